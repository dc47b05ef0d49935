"""A policy on disk: one YAML file beside the artifacts that it names, with their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ...export.artifact import MANIFEST
from .. import session
from ..errors import RunError
from .calibrate import Calibration
from .coarse_to_fine import CoarseToFine
from .density_budget import DensityBudget
from .policy import Policy

KINDS: dict[str, type[Policy]] = {c.name: c for c in (CoarseToFine, DensityBudget)}
FORMAT = 1


def save(policy: Policy, path: Path) -> Path:
    """Write by rename. Artifacts are named relative to the file."""
    if policy.thresholds is None:
        raise RunError(f"{policy.name}: it has no thresholds to be saved; find them with calibrate()")
    if lost := [b for b in policy.buckets if b.path is None]:
        raise RunError(f"{policy.name}: {len(lost)} of its artifacts were not opened from a folder, so a file cannot name them")
    folder = path.absolute().parent
    buckets = [{"artifact": os.path.relpath(b.path.absolute(), folder), "sha256": digest(b.path)} for b in policy.buckets]  # type: ignore[union-attr]
    record = {"foveate_policy": FORMAT, "policy": policy.name, **{n: getattr(policy, n) for n in policy.settings}, "thresholds": list(policy.thresholds),
              "buckets": buckets}
    if policy.calibration:
        record["calibration"] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(policy.calibration).items()}
    partial = path.with_name(f".{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"policy: {path} cannot be written: {error.strerror or error}") from None
    return path


def load_policy(path: str | Path, verify: bool = True) -> Policy:
    """Open a saved policy and its artifacts; their manifests must be those that it was calibrated with (and their files intact, with verify)."""
    path = Path(path)
    record = _read(path)
    kind, folder = KINDS[record["policy"]], path.absolute().parent
    places = [folder / str(b["artifact"]) for b in record["buckets"]]
    for place, bucket in zip(places, record["buckets"], strict=True):
        if not (place / MANIFEST).is_file():
            raise RunError(f"policy: {path} names the artifact {place}, and there is none; keep the file and its artifacts together")
        if digest(place) != bucket["sha256"]:
            raise RunError(f"policy: {place} is not the artifact that {path.name} was calibrated with (its hash differs); calibrate again")
    sessions: list[Any] = []
    try:
        for place in places:
            sessions.append(session.load(place, verify))
        policy = kind(sessions, record["thresholds"], **{n: record[n] for n in kind.settings})
    except Exception:
        for one in sessions:
            one.close()
        raise
    if "calibration" in record:
        policy.calibration = Calibration(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["calibration"].items()})
    return policy


def opened(path: str | Path, verify: bool = True) -> session.Session | Policy:
    """An artifact folder or a policy file, ready to `generate`."""
    return load_policy(path, verify) if Path(path).is_file() else session.load(path, verify)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"policy: {path} cannot be read: {(str(error).strip().splitlines() or ['?'])[0]}") from None
    if not isinstance(record, dict) or record.get("foveate_policy") != FORMAT:
        raise RunError(f"policy: {path} is no policy file of this version (it has no 'foveate_policy: {FORMAT}')")
    if record.get("policy") not in KINDS:
        raise RunError(f"policy: {path} is of kind {record.get('policy')!r}; there are {', '.join(KINDS)}")
    if missing := [n for n in (*KINDS[record["policy"]].settings, "thresholds", "buckets") if record.get(n) is None]:
        raise RunError(f"policy: {path} lacks {', '.join(missing)}; calibrate again")
    return record


def digest(artifact: Path) -> str:
    """Of the manifest, which holds the hashes of all the artifact's files."""
    return hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()


__all__ = ["KINDS", "load_policy", "opened", "save"]
