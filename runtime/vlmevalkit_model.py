"""An artifact as a VLMEvalKit model. In a small script of your own beside VLMEvalKit's run.py:

    from foveate.runtime.vlmevalkit_model import register
    register("my-model-64", "build/candidate")       # then: run.py --data MMBench_DEV_EN --model my-model-64
    import run; run.main()

This module imports vlmeval, so nothing else of ours imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from .errors import RunError
from .session import load


class Foveate(BaseModel):
    """VLMEvalKit's interface over a session."""

    INTERLEAVE = True
    INSTALL_REQ = False

    def __init__(self, model_path: str, max_new_tokens: int = 512, **options: Any) -> None:
        super().__init__()
        self.session = load(model_path)
        self.max_new_tokens = max_new_tokens
        self.options = {"do_sample": False, **options}

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """message: parts {type: text | image, value: text or path}, in order."""
        content = []
        for part in message:
            if part["type"] not in ("text", "image"):
                raise RunError(f"foveate: {dataset or 'a data set'} has {part['type']} input; an artifact takes text and images")
            content.append({"type": "text", "text": part["value"]} if part["type"] == "text" else {"type": "image", "image": part["value"]})
        return self.session.generate(
            messages=[{"role": "user", "content": content}], max_new_tokens=self.max_new_tokens, **self.options
        ).text


def register(name: str, path: str, **options: Any) -> None:
    """Make an artifact known to VLMEvalKit under a model name."""
    from vlmeval import config

    if name in config.supported_VLM:
        raise RunError(f"foveate: VLMEvalKit already has a model {name!r}; choose another name")
    config.supported_VLM[name] = partial(Foveate, model_path=path, **options)
