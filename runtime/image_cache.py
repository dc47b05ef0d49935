"""Many questions about the same pictures: the encoder and the pictures' part of the prefill run once, questions are read behind copies of that cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import Layout
from .errors import RunError
from .result import Generation, Timings, clock
from .sampling import chooser

if TYPE_CHECKING:
    from .session import Session

Array = np.ndarray


class ImageCache:
    """What a model read of its pictures, kept for any number of questions.

    The cache ends with the last image token, or with the registers behind it. That a question may be read behind it is checked with the first one:
    its whole prompt is prefilled once more, and must keep the same visual tokens and give the same logits. A recipe that chooses among the visual
    tokens by the question, or that lets text read visual tokens which it then throws away (`victor` with evict_summarised_kv), fails that check.
    """

    def __init__(self, session: Session, images: Any) -> None:
        if not getattr(session.processor, "chat_template", None):
            raise RunError("look: the processor has no chat template, so a question cannot be told from what stands before it")
        self.session, self.images = session, list(images) if isinstance(images, (list, tuple)) else [images]
        if not self.images or any(i is None for i in self.images):
            raise RunError("look: no pictures were given; without any there is nothing to keep")
        self.timings = Timings()  # of the pictures, once
        self._begin: Array | None = None
        self._vision: dict[str, Array] = {}
        self._cache: Any = None

    def ask(self, questions: str | Sequence[str], *, max_new_tokens: int | None = None, seed: int | None = None, **options: Any) -> Generation:
        """Answers to one question or several at once, each alone behind the pictures. Options as in `Session.generate`."""
        session, asked = self.session, [questions] if isinstance(questions, str) else list(questions)
        if not asked:
            raise RunError("look: no question was given")
        config, steps, timings = session._config(options), session._budget(max_new_tokens), Timings()
        content = [{"type": "image"} for _ in self.images]
        samples = session.prepare([self.images] * len(asked), None, [[{"role": "user", "content": [*content, {"type": "text", "text": q}]}] for q in asked])
        first = self._cache is None
        if first:
            self._look(samples[0], steps)
        for sample, question in zip(samples, asked, strict=True):
            if not np.array_equal(sample.tokens[: len(self._begin)], self._begin) or len(sample.tokens) == len(self._begin):  # type: ignore[arg-type]
                raise RunError(f"look: the prompt of {question!r} does not begin as the first one did; the chat template puts text before its pictures")
        kept = {n: np.concatenate([a] * len(samples)) for n, a in self._vision.items() if n.startswith("kept.")}
        layouts = session.lay(samples, kept)[2]
        if first:
            self._check(samples[0], layouts[0])
        choose = chooser(config, session.eos, [len(o.tokens) for o in layouts], seed)
        cache = self._cache.take(np.zeros(len(asked), np.int64))
        begins = [_begin(o, session.facts["image_token_id"]) for o in layouts]
        tokens, finish = read(session, cache, layouts, begins, choose, steps, timings)
        return Generation(tuple(session.text_of(t) for t in tokens), tuple(tokens), timings, {}, (), layouts, None, getattr(cache, "nbytes", None),
                          cache.clip_rate() if hasattr(cache, "clip_rate") else None, finish)

    def _look(self, sample: Any, steps: int) -> None:
        session = self.session
        last = np.flatnonzero(sample.tokens == session.facts["image_token_id"])
        if not len(last):
            raise RunError("look: the processor writes no image token into the prompt")
        begin = sample.tokens[: last[-1] + 1]
        with clock(self.timings, "encoder_ms"):
            self._vision = session._vision([sample], {})
        seen = session.arrange([replace(sample, tokens=begin)], self._vision)
        with clock(self.timings, "prefill_ms"):
            outputs, self._cache = session.engine.prefill(seen.batch.feeds, seen.batch.length + steps)
        self._begin, self._kept = begin, {n: v for n, v in outputs.items() if n.startswith("kept.")}

    def _check(self, sample: Any, layout: Layout) -> None:
        """The first question by a prefill of everything, against reading it behind the cache."""
        session, begin = self.session, _begin(layout, self.session.facts["image_token_id"])
        whole, _ = session.engine.prefill((seen := session.arrange([sample], self._vision)).batch.feeds, seen.batch.length)
        for name, kept in self._kept.items():
            mine, theirs = (set(k[(k >= 0) & (k < begin)].tolist()) for k in (kept[0], whole[name][0]))
            if mine != theirs:
                self._refuse(f"{name} keeps {len(theirs - mine)} other visual tokens once the question is known")
        cache = self._cache.take(np.zeros(1, np.int64))
        logits = None
        for place in range(begin, len(layout.tokens)):
            logits = session.engine.decode(cache, layout.tokens[None, place : place + 1], _at(layout, place)[..., None, None])
        error = float(np.abs(logits - whole["logits"]).max() / np.ptp(whole["logits"]))
        exact = all(_float(e.get("format")) for e in session.manifest["kv"])
        if exact and error > TOLERANCE:
            self._refuse(f"the logits of the first question differ by {100 * error:.1f}% of their range")

    def _refuse(self, what: str) -> None:
        self._cache = None
        raise RunError(f"look: with this recipe a picture cannot be read without its question: {what}; use generate, or a recipe that does not look at "
                       "the question (on the vision side, or victor with question_blind)")


TOLERANCE = 0.02  # of the logits' range: half precision stays below, a question that reads other tokens does not


def read(session: Session, cache: Any, layouts: Sequence[Layout], begins: Sequence[int], choose: Any, steps: int, timings: Timings | None = None
         ) -> tuple[list[Array], tuple[str, ...]]:
    """Feed every prompt from its token `begins` on, then answer. cache: of as many samples as layouts, of what stands before, all at the same length.

    Questions of different lengths run side by side: at every step each feeds its own next token, of the question while there is one, else of its
    answer. Returns per sample the answer's tokens, and "stop" or "length".
    """
    made: list[list[int]] = [[] for _ in layouts]
    history, done = [o.tokens for o in layouts], np.zeros(len(layouts), bool)
    token, step = np.array([o.tokens[b] for o, b in zip(layouts, begins, strict=True)]), 0
    longest = max(len(o.tokens) - b for o, b in zip(layouts, begins, strict=True))
    while not done.all():
        places = np.stack([_at(o, b + step) for o, b in zip(layouts, begins, strict=True)], -1)
        with clock(timings, "decode_ms" if step >= longest else "prefill_ms"):
            logits = session.engine.decode(cache, token[:, None].astype(np.int64), places[..., None])
            step += 1
            chosen = choose(logits, history)
        for i, (layout, begin) in enumerate(zip(layouts, begins, strict=True)):
            if begin + step < len(layout.tokens):
                token[i] = layout.tokens[begin + step]
            elif done[i]:
                token[i] = session.pad
            else:
                token[i] = chosen[i]
                made[i].append(int(chosen[i]))
                history[i] = np.append(history[i], chosen[i])
                done[i] = bool(np.isin(chosen[i], session.eos)) or len(made[i]) >= steps
    return [np.array(m, np.int64) for m in made], tuple("stop" if np.isin(m[-1], session.eos) else "length" for m in made)


def _begin(layout: Layout, image_token: int) -> int:
    return int(np.flatnonzero(layout.tokens == image_token)[-1]) + 1


def _at(layout: Layout, place: int) -> Array:
    """The position of token `place`, known or generated: [] or [3]"""
    if place < len(layout.tokens):
        return layout.positions[..., place].astype(np.int64)
    return np.full(layout.positions.shape[:-1], layout.next_position + place - len(layout.tokens), np.int64)


def _float(form: Any) -> bool:
    return not form or all(p.get("code", "float") == "float" for p in form.get("partitions", ()))
