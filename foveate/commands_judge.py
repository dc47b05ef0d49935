"""The judge's commands: foveate eval | gate | report | bisect | check. `register(app)` adds them to the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .graph.errors import FoveateError
from .options import Json, Limit, Mapped, Plugin, Quiet, load_plugins
from .runtime.errors import GateError

Data = Annotated[Path | None, typer.Option("--data", "-d", help="data set: a folder with items.jsonl, or a file and --mapping")]
Batch = Annotated[int, typer.Option("--batch", help="items at a time; results depend on it in the last bits")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="longest answer")]
Logits = Annotated[bool, typer.Option("--logits", help="save the first token's log-probabilities, for the agreement figures")]
Work = Annotated[Path, typer.Option("--work", help="folder of the per-item results; an interrupted run goes on from there")]

GAP_ITEMS = 32  # on which the log-likelihood gap is measured


def register(app: typer.Typer) -> None:
    for name, command in (("eval", evaluate), ("gate", gate), ("report", report), ("bisect", bisect), ("check", check)):
        app.command(name)(command)


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="artifact folder or policy file")],
    data: Annotated[Path, typer.Option("--data", "-d", help="data set: a folder with items.jsonl, or a file and --mapping")],
    output: Annotated[Path, typer.Option("--output", "-o", help="results file (.jsonl); continued if it exists")],
    mapping: Mapped = None,
    limit: Limit = None,
    shard: Annotated[str, typer.Option(help="i/n: every n-th item, beginning with the i-th")] = "1/1",
    batch: Batch = 1,
    max_new_tokens: NewTokens = 64,
    logits: Logits = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a data set with an artifact: per-item results and a table by slice."""
    from .runtime import evaluate as runner
    from .runtime.datasets import load_items
    from .runtime.policies import opened

    items = load_items(data, mapping, limit)
    with opened(artifact) as session:
        run = runner.evaluate(
            session,
            items,
            output,
            runner.Settings(max_new_tokens, batch, logits),
            shard=_shard(shard),
            name=artifact.name,
            progress=_progress(quiet, artifact.name),
        )
    rows = runner.summary(run)
    wrong = [r for r in run.errors if r.kind == "model"]
    if as_json:
        _json({"results": str(output), "slices": rows, "yes_no": runner.binary(run, items), "model_errors": [r.id for r in wrong]})
    else:
        for r in rows:
            score = "unlabelled" if r["score"] is None else f"{100 * r['score']:6.2f}  [{100 * r['low']:.2f}, {100 * r['high']:.2f}]"
            _say(f"{r['slice']:20s} {r['metric']:16s} {score}  n={r['n']}")
    if wrong:
        raise _coded(GateError(f"eval: {len(wrong)} items gave no number (first: {wrong[0].id}: {wrong[0].error}); they count as wrong"), 1)


@dataclass
class Side:
    """Candidate or baseline: saved results, or an artifact that can be run."""

    name: str
    path: Path
    session: Any = None
    run: Any = None

    @classmethod
    def open(cls, path: Path, stack: ExitStack, who: str, say: Callable[[str], None]) -> Side:
        from .runtime.results import read
        from .runtime.session import load

        if path.is_dir():
            say(f"loading {path}")
            return cls(path.name, path, session=stack.enter_context(load(path)))
        if path.is_file() and path.suffix == ".jsonl":
            return cls(path.stem, path, run=read(path))
        raise GateError(f"gate: {who} {path} is neither an artifact folder nor a results file (.jsonl)")


