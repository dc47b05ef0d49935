"""A program as a session, in plain torch and nothing written: where its weights are, in their type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .export.backends.eager import EagerEngine
from .graph.program import Program
from .runtime.session import Session


def in_memory(program: Program, processor: Any, generation: Mapping[str, Any] | None = None) -> Session:
    """The runtime speaks numpy, which has no bfloat16: it hands over float32."""
    engine = EagerEngine.of(program)
    sides = {
        stage: {side: [{**x, "dtype": "float32" if x["dtype"] == "bfloat16" else x["dtype"]} for x in values] for side, values in part.items()}
        for stage, part in engine.parts.items()
    }
    return Session(engine, processor, {"target": "eager", "facts": vars(program.facts), "components": sides, "kv": []}, generation)
