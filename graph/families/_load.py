"""A model and its processor from a folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..errors import GraphError


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", processor: bool = True) -> tuple[Any, Any]:
    """-> (model in eval mode, processor). `device="meta"` builds the model without weights, for shapes only; no processor -> None if not asked for."""
    path = str(path)
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise GraphError(f"load: {path} is not a model folder (no config.json in it)")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise GraphError(f"load: no model at {path!r}: {_first_line(error)}") from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise GraphError(f"load: {path} holds {config.model_type!r}, which is not a vision-language model that transformers can load as image-text-to-text")
    loaded = _processor(path) if processor else None
    if device == "meta":
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=None if dtype == "auto" else dtype)
    else:
        try:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise GraphError(f"load: the weights of {path} cannot be read: {_first_line(error)}") from error
        model = model.to(device)
    return model.eval(), loaded


def _processor(path: str) -> Any:
    try:
        loaded = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise GraphError(f"load: {path} has no processor: {_first_line(error)}") from error
    if not hasattr(loaded, "image_processor"):
        raise GraphError(f"load: {path} has no image processor, only a {type(loaded).__name__} (preprocessor_config.json is missing)")
    return loaded


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
