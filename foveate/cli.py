"""The command line: foveate optimize | run | check | bench | inspect | passes | recipes | doctor | dump, and the judge's.

Results go to stdout, everything else to stderr. Exit codes: 0 success, 1 verdict FAIL or numbers differ, 2 wrong usage, 3 not possible here
(model, machine, damaged artifact), 4 inconclusive, 5 the build failed, 130 interrupted. Never 0 without the artifact.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .options import Json, Plugin, Quiet, Usage, load_plugins, pairs

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A compiler for vision-language models: token reduction inside the graph, ONNX Runtime and TensorRT out.",
)
err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)

DEFAULT_CODES = {"PassError": 2, "RunError": 2, "GraphError": 3, "LowerError": 3, "DistillError": 2}  # where the phase did not say

Model = Annotated[str, typer.Argument(help="model folder or hub id")]
Folder = Annotated[Path, typer.Argument(help="artifact folder")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", "-r", help="name, YAML file, or inline: 'drop-fastv{layer=2,keep=64}'; none = no reduction")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe parameter: keep=32 or drop-fastv.layer=3")]
OptOption = Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="option of the target, e.g. precision=float16")]
Pictures = Annotated[list[Path] | None, typer.Option("--image", "-i", help="picture file; may be repeated")]


@app.command()
def optimize(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="artifact folder to write")] = None,
    recipe: RecipeOption = None,
    weights: Annotated[str | None, typer.Option("--weights", "-w", help="the recipe's learned tensors, from foveate distill; initial = untrained")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="ort, tensorrt-rtx, tensorrt, eager, ...; see `foveate doctor`")] = "ort",
    set_: SetOption = None,
    option: OptOption = None,
    dtype: Annotated[str, typer.Option(help="of the loaded weights")] = "auto",
    image: Pictures = None,
    text_tokens: Annotated[int, typer.Option(help="prompt length that the forecast assumes")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing artifact")] = False,
    golden: Annotated[bool, typer.Option("--golden/--no-golden", help="keep a tiny example with its results, for `foveate check`")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="forecast only: no weights are read, nothing is lowered or written")] = False,
    save_recipe: Annotated[Path | None, typer.Option(help="write the recipe with its overrides to this YAML file")] = None,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Capture a VLM, reduce its tokens, and write an artifact that runs without the modelling code."""
    from .api import forecast, optimize_model
    from .passes.recipe import load

    load_plugins(plugin)
    overrides, options = pairs("--set", set_), pairs("--option", option)
    if output is None and not dry_run:
        raise Usage("optimize: no output folder; give one with -o, or --dry-run for the forecast alone")
    chosen = load(recipe, overrides)
    pictures = _open(image)
    with _Progress(quiet) as progress:
        if dry_run:
            plan = forecast(model, chosen, target=target, images=pictures, text_tokens=text_tokens, progress=progress, **_values(options))
            report, limits, path = plan.report, plan.limits, None
        else:
            done = optimize_model(
                model,
                chosen,
                target=target,
                output=output,
                weights=weights,
                dtype=dtype,
                images=pictures,
                text_tokens=text_tokens,
                overwrite=overwrite,
                golden=golden,
                progress=progress,
                **_values(options),
            )
            report, limits, path = done.report, [], done.path
    if save_recipe:
        _write(save_recipe, chosen.yaml())
    if as_json:
        _json({**report.as_dict(), "artifact": None if path is None else str(path), "target": target, "limits": limits})
    else:
        out.print(str(report))
        for limit in limits:
            out.print(f"{target} cannot build this: {limit}")
        out.print("dry run: nothing was written" if path is None else f"wrote {path} ({_size(path)})")
    if limits:
        raise typer.Exit(3)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="artifact folder, or a policy file of foveate policy")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="question; the chat template is applied unless --raw")],
    image: Pictures = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="length limit of the answer")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="take the prompt as it is, with the model's image placeholders in it")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="sample instead of greedy")] = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    extra: Annotated[list[str] | None, typer.Option("--extra", metavar="NAME=FILE", help="array for an input that a method asked for: text=vector.npy")] = None,
    overlay: Annotated[Path | None, typer.Option(help="PNG with the kept tokens drawn on the pictures")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="check the hashes of the artifact's files")] = True,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a prompt about pictures with an artifact, or with a policy over several."""
    from .runtime.policies import opened

    load_plugins(plugin)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {k: v for k, v in given.items() if v is not None} | ({"do_sample": True} if sample else {})
    with _Progress(quiet) as progress:
        progress("load", str(artifact))
        session = opened(artifact, verify)
    with session:
        request: dict[str, Any] = {"prompt": prompt} if raw or not getattr(session.processor, "chat_template", None) else {"messages": _question(prompt)}
        arrays = _arrays(extra)
        result = session.generate([str(i) for i in image or []] or None, **request, max_new_tokens=max_new_tokens, seed=seed, extra=arrays, **options)
    drawn = result.overlay(overlay) if overlay else None
    if as_json:
        _json({**result.as_dict(), "overlay": None if drawn is None else str(drawn)})
        return
    out.print(result.text, markup=False)
    t = result.timings
    step = f", decode {_median(t.decode_ms):.1f} ms/token" if t.decode_ms else ""
    if not quiet:
        err.print(
            f"encoder {t.encoder_ms:.1f} ms, prefill {t.prefill_ms:.1f} ms, first token after {t.ttft_ms:.1f} ms{step}; "
            f"{result.layouts[0].visual} visual tokens{_kept(result)}{_bucket(result)}{f'; overlay in {drawn}' if drawn else ''}",
            markup=False,
        )


@app.command()
def bench(
    artifact: Folder,
    baseline: Annotated[Path | None, typer.Option("--baseline", "-b", help="artifact to alternate with and to compare against")] = None,
    image: Pictures = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p")] = None,
    new_tokens: Annotated[int, typer.Option(help="decode steps per repetition + 1")] = 16,
    repeat: Annotated[int, typer.Option(help="timed repetitions")] = 10,
    warmup: Annotated[int, typer.Option(help="untimed repetitions before")] = 3,
    batch: Annotated[int, typer.Option(help="the same request this often")] = 1,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Latency per stage: warm-up, medians, and in turns with a baseline."""
    from .runtime.bench import Request, measure
    from .runtime.session import load

    load_plugins(plugin)
    with _Progress(quiet) as progress:
        sessions = {}
        for name, path in (("artifact", artifact), ("baseline", baseline)):
            if path is not None:
                progress("load", str(path))
                sessions[name] = load(path)
        request = Request.of(sessions["artifact"], [str(i) for i in image or []], prompt, batch, new_tokens)
        result = measure(sessions, request, repeat=repeat, warmup=warmup, progress=lambda line: progress("bench", line))
    for session in sessions.values():
        session.close()
    _json(result.as_dict()) if as_json else out.print(str(result), markup=False)


