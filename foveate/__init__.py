"""Foveate: a compiler for vision-language models that look at full resolution only where it matters.

    model = foveate.optimize_model("path/or/hub-id", recipe="fastv-64", target="ort", output="out")
    print(model.report)
    print(model.generate("picture.png", "<image> what is this?").text)

    session = foveate.load("out")                       # later, elsewhere: no modelling code, no recipe
    policy = foveate.CoarseToFine([cheap, fine])        # a session that decides per request which of its artifacts answers

Errors, all with one clear sentence:

    FoveateError
    ├── GraphError      a model cannot be captured, or a program breaks an invariant
    ├── PassError       a pass or a recipe is unknown, wrong, or does not apply
    ├── LowerError      a program cannot be lowered, or an artifact is damaged
    ├── RunError        a request cannot be served: picture, prompt, option, machine
    ├── GateError       a verdict cannot be reached: items that do not match, an impossible demand
    └── DistillError    a program cannot be trained: nothing to train, data that does not fit, numbers that are not finite

Names are looked up when they are used (PEP 562), so `import foveate` is instant and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import OptimizedModel, forecast, optimize_model
    from .distill_error import DistillError
    from .distillation import distill
    from .export.errors import LowerError
    from .graph.errors import FoveateError, GraphError
    from .passes.base import PassError
    from .plugins import load_plugin
    from .report import Report
    from .runtime.errors import GateError, RunError
    from .runtime.policies import CoarseToFine, DensityBudget, load_policy
    from .runtime.result import Generation
    from .runtime.session import Session, load

__version__ = "0.1.0"

_HOME = {
    "CoarseToFine": ".runtime.policies",
    "DensityBudget": ".runtime.policies",
    "DistillError": ".distill_error",
    "FoveateError": ".graph.errors",
    "GateError": ".runtime.errors",
    "Generation": ".runtime.result",
    "GraphError": ".graph.errors",
    "LowerError": ".export.errors",
    "OptimizedModel": ".api",
    "PassError": ".passes.base",
    "Report": ".report",
    "RunError": ".runtime.errors",
    "Session": ".runtime.session",
    "distill": ".distillation",
    "forecast": ".api",
    "load": ".runtime.session",
    "load_plugin": ".plugins",
    "load_policy": ".runtime.policies",
    "optimize_model": ".api",
}

__all__ = [
    "CoarseToFine",
    "DensityBudget",
    "DistillError",
    "FoveateError",
    "GateError",
    "Generation",
    "GraphError",
    "LowerError",
    "OptimizedModel",
    "PassError",
    "Report",
    "RunError",
    "Session",
    "distill",
    "forecast",
    "load",
    "load_plugin",
    "load_policy",
    "optimize_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"foveate has no {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
