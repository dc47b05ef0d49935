"""An artifact as an lmms-eval model: `lmms-eval eval --model foveate --model_args pretrained=ARTIFACT --tasks ...`.

lmms-eval finds it by the entry point group `lmms_eval.models`. This module imports lmms_eval, so only lmms-eval imports it. Images
only: a task with video or
audio is refused, and so are log-likelihood tasks, since an artifact answers, it does not score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from .errors import RunError
from .session import load

GENERATION = ("temperature", "top_p", "top_k", "do_sample")  # of lmms-eval's generation arguments, what a session takes


class Foveate(lmms):
    """lmms-eval's chat interface over a session."""

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, max_new_tokens: int = 512, device: str | None = None, **other: Any
    ) -> None:
        super().__init__()
        if other:
            raise RunError(f"foveate: unknown model_args {sorted(other)}; possible: pretrained, batch_size, max_new_tokens")
        self.session = load(pretrained)
        self.batch_size_per_gpu = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in order; requests of equal options are answered in batches."""
        answers: list[str] = [""] * len(requests)
        for options, places in _by_options(requests).items():
            for start in range(0, len(places), self.batch_size_per_gpu):
                now = places[start : start + self.batch_size_per_gpu]
                texts = self._answer([requests[k] for k in now], dict(options))
                for k, text in zip(now, texts, strict=True):
                    answers[k] = text
        return answers

    def _answer(self, requests: Sequence[Any], options: dict[str, Any]) -> list[str]:
        talks = [self._messages(r) for r in requests]
        stops = [s for s in (options.pop("until", None) or ()) if s]
        steps = options.pop("max_new_tokens", self.max_new_tokens)
        chosen = {k: v for k, v in options.items() if k in GENERATION and v is not None}
        if not chosen.get("temperature"):  # lmms-eval writes greedy as temperature 0
            chosen = {"do_sample": False}
        texts = self.session.generate(messages=talks, max_new_tokens=int(steps), **chosen).texts
        return [_until(t, stops) for t in texts]

    def _messages(self, request: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages of a document, pictures inside them."""
        _, doc_to_messages, _, doc, task, split = request.args
        out = []
        for message in doc_to_messages(self.task_dict[task][split][doc]):
            content = []
            for part in message["content"]:
                if part["type"] not in ("text", "image"):
                    raise RunError(f"foveate: task {task} has {part['type']} input; an artifact takes text and images")
                content.append(
                    {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image", "image": part["url"]}
                )
            out.append({"role": message["role"], "content": content})
        return out

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise RunError("foveate: multi-round tasks of lmms-eval are not supported; `foveate eval` has several turns per item")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise RunError("foveate: log-likelihood tasks are not supported; use the generative version of the task")


def _by_options(requests: Sequence[Any]) -> dict[tuple[tuple[str, Any], ...], list[int]]:
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for k, request in enumerate(requests):
        options: Mapping[str, Any] = request.args[2]
        key = tuple(sorted((n, tuple(v) if isinstance(v, list) else v) for n, v in options.items() if not isinstance(v, dict)))
        groups.setdefault(key, []).append(k)
    return groups


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


def manifest() -> ModelManifest:
    """What the entry point returns."""
    return ModelManifest(model_id="foveate", chat_class_path=f"{__name__}.Foveate")
