"""What a backend is, and how the backends are found."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import LowerError

if TYPE_CHECKING:
    from ...graph.program import Program
    from ..artifact import Artifact

Arrays = dict[str, np.ndarray]

_FOUND: dict[str, type[Backend]] = {}


class Backend(ABC):
    """One target. A subclass with a `name` is registered as soon as its file is imported.

    fuses: names of the dialect ops that the target has its own spelling for; every other op reaches it as its reference body.
    options: name -> default of what the user may set; anything else is refused by name.
    """

    name: ClassVar[str] = ""
    fuses: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name:
            _FOUND[cls.name] = cls

    def available(self) -> str | None:
        """Why this machine cannot build for or run the target; None if it can."""
        return None

    def check(self, program: Program, options: Mapping[str, Any]) -> list[str]:
        """Limits that are known before anything is built: one sentence each, empty if the program can be lowered."""
        return []

    def scratch(self, program: Program, options: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """At most so many bytes does a decode step need beside the cache, for one sample whose prompt has these sizes (symbols of `Partition.rows`)."""
        return 0

    @abstractmethod
    def lower(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Write the components under `folder` (an artifact in the making); returns the manifest's `components`: stage -> {file,
        inputs, outputs, ...}."""

    @abstractmethod
    def open(self, artifact: Artifact) -> Engine:
        """Load the components of an artifact of this target."""

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options with their defaults; an unknown one is a LowerError."""
        for key in given:
            if key not in self.options:
                near = difflib.get_close_matches(key, self.options, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(self.options)}"
                raise LowerError(f"{self.name}: no option {key!r}{hint}")
        return {**self.options, **given}


class Cache(ABC):
    """The keys and values of one batch, on the backend's side."""

    lengths: np.ndarray  # [cached layers, B]: valid rows

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by the buffers."""

    @property
    def held(self) -> int:
        """Rows of the fullest layer and sample, over all its partitions."""
        parts = getattr(self, "parts", None) or {"lengths": self.lengths}
        return int(sum(parts.values(), np.zeros_like(self.lengths)).max(initial=0))

    def clip_rate(self) -> float | None:
        """Of the numbers appended since the prefill, the share that the prompt's range could not hold; None where no range is fixed."""
        return None

    def take(self, samples: np.ndarray) -> Cache:
        """A cache of these samples, any of them several times: parallel answers to one prompt. Continuing one does not touch the other."""
        raise LowerError(f"cache: a {type(self).__name__} cannot be copied; this target answers a prompt once per prefill")


class Engine(ABC):
    """The loaded stages of an artifact. Arrays by contract name in and out.

    limit: rows that a layer's cache can have at most, where that is fixed; `decode` beyond it is a CacheFullError.
    """

    limit: int | None = None

    @abstractmethod
    def vision(self, feeds: Arrays) -> Arrays: ...

    @abstractmethod
    def prefill(self, feeds: Arrays, capacity: int) -> tuple[Arrays, Cache]:
        """The outputs except keys and values (logits[B, V], kv_lengths, kept.*), and a cache.

        capacity: rows that a layer without reduction will need in all, prompt and answer; a hint, caches grow. Padding is on the right.
        """

    @abstractmethod
    def decode(self, cache: Cache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """One token per row: input_ids[B, 1] -> logits[B, V]; the cache grows by one row in place."""

    def close(self) -> None:  # noqa: B027  (most engines hold nothing that outlives them)
        """Free what the engine holds."""


def backends() -> dict[str, type[Backend]]:
    """Every backend by name: the files of this folder, and those given to `foveate.load_plugin`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "base" and not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return dict(_FOUND)


def find(name: str) -> Backend:
    """The backend of this name."""
    known = backends()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise LowerError(f"backends: no target {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"))
    return known[name]()
