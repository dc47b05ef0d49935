"""Declare an op once: its body is the reference, the fake kernel, the gradient and the default lowering.

The body is plain torch, must not mutate or return a view of an input, and its output shape may depend on shapes and attributes only.
Axis letters, one vocabulary: B batch, H query heads, G key/value heads, S query tokens, T key tokens, K kept tokens, P past rows, N visual tokens,
D head or hidden width, R chosen rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

REFERENCE: dict[OpOverload, Callable[..., Any]] = {}  # export/ expands what its backend does not fuse


def op(body: Callable[..., Any], fake: Callable[..., Any] | None = None) -> OpOverload:
    """Register `body` as `foveate::<its name>` and return the overload.

    fake: only where tracing the body would be slow or would put guards on symbolic sizes; a test must hold it against the body.
    """
    custom = torch.library.custom_op(f"foveate::{body.__name__}", body, mutates_args=())
    custom.register_fake(fake or body)
    overload = getattr(torch.ops.foveate, body.__name__).default
    backward, remember = _gradient(body)
    custom.register_autograd(backward, setup_context=remember)
    REFERENCE[overload] = body
    return overload


def _gradient(body: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """The body's own gradient, by recomputing it under autograd: (backward, setup_context)."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plain = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.save_for_backward(*[a if isinstance(a, Tensor) else None for a in inputs])

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            arguments = [p if t is None else t.detach().requires_grad_(t.is_floating_point())
                         for p, t in zip(ctx.plain, ctx.saved_tensors, strict=True)]
            outputs = body(*arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments)

    return backward, remember
