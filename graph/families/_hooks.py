"""What we register with transformers' public extension points, so that its modelling code traces into our dialect.

    AttentionInterface       one `foveate.attention` (or `attention_varlen`) node per layer, of the language model and of the vision tower
    AttentionMaskInterface   None, the padding mask bool[B, T], or a bool[B, 1, S, T] where the pattern is not plain causal
    Cache                    `kv_store` in prefill; `kv_append` and `kv_mask` in decode, each layer with its own past length

The masks that HF builds for plain causal and windowed layers are never traced: the node's own causal / window operands say the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from .. import ops  # noqa: F401  (registers torch.ops.foveate)
from ..errors import GraphError

NAME = "foveate"
_running: list[_StageCache] = []  # the cache of the stage that is being traced; empty in the vision stage


class _StageCache(Cache):
    """The part of HF's Cache protocol that attention and convolution layers call, with no length of its own.

    The mask code asks a cache for lengths and offsets: it hears that there is no past, so nothing about a past is baked in.
    """

    def __init__(self, layers: int, conv_width: int):
        self.count, self.conv_width = layers, conv_width
        self.k: dict[int, Tensor] = {}  # layer -> what the stage returns
        self.v: dict[int, Tensor] = {}
        self.conv: dict[int, Tensor] = {}
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    is_sliding = property(lambda self: [False] * self.count)
    is_linear = property(lambda self: [False] * self.count)
    is_dummy = property(lambda self: [False] * self.count)
    is_compileable = property(lambda self: False)
    is_initialized = property(lambda self: False)

    def __len__(self) -> int:
        return self.count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While this is open, attention layers find masks and positions here."""
        _running.append(self)
        try:
            yield
        finally:
            _running.pop()


