"""The error of this folder: a request cannot be served, or a verdict cannot be reached."""

from ..graph.errors import FoveateError


class RunError(FoveateError):
    """An artifact cannot be run as asked: picture, prompt, option or machine. The message says what was found and what is possible."""


class NumberError(RunError):
    """A model that answers with NaN or infinity."""

    exit_code = 3


class GateError(FoveateError):
    """A verdict cannot be reached: items that do not match, a score that is no number, an impossible demand."""

    exit_code = 2


class DataError(RunError):
    """A data set that cannot be read; the message names the file and, where there is one, the line."""

    exit_code = 2
