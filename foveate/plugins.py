"""One new file adds a method, a family or a backend: from the package's folders, or from anywhere with `load_plugin`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .graph.errors import FoveateError

_LOADED: dict[Path, dict[str, list[str]]] = {}  # file -> what it added; a second call for the same file finds it here


def load_plugin(path: str | Path) -> dict[str, list[str]]:
    """Import a python file, or every python file of a folder; returns what it added: {"passes": [...], "families": [...], "targets": [...]}.

    The file is imported as a sibling of the shipped methods, so `from ..select import Select` works as at home; absolute imports of
    `foveate.graph.families.base` and `foveate.export.backends.base` do too. A file that adds nothing is a FoveateError.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.py"))
        added = [load_plugin(f) for f in files]
        if not added:
            raise FoveateError(f"plugin: folder {path} has no python file")
        return {kind: [n for a in added for n in a[kind]] for kind in added[0]}
    if not path.is_file():
        raise FoveateError(f"plugin: no file {path}")
    if (known := _LOADED.get(path.resolve())) is not None:
        return known
    before = _known()
    _import(path)
    added = {kind: sorted(names - before[kind]) for kind, names in _known().items()}
    if not any(added.values()):
        raise FoveateError(
            f"plugin: {path.name} added nothing; it needs a Pass with a name, a Family with @register, or a Backend with a name"
        )
    _LOADED[path.resolve()] = added
    return added


def _known() -> dict[str, set[str]]:
    from .export.backends.base import backends
    from .graph.families.base import REGISTRY
    from .passes.base import discover

    return {"passes": set(discover()), "families": set(REGISTRY), "targets": set(backends())}


def _import(path: Path) -> None:
    from .passes import methods

    name = f"{methods.__name__}.{path.stem}"
    if name in sys.modules:
        raise FoveateError(f"plugin: {path} has the name of a module that is loaded already ({path.stem}); give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FoveateError(f"plugin: {path} is not a python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FoveateError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise FoveateError(f"plugin: {path} does not import: {type(error).__name__}: {error}") from error
