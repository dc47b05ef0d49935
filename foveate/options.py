"""What the commands share: options that mean the same everywhere, KEY=VALUE pairs, plugins, wrong usage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
Limit = Annotated[int | None, typer.Option("--limit", help="only the first items")]
Mapped = Annotated[str | None, typer.Option("--mapping", help="vqav2, textvqa, docvqa, chartqa, pope, mmmu, or a YAML file")]
Plugin = Annotated[list[Path] | None, typer.Option("--plugin", help="python file or folder that adds passes, families or targets")]


class Usage(Exception):
    """Wrong usage that typer cannot see: one sentence, exit code 2."""


def pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    """KEY=VALUE texts of `flag` as a mapping; a Usage error for any other text."""
    found = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise Usage(f"{flag} {text!r}: write it as KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def load_plugins(paths: list[Path] | None) -> None:
    """Those of the environment variable FOVEATE_PLUGINS, and these."""
    from .plugins import load_plugin

    for path in [*[Path(p) for p in os.environ.get("FOVEATE_PLUGINS", "").split(os.pathsep) if p], *(paths or [])]:
        load_plugin(path)
