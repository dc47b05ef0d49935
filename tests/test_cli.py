"""The command line end to end on a tiny model: exit codes, JSON on stdout, everything else on stderr."""

import json

import pytest
from checkpoints import tiny_llava
from PIL import Image

from foveate.cli import execute


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact made by the command itself."""
    path = tmp_path_factory.mktemp("cli") / "artifact"
    assert execute(["optimize", str(tiny_llava()), "-o", str(path), "-r", "drop-fastv{layer=1,keep=8}, clean-up", "--set", "keep=4", "-q"]) == 0
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (48, 40), (200, 60, 10)).save(path)
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = execute([str(a) for a in arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_optimize_leaves_a_whole_artifact_with_its_recipe(artifact):
    names = {p.name for p in artifact.iterdir()}
    assert {"foveate.json", "config.json", "generation_config.json", "tokenizer.json", "recipe.yaml", "components", "reports"} <= names
    assert "keep: 4" in (artifact / "recipe.yaml").read_text(), "the override is in the recipe"
    manifest = json.loads((artifact / "foveate.json").read_text())
    assert [r["name"] for r in manifest["history"]] == ["drop-fastv", "clean-up"]
    assert {e["length"] for e in manifest["kv"]} == {"S", "-N + S + 4"}
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["artifact"]


def test_run_answers_and_draws(capsys, artifact, picture, tmp_path):
    code, out, err = run(capsys, "run", artifact, "-i", picture, "-p", "what is this ?", "--overlay", tmp_path / "o.png", "--max-new-tokens", 3)
    assert code == 0 and out.strip()
    assert "4 kept at layer1" in err and "16 visual tokens" in err
    assert Image.open(tmp_path / "o.png").format == "PNG"


def test_run_json_is_alone_on_stdout(capsys, artifact, picture):
    code, out, _ = run(capsys, "run", artifact, "-i", picture, "-p", "what is this ?", "--json", "--max-new-tokens", 3)
    result = json.loads(out)
    assert code == 0 and len(result["texts"]) == 1 and len(result["kept"]["kept.layer1"][0]) == 4
    assert result["timings"]["ttft_ms"] >= result["timings"]["prefill_ms"] > 0


def test_raw_and_chat_prompts_agree(capsys, artifact, picture):
    chat = json.loads(run(capsys, "run", artifact, "-i", picture, "-p", "what is this ?", "--json")[1])
    raw = json.loads(run(capsys, "run", artifact, "-i", picture, "-p", "<image> what is this ?", "--raw", "--json")[1])
    assert chat["tokens"] == raw["tokens"]


def test_sampling_options_reach_the_session(capsys, artifact, picture):
    tokens = [
        json.loads(run(capsys, "run", artifact, "-i", picture, "-p", "a ?", "--sample", "--temperature", 9, "--seed", s, "--json")[1])["tokens"]
        for s in (1, 1, 2)
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def test_inspect(capsys, artifact):
    code, out, _ = run(capsys, "inspect", artifact)
    assert code == 0 and "llava for ort, 3 layers" in out and "drop-fastv layer=1, keep=4" in out and "-N + S + 4 cached rows" in out
    assert json.loads(run(capsys, "inspect", artifact, "--json")[1])["target"] == "ort"


def test_bench_compares(capsys, artifact, picture):
    code, out, _ = run(capsys, "bench", artifact, "-b", artifact, "-i", picture, "--repeat", 2, "--warmup", 1, "--new-tokens", 3, "--json", "-q")
    result = json.loads(out)
    assert code == 0 and set(result["stages"]) == {"artifact", "baseline"} and result["speedup"]["prefill"] > 0


def test_dry_run_forecasts_and_writes_nothing(capsys, tmp_path):
    saved = tmp_path / "recipe.yaml"
    code, out, _ = run(
        capsys, "optimize", tiny_llava(), "-r", "drop-uniform{layer=2,keep=2}", "--dry-run", "--save-recipe", saved, "-o", tmp_path / "never", "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["artifact"] is None
    assert list(report["after"]["tokens"].values()) == [48, 48, 34]
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    from foveate.passes.recipe import load

    assert load(str(saved)).steps[0].rewrite.keep == 2


def test_passes_recipes_doctor(capsys):
    names = {p["name"] for p in json.loads(run(capsys, "passes", "--json")[1])}
    assert {"drop-fastv", "drop-random", "prune-vision-cls"} <= names
    assert "fastv-64" in {r["name"] for r in json.loads(run(capsys, "recipes", "--json")[1])}
    assert "keep: 64" in run(capsys, "recipes", "fastv-64")[1]
    found = json.loads(run(capsys, "doctor", "--json")[1])
    assert {"ort", "eager", "tensorrt-rtx"} <= {t["name"] for t in found["targets"]}
    assert found["versions"]["torch"] and "CPUExecutionProvider" in found["providers"]
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "targets" not in out and "ready" in out


def test_dump_after_a_pass(capsys):
    code, out, _ = run(capsys, "dump", tiny_llava(), "--after", "drop-uniform", "--set", "layer=1", "--stage", "prefill", "-q")
    assert code == 0 and "foveate.compact_tokens" in out and "foveate.attention" in out
