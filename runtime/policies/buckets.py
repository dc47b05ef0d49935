"""The artifacts of a policy: what a run costs, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..session import Session

SAME_MODEL = ("model_type", "layers", "image_token_id", "eos_token_ids", "features")  # facts that artifacts of one model have in common
SAME_FILES = ("config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Run:
    """One request through one bucket."""

    bucket: int
    vision: bool = True  # False: the features of an earlier run of the request were taken
    prefill: bool = True  # False: the vision stage alone, to measure what there is to see
    steps: int = 0  # decode steps
    scale: float = 1.0  # pictures read / pictures of the request


@dataclass(frozen=True)
class Price:
    """FLOPs of the artifact's own forecast: one picture, one prompt, one token."""

    vision: int
    prefill: int
    decode: int

    @classmethod
    def of(cls, session: Session) -> Price:
        after = ((session.manifest.get("cost") or {}).get("after")) or {}
        try:
            return cls(*(int(after[f"{stage}_flops"]) for stage in ("vision", "prefill", "decode")))
        except KeyError:
            raise RunError(f"policy: {title(session)} has no forecast of its cost; optimize the model again with this version") from None

    @property
    def total(self) -> int:
        return self.vision + self.prefill

    def flops(self, run: Run) -> float:
        return run.scale * (self.vision * run.vision + self.prefill * run.prefill) + self.decode * run.steps


def check(buckets: Sequence[Session]) -> tuple[Price, ...]:
    """The prices of buckets that a policy can be made of: two or more, of one model, none cheaper than the one before."""
    if len(buckets) < 2:
        raise RunError(f"policy: it chooses among artifacts, so it needs at least two of them, {len(buckets)} given")
    for other in buckets[1:]:
        if differs := [k for k, v in identity(buckets[0]).items() if identity(other)[k] != v]:
            raise RunError(f"policy: {title(buckets[0])} and {title(other)} are artifacts of different models: they differ in {', '.join(differs)}")
    prices = tuple(Price.of(b) for b in buckets)
    for k in range(1, len(buckets)):
        if prices[k].total < prices[k - 1].total:
            raise RunError(
                f"policy: artifacts must be given cheapest first, and {title(buckets[k])} ({prices[k].total / 1e9:.3f} GFLOPs) is cheaper than "
                f"{title(buckets[k - 1])} ({prices[k - 1].total / 1e9:.3f} GFLOPs) before it"
            )
    return prices


def identity(session: Session) -> dict[str, Any]:
    """What artifacts of one model have in common, by name."""
    files = session.manifest.get("files") or {}
    return {n: session.facts.get(n) for n in SAME_MODEL} | {n: (files.get(n) or {}).get("sha256") for n in SAME_FILES}


def vision_of(session: Session) -> Any:
    """Equal for sessions whose vision stages are the same graph on the same weights."""
    files, components = session.manifest.get("files") or {}, session.manifest["components"]
    graphs = {c.get("file") for c in components.values()}
    own = components["vision"].get("file")
    if own not in files:
        return id(session)
    folder = own.rpartition("/")[0]
    data = [(n, e["sha256"]) for n, e in files.items() if n.startswith(f"{folder}/") and n not in graphs]  # weights beside the graphs
    facts = [session.facts.get(n) for n in ("features", "features_per_image", "vision_extra", "positions")]
    return files[own]["sha256"], repr(sorted(data)), repr(facts)


def title(session: Session) -> str:
    return session.path.name if session.path else "an artifact"
