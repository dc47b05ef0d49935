"""The folder that `foveate optimize` leaves: written whole or not at all, verified when loaded. JSON, ONNX, safetensors, npz: nothing
that can run code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import LowerError

FORMAT = 1
MANIFEST = "foveate.json"
REQUIRED = ("target", "facts", "kv", "components", "files")
CHUNK = 1 << 20  # bytes read at a time while hashing


@dataclass
class Artifact:
    """A loaded artifact: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, verify: bool = True) -> Artifact:
        """Read and check a folder: sizes always, hashes unless `verify` is False. Every defect is a LowerError that names the file."""
        path = Path(path)
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            _check_file(path, name, entry, verify)
        return cls(path, manifest)

    @staticmethod
    @contextmanager
    def create(path: str | Path, overwrite: bool = False) -> Iterator[Draft]:
        """A draft to write into; it becomes the folder `path` when the block ends, or disappears if the block raises.

        An existing folder is an error, unless `overwrite` is set and it is an artifact.
        """
        path = Path(os.path.abspath(path))
        _check_destination(path, overwrite)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        except OSError as cause:
            raise LowerError(f"artifact: cannot write in {path.parent}: {cause.strerror or cause}") from cause
        try:
            draft = Draft(folder)
            yield draft
            draft._finish()
            folder.chmod(0o755)
            _move(folder, path)
        except OSError as cause:
            where = f" ({cause.filename})" if cause.filename else ""
            raise LowerError(f"artifact: writing {path.name} failed: {cause.strerror or cause}{where}; nothing was left behind") from cause
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def file(self, name: str) -> Path:
        """The path of a file of the manifest."""
        if name not in self.manifest["files"]:
            raise LowerError(f"artifact: {self.path.name} has no file {name!r}; it has {sorted(self.manifest['files'])}")
        return self.path / name

    def component(self, stage: str) -> dict[str, Any]:
        """What the manifest says of one stage."""
        components = self.manifest["components"]
        if stage not in components:
            raise LowerError(f"artifact: {self.path.name} has no stage {stage!r}; it has {sorted(components)}")
        return components[stage]

    @property
    def target(self) -> str:
        return self.manifest["target"]


@dataclass
class Draft:
    """An artifact in the making: put files under `folder`, facts into `manifest`; sizes and hashes are added at the end."""

    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, content: str | bytes) -> None:
        """One file by its path in the artifact."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def _finish(self) -> None:
        self.manifest["format"] = FORMAT
        self.manifest["files"] = {
            p.relative_to(self.folder).as_posix(): {"sha256": _sha256(p), "bytes": p.stat().st_size}
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and p.name != MANIFEST
        }
        missing = [key for key in REQUIRED if key not in self.manifest]
        if missing:
            raise LowerError(f"artifact: the manifest lacks {missing}")
        self.write(MANIFEST, json.dumps(self.manifest, indent=1, allow_nan=False) + "\n")


def _check_destination(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise LowerError(f"artifact: {path} exists; choose another output or allow it to be overwritten")
    if not (path / MANIFEST).is_file():
        raise LowerError(f"artifact: {path} exists and is no foveate artifact; it is not overwritten")


def _move(folder: Path, path: Path) -> None:
    """Put `folder` in the place of `path`; an old artifact stays until the new one is there."""
    if path.exists() and any(path.iterdir()):
        old = folder.with_suffix(".old")
        os.replace(path, old)
        try:
            os.replace(folder, path)
        except OSError:
            os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise LowerError(f"artifact: {path} is no folder")
    if not (path / MANIFEST).is_file():
        found = sorted(p.name for p in path.iterdir())[:8]
        raise LowerError(f"artifact: {path} is no foveate artifact: it has no {MANIFEST}, only {found}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as cause:
        raise LowerError(f"artifact: {path / MANIFEST} is damaged: {cause}") from cause
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise LowerError(f"artifact: {path} has format {found!r}; this version reads format {FORMAT}: optimize the model again")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise LowerError(f"artifact: {path / MANIFEST} is damaged: it lacks {missing}")
    return manifest


def _check_file(folder: Path, name: str, entry: dict[str, Any], verify: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise LowerError(f"artifact: the manifest of {folder} names a file outside of the folder: {name!r}")
    path = folder / name
    if not path.is_file():
        raise LowerError(f"artifact: {folder} lacks the file {name}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise LowerError(f"artifact: {name} in {folder} has {size} bytes, the manifest says {entry['bytes']}: the file is damaged")
    if verify and _sha256(path) != entry["sha256"]:
        raise LowerError(f"artifact: {name} in {folder} does not have the content that was written (its hash differs): the file is damaged")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
