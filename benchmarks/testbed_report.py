"""docs/methods.md, docs/methods_slices.md, docs/methods.png and the README's section "Accuracy against cost", from the testbed table's record.

No number and no verdict in them is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.testbed_configs import (
    AVERAGE,
    BUDGETS,
    CONTROLS,
    CUTS,
    DEPTH,
    NONE,
    ORIGINAL,
    OTHER,
    RENUMBERED,
    SECTIONS,
    TOKENS,
    UNMEASURED,
    Config,
    plan,
    unplanned,
)
from benchmarks.testbed_table import ROOT, TEXT, Line, RecordError, digest, item_scores, items_of, read
from foveate.runtime.stats import Differences, interval, wilson

DOCS = ROOT / "docs"
START, END = "<!-- accuracy: start -->", "<!-- accuracy: end -->"
LEVEL = 0.95
RENUMBER = ", renumber-positions"


@dataclass(frozen=True)
class Gap:
    """A paired difference in accuracy with its 95% interval; shares, not percent."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray, against: np.ndarray) -> Gap:
        """scores, against [items] in [0, 1]"""
        d = scores - against
        low, high = interval(Differences.of(d), (1 + LEVEL) / 2)
        return cls(float(d.mean()), low, high)

    @property
    def verdict(self) -> str:
        """Of the interval: "better", "worse", or "" where it holds zero."""
        return "worse" if self.high < 0 else "better" if self.low > 0 else ""

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Row:
    """A configuration, what was measured of it, and what that says."""

    config: Config
    line: Line
    scores: np.ndarray
    loss: Gap
    uniform: Gap | None
    random: Gap | None
    worst: tuple[str, Gap]  # the slice that loses most against the unreduced model
    lost_slices: tuple[tuple[str, float], ...]  # (slice, difference to the uniform control), most lost first

    @property
    def accuracy(self) -> float:
        return float(self.scores.mean())

    @property
    def tokens(self) -> float:
        """Visual rows executed, mean over layers, as a share."""
        return sum(self.line.visual) / DEPTH / TOKENS

    @property
    def control(self) -> bool:
        return self.config.method in CONTROLS

    @property
    def name(self) -> str:
        return f"{self.config.method}, {self.config.label}" if self.config.label else self.config.method


@dataclass(frozen=True)
class Table:
    """Everything measured, on one set of items."""

    done: dict[str, Line]
    rows: tuple[Row, ...]
    refused: tuple[tuple[Config, str], ...]
    missing: tuple[str, ...]
    slices: dict[str, np.ndarray]  # slice -> indices of its items
    turns: tuple[int, ...]

    @property
    def none(self) -> Line:
        return self.done[NONE]

    def scores(self, recipe: str) -> np.ndarray:
        return item_scores(self.done[recipe].right, self.turns)

    def of(self, section: str, budget: float | None) -> list[Row]:
        """Best first."""
        return sorted((r for r in self.rows if r.config.section == section and r.config.budget == budget), key=lambda r: -r.accuracy)


def table(done: dict[str, Line], configs: Sequence[Config], turns: Sequence[int], slice_of: Sequence[str]) -> Table:
    """Join what was planned with what was measured; refused without the unreduced model, which everything is compared with."""
    if NONE not in done:
        raise RecordError(f"testbed_table: the unreduced model ({NONE!r}) is not in the record; run `testbed_table run` first")
    slices = {name: np.array([i for i, s in enumerate(slice_of) if s == name]) for name in sorted(set(slice_of))}
    found = Table(done, (), (), (), slices, tuple(turns))
    base, rows, refused, missing = found.scores(NONE), [], [], []
    for c in configs:
        line = done.get(c.recipe)
        if line is None:
            missing.append(c.recipe)
        elif line.refused:
            refused.append((c, line.refused))
        else:
            rows.append(_row(found, c, line, base))
    return Table(done, tuple(rows), tuple(refused), tuple(missing), slices, tuple(turns))


