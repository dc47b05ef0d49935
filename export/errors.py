"""The error of this folder: a program cannot be lowered, or an artifact is not what it says."""

from ..graph.errors import FoveateError


class LowerError(FoveateError):
    """A target cannot take a program, or an artifact cannot be written or trusted."""


class CacheFullError(LowerError):
    """decode was asked for one more row than the engine's caches can have. The cache is as it was; a generation ends here with what it has."""
