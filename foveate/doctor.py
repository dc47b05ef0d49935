"""What this machine has, and what each target can do on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

from .api import versions

TESTED = {"torch": ("2.11", "2.14"), "transformers": ("5.17", "5.25")}  # first version that is known to work, first that is not known to


def diagnose() -> dict[str, Any]:
    """Versions, providers, GPUs, targets with the reason why not, warnings. JSON-able."""
    import psutil

    found = versions()
    return {
        "versions": found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "providers": _providers(),
        "gpus": _gpus(),
        "targets": _targets(),
        "warnings": _warnings(found),
    }


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _gpus() -> list[str]:
    """Names from torch, else from the driver's tool (a GPU that torch cannot use is still worth naming)."""
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{g.name} (compute capability {g.major}.{g.minor}, {g.total_memory / 1e9:.0f} GB)" for g in gpus]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return [f"{line} (this torch cannot use it)" for line in listed.stdout.splitlines() if line] if listed.returncode == 0 else []


def _targets() -> list[dict[str, Any]]:
    from .export.backends.base import backends

    return [{"name": name, "problem": cls().available(), "options": sorted(cls.options)} for name, cls in sorted(backends().items())]


def _warnings(found: dict[str, str]) -> list[str]:
    out = []
    for name, (first, beyond) in TESTED.items():
        if name not in found:
            out.append(f"{name} is not installed")
        elif not _number(first) <= _number(found[name]) < _number(beyond):
            out.append(f"{name} {found[name]} is outside of the tested range {first} .. {beyond} (exclusive)")
    return out


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
