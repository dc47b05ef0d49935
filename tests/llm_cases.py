"""The methods inside the language model, found by discovery, and how tests build one with a single cut."""

from dataclasses import fields

from foveate.passes.base import discover, make
from foveate.passes.reduce import Reduce
from foveate.passes.vision_select import VisionReduce

METHODS = {n: p for n, p in discover().items() if issubclass(p, Reduce)}
AT_VISION = [n for n, p in discover().items() if issubclass(p, VisionReduce)]
BUDGETED = [n for n, p in METHODS.items() if {"keep", "keeps"} & {f.name for f in fields(p)}]


def build(name, keep, layer=1, **more):
    """The method with one cut and, where the data have a say, the settings under which they ask for everything."""
    if name in AT_VISION:
        return make(name, {"keep": keep})
    known = {f.name for f in fields(METHODS[name])}
    values = {"layer": layer, "layers": [layer], "keep": keep, "keeps": [keep]} | METHODS[name].everything | more
    return make(name, {k: v for k, v in values.items() if k in known})