@dataclass
class Inputs:
    """What a gate runs on."""

    items: Sequence[Any]
    settings: Any
    work: Path
    progress: Callable[[str], Callable[..., None] | None]
    seed: int = 0
    order: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np

        self.order = [self.items[k] for k in np.random.default_rng(self.seed).permutation(len(self.items))]

    def results(self, side: Side, until: int) -> Any:
        """The side's results on the first `until` items of the seeded order."""
        from .runtime import evaluate as runner
        from .runtime.results import Run

        if side.run is not None:
            wanted = [i.id for i in self.order[:until]] if self.order else list(side.run.results)
            lost = [i for i in wanted if i not in side.run.results]
            if lost:
                raise GateError(f"gate: {side.path} lacks {len(lost)} items of the data set (first: {lost[0]})")
            return Run(side.run.header, {i: side.run.results[i] for i in wanted})
        path = self.work / f"{side.name}-{runner.fingerprint(side.session)}-{runner.digest(self.order)[:8]}.jsonl"
        return runner.evaluate(
            side.session, self.order, path, self.settings, until=until, name=side.name, progress=self.progress(side.name)
        )


def gate(
    candidate: Annotated[Path | None, typer.Argument(help="artifact folder or results file")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", "-b", help="artifact folder, or results file (committed; made by the first run)")
    ] = None,
    data: Data = None,
    mapping: Mapped = None,
    limit: Limit = None,
    margin: Annotated[float, typer.Option(help="points that the candidate may lose")] = 1.0,
    confidence: Annotated[float, typer.Option(help="of a PASS")] = 0.95,
    slices: Annotated[
        str, typer.Option(help="guard: a slice that is shown to be worse fails; strict: each slice must pass; report: shown only")
    ] = "guard",
    slice_margin: Annotated[float | None, typer.Option(help="points that a slice may lose; default: the margin")] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="largest time to first token and in all, candidate / baseline")] = None,
    looks: Annotated[int, typer.Option(help="judge at this many equal parts of the data and stop when the verdict is clear")] = 1,
    batch: Batch = 1,
    max_new_tokens: NewTokens = 64,
    logits: Logits = False,
    seed: Annotated[int, typer.Option(help="of the order of items and of the bootstrap")] = 0,
    accept: Annotated[bool, typer.Option("--accept", help="make the candidate's results the new baseline file")] = False,
    plan: Annotated[
        float | None, typer.Option(metavar="SHARE", help="only print the items that a PASS needs if this share of answers changes (0.05)")
    ] = None,
    work: Work = Path("foveate-results"),
    junit: Annotated[Path | None, typer.Option(help="JUnit XML to write")] = None,
    metrics: Annotated[Path | None, typer.Option(help="JSON for github-action-benchmark to write")] = None,
    summary: Annotated[Path | None, typer.Option(help="markdown to write; on GitHub the step summary is written anyway")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML report to write")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Is the candidate at most MARGIN points worse than its baseline? PASS 0, FAIL 1, INCONCLUSIVE 4, wrong usage 2, not possible
    here 3.
    """
    from .runtime import gate as rules
    from .runtime.evaluate import Settings

    rule = rules.Rule(
        margin / 100,
        confidence,
        slices=slices,
        slice_margin=None if slice_margin is None else slice_margin / 100,
        looks=looks,
        max_latency_ratio=max_latency_ratio,
        seed=seed,
    )
    if plan is not None:
        needed = rules.recommended(rule, plan)
        _json(
            {"items": needed, "changed": plan, "margin": margin, "confidence": confidence, "power": rule.power, "looks": looks}
        ) if as_json else _say(
            f"{needed} items give a PASS with {rule.power:.0%} chance if nothing is lost and {plan:.1%} of the answers change "
            f"(margin {margin:g} points, confidence {confidence:.0%})"
        )
        return
    if candidate is None or baseline is None:
        raise GateError("gate: give a candidate and --baseline: artifact folders or results files")
    with ExitStack() as stack:
        inputs = _inputs(data, mapping, limit, Settings(max_new_tokens, batch, logits), work, quiet, seed)
        fresh = baseline.suffix == ".jsonl" and not baseline.exists()
        if accept and baseline.suffix != ".jsonl":
            raise GateError(f"gate: --accept writes a baseline file, but --baseline {baseline} is not a .jsonl file")
        a = Side.open(candidate, stack, "candidate", _line(quiet))
        b = None if fresh or accept else Side.open(baseline, stack, "baseline", _line(quiet))
        inputs = _filled(inputs, a, b)
        if b is None:
            _accepted(inputs.results(a, len(inputs.order)), baseline, fresh and not accept)
            return
        timed = _timed(a, b, inputs, rule, quiet) if max_latency_ratio is not None else None
        verdict, runs = _judged(a, b, inputs, rule, timed)
        found = _Found(verdict, *runs, timed, inputs.items, a, b)
        _write_outputs(found, junit, metrics, summary, html, as_json)
    raise typer.Exit(verdict.exit_code)


def _judged(a: Side, b: Side, inputs: Inputs, rule: Any, timed: Any) -> tuple[Any, tuple[Any, Any]]:
    """Look after look until the verdict is clear."""
    from .runtime import gate as rules
    from .runtime.results import pairs

    verdict = None
    for look, share in enumerate(rule.fractions):
        size = inputs.settings.batch
        until = min(len(inputs.order), -(-max(1, round(len(inputs.order) * share)) // size) * size)  # whole batches
        runs = inputs.results(b, until), inputs.results(a, until)
        last = look == rule.looks - 1
        verdict = rules.judge(pairs(*runs), rule, timed.pairs() if timed else None, look)
        if last or verdict.status is not rules.Status.INCONCLUSIVE:
            return verdict, runs
    raise GateError("gate: no look was taken")


def _inputs(data: Path | None, mapping: str | None, limit: int | None, settings: Any, work: Path, quiet: bool, seed: int) -> Inputs:
    from .runtime.datasets import load_items

    items = load_items(data, mapping, limit) if data is not None else []
    return Inputs(items, settings, work, lambda name: _progress(quiet, name), seed)


def _filled(inputs: Inputs, a: Side, b: Side | None) -> Inputs:
    """Without --data both sides must be saved results, and their items are the data set."""
    sides = [s for s in (a, b) if s is not None]
    if inputs.items:
        return inputs
    if any(s.session is not None for s in sides):
        raise GateError("gate: --data is needed to run an artifact")
    if b is not None and a.run.results.keys() != b.run.results.keys():
        from .runtime.results import pairs

        pairs(b.run, a.run)  # says which items differ
    return Inputs(list(a.run.results.values()), inputs.settings, inputs.work, inputs.progress, inputs.seed)


def _accepted(run: Any, path: Path, first: bool) -> None:
    """Write a baseline file, without timings so that it changes only when an answer does. The first one fails: nothing was compared."""
    from .runtime.results import write

    header = {k: v for k, v in run.header.items() if k != "shard"}
    write(path, header, sorted((replace(r, ms={}) for r in run.results.values()), key=lambda r: r.id))
    if first:
        raise _coded(
            GateError(
                f"gate: there was no baseline {path}; the candidate's {len(run.results)} results were written there, commit "
                f"it and run again (--accept says so at once)"
            ),
            1,
        )
    _say(f"accepted: {path} holds {len(run.results)} results of {run.name}")


def _timed(a: Side, b: Side, inputs: Inputs, rule: Any, quiet: bool) -> Any:
    from .runtime import latency

    if a.session is None or b.session is None:
        raise GateError("gate: --max-latency-ratio needs two artifacts, timed in turns; saved results cannot be timed")
    say = _line(quiet)
    return latency.compare(
        a.session,
        b.session,
        images=inputs.items[0].pictures(),
        confidence=rule.confidence,
        seed=rule.seed,
        progress=lambda text: say(f"latency: {text}"),
    )


@dataclass(frozen=True)
class _Found:
    verdict: Any
    baseline: Any
    candidate: Any
    timed: Any
    items: Sequence[Any]
    a: Side
    b: Side


def _write_outputs(found: _Found, junit: Path | None, metrics: Path | None, summary: Path | None, html: Path | None, as_json: bool) -> None:
    from .runtime import outputs

    verdict = found.verdict
    agreed = _agreed(found.a, found.b, found.baseline, found.candidate, found.items)
    texts = {junit: outputs.junit(verdict), metrics: outputs.metrics_json(verdict, agreed), summary: outputs.markdown(verdict, agreed)}
    for path, text in texts.items():
        if path is not None:
            _write(path, text)
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(step).open("a", encoding="utf-8") as file:
            file.write(outputs.markdown(verdict, agreed))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stderr.write("\n".join(outputs.annotations(verdict)) + "\n")
    if html is not None:
        from .runtime.report import Comparison, render

        _write(
            html,
            render(
                [
                    Comparison(
                        found.a.name,
                        found.b.name,
                        verdict,
                        found.candidate,
                        found.baseline,
                        agreed,
                        found.timed,
                        _manifest(found.a),
                        _manifest(found.b),
                        tuple(found.items),
                        found.a.session,
                    )
                ]
            ),
        )
    broken = {side: [r for r in run.errors if r.kind == "model"] for side, run in (("baseline", found.baseline), ("candidate", found.candidate))}
    for side, wrong in broken.items():
        if wrong:
            _line(False)(f"warning: {len(wrong)} items of the {side} gave no number (first: {wrong[0].id}: {wrong[0].error}); they count as wrong")
    if as_json:
        _json(
            {
                **verdict.as_dict(),
                "model_errors": {side: [r.id for r in wrong] for side, wrong in broken.items()},
                "agreement": agreed.as_dict() if agreed else None,
                "timing": found.timed.as_dict() if found.timed else None,
            }
        )
    else:
        _say(outputs.text(verdict, agreed))


def _agreed(a: Side, b: Side, base: Any, cand: Any, items: Sequence[Any]) -> Any:
    """The label-free figures; the log-likelihood gap needs both models at hand and --logits, and takes the first items."""
    from .runtime import agreement

    if not any(r.answers for r in cand.results.values()):
        return None
    asked = any(r.first for r in cand.results.values())
    live = a.session is not None and b.session is not None and asked
    gap = agreement.likelihood_gap(b.session, a.session, list(items)[:GAP_ITEMS])[0] if live else None
    return agreement.compare(base, cand, gap)


def _manifest(side: Side) -> Mapping[str, Any]:
    return side.session.manifest if side.session is not None else {}


def report(
    candidates: Annotated[list[Path], typer.Argument(help="artifact folders or results files; the first is shown first")],
    baseline: Annotated[Path, typer.Option("--baseline", "-b", help="artifact folder or results file")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write")],
    data: Data = None,
    mapping: Mapped = None,
    limit: Limit = None,
    margin: Annotated[float, typer.Option(help="points that a candidate may lose")] = 1.0,
    confidence: Annotated[float, typer.Option(help="of a PASS")] = 0.95,
    time: Annotated[bool, typer.Option("--time/--no-time", help="measure latency where both sides are artifacts")] = True,
    batch: Batch = 1,
    max_new_tokens: NewTokens = 64,
    logits: Logits = False,
    work: Work = Path("foveate-results"),
    quiet: Quiet = False,
) -> None:
    """One HTML file: verdicts, slices, tokens, cost, latency, the items that changed with their kept tokens.

    Exit code 0 whatever the verdicts.
    """
    from .runtime.evaluate import Settings
    from .runtime.gate import Rule
    from .runtime.report import Comparison, render

    rule = Rule(margin / 100, confidence)
    with ExitStack() as stack:
        inputs = _inputs(data, mapping, limit, Settings(max_new_tokens, batch, logits), work, quiet, 0)
        b = Side.open(baseline, stack, "baseline", _line(quiet))
        found = []
        for path in candidates:
            a = Side.open(path, stack, "candidate", _line(quiet))
            filled = _filled(inputs, a, b)
            timed = _timed(a, b, filled, rule, quiet) if time and a.session is not None and b.session is not None else None
            verdict, (base, cand) = _judged(a, b, filled, rule, None)
            agreed = _agreed(a, b, base, cand, inputs.items)
            found.append(
                Comparison(a.name, b.name, verdict, cand, base, agreed, timed, _manifest(a), _manifest(b), tuple(inputs.items), a.session)
            )
        _write(output, render(found))
    _say(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB): " + ", ".join(f"{c.name} {c.verdict.status.value}" for c in found))


def bisect(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    data: Annotated[Path, typer.Option("--data", "-d", help="data set: a folder with items.jsonl, or a file and --mapping")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="the original: folder or hub id; default: what the artifact was made of")] = None,
    mapping: Mapped = None,
    limit: Annotated[int, typer.Option("--limit", help="items to compare")] = 32,
    error: Annotated[float, typer.Option(help="largest relative difference of a lowering")] = 0.02,
    floor: Annotated[float, typer.Option(help="share of equal tokens below which a pass may be called broken")] = 0.85,
    drop: Annotated[float, typer.Option(help="loss of equal tokens at one pass that is called a break")] = 0.1,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Walk from the original to the artifact, pass by pass and lowering by lowering, and name the step that breaks agreement: 0
    none, 1 found, 4 none of those that run on this machine.
    """
    import tempfile

    from .runtime.bisect import Limits
    from .runtime.bisect import bisect as walk
    from .runtime.datasets import load_items
    from .walk import steps

    limits, items = Limits(error, floor, drop), load_items(data, mapping, limit)
    load_plugins(plugin)
    with tempfile.TemporaryDirectory(prefix="foveate-bisect-") as folder:
        found = walk(steps(artifact, model, items[0].pictures(), Path(folder), _line(quiet)), items, limits, _line(quiet))
    _json(found.as_dict()) if as_json else _say(str(found))
    raise typer.Exit(found.exit_code)


def check(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    limit: Annotated[float | None, typer.Option(help="largest relative difference of every output; default: by the artifact's precision")] = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Replay the golden files of an artifact on this machine: 0 as when it was made, 1 numbers differ, 3 it cannot run here."""
    from .export.artifact import Artifact
    from .export.backends.base import find
    from .runtime import golden

    if limit is not None and not 0 < limit < 1:
        raise GateError(f"check: limit is {limit:g}; it must lie between 0 and 1")
    load_plugins(plugin)
    loaded = Artifact.load(artifact)
    engine = find(loaded.target).open(loaded)
    try:
        found = golden.check(engine, loaded.path, loaded.manifest, limit)
    finally:
        engine.close()
    _json(found.as_dict()) if as_json else _say(str(found))
    raise typer.Exit(0 if found.ok else 1)


# -- small things


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(p) for p in text.split("/"))
    except ValueError:
        raise GateError(f"shard {text!r}: write it as i/n") from None
    return index, count


def _progress(quiet: bool, name: str) -> Callable[[int, int, float | None], None] | None:
    """One line that is rewritten on a terminal; elsewhere a line per tenth."""
    if quiet:
        return None
    terminal = sys.stderr.isatty()

    def show(done: int, total: int, score: float | None) -> None:
        if terminal or done == total or done * 10 // total > (done - 1) * 10 // total:
            mean = "" if score is None else f", score {100 * score:.1f}"
            sys.stderr.write(f"{chr(13) if terminal else ''}{name}: {done}/{total}{mean}{'' if terminal and done < total else chr(10)}")
            sys.stderr.flush()

    return show


def _line(quiet: bool) -> Callable[[str], None]:
    return lambda text: None if quiet else sys.stderr.write(text + "\n") and None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise GateError(f"cannot write {path}: {error.strerror or error}") from None


def _coded(error: FoveateError, code: int) -> FoveateError:
    error.exit_code = code  # type: ignore[attr-defined]
    return error
