"""The public surface, pinned: adding or removing a name is a decision, not an accident."""

import inspect

import pytest

import foveate

PUBLIC = [
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


def test_names():
    assert foveate.__all__ == sorted(PUBLIC)
    assert dir(foveate) == sorted([*PUBLIC, "__version__"])
    for name in PUBLIC:
        assert getattr(foveate, name).__doc__, f"{name} has no docstring"


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="foveate has no 'optimise'; it has"):
        foveate.optimise  # noqa: B018


def test_the_error_tree():
    for name in ("GraphError", "PassError", "LowerError", "RunError", "GateError", "DistillError"):
        assert getattr(foveate, name).__bases__ == (foveate.FoveateError,)


def test_signatures():
    optimize = list(inspect.signature(foveate.optimize_model).parameters)
    shared = ["dtype", "overrides", "processor", "images", "text_tokens", "overwrite", "golden", "progress", "options"]
    assert optimize == ["model", "recipe", "target", "output", "weights", *shared]
    generate = list(inspect.signature(foveate.Session.generate).parameters)
    assert generate == ["self", "images", "prompt", "messages", "max_new_tokens", "streamer", "seed", "extra", "max_cache_tokens",
                        "num_return_sequences", "options"]
    assert [list(inspect.signature(f).parameters) for f in (foveate.load, foveate.load_policy)] == [["path", "verify"]] * 2
    for policy in (foveate.CoarseToFine, foveate.DensityBudget):
        assert list(inspect.signature(policy.generate).parameters) == generate, "a policy is asked as a session is"
