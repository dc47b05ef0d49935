"""Compact positions (mode parity): kept tokens are numbered anew behind every cut, and decode goes on from each layer's own length."""

from dataclasses import dataclass

import helpers
import pytest
import torch
from torch import Tensor

from foveate.graph.verify import verify
from foveate.passes.base import PassError, make
from foveate.passes.select import Staged


def reduced(mode="parity"):
    program = helpers.toy()
    make("drop-pyramid", {"layers": [1, 2], "keeps": [4, 2], "mode": mode}).run(program)
    verify(program)
    return program


def by_hand(feed, kept):
    """The toy on one sample in plain torch: at layers 1 and 2 the kept tokens are gathered and counted from zero. -> logits, k per layer"""
    model = helpers.toy()["prefill"].module.lm
    visual = feed["input_ids"][0] == helpers.IMAGE
    h = model.embed.weight[feed["input_ids"][0]].clone()
    h[visual] = feed["image_features"][0, : int(visual.sum())]
    rank = torch.where(visual, visual.long().cumsum(0) - 1, -1)
    keys = []
    for layer in range(3):
        if layer:
            stays = torch.tensor([r < 0 or r in kept[layer] for r in rank.tolist()])
            h, rank = h[stays], rank[stays]
        block, T = model.layers.get_submodule(str(layer)), len(h)
        cos = torch.cos(torch.arange(T)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
        q, k, v = (h @ block.qkv.weight.T).chunk(3, -1)
        q, k = q * cos, k * cos
        keys.append(k)
        p = ((q @ k.T) * 0.5 + torch.full((T, T), float("-inf")).triu(1)).softmax(-1)
        h = h + p @ v
        h = h + (h @ block.mlp.weight.T).relu()
    return h[-1] @ model.head.weight.T, keys


def test_prefill_counts_kept_tokens_from_zero_at_every_stage():
    program, feed = reduced(), helpers.feeds([1], [5], seed=6)
    with torch.no_grad():
        out = program["prefill"].run(feed)
        kept = {l: [i for i in out[f"kept.layer{l}"][0].tolist() if i >= 0] for l in (1, 2)}
        logits, keys = by_hand(feed, kept)
    helpers.close(out["logits"][0], logits)
    for layer in range(3):
        helpers.close(out[f"k.{layer}"][0, 0, : len(keys[layer])], keys[layer])
    fixed = reduced("fixed")["prefill"].run(feed)
    assert (fixed["k.2"][0, 0, :7] - keys[2]).abs().max() > 1e-2  # and that is not what original positions give


def given(kept):
    @dataclass(frozen=True)
    class Given(Staged):
        compact = True

        def score(self, visual_index: Tensor) -> Tensor:
            inner, outer = (torch.tensor([float(i in kept[l]) for i in range(64)]) for l in (2, 1))
            return (inner + outer)[visual_index.clamp(0, 63)]

    return Given(layers=(1, 2), keeps=(4, 2))


def test_sixteen_steps_equal_recomputing_the_longer_prompt():
    program, feed = reduced(), helpers.feeds([1], [4], seed=2)
    out = program["prefill"].run(feed)
    full = helpers.toy()
    given({l: [i for i in out[f"kept.layer{l}"][0].tolist() if i >= 0] for l in (1, 2)}).run(full)
    lengths, logits = out["kv_lengths"].clone(), out["logits"]
    past = {f"past_{n}": out[n] for n in program["decode"].outputs if n != "logits"}
    for _ in range(16):
        token = logits.argmax(-1, keepdim=True)
        token = torch.where(token == helpers.IMAGE, 1, token)
        position = feed["attention_mask"].sum(1, keepdim=True)
        step = program["decode"].run({"input_ids": token, "position_ids": position, "lengths": lengths, **past})
        logits = step["logits"]
        past = {n: torch.cat([past[n][:, :, : int(lengths[int(n[7:]), 0])], step[n[5:]]], 2) for n in past}
        lengths = lengths + 1
        grown = {"input_ids": token, "attention_mask": torch.ones_like(token), "position_ids": position}
        feed = feed | {n: torch.cat([feed[n], value], 1) for n, value in grown.items()}
        helpers.close(logits, full["prefill"].run(feed)["logits"], 3e-5)


def test_positions_with_three_axes_are_refused():
    from dataclasses import replace

    program = helpers.toy()
    program.facts = replace(program.facts, positions={"kind": "mrope"})
    with pytest.raises(PassError, match="drop-pyramid: mode parity numbers positions anew, and those of toy have three axes"):
        make("drop-pyramid", {"layers": [1], "keeps": [2], "mode": "parity"}).run(program)