def _row(found: Table, c: Config, line: Line, base: np.ndarray) -> Row:
    scores = found.scores(c.recipe)

    def measured(recipes: Sequence[str]) -> list[np.ndarray]:
        return [found.scores(r) for r in recipes if r in found.done and found.done[r].right and r != c.recipe]

    uniform = max(measured(c.uniform), key=lambda s: float(s.mean()), default=None) if c.method not in CONTROLS else None
    draws = measured(c.random) if c.method not in CONTROLS else []
    losses = {name: float((scores[i] - base[i]).mean()) for name, i in found.slices.items()}
    worst = min(losses, key=losses.__getitem__)
    lost = {name: float((scores[i] - uniform[i]).mean()) for name, i in found.slices.items()} if uniform is not None else {}
    return Row(
        c,
        line,
        scores,
        Gap.of(scores, base),
        None if uniform is None else Gap.of(scores, uniform),
        Gap.of(scores, np.mean(draws, 0)) if draws else None,
        (worst, Gap.of(scores[found.slices[worst]], base[found.slices[worst]])),
        tuple(sorted(lost.items(), key=lambda kv: kv[1])),
    )


# -- cost


def flops(line: Line) -> int:
    """Of the encoder and the prefill, one picture."""
    return line.flops["vision"] + line.flops["prefill"]


def latency(found: Table, line: Line) -> dict[str, Any] | None:
    """A recipe that only keeps positions runs the same graphs as the one without."""
    return (found.done.get(line.recipe.replace(RENUMBER, "")) or line).latency


