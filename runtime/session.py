"""A loaded artifact: pictures and a prompt in, text out. Encoder, prefill, and a decode loop over a cache that stays with the backend."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.artifact import Artifact
from ..export.backends.base import find
from ..export.errors import CacheFullError
from . import prompts
from .batch import Batch, Layout, assemble, image_groups, lay_out
from .context import compressed
from .errors import NumberError, RunError
from .prompts import Sample
from .result import Generation, Picture, Timings, cached_rows, clock
from .sampling import PENALTIES, WARPERS, Choose, chooser

if TYPE_CHECKING:
    from .conversation import Conversation
    from .image_cache import ImageCache

DEFAULT_NEW_TOKENS = 128
OPTIONS = ("do_sample", *WARPERS, *PENALTIES)


class Session:
    """One artifact, opened. `generate` answers; `close` (or `with`) gives the backend's memory back."""

    def __init__(
        self,
        engine: Any,
        processor: Any,
        manifest: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ):
        self.engine = engine
        self.processor = processor
        self.manifest = manifest
        self.facts: Mapping[str, Any] = manifest["facts"]
        self.generation = dict(generation or {})
        self.path = path

    # -- the main job

    def generate(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        streamer: Any = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        max_cache_tokens: int | None = None,
        num_return_sequences: int = 1,
        **options: Any,
    ) -> Generation:
        """Answer one prompt or a batch of them.

        images: a picture (PIL image, path, uint8 array) or a list of them for one prompt; for a batch one entry per prompt (picture, list
        or None). prompt: text with the model's image placeholder; or messages: a conversation, or a list of them, for the chat template.
        options: do_sample, temperature, top_k, top_p, min_p, repetition_penalty, ... as in transformers' generation config, whose saved
        values are the defaults. streamer: transformers' streamer, or a function called with each new piece of text (one prompt only).
        extra: inputs that a method asked for and no processor makes (a text vector, a saliency map), by the names of
        facts.vision_extra: one row [images, width] per picture, or one row for all of them.
        max_cache_tokens: rows that the cache of a layer may hold, prompt and answer (after any reduction); a generation that reaches it, or the
        engine's own limit, ends with its text so far and finish "cache". num_return_sequences: answers per prompt, next to each other in
        the result; the prompt is computed once. Raises a RunError; a NumberError when the model's logits are no numbers.
        """
        config, steps = self._config(options), self._budget(max_new_tokens)
        check_copies(num_return_sequences)
        timings = Timings()
        with clock(timings, "preprocess_ms"):
            samples = self.prepare(images, prompt, messages)
        stream = Stream(streamer, self.tokenizer, len(samples) * num_return_sequences) if streamer is not None else None
        limit = self._limit(max_cache_tokens)
        read = self.read(samples, self.encode(samples, timings, extra), steps, timings, limit)
        if num_return_sequences != 1:
            read = read.take(np.repeat(np.arange(read.batch.size), num_return_sequences))
        choose = chooser(config, self.eos, [len(p.tokens) for p in read.batch.layouts], seed)
        return self.answer(read, choose, Stop(steps, limit), timings, stream)

    def conversation(self, images: Any = None) -> Conversation:
        """Questions about the same pictures one after another, over one cache: the pictures and what was said are never computed again."""
        from .conversation import Conversation

        return Conversation(self, images)

    def look(self, images: Any) -> ImageCache:
        """Pictures that many questions will be asked about, each alone: they are read once, `ask` reads questions behind that cache."""
        from .image_cache import ImageCache

        return ImageCache(self, images)

    # -- parts, also used by bench

    def prepare(self, images: Any = None, prompt: Any = None, messages: Any = None) -> list[Sample]:
        """Pictures and prompts through the processor, one sample at a time."""
        return [
            prompts.process(self.processor, text, pictures) for text, pictures in prompts.requests(self.processor, images, prompt, messages)
        ]

    def read(self, samples: Sequence[Sample], seen: Seen, room: int, timings: Timings | None = None, limit: int | None = None) -> Read:
        """The prefill over encoded samples; the cache gets rows for `room` tokens more, and may hold `limit` in all."""
        with clock(timings, "prefill_ms"):
            outputs, cache = self.engine.prefill(seen.batch.feeds, seen.batch.length + room)
        checked(outputs["logits"], "prefill")
        held = getattr(cache, "held", 0)
        if limit is not None and held > limit:
            raise RunError(f"generate: the prompt takes {held} cache rows, and {limit} are allowed; shorten it, raise max_cache_tokens, or drop more")
        return Read(tuple(samples), seen, seen.batch, outputs, outputs["logits"], cache)

    def answer(self, read: Read, choose: Choose, stop: Stop, timings: Timings, stream: Stream | None = None) -> Generation:
        """The decode loop behind a prefill."""
        tokens, finish = self._decode(read.batch, read.logits, read.cache, stop, choose, timings, stream)
        kept = {k: v for k, v in read.outputs.items() if k.startswith("kept.")}
        return Generation(
            texts=tuple(self.text_of(t) for t in tokens),
            tokens=tuple(tokens),
            timings=timings,
            kept={**read.seen.kept, **kept},
            pictures=_pictures(read.samples, read.seen, kept, self._grid),
            layouts=read.seen.batch.layouts,
            kv_rows=cached_rows(read.outputs),
            kv_bytes=getattr(read.cache, "nbytes", None),
            kv_clip_rate=read.cache.clip_rate() if hasattr(read.cache, "clip_rate") else None,
            finish=finish,
        )

    def encode(self, samples: Sequence[Sample], timings: Timings | None = None, extra: Mapping[str, Any] | None = None) -> Seen:
        """The vision stage over all pictures of all samples, and the padded feeds of prefill."""
        with clock(timings, "encoder_ms"):
            outputs = self._vision(samples, extra or {})
        return self.arrange(samples, outputs)

    def arrange(self, samples: Sequence[Sample], outputs: Mapping[str, np.ndarray]) -> Seen:
        """The padded feeds of prefill, given what the vision stage returned for all pictures of all samples."""
        kept = {k: v for k, v in outputs.items() if k.startswith("kept.")}
        groups, rows, layouts = self.lay(samples, kept)
        features = {name: _regroup(outputs.get(name), rows, name, self._feature_width(name)) for name in self.facts["features"]}
        return Seen(assemble(layouts, features, self.facts, self.pad), kept, groups, features)

    def lay(self, samples: Sequence[Sample], kept: Mapping[str, np.ndarray]) -> tuple[list[tuple[np.ndarray, ...]], list[list[int]], list[Layout]]:
        """Per sample: the places of its images' placeholders, how many tokens each image has left, and its tokens with their positions.

        kept: the vision stage's kept.<site> of all pictures.
        """
        rule, grids = self.facts["positions"], [s.vision.get("image_grid_thw") for s in samples]
        merge = int(rule.get("merge", 1))
        groups = [
            image_groups(s.tokens, self.facts["image_token_id"], len(s.pictures), self.facts.get("tokens_per_image"), g, merge)
            for s, g in zip(samples, grids, strict=True)
        ]
        fixed = self.facts.get("features_per_image")
        rows = [[len(g) if fixed is None else fixed for g in sample] for sample in groups]
        chosen = _chosen(kept, rows)
        layouts = [lay_out(s.tokens, g, r, grid, rule, c) for s, g, r, grid, c in zip(samples, groups, rows, grids, chosen, strict=True)]
        if rule := self.facts.get("context"):
            layouts = [compressed(layout, rule) for layout in layouts]
        return groups, rows, layouts

    def again(self, seen: Seen, chosen: Sequence[int]) -> Seen:
        """What this session's vision stage would make of the samples `chosen`, from what an equal vision stage made of them and others."""
        images = np.array([len(g) for g in seen.groups])
        rows = np.concatenate([np.arange(images[:b].sum(), images[: b + 1].sum()) for b in chosen])
        features = {name: [parts[b] for b in chosen] for name, parts in seen.features.items()}
        batch = assemble([seen.batch.layouts[b] for b in chosen], features, self.facts, self.pad)
        return Seen(batch, {k: v[rows] for k, v in seen.kept.items()}, [seen.groups[b] for b in chosen], features)

    def _vision(self, samples: Sequence[Sample], extra: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All pictures at once, or in as many runs as a stage with a fixed picture count needs. No picture: {}."""
        asked = tuple(self.facts.get("vision_extra") or ())
        if unknown := sorted(set(extra) - set(asked)):
            raise RunError(f"generate: this artifact has no extra inputs {unknown}; it takes {list(asked) or 'none'}")
        if not any(s.pictures for s in samples):
            return {}
        for sample in samples:
            _check_geometry(sample, self.facts.get("geometry") or {})
        feeds: dict[str, np.ndarray] = {}
        runs, rows = 1, sum(len(s.pictures) for s in samples)
        for spec in self.manifest["components"]["vision"]["inputs"]:
            first = spec["shape"][0]
            if spec["name"] in asked:
                value = _row_per_picture(extra, spec, rows)
            else:
                value = np.concatenate([_shaped(s.vision, spec) for s in samples if s.pictures])
            if isinstance(first, int):
                runs = max(runs, len(value) // first)
                if len(value) != runs * first:
                    raise RunError(f"images: {spec['name']} has {len(value)} rows; this artifact's vision stage takes {first} at a time")
            feeds[spec["name"]] = value
        outputs = [self.engine.vision(part) for part in _split(feeds, runs)]
        return {k: np.concatenate([o[k] for o in outputs]) for k in outputs[0]}

    def _decode(
        self, batch: Batch, logits: np.ndarray, cache: Any, stop: Stop, choose: Any, timings: Timings, stream: Stream | None, past: int = 0
    ) -> tuple[list[np.ndarray], tuple[str, ...]]:
        """logits[B, V] of the prefill -> per sample the generated tokens and why they end; a finished sample is fed padding until all are done.

        past: tokens that were fed behind the prompt already.
        """
        history = [p.tokens for p in batch.layouts]
        done = np.zeros(batch.size, bool)
        made: list[list[int]] = [[] for _ in range(batch.size)]
        tokens, why = np.empty(batch.size, np.int64), "length"
        for step in range(stop.steps):
            with clock(timings, "first_token_ms" if step == 0 else "decode_ms"):
                if step:
                    if stop.full(cache):
                        why = "cache"
                        break
                    try:
                        logits = self.engine.decode(cache, tokens[:, None], batch.step_positions(past + step - 1))
                    except CacheFullError:
                        why = "cache"
                        break
                    checked(logits, f"decode step {step}")
                tokens = np.where(done, self.pad, choose(logits, history))
            for b in np.flatnonzero(~done):
                made[b].append(int(tokens[b]))
            history = [np.append(h, t) for h, t in zip(history, tokens, strict=True)]
            done |= np.isin(tokens, self.eos)
            if stream:
                stream.put(tokens)
            if done.all():
                break
        if stream:
            stream.end()
        return [np.array(m, np.int64) for m in made], tuple("stop" if d else why for d in done)

    def _limit(self, asked: int | None) -> int | None:
        """The cache rows that a generation may use: what the caller, the artifact's options and the engine allow, the least of them."""
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise RunError(f"generate: max_cache_tokens is {asked!r}; it must be a whole number of at least 1, or None")
        known = [asked, (self.manifest.get("options") or {}).get("max_cache_tokens") or None, getattr(self.engine, "limit", None)]
        return min((n for n in known if n is not None), default=None)

    # -- small things

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def eos(self) -> tuple[int, ...]:
        return tuple(self.facts["eos_token_ids"])

    @property
    def pad(self) -> int:
        """What fills rows; any token that is neither an image nor an end will do."""
        pad = self.generation.get("pad_token_id")
        return pad if isinstance(pad, int) and pad != self.facts["image_token_id"] else self.eos[0] if self.eos else 0

    def text_of(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _config(self, options: Mapping[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in OPTIONS:
                close = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise RunError(f"generate: no option {name!r}{hint}; options are {', '.join(OPTIONS)}")
        if self.generation.get("num_beams") not in (None, 1):
            raise RunError(
                f"generate: the saved generation config asks for {self.generation['num_beams']} beams; beam search is not supported, set num_beams to 1"
            )
        return {**{k: self.generation.get(k) for k in OPTIONS}, **options}

    def _budget(self, max_new_tokens: int | None) -> int:
        steps = max_new_tokens if max_new_tokens is not None else self.generation.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        if not isinstance(steps, int) or steps < 1:
            raise RunError(f"generate: max_new_tokens is {steps!r}; it must be a whole number of at least 1")
        return steps

    def _feature_width(self, name: str) -> tuple[int, np.dtype]:
        """(D, dtype) of a prefill feature, for samples without pictures"""
        spec = next(i for i in self.manifest["components"]["prefill"]["inputs"] if i["name"] == name)
        return int(spec["shape"][-1]), np.dtype(spec["dtype"])

    def _grid(self, sample: Sample, image: int, tokens: int) -> tuple[int, int] | None:
        """(rows, columns) of an image's tokens before any reduction, where there is one grid"""
        thw = sample.vision.get("image_grid_thw")
        if thw is not None:
            merge = int(self.facts["positions"].get("merge", 1))
            return int(thw[image][1]) // merge, int(thw[image][2]) // merge
        grid = self.facts.get("vision_grid")
        return (int(grid[0]), int(grid[1])) if grid and grid[0] * grid[1] == tokens else None


def load(path: str | Path, verify: bool = True) -> Session:
    """Open an artifact folder: its files are checked against their hashes (sizes only with verify=False), its backend opens the stages.

    Raises a FoveateError: a damaged artifact, a missing processor, a target or an engine that this machine cannot run.
    """
    artifact = Artifact.load(path, verify)
    processor = _processor(artifact.path)
    engine = find(artifact.target).open(artifact)
    saved = artifact.path / "generation_config.json"
    generation = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    return Session(engine, processor, artifact.manifest, generation, artifact.path)


def _processor(folder: Path) -> Any:
    """The Hugging Face processor that was saved in the artifact."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"artifact: {folder} has no processor that can be loaded: {first}") from error
    if not hasattr(processor, "image_processor"):
        raise RunError(
            f"artifact: {folder} has no image processor, only a {type(processor).__name__}; optimize the model again with its processor files"
        )
    return processor


@dataclass(frozen=True)
class Stop:
    """When a generation ends without an end token."""

    steps: int
    rows: int | None = None  # of the cache

    def full(self, cache: Any) -> bool:
        return self.rows is not None and cache.held >= self.rows


@dataclass(frozen=True)
class Seen:
    """What the vision stage made of the samples."""

    batch: Batch
    kept: dict[str, np.ndarray]  # vision's kept.<site>, [images, K]
    groups: list[tuple[np.ndarray, ...]]  # per sample and image its placeholder places before any reduction
    features: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)  # by name, per sample [visual, D]


@dataclass(frozen=True)
class Read:
    """What the prefill made of encoded samples. `batch`, `logits` and `cache` are what the decode loop goes on from; `outputs` has a row per sample."""

    samples: tuple[Sample, ...]
    seen: Seen
    batch: Batch
    outputs: Mapping[str, np.ndarray]
    logits: np.ndarray
    cache: Any

    def take(self, index: np.ndarray) -> Read:
        """To be answered: these samples, any of them several times."""
        layouts = tuple(self.batch.layouts[i] for i in index)
        feeds = {n: a[:, index] if n == "position_ids" and a.ndim == 3 else a[index] for n, a in self.batch.feeds.items()}
        return replace(self, batch=replace(self.batch, feeds=feeds, layouts=layouts), logits=self.logits[index], cache=self.cache.take(index))


class Stream:
    """Feeds transformers' streamers, or a function, with one sample's tokens."""

    def __init__(self, target: Any, tokenizer: Any, samples: int):
        if samples != 1:
            raise RunError(f"generate: a streamer takes one prompt at a time, {samples} given")
        if not callable(target) and not hasattr(target, "put"):
            raise RunError(
                f"generate: streamer is a {type(target).__name__}; possible: transformers' streamers or a function of one string"
            )
        self.target, self.tokenizer, self.tokens, self.printed = target, tokenizer, [], ""

    def put(self, tokens: np.ndarray) -> None:
        if hasattr(self.target, "put"):
            self.target.put(tokens)
            return
        self.tokens.append(int(tokens[0]))
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the rest
            self.target(text[len(self.printed) :])
            self.printed = text

    def end(self) -> None:
        if hasattr(self.target, "end"):
            self.target.end()


# -- arrays


def _shaped(arrays: Mapping[str, np.ndarray], spec: Mapping[str, Any]) -> np.ndarray:
    """The processor's array for a vision input, in its rank and dtype; fixed sizes must match."""
    name, shape = spec["name"], spec["shape"]
    if name not in arrays:
        raise RunError(f"images: the vision stage takes {name!r}, which this processor does not make; it makes {sorted(arrays)}")
    value = arrays[name]
    if value.ndim == len(shape) + 1:  # [samples, images, ...] of families that nest
        value = value.reshape(-1, *value.shape[2:])
    if value.ndim != len(shape) or any(isinstance(d, int) and d != v for d, v in list(zip(shape, value.shape, strict=True))[1:]):
        raise RunError(
            f"images: {name} became {list(value.shape)}, this artifact was built for {shape}; a picture of another size or shape needs an "
            "artifact that was captured with such a picture"
        )
    return value.astype(np.dtype(spec["dtype"]), copy=False)


def _row_per_picture(extra: Mapping[str, Any], spec: Mapping[str, Any], pictures: int) -> np.ndarray:
    """An extra input as [pictures, width]; one row stands for every picture."""
    name, width = spec["name"], spec["shape"][1:]
    if name not in extra:
        raise RunError(f"generate: this artifact needs extra={{{name!r}: array of shape {['images', *width]}}}, which no processor makes")
    value = np.asarray(extra[name])
    if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
        raise RunError(f"generate: extra[{name!r}] must be finite numbers, found {value.dtype}{list(value.shape)}")
    value = value[None] if value.ndim == len(width) else value
    if value.ndim != len(width) + 1 or list(value.shape[1:]) != list(width) or len(value) not in (1, pictures):
        raise RunError(f"generate: extra[{name!r}] is {list(np.shape(extra[name]))}; {pictures} picture(s) need {[pictures, *width]} or one row {width}")
    return np.broadcast_to(value, (pictures, *value.shape[1:])).astype(np.dtype(spec["dtype"]))


def check_copies(count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RunError(f"generate: num_return_sequences is {count!r}; it must be a whole number of at least 1")


def checked(logits: np.ndarray, stage: str) -> np.ndarray:
    """The logits, if the next token can be chosen from them: NaN or +inf anywhere, or a row of -inf alone, is refused. -inf is a ban."""
    if not np.isfinite(logits.max(-1)).all():  # max carries NaN and +inf on
        bad = int((~np.isfinite(logits)).sum())
        raise NumberError(
            f"{stage}: {bad} of {logits.size} logits are NaN or infinite, so no token can be chosen; `foveate bisect` names the step "
            "where numbers break"
        )
    return logits


def _check_geometry(sample: Sample, geometry: Mapping[str, Any]) -> None:
    """A picture of another shape can have as many patches as the captured one, and would be seen scrambled."""
    for name, want in geometry.items():
        rows = sample.vision.get(name)
        if rows is None:
            continue
        for picture, row in enumerate(rows.reshape(-1, *np.shape(want))):
            if row.tolist() != want:
                size = sample.pictures[picture].size if picture < len(sample.pictures) else "?"
                raise RunError(
                    f"images: a picture of size {size} has {name} {row.tolist()}, this artifact was captured for {want}; "
                    "resize it, or optimize again with --image and a picture like it"
                )


def _split(feeds: Mapping[str, np.ndarray], runs: int) -> list[dict[str, np.ndarray]]:
    parts = {k: np.split(v, runs) for k, v in feeds.items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(runs)]


def _regroup(flat: np.ndarray | None, rows: Sequence[Sequence[int]], name: str, like: tuple[int, np.dtype]) -> list[np.ndarray]:
    """flat[sum of all rows, D] -> per sample [its rows, D]"""
    counts = [sum(r) for r in rows]
    if flat is None:
        if sum(counts):
            raise RunError(f"vision: it returned no {name!r}, but the prompt has {sum(counts)} image tokens")
        return [np.zeros((0, like[0]), like[1]) for _ in rows]
    flat = flat.reshape(-1, flat.shape[-1])
    if len(flat) != sum(counts):
        raise RunError(
            f"vision: it returned {len(flat)} rows of {name} for {sum(counts)} image tokens; the picture does not have the geometry "
            "that this artifact was captured with"
        )
    return np.split(flat, np.cumsum(counts)[:-1])


def _chosen(kept: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]]) -> list[list[np.ndarray] | None]:
    """Per sample and image the token indices that a reduction before the LLM kept, when exactly one site says so."""
    if len(kept) != 1:
        return [None] * len(rows)
    images = iter(next(iter(kept.values())))
    return [[next(images)[:count] for count in sample] for sample in rows]


def _pictures(samples: Sequence[Sample], seen: Seen, kept: Mapping[str, np.ndarray], grid: Any) -> tuple[tuple[Picture, ...], ...]:
    """Every picture with its kept tokens per site; vision reports per image, prefill per sample by rank among its visual tokens."""
    out, image = [], 0
    for b, sample in enumerate(samples):
        group, start = [], 0
        for i, picture in enumerate(sample.pictures):
            tokens, rows = len(seen.groups[b][i]), len(seen.batch.layouts[b].groups[i])
            own = {k.removeprefix("kept."): np.sort(v[image][v[image] >= 0]) for k, v in seen.kept.items()}
            before = own[next(reversed(own))] if own else np.arange(tokens)
            for name, value in kept.items():
                ranks = value[b][(value[b] >= start) & (value[b] < start + rows)] - start
                own[name.removeprefix("kept.")] = before[ranks] if rows == len(before) else ranks
            group.append(Picture(picture, tokens, grid(sample, i, tokens), own))
            start, image = start + rows, image + 1
        out.append(tuple(group))
    return tuple(out)

