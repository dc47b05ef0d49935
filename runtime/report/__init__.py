"""One HTML file for a comparison: verdict, slices, tokens, FLOPs, latency, the items that changed with their kept tokens, passes,
environment.

in:  `Comparison`s (verdict, both runs, and what is known of artifacts and timing)
out: text of a page that needs no network; opens in any browser, light and dark, on a phone

The page is `page.html.j2`; its script draws kept tokens on the pictures and walks through the items.
"""

from __future__ import annotations

import base64
import io
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..agreement import Agreement
from ..datasets import Item
from ..errors import RunError
from ..evaluate import request_of
from ..gate import Status, Verdict, points
from ..latency import Timed
from ..outputs import decides
from ..results import Result, Run

SIDE = 320  # pixels of a picture's longer side in the page
BUDGET = 2_200_000  # bytes of pictures in the page; the items beyond it are listed without
SHOWN = 120  # items in the browser
FIGURES = (
    ("prefill GFLOPs", "prefill_flops", 1e9),
    ("vision GFLOPs", "vision_flops", 1e9),
    ("decode MFLOPs per token", "decode_flops", 1e6),
    ("KV cache MB per sample", "kv_bytes", 1e6),
    ("decode MB moved per token", "decode_bytes", 1e6),
)


@dataclass(frozen=True)
class Comparison:
    """One candidate against its baseline. Manifests are empty and `session` is None where only saved results are known."""

    name: str
    baseline_name: str
    verdict: Verdict
    candidate: Run
    baseline: Run
    agreement: Agreement | None = None
    timed: Timed | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    baseline_manifest: Mapping[str, Any] = field(default_factory=dict)
    items: tuple[Any, ...] = ()  # datasets.Item where the data set is at hand: pictures come from there
    session: Any = None


def render(comparisons: Sequence[Comparison], title: str = "foveate report") -> str:
    """The page; the first comparison is shown in full, all of them on the accuracy-latency plot."""
    from jinja2 import Environment, StrictUndefined

    if not comparisons:
        raise RunError("report: there is nothing to report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["points"] = points
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    budget = BUDGET // len(comparisons)
    sections = [_section(c, index, budget) for index, c in enumerate(comparisons)]
    data = {"items": [s["items"] for s in sections], "names": [c.name for c in comparisons]}
    page = template.render(title=title, sections=sections, pareto=_pareto(comparisons), data=_embedded(data), environment=_machine())
    return re.sub(r"\n\s*\n+", "\n", page)


def _embedded(data: Any) -> str:
    """JSON that cannot end its script element"""
    return (
        json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _section(c: Comparison, index: int, budget: int) -> dict[str, Any]:
    return {
        "index": index,
        "name": c.name,
        "baseline": c.baseline_name,
        "verdict": c.verdict,
        "rows": [_row(c.verdict, r) for r in c.verdict.rows],
        "tokens": _tokens(c.manifest),
        "figures": _figures(c.manifest),
        "latency": _latency(c.timed),
        "agreement": c.agreement,
        "history": _history(c.manifest),
        "made": _made(c),
        "items": _items(c, budget),
        "counts": {"lost": c.verdict.overall.losses, "gained": c.verdict.overall.gains, "all": c.verdict.overall.n},
    }


def _row(verdict: Verdict, row: Any) -> dict[str, Any]:
    """A table row and its interval as a picture: x of 0, margin, ends and point in percent of the axis."""
    reach = max(5 * row.margin, *(abs(v) for r in verdict.rows if r.n >= 20 for v in (r.lower, r.upper, r.difference)), 1e-6)

    def x(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / reach)), 2)

    return {
        "row": row,
        "deciding": decides(verdict, row),
        "zero": x(0),
        "margin": x(-row.margin),
        "low": x(row.lower),
        "high": x(row.upper),
        "at": x(row.difference),
    }


