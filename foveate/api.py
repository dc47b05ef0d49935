"""optimize_model: capture, rewrite, lower, save. What `foveate optimize` runs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .export.artifact import Artifact, Draft
from .export.backends.base import Backend, find
from .export.errors import LowerError
from .graph.errors import FoveateError, GraphError
from .graph.program import PassRecord, Program
from .marks import Marks
from .passes.base import PassError
from .passes.insert import PREFIX, learned, load_weights, save_weights, settle
from .passes.pipeline import run
from .passes.recipe import Recipe
from .passes.recipe import load as load_recipe
from .report import TEXT_TOKENS, Figures, Report
from .runtime.session import Session, load

Progress = Callable[[str, str], None]  # stage of work ("capture", "pass", ...), a line about it

USAGE, UNSUPPORTED, BUILD = 2, 3, 5  # exit codes of what goes wrong where
PACKAGES = ("foveate", "torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "numpy")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class OptimizedModel:
    """An artifact on disk, with what was done to get it. `generate` opens it on first use."""

    path: Path
    report: Report
    history: list[PassRecord]
    _session: Session | None = field(default=None, repr=False)
    _temporary: Any = field(default=None, repr=False)  # keeps an unnamed output alive as long as this object

    @property
    def artifact(self) -> Artifact:
        return Artifact.load(self.path, verify=False)

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = load(self.path)
        return self._session

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As `Session.generate`."""
        return self.session.generate(*arguments, **options)


@dataclass(frozen=True)
class Plan:
    """A rewritten program and everything that is known before it is lowered."""

    program: Program
    report: Report
    recipe: Recipe
    model: Any
    processor: Any
    limits: list[str]
    source: str  # where the model came from: folder, hub id, or the class of a loaded one
    learned: Mapping[str, Any] = field(default_factory=dict)  # what insertions learned, by name


