"""Pass, the registry, and the error: the whole framework."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..graph.errors import FoveateError
from ..graph.program import Program

SHAPES = {
    "fixed": "every count follows from the parameters",
    "split": "the total is fixed, the data split it over views, crops or stretches",
    "bound": "the data set the count; shapes hold the largest, the rest is filler that nothing attends to",
    "": "no token goes",
}
PASSES: dict[str, type[Pass]] = {}


class PassError(FoveateError):
    """A pass cannot be built or does not apply. Names the pass, what was found, what was possible."""


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. A frozen dataclass: its fields are its YAML and command-line parameters, `name` is its file name in kebab-case."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    place: ClassVar[str] = "graph"  # what it works on: vision (tower's output), tower (inside it), llm, cache, graph (anything else)
    shapes: ClassVar[str] = ""  # for what drops tokens: when the counts are known; see SHAPES
    may_be_idle: ClassVar[bool] = False  # changing nothing is a normal outcome (clean-ups), not a recipe that does nothing
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            return  # a base, not a pass
        known = PASSES.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PassError(f"{cls.name}: two passes of this name, in {known.__module__} and {cls.__module__}")
        PASSES[cls.name] = cls

    @abstractmethod
    def run(self, program: Program) -> bool:
        """Rewrite in place; True if anything changed. Not applicable is a PassError, nothing left to do is False."""

    def fail(self, found: str) -> PassError:
        return PassError(f"{self.name}: {found}")

    def parameters(self) -> dict[str, Any]:
        return asdict(self)


def discover() -> dict[str, type[Pass]]:
    """Import every method; returns name -> pass, those of plug-ins among them."""
    from . import methods

    for module in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(PASSES.items()))


def make(name: str, parameters: dict[str, Any] | None = None) -> Pass:
    """The pass of that name with these parameters; an unknown name or parameter is a PassError with the nearest known one."""
    known = discover()
    if name not in known:
        raise PassError(f"{name}: no such pass{did_you_mean(name, known)}; passes are {', '.join(known)}")
    allowed = [f.name for f in fields(known[name])]
    for key in parameters or {}:
        if key not in allowed:
            raise PassError(f"{name}: no parameter {key!r}{did_you_mean(key, allowed)}; parameters are {', '.join(allowed) or 'none'}")
    try:
        return TypeAdapter(known[name]).validate_python(parameters or {})
    except ValidationError as error:
        first = error.errors()[0]
        causes = "; or ".join(dict.fromkeys(e["msg"].lower() for e in error.errors() if e["loc"][:1] == first["loc"][:1]))
        raise PassError(f"{name}: parameter {first['loc'][0]}: {causes}, got {first.get('input')!r}") from None


def did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
