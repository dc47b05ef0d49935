"""The policy command: foveate policy. `register(app)` adds it to the command line."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands_learn import Data
from .options import Json, Limit, Mapped, Quiet, Usage, pairs


def register(app: typer.Typer) -> None:
    app.command("policy")(policy)


def policy(
    artifacts: Annotated[list[Path], typer.Argument(help="artifact folders of one model, cheapest first")],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="policy file (YAML) to write, beside the artifacts")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="coarse-to-fine or density-budget")] = "coarse-to-fine",
    agreement: Annotated[float | None, typer.Option(help="least share of answers that must be the teacher's; then least cost")] = None,
    cost: Annotated[float | None, typer.Option(help="largest mean cost, a share of the last artifact's; then most agreement")] = None,
    teacher: Annotated[Path | None, typer.Option(help="artifact whose answers are the right ones; the last one when left out")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="measure, over, mode (coarse-to-fine), signal (density-budget)")] = None,
    batch: Annotated[int, typer.Option(help="requests at a time")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 64,
    mapping: Mapped = None,
    limit: Limit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the thresholds of a runtime policy on unlabelled pictures and questions: which artifact answers which request."""
    from .runtime.datasets import load_items
    from .runtime.policies.saved import KINDS
    from .runtime.session import load

    if kind not in KINDS:
        raise Usage(f"policy: no kind {kind!r}; there are {', '.join(KINDS)}")
    chosen, options = KINDS[kind], pairs("--set", set_)
    if unknown := sorted(set(options) - set(chosen.settings)):
        raise Usage(f"--set {unknown[0]}: {kind} has {', '.join(chosen.settings)}")
    items = load_items(data, mapping, limit)
    with ExitStack() as stack:
        buckets = [stack.enter_context(load(a)) for a in artifacts]
        judge = stack.enter_context(load(teacher)) if teacher else None
        made = chosen(buckets, **options).calibrate(
            items, agreement=agreement, cost=cost, teacher=judge, batch=batch, max_new_tokens=max_new_tokens,
            progress=lambda line: None if quiet else print(line, file=sys.stderr),
        )
        path = made.save(output)
    if as_json:
        record: dict[str, Any] = {"policy": str(path), "thresholds": made.thresholds, **asdict(made.calibration)}
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    print(f"{made.calibration}\nwrote {path}")