def first_token(found: Table, line: Line) -> float | None:
    """Encoder and prefill, as a share of the unreduced model's measured in turns with it."""
    timed = latency(found, line)
    return None if timed is None else sum(timed[s]["ms"] for s in ("vision", "prefill")) / sum(timed[s]["none_ms"] for s in ("vision", "prefill"))


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that no other is at most as expensive and better than, by rising cost."""
    best, out = -1.0, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            out.append(i)
    return out


# -- words


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def listed(rows: Sequence[Row], gap: str = "uniform") -> str:
    return ", ".join(f"`{r.config.method}`{f' ({r.config.label})' if r.config.label else ''} {100 * getattr(r, gap).mean:+.1f}" for r in rows) or "none"


def judged(rows: Sequence[Row], gap: str = "uniform") -> dict[str, list[Row]]:
    """verdict -> methods (no controls), largest difference first"""
    out: dict[str, list[Row]] = {"worse": [], "better": [], "": []}
    for r in sorted((r for r in rows if getattr(r, gap) is not None), key=lambda r: -abs(getattr(r, gap).mean)):
        out[getattr(r, gap).verdict].append(r)
    return out


def where_lost(rows: Sequence[Row], count: int = 3) -> str:
    """The slices in which these lose most to their uniform controls, on average."""
    sums: dict[str, list[float]] = {}
    for r in rows:
        for name, value in r.lost_slices:
            sums.setdefault(name, []).append(value)
    worst = sorted(sums, key=lambda s: np.mean(sums[s]))[:count]
    return ", ".join(f"`{s}` {100 * np.mean(sums[s]):+.0f}" for s in worst)


def findings(found: Table) -> list[str]:
    """One paragraph per place and budget: who loses to the uniform control, by how much, and where."""
    out = []
    for section in SECTIONS:
        for budget in sorted(BUDGETS, reverse=True) if section != OTHER else (None,):
            rows = [r for r in found.of(section, budget) if not r.control]
            if section == OTHER:
                rows = [r for r in found.rows if r.config.section == OTHER and not r.control]
            by = judged(rows)
            if not any(by.values()):
                continue
            title = f"{section}, {percent(budget, 0)}" if budget else section
            text = f"- **{title}.** Lose to uniform: {listed(by['worse'])}."
            if by["worse"]:
                text += f" They lose it in {where_lost(by['worse'])}."
            text += f" Beat it: {listed(by['better'])}. Cannot be told from it: {listed(by[''])}."
            out.append(text)
    return out


def renumbering(found: Table) -> str:
    """What original positions are worth at the vision side: the same tokens, the same graphs."""
    parts = []
    for budget in sorted(BUDGETS, reverse=True):
        both = {(r.config.method, r.config.label): r for r in found.of(RENUMBERED, budget)}
        pairs = [(r, both[key]) for r in found.of(ORIGINAL, budget) if (key := (r.config.method, r.config.label)) in both]
        if pairs:
            gains = [a.accuracy - b.accuracy for a, b in pairs]
            spread = f"{100 * min(gains):+.1f} to {100 * max(gains):+.1f} over {len(pairs)}"
            parts.append(f"{percent(budget, 0)} kept: {100 * np.mean(gains):+.1f} on average ({spread})")
    if not parts:
        return ""
    return ("Positions: the same tokens at their original positions, the default, instead of renumbered ones, as published vision-side code has them "
            "(`renumber-positions`): "
            + "; ".join(parts) + " points.")


def best(found: Table) -> list[str]:
    """Per budget the best configuration that executes at most that share of visual tokens per layer on average."""
    out = []
    for budget in sorted(BUDGETS, reverse=True):
        rows = [r for r in found.rows if r.tokens <= budget + 0.005]
        if rows:
            top = max(rows, key=lambda r: r.accuracy)
            kind = "a control" if top.control else "a method"
            short, gap = top.line.recipe.removesuffix(", clean-up"), top.loss
            out.append(f"{percent(budget, 0)}: `{short}` ({kind}), {percent(top.accuracy)}, {gap} points")
    return out


# -- tables


COLUMNS = ("tokens", "accuracy %", "to unreduced", "to uniform", "to random", "worst slice", "GFLOPs vision + prefill", "of unreduced", "first token", "decode")
HEAD = f"| method | {' | '.join(COLUMNS)} |\n|---|--:|--:|---|---|---|---|--:|--:|--:|--:|"


def mark(gap: Gap | None) -> str:
    if gap is None:
        return ""
    return f"**{gap}**" if gap.verdict == "worse" else str(gap)


def line_of(found: Table, r: Row) -> str:
    timed, cost = latency(found, r.line), f"{r.line.flops['vision'] / 1e9:.2f} + {r.line.flops['prefill'] / 1e9:.2f}"
    first = first_token(found, r.line)
    held = sum(r.line.held) / DEPTH / TOKENS
    tokens = percent(r.tokens) if abs(held - r.tokens) < 0.006 else f"{percent(r.tokens)} (cache {percent(held)})"
    cells = [
        f"*{r.name}*" if r.control else r.name,
        tokens,
        f"{100 * r.accuracy:.1f}",
        str(r.loss),
        mark(r.uniform),
        mark(r.random),
        f"`{r.worst[0]}` {r.worst[1]}",
        cost,
        percent(flops(r.line) / flops(found.none), 0),
        "" if first is None else percent(first, 0),
        "" if timed is None else percent(1 / timed["decode"]["speedup"], 0),
    ]
    return f"| {' | '.join(cells)} |"


def sections(found: Table) -> list[str]:
    out: list[str] = []
    about = {
        RENUMBERED: "The same tokens numbered 0, 1, 2, ... anew (`renumber-positions`), as the published code does; the graphs and costs are those above.",
        ORIGINAL: "Fewer tokens enter the language model, at the positions that they had in the whole prompt.",
        AVERAGE: f"As many executed visual tokens per layer, on average over {DEPTH} layers, as the budget says. Methods that read attention cannot cut before "
        "layer 1, so an average of 12.5% is their floor: 11 and 6% are out of their reach, exits aside.",
        OTHER: "Published schedules scaled from 32 layers, methods without a budget, and combinations.",
    }
    for section in SECTIONS:
        blocks = []
        for budget in (None, *sorted(BUDGETS, reverse=True)):
            rows = found.of(section, budget)
            if rows:
                title = f"### {section[0].upper()}{section[1:]}: {percent(budget, 0)}" if budget else f"### {section[0].upper()}{section[1:]}"
                blocks += ["", title, "", HEAD, *(line_of(found, r) for r in rows)]
        if blocks:
            cut = f"From layer {CUTS[section]} on so many tokens are left; the average says what that costs." if section in CUTS else ""
            out += ["", f"## {section[0].upper()}{section[1:]}", "", about.get(section, cut), *blocks]
    return out


def notes(found: Table) -> list[str]:
    out = ["", "## Not measured, or not at the budget", ""]
    out += [f"- `{name}`: {why}." for name, why in UNMEASURED.items()]
    out += [f"- `{name}`: came after the plan (`benchmarks/testbed_configs.py`)." for name in unplanned()]
    out += [f"- `{c.recipe}`: refused: {why}" for c, why in found.refused]
    seen = set()
    for r in found.rows:
        for note in r.config.notes:
            if (r.config.method, note) not in seen:
                seen.add((r.config.method, note))
                out.append(f"- `{r.config.method}`: {note}.")
    if found.missing:
        out.append(f"- {len(found.missing)} planned configurations are not in the record yet: " + "; ".join(f"`{m}`" for m in found.missing))
    return out


METHOD = """\
`python -m benchmarks.testbed_table run`, then `latency`, then `report`. {n} held-out items of `test` (the first, slices taking turns),
{questions} questions, greedy answers through ONNX Runtime artifacts, exact match. Every difference is paired on the same items, with its
95% interval (`runtime/stats.py`), each on its own: of a hundred such intervals about five miss. **Bold**: the interval lies below zero. The
worst slice is picked after the fact, so its interval is too kind.

