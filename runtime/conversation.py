"""Several turns over one cache: the first question goes through prefill, what follows is fed token by token behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RunError
from .result import Generation, Timings, cached_rows
from .sampling import chooser

if TYPE_CHECKING:
    from .session import Session

ROOM = 256  # rows that the first prefill leaves for turns to come; caches grow


class Conversation:
    """One conversation about one list of pictures. What a cut dropped for the first question stays dropped, unless the cache kept it in few
    bits (drop-keep-kv)."""

    def __init__(self, session: Session, images: Any = None) -> None:
        if not getattr(session.processor, "chat_template", None):
            raise RunError("conversation: the processor has no chat template, so turns cannot be told apart; use generate with a prompt")
        self.session, self.images = session, images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        self.messages: list[dict[str, Any]] = []
        self.cache: Any = None
        self._seen: Any = None
        self._fed = 0  # tokens behind the prompt that the cache holds
        self._unfed: list[int] = []  # chosen, not in the cache yet
        self._logits: Any = None

    def ask(self, question: str, *, max_new_tokens: int | None = None, max_cache_tokens: int | None = None, seed: int | None = None,
            **options: Any) -> Generation:
        """The answer to the next question. Options as in `Session.generate`. A full cache is a RunError, and the conversation is as it was."""
        session = self.session
        config, steps, limit = session._config(options), session._budget(max_new_tokens), session._limit(max_cache_tokens)
        timings = Timings()
        content = [*({"type": "image"} for _ in self.images if self.cache is None), {"type": "text", "text": question}]
        chat = [*self.messages, {"role": "user", "content": content}]
        outputs: dict[str, Any] = {}
        if self.cache is None:
            outputs = self._open(chat, steps, timings)
        else:
            self._continue(chat, limit)
        from .session import Stop

        choose = chooser(config, session.eos, [len(p.tokens) for p in self._seen.batch.layouts], seed)
        tokens, finish = session._decode(self._seen.batch, self._logits, self.cache, Stop(steps, limit), choose, timings, None, self._fed)
        said = [int(t) for t in tokens[0]]
        self._fed, self._unfed = self._fed + len(said) - 1, said[-1:]  # the last choice was not fed
        text = session.text_of(tokens[0])
        self.messages = [*chat, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return Generation((text,), tuple(tokens), timings, {k: v for k, v in outputs.items() if k.startswith("kept.")}, (), self._seen.batch.layouts,
                          cached_rows(outputs), getattr(self.cache, "nbytes", None), self.cache.clip_rate(), finish)

    def _open(self, chat: list[dict[str, Any]], steps: int, timings: Timings) -> dict[str, Any]:
        session = self.session
        samples = session.prepare(self.images or None, None, chat)
        self._seen = session.encode(samples, timings)
        outputs, self.cache = session.engine.prefill(self._seen.batch.feeds, self._seen.batch.length + steps + ROOM)
        self._logits = outputs["logits"]
        return outputs

    def _continue(self, chat: list[dict[str, Any]], limit: int | None) -> None:
        """Feed what the template puts between the last answer and the next one."""
        tokens = [*self._unfed, *self._between(chat)]
        if self._unfed and tokens[1:2] == self._unfed and self._unfed[0] in self.session.eos:
            tokens = tokens[1:]  # the template closes the answer with the end token that was chosen
        if limit is not None and self.cache.held + len(tokens) > limit:
            raise RunError(f"conversation: the question needs {len(tokens)} more cache rows, {self.cache.held} of {limit} are taken; start anew")
        for token in tokens:
            position = self._seen.batch.step_positions(self._fed)
            self._logits = self.session.engine.decode(self.cache, np.array([[token]], np.int64), position)
            self._fed += 1
        self._unfed = []

    def _between(self, chat: list[dict[str, Any]]) -> list[int]:
        """The tokens behind the last answer's text, up to where the next answer begins."""
        before, after = (self._text(messages) for messages in (chat[:-2], chat))
        answer = chat[-2]["content"][0]["text"]
        at = after.find(answer, len(before)) if after.startswith(before) else -1
        if at < 0:
            raise RunError("conversation: the chat template rewrites earlier turns when one is added; use generate with all messages instead")
        return list(self.session.tokenizer(after[at + len(answer) :], add_special_tokens=False)["input_ids"])

    def _text(self, messages: Sequence[dict[str, Any]]) -> str:
        return self.session.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
