"""Policies: controllers over several artifacts of one model, which decide per request how much of the picture is read.

in:  opened artifacts (`Session`), cheapest first: the buckets
out: `policy.generate(...)` as a session has it, with the bucket that answered, how sure it was, and the cost of all runs

    policy.py          what all policies share: groups of a batch, one result;  buckets.py  prices and checks of the artifacts
    coarse_to_fine.py  the cheap bucket answers; where it is unsure, a finer one is asked, or the region it looked at is shown again
    density_budget.py  the bucket is chosen by how much there is to see, before the language model runs
    region.py          the most attended region of a picture;  density.py  figures of how much a picture holds
    calibrate.py       thresholds from unlabelled requests: least cost at an agreement with the full artifact, or the reverse
    saved.py           a policy as one YAML file beside its artifacts

A policy is a class on `Policy` with `name`, `decide` and `bucket_of`; its thresholds come from `calibrate`.
"""

from .buckets import Run
from .calibrate import Calibration
from .coarse_to_fine import CoarseToFine
from .density_budget import DensityBudget
from .policy import Answer, Policy
from .saved import load_policy, opened

__all__ = ["Answer", "Calibration", "CoarseToFine", "DensityBudget", "Policy", "Run", "load_policy", "opened"]