- *tokens*: visual rows that the graph executes per layer, mean over the language model's {depth} layers, of {tokens} per picture. Where the
  data decide how many are real, the rest is filler and costs the same; `cache` then says what is held.
- *GFLOPs*: by the cost model, one picture and {text} text tokens; products only, so that sorting and the greedy loops of `prune-divprune`,
  `prune-cdpruner` and `prune-vispruner` are in the latency, not there. *first token*: measured time of encoder and prefill, of the
  unreduced model's in turns with it (one picture, batch 1); *decode*: the same of a decode step.
- *to uniform*: the better of two even spacings with the same counts at the same place: by reading order, which aliases with the rows of 12
  (a quarter is three whole columns), and a dithered grid (before the LLM) or staggered rows (inside). *to random*: the mean of two fixed
  draws (one for several stages).
- Outside inputs are stand-ins. `prune-objects` gets heat maps of where the generator put things, as of an ideal detector; `prune-cdpruner`
  (question) the mean word embedding of the question in the language model's space; `prune-elip` the question's vector of the testbed's text
  tower, mapped into the vision tower by the pseudo-inverse of the visual projection.
- The model is what its card says: CLS attention was supervised to look at things, missing background was trained in, and every token of a
  picture was otherwise always there. It has 8 layers and 144 tokens per picture: schedules were scaled by depth. Nothing here says how a
  method does on a model of 7 billion parameters.