class PrefillCache(_StageCache):
    """valid: bool[B, S]. Every update counts its valid rows from `valid`, so that a later cut above a layer changes that layer's count."""

    def __init__(self, layers: int, conv_width: int, valid: Tensor, windowed: bool, bidirectional: bool):
        super().__init__(layers, conv_width)
        self.valid, self.bidirectional = valid, bidirectional
        self.slots = (valid.long().cumsum(1) - 1).clamp(min=0) if windowed else None  # [B, S]: how many valid tokens came before
        self.lengths: dict[int, Tensor] = {}  # layer -> [B]
        self.positions: dict[int, Tensor] = {}  # layer -> [B, S], filled by the attention of windowed layers
        self.windows: dict[int, int] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k = torch.ops.foveate.kv_store(k, layer_idx, "k")
        v = torch.ops.foveate.kv_store(v, layer_idx, "v")
        self.k[layer_idx], self.v[layer_idx] = k, v
        self.lengths[layer_idx] = self.valid.sum(1)
        return k, v

    def note_window(self, layer: int, window: int) -> None:
        """A windowed layer says where its rows stand: decode compares slots, never indices, so rows may be dropped."""
        if window:
            if self.slots is None:
                raise GraphError(f"capture: layer {layer} has a window of {window} but the configuration names none")
            self.windows[layer] = window
            self.positions[layer] = self.slots.clone()

    def mask(self, layer: int) -> Tensor | None:
        return None  # HF hands the padding mask to the layers

    def window_positions(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return self.slots, self.slots

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """x[B, D, S] -> x; keeps the last `conv_width` columns that end at the last valid token (zeros before the first)."""
        at = torch.arange(x.shape[2], device=x.device)[None]
        last = torch.where(self.valid, at, 0).amax(1)
        index = last[:, None] - torch.arange(self.conv_width - 1, -1, -1, device=x.device)[None]  # [B, width]
        inside = (index >= 0)[:, None]
        state = x.gather(2, index.clamp(min=0)[:, None].expand(-1, x.shape[1], -1))
        self.conv[layer_idx] = torch.where(inside, state, 0)
        return x


class DecodeCache(_StageCache):
    """past: layer -> (k, v), each layer with its own length; row i of `lengths`[L, B] belongs to the i-th layer of `past`.

    conv: layer -> state[B, D, width]; past_pos: layer -> [B, P] slots of the past rows of windowed layers; slot: [B, 1] of the new token.
    """

    def __init__(self, layers: int, conv_width: int, past: dict[int, tuple[Tensor, Tensor]], lengths: Tensor,
                 conv: dict[int, Tensor], past_pos: dict[int, Tensor], slot: Tensor | None):
        super().__init__(layers, conv_width)
        self.past, self.past_conv, self.past_pos, self.slot = past, conv, past_pos, slot
        self.table = {layer: row for row, layer in enumerate(past)}
        self.past_lengths = lengths
        self.masks: dict[int, Tensor] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.past[layer_idx]
        self.k[layer_idx] = torch.ops.foveate.kv_store(k, layer_idx, "k")
        self.v[layer_idx] = torch.ops.foveate.kv_store(v, layer_idx, "v")
        self.masks[layer_idx] = torch.ops.foveate.kv_mask(past_k, self.past_lengths, self.table[layer_idx])
        return torch.ops.foveate.kv_append(past_k, k, layer_idx, "k"), torch.ops.foveate.kv_append(past_v, v, layer_idx, "v")

    def mask(self, layer: int) -> Tensor | None:
        return self.masks[layer]

    def window_positions(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return self.slot, torch.cat([self.past_pos[layer], self.slot], 1)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.past_conv)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.conv[layer_idx] = self.past_conv[layer_idx].clone()  # HF's one-token kernel updates it in place
        return self.conv[layer_idx]

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        full = torch.cat([self.past_conv[layer_idx], x], -1)
        self.conv[layer_idx] = full[..., -self.conv_width:].clone()
        return full


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, sliding_window: int | None = None,
               softcap: float | None = None, cu_seq_lens_q: Tensor | None = None, position_bias: Tensor | None = None,
               s_aux: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function of `AttentionInterface`: q[B, H, S, D], k, v[B, G, T, D] -> ([B, S, H, D], None)"""
    if s_aux is not None:
        raise GraphError(f"capture: {type(module).__name__} uses attention sinks, which the dialect's attention does not have")
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    layer = getattr(module, "layer_idx", None)
    layer = -1 if layer is None else int(layer)
    if cu_seq_lens_q is not None:
        return torch.ops.foveate.attention_varlen(query, key, value, cu_seq_lens_q, scale, layer), None
    cap = float(softcap or 0.0)
    if not _running:  # a vision tower
        mask = attention_mask if position_bias is None else position_bias if attention_mask is None else position_bias + attention_mask
        causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)) and mask is None
        return torch.ops.foveate.attention(query, key, value, mask, None, None, scale, causal, 0, cap, layer), None
    cache = _running[-1]
    window = int(sliding_window or 0)
    if isinstance(cache, PrefillCache):
        cache.note_window(layer, window)
    mask = cache.mask(layer)
    if mask is None:
        mask = attention_mask
    if mask is None:
        raise GraphError(f"capture: layer {layer} ({type(module).__name__}) got no mask: its padding would be seen")
    if mask.dim() == 4:  # whatever the pattern is, the mask says all of it
        return torch.ops.foveate.attention(query, key, value, mask, None, None, scale, False, 0, cap, layer), None
    # `module.is_causal` is not authoritative (paligemma's layers say False): a two-dimensional mask means plain causal by construction
    q_pos = k_pos = None
    causal = isinstance(cache, PrefillCache) and not cache.bidirectional
    if window and (causal or isinstance(cache, DecodeCache)):
        q_pos, k_pos = cache.window_positions(layer)
        causal = True
    return torch.ops.foveate.attention(query, key, value, mask, q_pos, k_pos, scale, causal, window, cap, layer), None


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Callable[..., Any] | None = None,
          attention_mask: Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
          allow_is_bidirectional_skip: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask function of `AttentionMaskInterface`: as little as possible, see the head of this file."""
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        if any("chunked" in name for name in _parts(mask_function)):
            raise GraphError("capture: chunked attention is not plain causal and the dialect's attention has no chunks")
        return attention_mask
    passed = {name: kwargs[name] for name in ("use_vmap", "device") if name in kwargs}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
                     attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **passed)


def _parts(function: Any) -> Iterator[str]:
    """Names of a mask function and of those it is composed of (HF nests them in closures)."""
    yield getattr(function, "__qualname__", "")
    for cell in getattr(function, "__closure__", None) or ():
        for inner in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if callable(inner) and not isinstance(inner, (type, Tensor)):
                yield from _parts(inner)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def patched(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes replaced while this is open: (owner, name, value)."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


@contextlib.contextmanager
def attention_of(model: Any, name: str = NAME) -> Iterator[None]:
    """The model (with its sub-towers) runs attention implementation `name` while this is open, and what it had before afterwards."""
    configs = list({id(c): c for c in _configs(model)}.values())
    before = [(c, c._attn_implementation_internal) for c in configs]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, value in before:
            config._attn_implementation_internal = value


def _configs(model: torch.nn.Module) -> Iterator[Any]:
    """Every configuration object under the model, some more than once."""
    waiting = [c for c in (getattr(module, "config", None) for module in model.modules()) if hasattr(c, "_attn_implementation_internal")]
    while waiting:
        config = waiting.pop()
        yield config
        waiting.extend(c for c in (getattr(config, name, None) for name in config.sub_configs) if c is not None)


def split_known(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.split that gives the whole tensor when sizes are unknown: HF splits per image at the very end, and we concatenate again."""

    def split(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        unknown = isinstance(sizes, (list, tuple)) and any(isinstance(s, torch.SymInt) and free_unbacked_symbols(s) for s in sizes)
        return (tensor,) if unknown else original(tensor, sizes, dim)

    return split
