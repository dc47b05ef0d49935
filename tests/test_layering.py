"""Imports point one way; this file is the diagram."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"graph": {"graph"}, "passes": {"graph", "passes"}, "export": {"graph", "export"}, "runtime": {"export", "runtime"}}
ALLOWED = {"runtime": {"graph.errors", "export.artifact", "export.backends", "export.errors"}}  # runtime sees the artifact, not the program


def imports(folder: str) -> list[tuple[str, str]]:
    """(file:line, dotted target below the root) of every import that leaves its own folder."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        depth = len(file.relative_to(ROOT).parts) - 1  # dots that stay inside the folder
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                names = [node.module] if node.module else [a.name for a in node.names]
                found += [(f"{file.relative_to(ROOT)}:{node.lineno}", n) for n in names]
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    for where, target in imports(folder):
        allowed = target.split(".")[0] in MAY_IMPORT[folder] or target == "graph.errors"
        assert allowed, f"{where} imports {target}"
        if folder in ALLOWED:
            assert any(target == a or target.startswith(a + ".") for a in ALLOWED[folder]), f"{where} imports {target}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_absolute_import_of_ourselves(folder):
    """It would import a second copy of every module when the folder is used under its own name."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            assert not any(n.split(".")[0] in ("foveate", *MAY_IMPORT) for n in names), f"{file.relative_to(ROOT)}:{node.lineno} imports {names}"


@pytest.mark.parametrize(("package", "allowed"), [("tensorrt", {"export/backends"}), ("tensorrt_rtx", {"export/backends"}), ("onnxruntime", {"export"})])
def test_heavy_packages_stay_in_their_place(package, allowed):
    for folder in MAY_IMPORT:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
                if any(n.split(".")[0] == package for n in names):
                    relative = file.relative_to(ROOT).as_posix()
                    assert any(relative.startswith(a) for a in allowed), f"{relative}:{node.lineno} imports {package}"


@pytest.mark.parametrize("module", ["foveate", "foveate.cli", "foveate.runtime.session", "foveate.export.artifact", "foveate.export.backends.base"])
def test_imports_without_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