@app.command()
def inspect(artifact: Folder, verify: Annotated[bool, typer.Option("--verify/--no-verify")] = True, as_json: Json = False) -> None:
    """What an artifact is: target, versions, passes, tokens per layer, components, files."""
    from .export.artifact import Artifact

    loaded = Artifact.load(artifact, verify)
    manifest = loaded.manifest
    if as_json:
        _json(manifest)
        return
    facts = manifest["facts"]
    out.print(
        f"{artifact}: {facts['model_type']} for {manifest['target']}, {facts['layers']} layers, {_size(artifact)}, "
        f"hashes {'checked' if verify else 'not checked'}"
    )
    out.print("versions: " + ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items()))
    for record in manifest.get("history", []):
        out.print(
            f"pass {record['name']} {_inline(record['parameters'])}: {'changed' if record['changed'] else 'nothing to change'}",
            markup=False,
        )
    lengths: dict[str, list[int]] = {}
    for entry in manifest["kv"]:
        lengths.setdefault(entry["length"], []).append(entry["layer"])
    for length, layers in lengths.items():
        out.print(f"layers {layers[0]}..{layers[-1]}: {length} cached rows (S = prompt, N = visual tokens)", markup=False)
    table = Table("stage", "file", "inputs", "outputs", box=None)
    for stage, c in manifest["components"].items():
        table.add_row(stage, c["file"], str(len(c["inputs"])), str(len(c["outputs"])))
    out.print(table)


