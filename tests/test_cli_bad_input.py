"""Bad input: one clear sentence on stderr, the right exit code, nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import processor, tiny_llava
from PIL import Image

from foveate.cli import execute

ROOT = Path(__file__).resolve().parent.parent


def complaint(capsys, *arguments: object) -> tuple[int, str]:
    """(exit code, the one sentence): nothing on stdout, one line on stderr, no traceback"""
    code = execute([str(a) for a in arguments])
    done = capsys.readouterr()
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.out == ""
    assert lines and lines[-1].startswith("error: ") and "Traceback" not in done.err
    assert sum(line.startswith("error: ") for line in lines) == 1
    return code, lines[-1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "artifact"
    assert execute(["optimize", str(tiny_llava()), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture
def copy(artifact, tmp_path):
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40), (9, 99, 199)).save(tmp_path / "p.png")
    return tmp_path / "p.png"


@pytest.mark.parametrize(("arguments", "message"), [
    (["-r", "drop-fastw"], "no recipe or pass 'drop-fastw', did you mean 'drop-fastv'"),
    (["-r", "drop-fastv{layr=2}"], "drop-fastv: no parameter 'layr', did you mean 'layer'"),
    (["-r", "drop-fastv{keep=-3}"], "drop-fastv: parameter keep"),
    (["-r", "fastv-64", "--set", "kep=3"], "--set kep: fits no pass"),
    (["-r", "fastv-64", "--set", "keep"], "--set 'keep': write it as KEY=VALUE"),
    (["-r", "missing.yaml"], "no file missing.yaml"),
    (["-t", "orrt"], "no target 'orrt'; did you mean 'ort'"),
    (["--option", "thread=2"], "ort: no option 'thread'; did you mean 'threads'"),
    (["--dtype", "float8"], "dtype 'float8' is none of"),
    (["--plugin", "nowhere.py"], "plugin: no file nowhere.py"),
])
def test_usage_errors_before_anything_is_loaded(capsys, tmp_path, arguments, message):
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path / "out", "-q", *arguments)
    assert message in line
    assert code == 2 or "plugin" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("recipe", "message"), [
    ("drop-fastv{layer=7,keep=4}", "no layer 7"),
    ("drop-fastv{layer=1,keep=17}", "17"),
    ("drop-fastv{layer=0,keep=4}", "drop-fastv"),
])
def test_passes_that_do_not_fit_the_model(capsys, tmp_path, recipe, message):
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path / "out", "-r", recipe, "-q")
    assert code == 2 and message in line
    assert list(tmp_path.iterdir()) == []


def test_output_missing_taken_or_a_file(capsys, tmp_path):
    assert complaint(capsys, "optimize", tiny_llava()) == (2, "error: optimize: no output folder; give one with -o, or --dry-run for the forecast alone")
    (tmp_path / "thesis.tex").write_text("x")
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path, "-q")
    assert code == 2 and "exists and is not empty" in line
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path / "thesis.tex", "-q")
    assert code == 2 and "is a file; give a folder" in line
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_models_that_cannot_be_taken(capsys, tmp_path):
    import transformers as T

    out = tmp_path / "out"
    code, line = complaint(capsys, "optimize", tmp_path / "nothing", "-o", out, "-q")
    assert code == 3 and "is not a model folder" in line

    T.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9).save_pretrained(tmp_path / "text")
    code, line = complaint(capsys, "optimize", tmp_path / "text", "-o", out, "-q")
    assert code == 3 and "not a vision-language model" in line and "llama" in line

    shutil.copytree(tiny_llava(), tmp_path / "blind")
    for file in (tmp_path / "blind").glob("*processor*"):
        file.unlink()
    code, line = complaint(capsys, "optimize", tmp_path / "blind", "-o", out, "-q")
    assert code == 3 and "processor" in line

    T.GitConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2).save_pretrained(tmp_path / "git")
    processor().save_pretrained(tmp_path / "git")
    code, line = complaint(capsys, "optimize", tmp_path / "git", "--dry-run", "-q")
    assert code == 3 and "no family for model type 'git'; families: " in line
    assert not out.exists()


def test_questions_that_cannot_be_asked(capsys, artifact, picture, tmp_path):
    code, line = complaint(capsys, "run", artifact, "-i", picture, "-p", "what is this ?", "--raw", "-q")
    assert code == 2 and "no image placeholder" in line
    code, line = complaint(capsys, "run", artifact, "-p", "<image> what is this ?", "--raw", "-q")
    assert code == 2 and "image" in line
    (tmp_path / "no.npy").write_text("no array")
    code, line = complaint(capsys, "run", artifact, "-i", picture, "-p", "a", "--extra", f"text={tmp_path / 'no.npy'}", "-q")
    assert code == 2 and "--extra text" in line and "cannot be read as a .npy array" in line
    code, line = complaint(capsys, "run", artifact, "-i", picture, "-p", "a", "--extra", "text", "-q")
    assert code == 2 and "write it as KEY=VALUE" in line
    code, line = complaint(capsys, "run", artifact, "-i", tmp_path / "none.png", "-p", "a", "-q")
    assert code == 2 and "no file" in line
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    code, line = complaint(capsys, "run", artifact, "-i", tmp_path / "deep.png", "-p", "a", "-q")
    assert code == 2 and "mode 'I;16' cannot be taken" in line
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:50])
    code, line = complaint(capsys, "run", artifact, "-i", tmp_path / "torn.png", "-p", "a", "-q")
    assert code == 2 and "cannot be read as a picture" in line


def test_an_artifact_with_one_byte_changed(capsys, copy, picture):
    weights = max((f for f in (copy / "components").iterdir()), key=lambda f: f.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for command in (["run", copy, "-p", "a", "-i", picture, "-q"], ["inspect", copy], ["bench", copy, "-q"]):
        code, line = complaint(capsys, *command)
        assert code == 3 and weights.name in line and "hash differs" in line


def test_no_artifact_at_all(capsys, tmp_path):
    for command in (["run", tmp_path, "-p", "a", "-q"], ["inspect", tmp_path], ["bench", tmp_path, "-q"]):
        code, line = complaint(capsys, *command)
        assert code == 3 and "no foveate artifact" in line


def test_an_engine_for_another_gpu(capsys, copy, picture):
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx wheel (extra rtx)")
    manifest = json.loads((copy / "foveate.json").read_text())
    manifest["target"] = "tensorrt-rtx"
    for component in manifest["components"].values():
        component.update(compute_capability="8.9", version="1.7.1", precision="float16", profile={})
    (copy / "foveate.json").write_text(json.dumps(manifest))
    code, line = complaint(capsys, "run", copy, "-i", picture, "-p", "a", "-q")
    assert code == 3 and "8.9" in line and "GPU" in line


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """A real one: the process may not write files of more than 20 kB, so the weights do not fit."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run([sys.executable, "-m", "foveate.cli", "optimize", str(tiny_llava()), "-o", str(tmp_path / "out"), "-q"], cwd=ROOT,
                          capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1 and "nothing was left behind" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_of_the_parser(capsys):
    assert execute(["optimise"]) == 2
    assert execute(["run"]) == 2
    assert "No such command 'optimise'" in capsys.readouterr().err


def test_an_interrupt(capsys, monkeypatch, tmp_path):
    import foveate.api

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(foveate.api, "make_plan", stop)
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path / "out", "-q")
    assert code == 130 and "interrupted" in line
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_is_never_a_success(capsys, monkeypatch, tmp_path):
    import foveate.api

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(foveate.api, "make_plan", broken)
    code, line = complaint(capsys, "optimize", tiny_llava(), "-o", tmp_path / "out", "-q")
    assert code == 5 and "unexpected ZeroDivisionError: a bug" in line
