"""Every KV format against an independent re-implementation: numpy codes, torch's own attention, a cache kept as a list of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import feeds, toy
from lowering import engine

from foveate.passes.pipeline import run
from foveate.passes.recipe import load

STEPS = 16


def numpy_state(x: np.ndarray, bits: int, axis: int, centred: bool, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and centre of valid rows x[..., T, D], in float32 as the op computes."""
    if centred:
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        scale = np.maximum((high - low) * np.float32(margin / (2**bits - 1)), np.float32(1e-6))
        return scale, (low + high) / 2 + scale / 2
    scale = np.maximum(np.abs(x).max(axis, keepdims=True) * np.float32(margin / (2 ** (bits - 1) - 1)), np.float32(1e-6))
    return scale, np.zeros_like(scale)


def numpy_store(x: np.ndarray, bits: int, scale: np.ndarray, center: np.ndarray) -> np.ndarray:
    top = 2 ** (bits - 1)
    return np.clip(np.rint((x - center) / scale), -top, top - 1) * scale + center


class Oracle:
    """The toy, one sample at a time and without graph, cache object or padding; keys and values stored per channel."""

    def __init__(self, program, bits: int, centred: bool, margin: float) -> None:
        self.weights = {n: p.detach() for n, p in program["prefill"].module.named_parameters()}
        self.bits, self.centred, self.margin = bits, centred, margin

    def layers(self):
        return range(sum(n.endswith("qkv.weight") for n in self.weights))

    def qkv(self, h, layer, positions):
        cos = torch.cos(positions[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
        q, k, v = (h @ self.weights[f"lm.layers.{layer}.qkv.weight"].T).chunk(3, -1)
        return q * cos, k * cos, v

    def block(self, h, context, layer):
        h = h + context
        return h + (h @ self.weights[f"lm.layers.{layer}.mlp.weight"].T).relu()

    def generate(self, ids, features, steps):
        """-> logits of the prompt and of `steps` tokens after it"""
        embed = self.weights["lm.embed.weight"]
        h = embed[ids].clone()
        h[ids == 9] = features[: int((ids == 9).sum())]
        cache = {}
        for layer in self.layers():
            q, k, v = self.qkv(h, layer, torch.arange(len(ids)))
            causal = torch.ones(len(ids), len(ids)).tril().bool()
            p = ((q @ k.T) * 0.5).masked_fill(~causal, -torch.inf).softmax(-1)
            h = self.block(h, p @ v, layer)
            cache[layer] = [Column(x.numpy(), self.bits, self.centred, self.margin) for x in (k, v)]
        found = [h[-1] @ self.weights["lm.head.weight"].T]
        for step in range(steps):
            h = embed[torch.tensor([1 + step % 3])]
            for layer in self.layers():
                q, k, v = self.qkv(h, layer, torch.tensor([len(ids) + step]))
                keys, values = (torch.from_numpy(c.append(x.numpy())) for c, x in zip(cache[layer], (k, v), strict=True))
                h = self.block(h, ((q @ keys.T) * 0.5).softmax(-1) @ values, layer)
            found.append(h[0] @ self.weights["lm.head.weight"].T)
        return torch.stack(found).numpy()


class Column:
    """Stored rows of one layer's keys or values; the scale is the prompt's."""

    def __init__(self, x, bits, centred, margin):
        self.bits = bits
        self.scale, self.center = numpy_state(x, bits, 0, centred, margin)
        self.rows = numpy_store(x, bits, self.scale, self.center)

    def append(self, row):
        self.rows = np.concatenate([self.rows, numpy_store(row, self.bits, self.scale, self.center)])
        return self.rows.astype(np.float32)


@pytest.mark.parametrize(("recipe", "bits", "centred", "margin"), [
    ("kv-int8", 8, False, 1.25), ("kv-int8{centred=true,margin=1.0}", 8, True, 1.0),
    ("kv-int4", 4, True, 1.0), ("kv-int4{centred=false,margin=1.25}", 4, False, 1.25)])
def test_per_channel_equals_the_oracle(recipe, bits, centred, margin, tmp_path):
    program = run(toy(2), load(recipe))
    given = feeds([1, 0, 2], [5, 3, 4])
    open_engine = engine(program, tmp_path, "eager")
    batch = {n: t.numpy() for n, t in given.items()}
    outputs, cache = open_engine.prefill(batch, batch["input_ids"].shape[1] + 4)  # too small: it must grow
    found, lengths = [outputs["logits"]], batch["attention_mask"].sum(1, keepdims=True)
    for step in range(STEPS):
        found.append(open_engine.decode(cache, np.full((3, 1), 1 + step % 3), lengths + step))
    oracle = Oracle(program, bits, centred, margin)
    for b in range(3):
        valid = given["attention_mask"][b].bool()
        want = oracle.generate(given["input_ids"][b][valid], given["image_features"][b], STEPS)
        # float32 in another order; a code at a rounding border may differ by one step, which none of these inputs has
        np.testing.assert_allclose(np.stack(found)[:, b], want, rtol=0, atol=2e-5 * np.abs(want).max())
