"""Golden files: an artifact repeats them, a damaged one does not, and it is said where."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import tiny_llava

from foveate.api import build, make_plan
from foveate.cli import execute
from foveate.export.artifact import Artifact, _sha256
from foveate.export.backends.base import find
from foveate.runtime import golden
from foveate.runtime.errors import RunError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Artifacts of one captured plan: ort, eager, half, and bare (without golden files)."""
    folder = tmp_path_factory.mktemp("golden")
    plan = make_plan(str(tiny_llava()), "drop-fastv{layer=1,keep=6}", backend=None, settings={}, progress=lambda stage, line: None)
    for name, target, options in (("ort", "ort", {}), ("eager", "eager", {}), ("half", "eager", {"precision": "float16"}), ("bare", "eager", {})):
        backend = find(target)
        build(plan, folder / name, backend, backend.settings(options), golden=name != "bare")
    return folder


def run(capsys, *arguments):
    code = execute([str(a) for a in arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize(("name", "limit"), [("ort", 1e-3), ("eager", 1e-3), ("half", 5e-2)])
def test_a_fresh_artifact_repeats_itself(made, capsys, name, limit):
    code, said = run(capsys, "check", made / name, "--json")
    found = json.loads(said.out)
    assert code == 0 and found["ok"]
    outputs = {(x["stage"], x["output"]) for x in found["lines"]}
    assert {("vision", "image_features"), ("prefill", "logits"), ("prefill", "kv_lengths"), ("decode", "logits")} <= outputs
    assert any(o.startswith("kept.") for _, o in outputs)
    assert {x["limit"] for x in found["lines"] if not x["output"].startswith("kept.")} == {limit}
    assert found["worst"]["difference"] < limit / 3, "the limit leaves room"
    assert sum(p.stat().st_size for p in (made / name / "golden").iterdir()) < 100_000


def test_in_words(made, capsys):
    code, said = run(capsys, "check", made / "ort")
    assert code == 0 and "ok     decode   logits" in said.out and "the largest difference is" in said.out


def spoil(folder, change):
    """Weights changed behind the artifact's back, its manifest made to agree."""
    path = folder / "components" / "weights.bin"
    data = np.fromfile(path, np.float32)
    path.write_bytes(change(data).tobytes())
    manifest = json.loads((folder / "foveate.json").read_text())
    manifest["files"]["components/weights.bin"]["sha256"] = _sha256(path)
    (folder / "foveate.json").write_text(json.dumps(manifest))


def test_other_numbers_are_found_and_named(made, tmp_path, capsys):
    copy = shutil.copytree(made / "ort", tmp_path / "copy")
    spoil(copy, lambda w: w * np.float32(1.01))
    code, said = run(capsys, "check", copy)
    assert code == 1 and "DIFFER vision" in said.out and "it does not give what it gave when it was made" in said.out
    assert run(capsys, "check", copy, "--limit", 0.99)[0] == 0
    assert run(capsys, "check", copy, "--limit", 2)[0] == 2


def test_without_golden_files(made, capsys):
    assert not (made / "bare" / "golden").exists()
    code, said = run(capsys, "check", made / "bare")
    assert code == 2 and "has no golden files" in said.err


def test_a_damaged_file_is_named(made, tmp_path):
    copy = shutil.copytree(made / "eager", tmp_path / "copy")
    (copy / "golden" / "decode.npz").write_bytes(b"no")
    loaded = Artifact(copy, json.loads((copy / "foveate.json").read_text()))
    with pytest.raises(RunError, match=r"decode\.npz cannot be read"):
        golden.check(find("eager").open(loaded), copy, loaded.manifest)


def test_numbers_that_are_none_are_not_golden():
    class Engine:
        def prefill(self, feeds, capacity):
            return {"logits": np.full((1, 4), np.nan, np.float32)}, None

        def decode(self, cache, ids, positions):
            return np.zeros((1, 4), np.float32)

    feeds = {"input_ids": np.ones((1, 3), int), "attention_mask": np.ones((1, 3), int), "position_ids": np.zeros((1, 3), int)}
    with pytest.raises(RunError, match="prefill gives NaN or infinity on its own example"):
        golden.record(Engine(), None, feeds, [1, 2])


def test_other_kept_tokens_are_a_difference_in_float32_and_a_remark_in_half():
    file = {"out.kept.a": np.array([[1, 2, 3, 4]]), "out.logits": np.ones((1, 2))}
    now = {"kept.a": np.array([[1, 2, 3, 5]]), "logits": np.zeros((1, 2))}
    wide = golden._compare("prefill", file, now, 1e-3)
    half = golden._compare("prefill", file, now, 5e-2)
    assert [x.difference for x in wide] == [0.25, 1.0] and not any(x.ok for x in wide)
    assert half[0].difference == 0.25 and not half[0].ok and half[1].difference is None and half[1].ok


def test_long_outputs_are_kept_in_part():
    value = np.arange(3 * golden.MOST, dtype=np.float32).reshape(3, -1)
    file = golden._file({}, {"x": value})
    assert file["out.x"].size == golden.MOST and int(file["every.x"]) == 3
    assert golden._compare("vision", file, {"x": value}, 1e-3)[0].difference == 0
    assert golden._compare("vision", file, {"x": value + np.float32(1e4)}, 1e-3)[0].difference > 1e-3
