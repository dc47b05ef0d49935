"""The vision-side methods and the settings that tests run them with."""

from foveate.passes.base import discover
from foveate.passes.vision_select import VisionReduce

METHODS = [n for n, p in discover().items() if issubclass(p, VisionReduce)]
VARIANTS = {  # settings beyond the defaults that take another path; every method runs with its defaults too
    "merge-prumerge": [{"uniform": 0.75}, {"mode": "parity"}, {"mode": "parity", "uniform": 0.75}],
    "merge-visionzip": [{"contextual": 0.5}, {"mode": "parity"}],
    "prune-cdpruner": [{"relevance": "text"}, {"relevance": "text", "sign": -1, "mode": "parity"}],
    "prune-divprune": [{"mode": "parity"}],
    "prune-fopru": [{"by": "row"}],
    "prune-globalcom2": [{"rows": 1, "columns": 2}, {"rows": 1, "columns": 2, "mode": "parity"}],
    "prune-evs": [{"frames": 3}],
    "prune-hired": [{"rows": 1, "columns": 2}, {"rows": 1, "columns": 2, "mode": "parity"}],
    "prune-holov": [{"stretches": 4}, {"stretches": 4, "mode": "parity"}],
    "prune-vispruner": [{"important": 0.0}, {"step": 2}],
    "prune-vtc-cls": [{"start": 1}],
}
CASES = [(name, more) for name in METHODS for more in ({}, *VARIANTS.get(name, []))]
KEEP = 5
IN_TOWER = [
    ("merge-tome", {"r": 3}),
    ("merge-tome", {"r": 3, "mode": "parity", "proportional": False}),
    ("merge-tome", {"r": 2, "inflect": -1.0}),
    ("prune-elip", {"layers": (1, 2), "ahead": (2, 1), "keep": (0.7, 0.4)}),
    ("bypass-vision", {"layers": (1, 3), "keep": (0.5, 0.3)}),
    ("prune-objects", {}),
    ("prune-objects", {"layer": 2, "context": 0.0}),
    ("merge-must-drop", {"keep": 7}),
    ("merge-must-drop", {"keep": 9, "window": 2, "layer": 2, "mode": "parity"}),
]