@app.command()
def passes(plugin: Plugin = None, as_json: Json = False) -> None:
    """The catalogue of passes, from the classes themselves."""
    from .passes.base import SHAPES
    from .passes.catalogue import catalogue

    load_plugins(plugin)
    rows = catalogue()
    if as_json:
        _json(rows)
        return
    table = Table("pass", "place", "counts", "parameters", "what", "paper", box=None)
    for r in rows:
        table.add_row(r["name"], r["place"], r["shapes"], _inline(r["parameters"]), r["what"], r["paper"])
    out.print(table)
    for word, meaning in SHAPES.items():
        if word:
            out.print(f"counts {word}: {meaning}")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="show this recipe as YAML")] = None, as_json: Json = False) -> None:
    """The named recipes, or one of them in full."""
    from .passes.recipe import load, names

    if name:
        recipe = load(name)
        _json({"name": recipe.name, "passes": [{s.rewrite.name: s.rewrite.parameters()} for s in recipe.steps]}) if as_json else out.print(
            recipe.yaml(), markup=False
        )
        return
    found = [load(n) for n in names()]
    if as_json:
        _json([{"name": r.name, "description": r.description, "paper": r.paper, "passes": [s.rewrite.name for s in r.steps]} for r in found])
        return
    table = Table("recipe", "what", "passes", "paper", box=None)
    for r in found:
        table.add_row(r.name, r.description, ", ".join(s.rewrite.name for s in r.steps), r.paper)
    out.print(table)


