"""What the testbed table measures: every token-reduction method that discovery finds, with settings for 8 layers and 144 tokens per picture.

Budgets are shares of the 144 tokens. Before the language model a share is what every layer gets. Inside it, a cut at layer l that keeps K
costs l layers of 144 first, so two readings are measured: the same AVERAGE over the layers as a vision-side method has, and the same number
BEHIND a cut at a given layer. Every configuration names its uniform and random controls: same place, layers and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from foveate.passes.base import Pass, discover
from foveate.passes.insert import Insertion
from foveate.passes.recycle import clusters
from foveate.passes.reduce import Reduce
from foveate.passes.vision_select import VisionReduce

DEPTH, TOKENS = 8, 144
BUDGETS = {0.25: 36, 0.5: 72, 0.11: 16, 0.06: 9}  # in the order in which they are measured
SEEDS = (0, 1)
NONE = "none"
RENUMBERED, ORIGINAL = "before the LLM, positions renumbered", "before the LLM, original positions"
AVERAGE, CUT_2, CUT_4, OTHER = "inside, by average", "inside, behind layer 2", "inside, behind layer 4", "presets and others"
SECTIONS = (ORIGINAL, RENUMBERED, AVERAGE, CUT_2, CUT_4, OTHER)
CUTS = {CUT_2: 2, CUT_4: 4}
CONTROLS = ("prune-uniform", "prune-random", "drop-uniform", "drop-random")

UNMEASURED = {
    "prune-evs": "reads the change between video frames, and the testbed has still pictures only",
    "prune-globalcom2": "shares a budget between a thumbnail and its crops, and the testbed's pictures are one view each",
}
PREFIXES = ("drop-", "prune-", "merge-", "bypass-", "exit-")


@dataclass(frozen=True)
class Config:
    """One line of the table. `budget` is the nominal share of tokens, None where a method has a schedule of its own."""

    method: str
    recipe: str  # inline text, the whole of it
    section: str
    budget: float | None
    uniform: tuple[str, ...] = ()  # recipes of the controls: in reading order, and without aliasing
    random: tuple[str, ...] = ()
    label: str = ""  # what tells it from others of the same method and budget
    extra: str = ""  # the outside input it is given, a key of testbed_table.EXTRAS
    notes: tuple[str, ...] = field(default=())


def recipe(*steps: str) -> str:
    return ", ".join([*steps, "clean-up"])


def step(name: str, **parameters: object) -> str:
    return f"{name}{{{','.join(f'{k}={_value(v)}' for k, v in parameters.items())}}}"


def _value(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def thousandths(kept: int, of: int) -> float:
    """The share in whole thousandths, rounded down, of which `kept` of `of` tokens stay when the pass rounds up."""
    return 1000 * kept // of / 1000


# -- averages over the layers


def counts(layers: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Visual tokens in each of the DEPTH layers when `kept` are left from each of `layers` on."""
    now, out = TOKENS, []
    stage = dict(zip(layers, kept, strict=True))
    for layer in range(DEPTH):
        now = stage.get(layer, now)
        out.append(now)
    return out


def average(layers: Sequence[int], kept: Sequence[int]) -> float:
    return sum(counts(layers, kept)) / DEPTH / TOKENS


