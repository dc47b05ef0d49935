"""The artifact: whole or absent, and never trusted without a look."""

import errno
import json
from pathlib import Path

import pytest

from foveate.export.artifact import MANIFEST, Artifact, Draft
from foveate.export.errors import LowerError


def fill(draft: Draft) -> None:
    draft.write("components/prefill.onnx", b"graph" * 100)
    draft.write("config.json", "{}")
    draft.manifest.update(target="ort", facts={}, kv=[], components={"prefill": {"file": "components/prefill.onnx"}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Artifact.create(tmp_path / "model") as draft:
        fill(draft)
    return tmp_path / "model"


def test_round_trip(folder):
    artifact = Artifact.load(folder)
    assert artifact.target == "ort"
    assert artifact.file("config.json").read_text() == "{}"
    assert artifact.manifest["files"]["components/prefill.onnx"]["bytes"] == 500
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]  # no temporary folder stays


def test_one_byte_changed(folder):
    path = folder / "components" / "prefill.onnx"
    content = bytearray(path.read_bytes())
    content[250] ^= 1
    path.write_bytes(content)
    with pytest.raises(LowerError, match=r"components/prefill\.onnx .* hash differs"):
        Artifact.load(folder)
    Artifact.load(folder, verify=False)  # the size is right, and hashes were not asked for


def test_truncated_file_is_found_without_hashing(folder):
    (folder / "components" / "prefill.onnx").write_bytes(b"x")
    with pytest.raises(LowerError, match="has 1 bytes, the manifest says 500"):
        Artifact.load(folder, verify=False)


def test_missing_file(folder):
    (folder / "config.json").unlink()
    with pytest.raises(LowerError, match=r"lacks the file config\.json"):
        Artifact.load(folder)


def test_other_format(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(LowerError, match="has format 99; this version reads format 1"):
        Artifact.load(folder)


def test_damaged_manifest(folder):
    (folder / MANIFEST).write_text('{"format": 1')
    with pytest.raises(LowerError, match="is damaged"):
        Artifact.load(folder)


def test_a_name_that_leaves_the_folder(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LowerError, match="outside of the folder"):
        Artifact.load(folder)


def test_not_an_artifact(tmp_path):
    (tmp_path / "readme").write_text("x")
    with pytest.raises(LowerError, match=r"no foveate artifact: it has no foveate\.json, only \['readme'\]"):
        Artifact.load(tmp_path)
    with pytest.raises(LowerError, match="is no folder"):
        Artifact.load(tmp_path / "nothing")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="stop"), Artifact.create(tmp_path / "model") as draft:
        fill(draft)
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self: Draft, name: str, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with (
        pytest.raises(LowerError, match=r"writing model failed: No space left on device .*nothing was left behind"),
        Artifact.create(tmp_path / "model") as draft,
    ):
        fill(draft)
        monkeypatch.setattr(Draft, "write", full)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_by_accident(folder, tmp_path):
    with pytest.raises(LowerError, match="exists; choose another output"), Artifact.create(folder):
        pytest.fail("the block ran")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(LowerError, match="no foveate artifact; it is not overwritten"), Artifact.create(foreign, overwrite=True):
        pytest.fail("the block ran")
    assert (foreign / "thesis.tex").exists()


def test_overwriting_keeps_the_old_one_until_the_new_one_is_whole(folder):
    with pytest.raises(ValueError), Artifact.create(folder, overwrite=True) as draft:
        fill(draft)
        raise ValueError
    assert Artifact.load(folder).target == "ort"
    with Artifact.create(folder, overwrite=True) as draft:
        fill(draft)
        draft.manifest["target"] = "eager"
    assert Artifact.load(folder).target == "eager"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_the_manifest_must_be_complete(tmp_path):
    with pytest.raises(LowerError, match=r"lacks \['components'\]"), Artifact.create(tmp_path / "model") as draft:
        fill(draft)
        del draft.manifest["components"]
    assert list(tmp_path.iterdir()) == []
