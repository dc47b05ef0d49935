"""What a stage's time is made of: the projector's share of the encoder, and the share of what passes added (scores, top-k, gathers).

Measured by ONNX Runtime's own profile of the kernels of a stage (the profile charges every operation 1 to 2 us of its own, so small
operations look a little dearer than they are). Operations are told apart by the module path in their names: `foveate.<pass>` is what a pass
added, a name like PROJECTOR is the projector's. Shares are of the profiled kernel time; callers apply them to times measured without a
profile. Other backends keep no such names at run time: None.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ADDED = re.compile(r"^foveate\.([^/]+)/")
PROJECTOR = re.compile(r"projector|connector|merger|aligner|adapter|resampler|embed_vision")
ROUNDS = 5


@dataclass(frozen=True)
class Shares:
    """Of one stage, each in [0, 1]: medians over rounds."""

    projector: float
    added: Mapping[str, float]  # pass -> share

    @property
    def selection(self) -> float:
        return sum(self.added.values())


def shares(session: Any, run: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Shares] | None:
    """stage -> shares of a request's vision and prefill; `run` makes one request. None where the backend cannot say."""
    sessions = getattr(session.engine, "sessions", None)
    if not isinstance(sessions, dict) or not all(hasattr(s, "end_profiling") for s in sessions.values()):
        return None
    with tempfile.TemporaryDirectory(prefix="foveate-profile-") as folder, _profiled(session, sessions, Path(folder)) as profiled:
        for _ in range(rounds + 1):
            run()
        events = {stage: json.loads(Path(s.end_profiling()).read_text(encoding="utf-8")) for stage, s in profiled.items()}
    return {stage: found for stage, e in events.items() if (found := of_events(e)) is not None}


@contextmanager
def _profiled(session: Any, sessions: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The engine with sessions of vision and prefill that keep a profile; as before afterwards."""
    plain = {stage: sessions[stage] for stage in ("vision", "prefill") if stage in sessions}
    made = {}
    try:
        for stage, old in plain.items():
            options = old.get_session_options()
            options.enable_profiling, options.profile_file_prefix = True, str(folder / stage)
            file = session.path / session.manifest["components"][stage]["file"]
            made[stage] = sessions[stage] = type(old)(str(file), options, providers=old.get_providers())
            options.enable_profiling = False
        yield made
    finally:
        sessions.update(plain)


def of_events(events: list[dict[str, Any]]) -> Shares | None:
    """The events of one session's profile; the first round warms up. None: the stage did not run."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    runs = [e["ts"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run"]
    rounds: list[dict[str, float]] = [defaultdict(float) for _ in runs]
    starts = np.sort(np.array(runs, float))
    for event in kernels:
        at = int(np.searchsorted(starts, event["ts"], side="right")) - 1
        if at >= 0:
            rounds[at][_kind(event["name"])] += event["dur"]
            rounds[at]["all"] += event["dur"]
    rounds = [r for r in rounds[1:] if r["all"] > 0]
    if not rounds:
        return None
    median = {kind: float(np.median([r[kind] / r["all"] for r in rounds])) for kind in {k for r in rounds for k in r}}
    added = {k.removeprefix("+"): v for k, v in sorted(median.items()) if k.startswith("+")}
    return Shares(median.get("projector", 0.0), added)


def _kind(name: str) -> str:
    if found := ADDED.match(name):
        return f"+{found[1]}"
    path = name.rpartition("/")[0]
    return "projector" if PROJECTOR.search(path) else "rest"
