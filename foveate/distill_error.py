"""The error of distillation."""

from .graph.errors import FoveateError


class DistillError(FoveateError):
    """A program cannot be trained: nothing to train, data that does not fit, numbers that are not finite."""