def optimize_model(
    model: Any,
    recipe: Any = None,
    *,
    target: str = "ort",
    output: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    processor: Any = None,
    images: Sequence[Any] | None = None,
    text_tokens: int = TEXT_TOKENS,
    overwrite: bool = False,
    golden: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> OptimizedModel:
    """Capture a VLM, apply a recipe, lower it for `target` and save the artifact in the folder `output`.

    model: a folder or hub id, or a loaded transformers model (then pass its processor). recipe: a name, a YAML file, inline text
    ("drop-fastv{layer=2,keep=64}"), a list of passes, or None for no reduction. overrides: {"keep": 32} or {"drop-fastv.layer": 3}.
    weights: the safetensors file that `foveate.distill` made for this recipe; needed where a recipe inserts learned tensors ("initial" takes their
    untrained values). images: pictures that fix the geometry of families that need one. options: the target's own (see `foveate doctor`).
    golden: keep a tiny example per stage with its results, for `foveate check`.
    Nothing is left behind when anything fails. Raises a FoveateError.
    """
    say = progress or (lambda stage, line: None)
    with _fails_as(USAGE):
        backend = find(target)
        settings = backend.settings(options)
        _check_output(output, overwrite)
    with _fails_as(UNSUPPORTED):
        if why := backend.available():
            raise LowerError(f"{target}: {why}")
    plan = make_plan(
        model,
        recipe,
        backend=backend,
        dtype=dtype,
        overrides=overrides,
        processor=processor,
        images=images,
        text_tokens=text_tokens,
        settings=settings,
        progress=say,
        learned_from=weights,
    )
    with _fails_as(UNSUPPORTED):
        if plan.limits:
            raise LowerError("; ".join(x if x.startswith(f"{target}:") else f"{target}: {x}" for x in plan.limits))
        if plan.processor is None:
            raise GraphError("optimize: a loaded model was given without its processor; pass processor= (the artifact needs it to run)")
    temporary = tempfile.TemporaryDirectory(prefix="foveate-") if output is None else None
    path = Path(temporary.name, "artifact") if temporary else Path(output)
    build(plan, path, backend, settings, overwrite=overwrite, golden=golden, progress=say)
    return OptimizedModel(path, plan.report, list(plan.program.history), _temporary=temporary)


def build(
    plan: Plan,
    path: Path,
    backend: Backend,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    golden: bool = True,
    progress: Progress = lambda stage, line: None,
) -> None:
    """Lower a plan and save it as an artifact. Nothing is left behind when anything fails."""
    with _fails_as(BUILD), Artifact.create(path, overwrite) as draft:
        progress("lower", f"{backend.name}: writing components")
        draft.manifest["components"] = backend.lower(plan.program, draft.folder, settings)
        _save_sources(draft, plan)
        if golden:
            progress("golden", "a tiny example of every stage, for `foveate check`")
            _save_golden(draft, plan.program)
        _fill_manifest(draft, plan, backend.name, settings)
        progress("save", f"{path}")


def forecast(
    model: Any,
    recipe: Any = None,
    *,
    target: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    images: Sequence[Any] | None = None,
    text_tokens: int = TEXT_TOKENS,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """What `optimize_model` would do, without weights (a path is loaded on the meta device) and without lowering: `plan.report`, `plan.limits`."""
    with _fails_as(USAGE):
        backend = find(target) if target else None
        settings = backend.settings(options) if backend else {}
    return make_plan(
        model,
        recipe,
        backend=backend,
        overrides=overrides,
        images=images,
        text_tokens=text_tokens,
        settings=settings,
        weights=False,
        learned_from="initial",
        progress=progress or (lambda stage, line: None),
    )


def make_plan(
    model: Any,
    recipe: Any,
    *,
    backend: Backend | None,
    settings: Mapping[str, Any],
    progress: Progress,
    dtype: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    processor: Any = None,
    images: Sequence[Any] | None = None,
    text_tokens: int = TEXT_TOKENS,
    weights: bool = True,
    learned_from: str | Path | None = None,
) -> Plan:
    """Capture, rewrite, compare."""
    with _fails_as(USAGE):
        chosen = load_recipe(recipe, {k: str(v) for k, v in (overrides or {}).items()})
        if dtype not in DTYPES:
            raise GraphError(f"optimize: dtype {dtype!r} is none of {list(DTYPES)}")
    source = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    with _fails_as(UNSUPPORTED):
        model, processor = _loaded(model, processor, dtype, weights, progress)
        progress("capture", f"{model.config.model_type}: vision, prefill, decode")
        from .graph.capture import capture

        program = capture(model, processor, images=images)
        for note in program.facts.notes:
            progress("note", note)
        before = Figures.of(program, text_tokens)
    with _fails_as(USAGE):
        marks = Marks(program)

        def passed(record: PassRecord, program: Program) -> None:
            progress("pass", _line(record))
            marks(record, program)

        run(program, chosen, passed)
        marks.write(program)
        inserted = _learn(program, chosen, learned_from, progress)
    with _fails_as(UNSUPPORTED):
        limits = backend.check(program, settings) if backend else []
        scratch = (lambda sizes: backend.scratch(program, settings, sizes)) if backend and not limits else None
        report = Report(chosen.name, before, Figures.of(program, text_tokens, scratch=scratch))
    return Plan(program, report, chosen, model, processor, limits, source, inserted)


def _learn(program: Program, recipe: Recipe, source: str | Path | None, progress: Progress) -> dict[str, Any]:
    """Fill what the recipe inserted, fold what depends on weights alone; returns the learned tensors by name."""
    tensors = learned(program)
    if source is not None and str(source) != "initial":
        progress("note", f"{load_weights(program, source)} learned tensors from {source}")
    elif tensors and source is None:
        raise PassError(
            f"optimize: recipe {recipe.name!r} inserts {len(tensors)} learned tensors ({next(iter(tensors)).removeprefix(PREFIX)}, ...) and no weights were "
            "given; train them with foveate distill and pass the file, or say weights 'initial' for their untrained values"
        )
    if tensors:
        settle(program)
    return dict(tensors)


def _loaded(model: Any, processor: Any, dtype: str, weights: bool, progress: Progress) -> tuple[Any, Any]:
    """A model and its processor: loaded from a path or hub id, or as given."""
    if not isinstance(model, (str, Path)):
        return model.eval(), processor
    import torch

    from .graph.families import load_model

    progress("load", str(model))
    loaded, found = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device="cpu" if weights else "meta")
    return loaded, processor or found


def _line(record: PassRecord) -> str:
    lengths = list(dict.fromkeys(record.tokens.values()))
    what = "changed" if record.changed else "nothing to change"
    return f"{record.name}: {what}, nodes {record.nodes[0]} -> {record.nodes[1]}, tokens {' | '.join(lengths)}, {record.ms:.0f} ms"


# -- the artifact's other files


def _save_sources(draft: Draft, plan: Plan) -> None:
    """config.json, generation_config.json, the processor: what makes the folder look like a Hugging Face model."""
    plan.model.config.save_pretrained(draft.folder)
    plan.model.generation_config.save_pretrained(draft.folder)
    plan.processor.save_pretrained(draft.folder)
    draft.write("recipe.yaml", plan.recipe.yaml())
    if plan.learned:
        save_weights(plan.learned, draft.folder / "learned.safetensors")
    draft.write("reports/forecast.json", json.dumps(plan.report.as_dict(), indent=1))


def _save_golden(draft: Draft, program: Program) -> None:
    from .golden import record
    from .runtime.golden import write

    try:
        write(draft.folder, record(program))
    except FoveateError as error:
        raise LowerError(f"{error}; golden=False (--no-golden) builds without the example") from error


def _fill_manifest(draft: Draft, plan: Plan, target: str, settings: Mapping[str, Any]) -> None:
    program = plan.program
    draft.manifest.update(
        model=plan.source,
        foveate=versions().get("foveate"),
        versions=versions(),
        target=target,
        options=_plain(settings),
        facts=_plain(asdict(program.facts)),
        kv=[asdict(e) for e in program.kv],
        history=[_plain(asdict(r)) for r in program.history],
        tokens={e.layer: e.length for e in program.kv},
        cost=plan.report.as_dict(),
        gpu=draft.manifest.get("gpu"),
    )


def versions() -> dict[str, str]:
    """Of the packages that shape an artifact, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "foveate" not in found:
        from . import __version__

        found["foveate"] = __version__
    return found


def _plain(value: Any) -> Any:
    """JSON-able: paths and other objects as text"""
    return json.loads(json.dumps(value, default=str))


def _check_output(output: str | Path | None, overwrite: bool) -> None:
    """Say that a folder is taken before the hours of work, not after."""
    if output is None:
        return
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise LowerError(f"optimize: output {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise LowerError(f"optimize: output {path} exists and is not empty; choose another folder or allow overwriting")
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        raise LowerError(f"optimize: output {path} cannot be written: no permission in {nearest}")


@contextmanager
def _fails_as(code: int) -> Iterator[None]:
    """Note on an error which kind of failure it is; the command line exits with it."""
    try:
        yield
    except FoveateError as error:
        if not hasattr(error, "exit_code"):
            error.exit_code = code  # type: ignore[attr-defined]
        raise