def recycled(shares: Sequence[float]) -> list[int]:
    """Tokens behind every stage of SparseVLM: its share of the prompt, and the clusters of what it drops."""
    out, now = [], TOKENS
    for share in shares:
        best = min(now, -(-TOKENS * round(1000 * share) // 1000))
        now = best + (int(clusters(now - best)) if best < now else 0)
        out.append(now)
    return out


def solve(mean: Callable[[float], float], target: float) -> float:
    """x in (0, 1] at which the rising `mean` is closest to target from below, to 1/4096"""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= target else (low, middle)
    return low


def single(target: float, layer: int) -> int:
    """K for a cut at `layer` with that average; below 1 where the layers before cost more already."""
    return round((target * DEPTH - layer) / (DEPTH - layer) * TOKENS)


# -- controls


def chain(name: str, layers: Sequence[int], kept: Sequence[int], **parameters: object) -> str:
    """The control that leaves `kept` tokens from `layers` on."""
    steps, now = [], TOKENS
    for layer, count in zip(layers, kept, strict=True):
        if count < now:
            steps.append(step(name, layer=layer, keep=thousandths(count, now), **parameters))
        now = count
    return recipe(*steps)


def controls(layers: Sequence[int], kept: Sequence[int]) -> dict[str, object]:
    seeds = SEEDS if len(layers) == 1 else SEEDS[:1]
    uniform = (chain("drop-uniform", layers, kept), chain("drop-uniform", layers, kept, staggered=True))
    return {"uniform": uniform, "random": tuple(chain("drop-random", layers, kept, seed=s) for s in seeds)}


def averaged(mean: float) -> dict[str, object]:
    """Single-cut controls of about that average, for methods without counterpart: at layer 2, earlier where that cannot be."""
    layer = next(l for l in (2, 1, 0) if single(mean, l) >= TOKENS * mean / 3 or l == 0)
    return controls((layer,), (single(mean, layer),))


def before(budget: float, *more: str) -> dict[str, object]:
    uniform = (recipe(step("prune-uniform", keep=budget), *more), recipe(step("prune-uniform", keep=budget, by="grid"), *more))
    return {"uniform": uniform, "random": tuple(recipe(step("prune-random", keep=budget, seed=s), *more) for s in SEEDS)}


# -- settings per method


def vision(name: str, budget: float, section: str) -> Iterator[Config]:
    """One configuration per budget, or several where a method has variants worth telling apart."""
    K, more = BUDGETS[budget], ("renumber-positions",) if section == RENUMBERED else ()

    def made(text: str, label: str = "", extra: str = "", notes: tuple[str, ...] = ()) -> Config:
        return Config(name, recipe(text, *more), section, budget, **before(budget, *more), label=label, extra=extra, notes=notes)  # type: ignore[arg-type]

    if name == "prune-random":
        yield from (made(step(name, keep=budget, seed=s), f"seed {s}") for s in SEEDS)
    elif name == "prune-uniform":
        yield made(step(name, keep=budget), "by order")
        yield made(step(name, keep=budget, by="grid"), "by grid")
    elif name == "prune-fopru":
        yield made(step(name, keep=budget), "by token")
        note = () if K % 12 == 0 else ("keeps whole rows of 12 tokens, so it lies below the budget",)
        yield made(step(name, keep=budget, by="row"), "by row", notes=note)
    elif name == "prune-cdpruner":
        yield made(step(name, keep=budget), "no text")
        yield made(step(name, keep=budget, relevance="text"), "question", "question in token space")
    elif name == "prune-vispruner":
        yield made(step(name, keep=budget, important=0.5 if budget >= 0.2 else 0.75))
    elif name == "merge-prumerge":
        yield made(step(name, keep=budget), "PruMerge")
        yield made(step(name, keep=budget, uniform=0.75), "PruMerge+")
    elif name == "merge-must-drop":
        note = () if K in (72, 16) else ("merges whole windows of 9 patches, so that it keeps 144 - 8 r tokens, r at most 16",)
        yield made(step(name, keep=budget), notes=note)
    elif name == "merge-tome":
        yield made(step(name, r={72: 18, 36: 27, 16: 40, 9: 72}[K]))
    elif name == "prune-elip":
        last = (K - 0.5) / TOKENS  # and the summary token
        shares = [round(1 - (1 - last) / 6, 4), round(1 - (1 - last) * 7 / 12, 4), round(last, 4)]
        yield made(step(name, layers=[1, 2, 3], ahead=[2, 2, 1], keep=shares), extra="question in tower space")
    elif name == "prune-objects":
        things = round(0.75 * K)
        yield made(step(name, objects=round((things + 0.25) / TOKENS, 4), context=round((K - things + 0.25) / TOKENS, 4)), extra="true objects")
    else:
        yield made(step(name, keep=budget))


def cut(name: str, section: str, budget: float, layer: int, kept: int) -> Iterator[Config]:
    """A method with one cut."""
    at, keep = (layer,), thousandths(kept, TOKENS)

    def made(text: str, label: str = "") -> Config:
        shown = ", ".join(s for s in (label, f"{kept} from layer {layer}" if section == AVERAGE else "") if s)
        return Config(name, recipe(text), section, budget, **controls(at, (kept,)), label=shown)  # type: ignore[arg-type]

    if name == "drop-random":
        yield from (made(step(name, layer=layer, keep=keep, seed=s), f"seed {s}") for s in SEEDS)
    elif name == "drop-uniform":
        yield made(step(name, layer=layer, keep=keep), "by order")
        yield made(step(name, layer=layer, keep=keep, staggered=True), "staggered")
    elif name == "drop-zip-vl":
        yield made(step(name, layers=[layer], keeps=[keep]), "at most")
    else:
        yield made(step(name, layer=layer, keep=keep))


def staged(name: str, budget: float) -> Config | None:
    """A method with a schedule, scaled to an average; None where layers that it needs cost more than that."""
    if name == "drop-pyramid":
        layers = (2, 4, 6) if budget >= 0.4 else (1, 2, 4)
        ratio = solve(lambda r: average(layers, [round(TOKENS * r**i) for i in (1, 2, 3)]), budget)
        shares = [round(ratio**i, 3) for i in (1, 2, 3)]
        kept = [-(-TOKENS * round(1000 * s) // 1000) for s in shares]
    elif name == "drop-sparse-vlm":
        layers, base = (1, 2, 4), (300 / 576, 200 / 576, 110 / 576)
        scale = solve(lambda x: average(layers, recycled([2 * x * b for b in base])), budget)
        shares = [round(min(1.0, 2 * scale * b), 3) for b in base]
        kept = recycled(shares)
    else:  # drop-must-drop
        layers = (1, 2, 3, 4)
        ratio = solve(lambda r: average(layers, [round(TOKENS * r**i) for i in (1, 2, 3, 4)]), budget)
        shares = [round(ratio**i, 3) for i in (1, 2, 3, 4)]
        kept = [-(-TOKENS * round(1000 * s) // 1000) for s in shares]
    if min(shares) <= 0:
        return None
    text = step(name, layers=list(layers), keeps=shares)
    return Config(name, recipe(text), AVERAGE, budget, **controls(layers, kept), label=f"{'/'.join(map(str, kept))} from {'/'.join(map(str, layers))}")  # type: ignore[arg-type]


STAGED = ("drop-pyramid", "drop-sparse-vlm", "drop-must-drop")
SINGLE = {0.5: ((2, 48), (3, 29)), 0.25: ((1, 21),)}  # (layer, K): average over 8 layers as the budget
FLOOR = "reads attention, so its first cut is at layer 1, and one layer of all tokens is an average of 12.5% already"


def inside(name: str, budget: float, kind: type[Pass]) -> Iterator[Config]:
    if name == "exit-vision":
        at = {0.5: 4, 0.25: 2, 0.11: 1}.get(budget)
        if at:
            note = ("12.5% and a row: the lowest exit",) if at == 1 else ()
            yield Config(name, recipe(step(name, layer=at)), AVERAGE, budget, **averaged(at / DEPTH), label=f"all leave at layer {at}", notes=note)  # type: ignore[arg-type]
    elif name == "bypass-mod":
        keep = {0.5: 0.2, 0.25: 0.06}.get(budget)
        if keep:
            note = ("skips every other layer between the first and the last, so 62.5% are the least it can reach",)
            text = step(name, layers=[1, 3, 5], keep=keep)
            yield Config(name, recipe(text), AVERAGE, budget, **averaged((5 + 3 * keep) / DEPTH), label=f"{keep:.0%} in layers 1, 3, 5", notes=note)  # type: ignore[arg-type]
    elif name in STAGED:
        found = staged(name, budget) if budget in SINGLE else None
        if found:
            yield found
    else:
        for layer, kept in SINGLE.get(budget, ()):
            yield from cut(name, AVERAGE, budget, layer, kept)
        if name in ("drop-uniform", "drop-random"):
            yield from cut(name, AVERAGE, budget, 0, BUDGETS[budget])  # needs no attention: the language model's first layer will do
        for section, layer in CUTS.items():
            yield from cut(name, section, budget, layer, BUDGETS[budget])


def others() -> Iterator[Config]:
    """Published schedules as they are, scaled from 32 layers of 576 tokens, and what has no budget."""
    sparse = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
    for name, kept in sparse.items():
        shares = [round(k / 576, 3) for k in kept]
        text = step("drop-sparse-vlm", layers=[1, 2, 4], keeps=shares)
        yield Config("drop-sparse-vlm", recipe(text), OTHER, None, **controls((1, 2, 4), recycled(shares)), label=f"list of {name}")  # type: ignore[arg-type]
    text = step("drop-pyramid", layers=[2, 4, 6], keeps=[0.5, 0.25, 0.125])
    yield Config("drop-pyramid", recipe(text), OTHER, None, **controls((2, 4, 6), (72, 36, 18)), label="default")  # type: ignore[arg-type]
    for name, share, single in ((192, 0.001, 0.001), (128, 0.0012, 0.001), (64, 0.011, 0.01)):
        text = step("drop-must-drop", layers=[1, 2, 3, 4], keeps=[1.0] * 4, global_share=share, individual=single)
        note = "the data decide how many stay; the rows of the rest are computed as filler and only leave the cache"
        yield Config("drop-must-drop", recipe(text), OTHER, None, label=f"thresholds of {name}", notes=(note,))
    yield Config("exit-vision", recipe(step("exit-vision", layer=6)), OTHER, None, **averaged(0.75), label="all leave at layer 6")  # type: ignore[arg-type]
    text = step("bypass-vision", layers=[1, 3], keep=[0.7, 0.343])
    note = "no token is lost: the work of the tower falls, that of the language model does not"
    yield Config("bypass-vision", recipe(text), OTHER, None, label="70% in tower layer 1, 34% in 3", notes=(note,))
    both = recipe(step("prune-vision-cls", keep=0.5), step("drop-fastv", layer=2, keep=0.333))
    yield Config("prune-vision-cls + drop-fastv", both, OTHER, 0.25, **before(0.25), label="72, then 24 from layer 2")  # type: ignore[arg-type]
    both = recipe(step("prune-vision-cls", keep=0.75), step("drop-fastv", layer=4, keep=0.333))
    yield Config("prune-vision-cls + drop-fastv", both, OTHER, 0.5, **before(0.5), label="108, then 36 from layer 4")  # type: ignore[arg-type]


def reductions() -> dict[str, type[Pass]]:
    """The training-free token-reduction methods that discovery finds; insertions are trained and have benchmarks of their own."""
    found = {n: c for n, c in discover().items() if issubclass(c, (Reduce, VisionReduce)) or n.startswith(PREFIXES)}
    return {n: c for n, c in found.items() if not issubclass(c, Insertion)}


def before_llm(kind: type[Pass]) -> bool:
    """Does it leave fewer tokens at the vision side? bypass-vision does not, whatever its place."""
    return issubclass(kind, VisionReduce) or (kind.place == "tower" and kind.name != "bypass-vision")


def plan() -> list[Config]:
    """Every configuration, in the order in which it is measured: 25% first, controls before methods, single cuts to other budgets last."""
    found = {n: c for n, c in reductions().items() if n not in UNMEASURED}
    names = sorted(found, key=lambda n: (n not in CONTROLS, n))
    out = []
    for budget in BUDGETS:
        for name in names:
            if before_llm(found[name]):
                out += [c for section in (ORIGINAL, RENUMBERED) for c in vision(name, budget, section)]
            elif issubclass(found[name], Reduce):
                out += inside(name, budget, found[name])
        out += [c for c in others() if (c.budget or 0.5) == budget]
    return sorted(out, key=lambda c: c.section in CUTS and c.budget != 0.25)


def unplanned() -> list[str]:
    """Methods that the plan does not know what to do with."""
    planned = {name for c in plan() for name in c.method.split(" + ")}
    return sorted(n for n in reductions() if n not in planned and n not in UNMEASURED)


__all__ = ["BUDGETS", "NONE", "SECTIONS", "UNMEASURED", "Config", "plan", "reductions", "unplanned"]