@app.command()
def doctor(plugin: Plugin = None, as_json: Json = False) -> None:
    """Versions, ONNX Runtime providers, GPUs, and what each target can do on this machine."""
    from .doctor import diagnose

    load_plugins(plugin)
    found = diagnose()
    if as_json:
        _json(found)
        return
    out.print("packages: " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    out.print(f"python {found['python']} on {found['platform']}, {found['cpus']} CPUs, {found['memory_gb']:.1f} GB memory")
    out.print(f"ONNX Runtime providers: {', '.join(found['providers']) or 'none'}")
    out.print(f"GPUs: {', '.join(found['gpus']) or 'none'}")
    table = Table("target", "here", "options", box=None)
    for t in found["targets"]:
        table.add_row(t["name"], escape(t["problem"] or "ready"), ", ".join(t["options"]))
    out.print(table)
    for line in found["warnings"]:
        out.print(f"warning: {line}", markup=False)


@app.command()
def dump(
    model: Model,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    after: Annotated[str | None, typer.Option(help="the program right after this pass of the recipe (or after this pass with its defaults)")] = None,
    stage: Annotated[str | None, typer.Option(help="vision, prefill or decode; all when left out")] = None,
    plugin: Plugin = None,
    quiet: Quiet = False,
) -> None:
    """The captured and rewritten graphs as text (no weights are read)."""
    from .api import forecast
    from .graph.dump import dump as text
    from .passes.recipe import Recipe, load

    load_plugins(plugin)
    chosen = load(recipe if recipe or not after else after, pairs("--set", set_))
    if after:
        names = [s.rewrite.name for s in chosen.steps]
        if after not in names:
            raise Usage(f"dump: pass {after!r} is not in recipe {chosen.name!r}; it has {', '.join(names)}")
        chosen = Recipe(chosen.name, chosen.steps[: names.index(after) + 1])
    with _Progress(quiet) as progress:
        plan = forecast(model, chosen, progress=progress)
    out.print(text(plan.program, stage), markup=False)


from .commands_judge import register as _judge  # noqa: E402  eval, gate, report, bisect

_judge(app)

from .commands_learn import register as _learn  # noqa: E402  distill, exits

_learn(app)

from .commands_policy import register as _policy  # noqa: E402  policy

_policy(app)


# -- small things


class _Progress:
    """A spinner on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool):
        self.quiet, self.status = quiet, err.status("starting") if err.is_terminal and not quiet else None

    def __enter__(self) -> _Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def __call__(self, stage: str, line: str) -> None:
        if self.quiet:
            return
        if self.status:
            self.status.update(f"{stage}: {line}")
        if not self.status or stage == "pass":
            err.print(f"{stage}: {line}", markup=False)


def _arrays(given: list[str] | None) -> dict[str, Any]:
    """NAME=FILE.npy -> arrays; nothing that could run code is read."""
    import numpy as np

    found = {}
    for name, path in pairs("--extra", given).items():
        try:
            found[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Usage(f"--extra {name}: {path} cannot be read as a .npy array ({_one_line(error)})") from None
    return found


def _values(pairs: dict[str, str]) -> dict[str, Any]:
    """Option values as YAML reads them: 1 is a number, true a truth value; "1:8:64" stays text (YAML 1.1 would read minutes)."""
    import yaml

    return {k: v if ":" in v else yaml.safe_load(v) for k, v in pairs.items()}


def _open(paths: list[Path] | None) -> list[Any] | None:
    from .runtime.prompts import load_picture

    return [load_picture(p) for p in paths] if paths else None


def _question(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def _kept(result: Any) -> str:
    sites = {k.removeprefix("kept."): int((v[0] >= 0).sum()) for k, v in result.kept.items()}
    return "".join(f", {n} kept at {site}" for site, n in sites.items())


def _bucket(result: Any) -> str:
    """Of a policy's answer: who gave it, and why."""
    if not hasattr(result, "buckets"):
        return ""
    measured = result.confidence[0]
    return f"; artifact {result.buckets[0] + 1} answered after {len(result.runs[0])} run(s), measured {'nothing' if measured is None else f'{measured:.4g}'}"


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _inline(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in parameters.items())


def _size(folder: Path) -> str:
    total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return f"{total / 1e6:,.1f} MB"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise Usage(f"cannot write {path}: {error.strerror or error}") from None


def _json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _quieten() -> None:
    """Third-party chatter off: what matters is said by us."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not _debug():
        warnings.simplefilter("ignore")


def _debug() -> bool:
    return os.environ.get("FOVEATE_DEBUG", "0") not in ("", "0")


def execute(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit code. Every error is one sentence on stderr."""
    from .graph.errors import FoveateError

    _quieten()
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # typer swallows the interrupt itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted; nothing half-written was left behind", 130)
    except typer.Exit as done:
        return done.exit_code
    except Usage as error:
        return _complain(str(error), 2)
    except FoveateError as error:
        _trace()
        return _complain(str(error), getattr(error, "exit_code", DEFAULT_CODES.get(type(error).__name__, 5)))
    except Exception as error:  # the last line of defence: no traceback for users, and never exit code 0
        if hasattr(error, "format_message"):  # typer's own usage errors
            return _complain(error.format_message(), 2)
        _trace()
        return _complain(f"unexpected {type(error).__name__}: {_one_line(error)} (FOVEATE_DEBUG=1 shows where)", 5)


def _trace() -> None:
    if _debug():
        import traceback

        traceback.print_exc()


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _complain(text: str, code: int) -> int:
    err.print(f"error: {text}", markup=False)
    return code


def main() -> None:
    sys.exit(execute())


if __name__ == "__main__":
    main()
