"""The error of this folder: something is not true of a program that has to be."""


class FoveateError(Exception):
    """Base of the four: GraphError, PassError, LowerError, GateError. The message says who, what was found, what was possible."""


class GraphError(FoveateError):
    """A model cannot be captured, or a program breaks an invariant."""
