"""The learning commands: foveate distill | exits. `register(app)` adds them to the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Limit, Mapped, Plugin, Quiet, Usage, load_plugins, pairs

Data = Annotated[Path, typer.Option("--data", "-d", help="pictures and questions: a folder with items.jsonl, or a file and --mapping; labels are not read")]
Dtype = Annotated[str, typer.Option(help="of the loaded weights: float32, bfloat16")]
Device = Annotated[str, typer.Option(help="where the model is loaded and everything is computed: cpu, cuda")]
DTYPES = ("float32", "bfloat16")


def register(app: typer.Typer) -> None:
    app.command("distill")(train)
    app.command("exits")(exits)


def train(
    model: Annotated[str, typer.Argument(help="model folder or hub id: the teacher, and what the student is made of")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="recipe with learned insertions: name, YAML file, or inline")],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for recipe, weights, curve and checkpoint; continued if it has one")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe parameter: registers=16")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="training setting: steps=2000, lr=0.001, elastic=[4,8,16]")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="folder of the teacher's answers; may be shared between runs")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="start from these")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    mapping: Mapped = None,
    limit: Limit = None,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what a recipe inserts to answer as the model does, on unlabelled pictures and questions."""
    import yaml

    from .distillation import distill, settings_of
    from .passes.recipe import load as load_recipe
    from .runtime.datasets import load_items

    load_plugins(plugin)
    config = settings_of(None, {k: yaml.safe_load(v) for k, v in pairs("--option", option).items()})
    chosen, items = load_recipe(recipe, pairs("--set", set_)), load_items(data, mapping, limit)
    program, processor = _captured(model, dtype, device)
    with Bar(quiet, config.steps) as bar:
        done = distill(program, items, chosen, processor=processor, output=output, settings=config, cache=cache, weights=weights, progress=bar)
    if as_json:
        sys.stdout.write(json.dumps({"recipe": str(done.recipe), "weights": str(done.weights), **done.report}, indent=1) + "\n")
        return
    report = done.report
    print(f"{report['parameters']:,} learned numbers, {report['steps']} steps; {100 * report['agreement']:.1f}% of {report['held_out_questions']} held-out "
          f"questions are answered as by the original\nnext: foveate optimize {model} --recipe {done.recipe} --weights {done.weights} -o ARTIFACT")


def exits(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    data: Data,
    mapping: Mapped = None,
    limit: Limit = 64,
    share: Annotated[float, typer.Option(help="of the questions must keep their answer")] = 0.95,
    task: Annotated[str | None, typer.Option(help="with a task class, the visual tokens that the scaling law gives it")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Where visual tokens may leave: the teacher's agreement with itself when they are removed at each layer, and the layer that it recommends."""
    from .distill_calibrate import calibrate
    from .runtime.datasets import load_items

    items = load_items(data, mapping, limit)
    program, processor = _captured(model, dtype, device)
    with Bar(quiet, 0) as bar:
        found = calibrate(program, processor, items, share=share, task=task, say=lambda line: bar("teacher", line))
    sys.stdout.write(json.dumps(found.as_dict(), indent=1) + "\n") if as_json else print(found)


class Bar:
    """A rich progress bar on a terminal, every tenth of the way as a line elsewhere, nothing when quiet or not the first process."""

    def __init__(self, quiet: bool, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from .distill_train import world

        self.console, self.quiet, self.steps, self.told = Console(stderr=True, highlight=False), quiet or world()[0] > 0, steps, -1
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, console=self.console) if self.console.is_terminal and not self.quiet and steps else None
        self.task: Any = None

    def __enter__(self) -> Bar:
        if self.progress:
            self.progress.start()
            self.task = self.progress.add_task("teacher", total=self.steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, stage: str, line: Any) -> None:
        if self.quiet:
            return
        if stage == "teacher":
            self.progress.update(self.task, description=str(line)) if self.progress else self.console.print(str(line), markup=False)
        elif "loss" in line:
            text = f"loss {line['loss']:.4f}"
            if self.progress:
                self.progress.update(self.task, completed=line["step"], description=text)
            elif (tenth := 10 * line["step"] // max(self.steps, 1)) > self.told:
                self.told = tenth
                self.console.print(f"step {line['step']} of {self.steps}: {text}", markup=False)
        elif "agreement" in line:
            self.console.print(f"step {line['step']}: agreement {100 * line['agreement']:.1f}%, KL {line['held_out_kl']:.4f} on held-out sources", markup=False)
        else:
            self.console.print(", ".join(f"{k} {v}" for k, v in line.items()), markup=False)


def _captured(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """On the process's own GPU where there are several processes."""
    import os

    import torch

    from .graph.capture import capture
    from .graph.families import load_model

    if dtype not in DTYPES:
        raise Usage(f"--dtype {dtype}: it is none of {', '.join(DTYPES)}")
    gpus = torch.cuda.device_count()
    if device != "cpu" and not (gpus and device.partition(":")[0] == "cuda"):
        raise Usage(f"--device {device}: possible are cpu{' and cuda' if gpus else ''}; torch sees {gpus or 'no'} CUDA devices here")
    place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    loaded, processor = load_model(model, dtype=getattr(torch, dtype), device=place)
    return capture(loaded, processor), processor
