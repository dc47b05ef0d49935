"""The targets, one file each: a class with a `name`, found by its file.

Add one: a file here (or anywhere, through `foveate.load_plugin`) with a subclass of `Backend`: `lower` writes components into a folder and
describes them,
`open` turns an artifact into an `Engine`. Nothing here imports torch until it lowers.
"""

from .base import Backend, Cache, Engine, backends, find

__all__ = ["Backend", "Cache", "Engine", "backends", "find"]