def _tokens(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per layer: tokens before and after, as bars."""
    cost = manifest.get("cost") or {}
    if not cost:
        return []
    before, after = cost["before"]["tokens"], cost["after"]["tokens"]
    top = max(before.values(), default=1)
    return [
        {
            "layer": k,
            "before": before[k],
            "after": after.get(k, 0),
            "width_before": 100 * before[k] / top,
            "width": 100 * after.get(k, 0) / top,
        }
        for k in sorted(before, key=int)
    ]


def _figures(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    cost = manifest.get("cost") or {}
    if not cost:
        return []
    out = []
    for label, key, unit in FIGURES:
        a, b = cost["before"][key] / unit, cost["after"][key] / unit
        out.append({"what": label, "before": f"{a:,.3f}", "after": f"{b:,.3f}", "less": f"{a / b:.2f}x" if b else "-"})
    return out


def _latency(timed: Timed | None) -> list[dict[str, Any]]:
    if timed is None:
        return []
    top = max(max(s.candidate["p90"], (s.baseline or s.candidate)["p90"]) for s in timed.stages)
    return [
        {
            "stage": s,
            "candidate_width": 100 * s.candidate["p50"] / top,
            "baseline_width": 100 * s.baseline["p50"] / top if s.baseline else None,
        }
        for s in timed.stages
    ]


def _history(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = []
    for record in manifest.get("history", []):
        parameters = ", ".join(f"{k}={v}" for k, v in record.get("parameters", {}).items())
        out.append(
            {
                "name": record["name"],
                "parameters": parameters,
                "changed": record.get("changed"),
                "ms": record.get("ms"),
                "nodes": record.get("nodes"),
            }
        )
    return out


def _made(c: Comparison) -> list[tuple[str, str]]:
    """What the artifacts were made with and for."""
    rows = []
    for who, m in (("candidate", c.manifest), ("baseline", c.baseline_manifest)):
        if m:
            versions = ", ".join(f"{k} {v}" for k, v in m.get("versions", {}).items())
            rows += [(f"{who} target", str(m.get("target"))), (f"{who} versions", versions)] + (
                [(f"{who} GPU", str(m["gpu"]))] if m.get("gpu") else []
            )
    if c.timed:
        rows += [
            ("peak memory of the process", f"{c.timed.peak_rss_bytes / 1e6:,.0f} MB"),
            *([("GPU clocks", c.timed.clocks)] if c.timed.clocks else []),
        ]
        rows += [(f"KV buffers at batch {b}", f"candidate {_mb(x)}, baseline {_mb(y)}") for b, (x, y) in c.timed.kv_bytes.items()]
        rows += [
            (f"tokens per second at batch {b}", f"candidate {x:,.1f}" + (f", baseline {y:,.1f}" if y else ""))
            for b, (x, y) in c.timed.tokens_per_second.items()
        ]
    return rows


def _mb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.2f} MB"


def _machine() -> list[tuple[str, str]]:
    return [
        ("date", time.strftime("%Y-%m-%d %H:%M %Z")),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("processor", platform.processor() or platform.machine()),
    ]


# -- the item browser


def _items(c: Comparison, budget: int) -> list[dict[str, Any]]:
    """The items that changed, losses first; pictures while the budget lasts."""
    by_id = {i.id: i for i in c.items if isinstance(i, Item)}

    def loss(id: str) -> float:
        return (c.baseline.results[id].score or 0.0) - (c.candidate.results[id].score or 0.0)

    changed = [i for i, r in c.candidate.results.items() if r.answers != c.baseline.results[i].answers]
    out = []
    for id in sorted(changed, key=lambda i: (-loss(i), i))[:SHOWN]:
        entry = _entry(c.baseline.results[id], c.candidate.results[id], by_id.get(id))
        if id in by_id:
            pictures = _pictures(by_id[id], c.session)
            size = sum(len(p["src"]) for p in pictures)
            if size <= budget:
                budget -= size
                entry["pictures"] = pictures
        out.append(entry)
    return out


def _entry(base: Result, cand: Result, item: Item | None) -> dict[str, Any]:
    questions = [t.question for t in item.turns] if item else [""] * max(len(base.answers), len(cand.answers))
    expected = [" | ".join(dict.fromkeys(t.answers)) for t in item.turns] if item else []
    return {
        "id": base.id,
        "slice": base.slice,
        "scores": [base.score, cand.score],
        "questions": questions,
        "expected": expected,
        "baseline": list(base.answers),
        "candidate": list(cand.answers),
        "error": cand.error or base.error or "",
        "pictures": [],
    }


def _pictures(item: Item, session: Any) -> list[dict[str, Any]]:
    """Each picture as a data URL, with the kept tokens of each site where the candidate can be run."""
    try:
        images = item.pictures()
        kept = _kept(session, item, images) if session is not None else [{} for _ in images]
    except RunError as error:  # a picture that broke since the run is said in the page, not fatal to it
        return [{"src": "", "note": str(error), "sites": {}}]
    return [{"src": _url(image), "note": "", **k} for image, k in zip(images, kept, strict=True)]


def _kept(session: Any, item: Item, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    made = session.generate([list(images)], **request_of(session, [(item, [])]), max_new_tokens=1, do_sample=False)
    out = []
    for picture in made.pictures[0]:
        side = int(np.sqrt(picture.tokens))
        grid = picture.grid or ((side, side) if side * side == picture.tokens else None)
        out.append({"grid": grid, "tokens": picture.tokens, "sites": {name: np.asarray(v).tolist() for name, v in picture.kept.items()}})
    return out


def _url(image: Image.Image) -> str:
    """PNG while it is small, else JPEG."""
    if max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE))
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 80})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if kind == "JPEG" or buffer.tell() < 24_000:
            break
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- several candidates


def _pareto(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Points (cost, score) of all candidates and the baseline.

    Cost: measured time of a whole request, else the forecast of prefill FLOPs; None if neither is known of all.
    """
    if all(c.timed is not None for c in comparisons):
        # type: ignore[union-attr,index]
        found = [(c.name, next(s.ratio[0] for s in c.timed.stages if s.name == "total"), c) for c in comparisons]
        unit = "time of a whole request, candidate / baseline"
    elif all(c.manifest.get("cost") for c in comparisons):
        found = [
            (c.name, c.manifest["cost"]["after"]["prefill_flops"] / c.manifest["cost"]["before"]["prefill_flops"], c) for c in comparisons
        ]
        unit = "prefill FLOPs, candidate / baseline (cost model)"
    else:
        return None
    if len(found) < 2:
        return None
    dots = [(comparisons[0].baseline_name, 1.0, comparisons[0].verdict.overall.baseline, "baseline")]
    dots += [(name, cost, c.verdict.overall.candidate, c.verdict.status.value) for name, cost, c in found]
    costs, scores = [d[1] for d in dots], [d[2] for d in dots]
    low, high = min(scores), max(scores)
    pad = max(0.01, 0.15 * (high - low))

    def place(cost: float, score: float) -> tuple[float, float]:
        return round(60 + 500 * cost / max(costs), 1), round(20 + 200 * (high + pad - score) / (high - low + 2 * pad), 1)

    front = sorted((d for d in dots if not any(e[1] <= d[1] and e[2] >= d[2] and e[1:3] != d[1:3] for e in dots)), key=lambda d: d[1])
    return {
        "unit": unit,
        "dots": [{"name": d[0], "kind": d[3], "xy": place(d[1], d[2]), "cost": f"{d[1]:.3f}", "score": points(d[2])} for d in dots],
        "front": " ".join(",".join(map(str, place(d[1], d[2]))) for d in front),
        "ticks": [{"y": place(0, v)[1], "text": points(v)} for v in (low, high)],
        "xticks": [{"x": place(v, low)[0], "text": f"{v:.2f}"} for v in (0, max(costs) / 2, max(costs))],
    }


__all__ = ["Comparison", "Status", "render"]