"""


def document(found: Table, count: int) -> str:
    lines = [r.line for r in found.rows]
    commits = ", ".join(sorted({line.commit for line in lines}))
    dates = sorted({line.date[:10] for line in lines})
    machine = found.none.versions
    unreduced = found.scores(NONE)
    low, high = wilson(float(unreduced.sum()), len(unreduced), LEVEL)
    out = [
        "# Token-reduction methods on the testbed",
        "",
        f"Written by `benchmarks/testbed_table.py`; measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} at commits {commits} on {machine['cpu']}, "
        f"{machine['threads']} thread, onnxruntime {machine['onnxruntime']}. {len(found.rows)} configurations; the unreduced model answers "
        f"{percent(unreduced.mean())} ({percent(low)} to {percent(high)}).",
        "",
        "![Accuracy against cost](methods.png)",
        "",
        "## What the figures say",
        "",
        *findings(found),
        "",
        renumbering(found),
        "",
        "Best at a budget of visual tokens per layer, on average: " + "; ".join(best(found)) + ".",
        "",
        "## How it was measured",
        "",
        METHOD.format(n=count, questions=sum(found.turns), depth=DEPTH, tokens=TOKENS, text=TEXT),
        "Accuracy by slice with intervals: [methods_slices.md](methods_slices.md). The record has one bit per question: "
        "`benchmarks/results/testbed_table.jsonl`. What choosing costs: [methods_overhead.md](methods_overhead.md).",
        *sections(found),
        *notes(found),
    ]
    return "\n".join(out) + "\n"


def slices_document(found: Table) -> str:
    names = list(found.slices)
    size = {len(i) for i in found.slices.values()}
    out = ["# Accuracy by slice", "", f"Percent, Wilson 95% intervals; {'/'.join(map(str, sorted(size)))} items per slice. Settings, costs and verdicts: "
           "[methods.md](methods.md)."]
    head = f"| method | {' | '.join(f'`{n}`' for n in names)} |\n|---{'|--:' * len(names)}|"

    def cells(scores: np.ndarray) -> str:
        found_cells = []
        for i in found.slices.values():
            low, high = wilson(float(scores[i].sum()), len(i), LEVEL)
            found_cells.append(f"{100 * scores[i].mean():.0f} ({100 * low:.0f}-{100 * high:.0f})")
        return " | ".join(found_cells)

    out += ["", head, f"| unreduced | {cells(found.scores(NONE))} |"]
    for section in SECTIONS:
        for budget in (None, *sorted(BUDGETS, reverse=True)):
            rows = found.of(section, budget)
            if rows:
                out += ["", f"## {section[0].upper()}{section[1:]}{f': {percent(budget, 0)}' if budget else ''}", "", head]
                out += [f"| {r.name} | {cells(r.scores)} |" for r in rows]
    return "\n".join(out) + "\n"


# -- picture


COLORS = {RENUMBERED: "#d95f02", ORIGINAL: "#1b6ca8", AVERAGE: "#2a9d4a", OTHER: "#8e5aa8"}
MARKS = {RENUMBERED: "o", ORIGINAL: "^", AVERAGE: "s", OTHER: "D"}
LEGEND = {RENUMBERED: "before the LLM, renumbered", ORIGINAL: "before the LLM, original positions", AVERAGE: "inside the LLM", OTHER: "presets, combinations"}


def picture(found: Table, path: Path) -> list[str]:
    """Two panels, accuracy against FLOPs and against measured time; returns what the numbers at the frontier stand for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in found.rows if first_token(found, r.line) is not None]
    panels = [("FLOPs of encoder and prefill, % of unreduced", found.rows, lambda r: flops(r.line) / flops(found.none))]
    if timed:
        panels.append(("measured time to first token (ONNX Runtime), % of unreduced", timed, lambda r: first_token(found, r.line)))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.4), squeeze=False, sharey=True, facecolor="white")
    names: list[str] = []
    for axis, (label, rows, cost) in zip(axes[0], panels, strict=True):
        _panel(axis, rows, cost, names)
        axis.set_xlabel(label)
        axis.scatter([100], [100 * found.scores(NONE).mean()], marker="*", s=160, color="black", zorder=5, label="unreduced")
    axes[0][0].set_ylabel("exact match on held-out questions, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4 if len(panels) > 1 else 2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1 if len(panels) > 1 else 0.16, 1, 1))
    figure.savefig(path, dpi=96, facecolor="white")
    plt.close(figure)
    return names


def _panel(axis: Any, rows: Sequence[Row], cost: Any, names: list[str]) -> None:
    for section, color in COLORS.items():
        here = [r for r in rows if (AVERAGE if r.config.section in CUTS else r.config.section) == section]
        for control in (False, True):
            part = [r for r in here if r.control == control]
            x, y = [100 * cost(r) for r in part], [100 * r.accuracy for r in part]
            look = {"facecolors": "white", "edgecolors": color, "alpha": 0.9} if control else {"color": color, "alpha": 0.75}
            label = f"{LEGEND[section]}{': controls' if control else ''}" if part else None
            axis.scatter(x, y, marker=MARKS[section], s=26, linewidths=1.1, label=label, **look)
    points = [(cost(r), r.accuracy) for r in rows]
    front = frontier(points)
    axis.step([100 * points[i][0] for i in front], [100 * points[i][1] for i in front], where="post", color="#444444", linewidth=1, alpha=0.6, zorder=1)
    for i in front:
        text = f"{rows[i].line.recipe.removesuffix(', clean-up')}"
        if text not in names:
            names.append(text)
        axis.annotate(str(names.index(text) + 1), (100 * points[i][0], 100 * points[i][1]), xytext=(-3, 5), textcoords="offset points", fontsize=8, ha="right")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


# -- README


def readme_section(found: Table, names: Sequence[str], count: int) -> str:
    """Short: the picture, who is on the frontier, who loses to the uniform control at a quarter of the tokens, and where."""
    unreduced = found.scores(NONE).mean()
    methods = {r.config.method for r in found.rows if not r.control and " + " not in r.config.method}
    out = [
        f"{len(found.rows)} configurations of {len(methods)} methods and their controls on {count} held-out items of the testbed (unreduced: "
        f"{percent(unreduced)}), 50, 25, 11 and 6% of the visual tokens; hollow marks are uniform and random controls.",
        "",
        "![Accuracy against FLOPs and against measured latency](docs/methods.png)",
        "",
        "On the frontier: " + "; ".join(f"{i} `{n}`" for i, n in enumerate(names, 1)) + ".",
        "",
    ]
    out += [f"- **{section[0].upper()}{section[1:]}.** {text}" for section in (ORIGINAL, RENUMBERED, AVERAGE) if (text := _places(found, section))]
    out += ["", renumbering(found), "", "Best at a budget of visual tokens per layer, on average: " + "; ".join(best(found)) + ".", "",
            "One small model, supervised CLS attention: see [docs/methods.md](docs/methods.md) for every figure, interval and slice, and for what is not",
            "measured."]
    return "\n".join(out)


def _places(found: Table, section: str) -> str:
    """How many beat the uniform control at each budget, and the names of those that lose to it, worst first."""
    parts = []
    for budget in sorted(BUDGETS, reverse=True):
        by = judged([r for r in found.of(section, budget) if not r.control])
        total, worse = sum(map(len, by.values())), by["worse"]
        if total:
            names = list(dict.fromkeys(f"`{r.config.method}`" for r in worse))
            gaps = list(dict.fromkeys(f"{100 * r.uniform.mean:+.0f}" for r in (worse[-1:] + worse[:1]) if r.uniform))
            points = f" ({' to '.join(gaps)} points, most in {where_lost(worse, 2)})" if worse else ""
            parts.append(f"{percent(budget, 0)}: of {total}, {len(by['better'])} better than the uniform control, {len(worse)} worse"
                         + (f": {', '.join(names)}{points}" if worse else ""))
    return ". ".join(parts) + "." if parts else ""


def write(path: Path) -> None:
    lines = read(path)
    if not lines:
        raise RecordError(f"{path.name}: no configuration in it; run `testbed_table run` first")
    count = next(iter(lines.values())).n
    if (now := digest(count)) != (was := next(iter(lines.values())).items):
        raise RecordError(f"{path.name}: measured on items {was}, the testbed now makes {now}: the checkpoint or the data have changed; measure again")
    items = items_of(count)
    found = table(lines, plan(), [len(i.turns) for i in items], [i.slice for i in items])
    names = picture(found, DOCS / "methods.png")
    (DOCS / "methods.md").write_text(document(found, count))
    (DOCS / "methods_slices.md").write_text(slices_document(found))
    readme = ROOT / "README.md"
    body = readme.read_text()
    if START not in body or END not in body:
        raise RecordError(f"README.md: no {START} ... {END} to write between")
    text = readme_section(found, names, count)
    readme.write_text(re.sub(f"{START}.*{END}", lambda _: f"{START}\n{text}\n{END}", body, flags=re.S))
    print(f"{len(found.rows)} configurations written, {len(found.refused)} refused, {len(found.missing)} missing")
