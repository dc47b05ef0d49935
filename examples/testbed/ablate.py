"""What dropping visual tokens costs: random, CLS attention and last-row attention keep 25%, through plain transformers and hooks.

Teacher-forced exact match (for a whole answer the same as greedy's). A dropped token keeps its row but no later layer may look at it;
positions stay as they were.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed import make_data
from examples.testbed.dataset import Item
from examples.testbed.evaluate import CHECKPOINT, load, messages, wilson

KEEP = 0.25


class Batch:
    """Items with as many pictures each, their whole conversations tokenised, padded on the right."""

    def __init__(self, items: list[Item], processor):
        self.items, self.pictures = items, len(items[0].sources)
        texts = [processor.apply_chat_template(messages(i, [t.answer for t in i.turns[:-1]]), tokenize=False) for i in items]
        texts = [f"{text} {i.turns[-1].answer} </s>" for text, i in zip(texts, items, strict=True)]
        self.inputs = processor(images=[i.images for i in items], text=texts, return_tensors="pt", padding=True, padding_side="right")
        ids = self.inputs["input_ids"]
        self.visual = ids == processor.image_token_id
        self.answers, self.last = [], []                # per item the spans of its answers; the last row of the first prompt
        for row, item in zip(ids.tolist(), items, strict=True):
            ends = [p for p, token in enumerate(row) if token == processor.tokenizer.eos_token_id]
            spans = [(end - len(t.answer.split()), end + 1) for end, t in zip(ends, item.turns, strict=True)]
            self.answers.append(spans)
            self.last.append(spans[0][0] - 1)

    def marks(self, logits: Tensor) -> list[float]:
        said, ids = logits.argmax(-1), self.inputs["input_ids"]
        right = [[bool((said[b, s - 1:e - 1] == ids[b, s:e]).all()) for s, e in spans] for b, spans in enumerate(self.answers)]
        return [sum(r) / len(r) for r in right]


def batches(items: list[Item], processor, size: int) -> Iterator[Batch]:
    for pictures in sorted({len(i.sources) for i in items}):
        group = [i for i in items if len(i.sources) == pictures]
        yield from (Batch(group[at:at + size], processor) for at in range(0, len(group), size))


def top(scores: Tensor, among: Tensor, keep: float) -> Tensor:
    """scores[B, S] -> everything outside `among`, and the best share of it."""
    n = max(1, round(keep * int(among[0].sum())))
    best = scores.masked_fill(~among, -1.0).topk(n, 1).indices
    return (~among).scatter(1, best, True)


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


@contextmanager
def selecting(model, batch: Batch, layer: int, choose: Callable[[dict], Tensor]):
    """From LLM layer `layer` on, only the tokens of choose(scores) are seen; `scores` holds the CLS and last-row attention so far."""
    llm, tower, scores, hooks = model.model.language_model, model.model.vision_tower, {}, []
    state: dict[str, Tensor] = {}

    def watch_cls(attn, args, kwargs):
        h = kwargs.get("hidden_states", args[0] if args else None)
        q, k = heads(attn.q_proj(h[:, :1]), attn.head_dim), heads(attn.k_proj(h), attn.head_dim)
        p = (q @ k.transpose(-1, -2) * attn.head_dim ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)         # [B * pictures, N]
        scores["cls"] = torch.zeros(batch.visual.shape).masked_scatter(batch.visual, p.flatten())

    def watch_last(attn, args, kwargs):
        h = kwargs.get("hidden_states", args[0] if args else None)
        q, k = heads(attn.q_proj(h), attn.head_dim), heads(attn.k_proj(h), attn.head_dim)
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        rows, k = torch.arange(len(h)), k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = torch.einsum("bhd,bhsd->bhs", q[rows, :, torch.tensor(batch.last)], k) * attn.head_dim ** -0.5
        future = torch.arange(h.shape[1])[None] > torch.tensor(batch.last)[:, None]
        scores["last"] = logits.masked_fill(future[:, None], -torch.inf).softmax(-1).mean(1)

    def narrow(block, args, kwargs):
        if "mask" not in state:
            S = batch.visual.shape[1]
            see = torch.ones(S, S, dtype=torch.bool).tril() & (choose(scores)[:, None, :] | torch.eye(S, dtype=torch.bool))
            state["mask"] = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]
        return args, kwargs | {"attention_mask": state["mask"]}

    hooks.append(tower.encoder.layers[-2].self_attn.register_forward_pre_hook(watch_cls, with_kwargs=True))
    if layer:
        hooks.append(llm.layers[layer - 1].self_attn.register_forward_pre_hook(watch_last, with_kwargs=True))
    hooks += [block.register_forward_pre_hook(narrow, with_kwargs=True) for block in llm.layers[layer:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def random_scores(batch: Batch, seed: int) -> Tensor:
    """The same draw for an item whatever the batch it is in."""
    seeds = [seed * 1_000_003 + int(i.id.split("-")[-1]) for i in batch.items]
    return torch.stack([torch.rand(batch.visual.shape[1], generator=torch.Generator().manual_seed(s)) for s in seeds])


def cls_per_picture(batch: Batch, scores: Tensor) -> Tensor:
    """The best share of every picture, not of all of them together."""
    kept = ~batch.visual
    each = scores[batch.visual].view(len(batch.items), batch.pictures, -1)
    n = round(KEEP * each.shape[-1])
    best = torch.zeros(each.shape, dtype=torch.bool).scatter(2, each.topk(n, 2).indices, True)
    return kept.masked_scatter(batch.visual, best.flatten())


def interval(difference: list[float]) -> dict:
    """Mean of paired differences with its 95% interval."""
    d = torch.tensor(difference, dtype=torch.float64)
    half = 1.96 * d.std().item() / math.sqrt(len(d))
    return dict(mean=d.mean().item(), low=d.mean().item() - half, high=d.mean().item() + half)


def points(d: dict) -> str:
    return f"{100 * d['mean']:5.1f} [{100 * d['low']:5.1f}, {100 * d['high']:5.1f}]"


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=CHECKPOINT)
    p.add_argument("--split", default="test", choices=["val", "test"])
    p.add_argument("--limit", type=int)
    p.add_argument("--batch", type=int, default=32)
    args = p.parse_args()
    model, processor = load(args.model)
    depth = model.config.text_config.num_hidden_layers
    conditions: dict[str, tuple[int, Callable[[Batch, dict], Tensor]]] = {
        **{f"random 25% before the LLM, seed {s}": (0, lambda b, _, s=s: top(random_scores(b, s), b.visual, KEEP)) for s in range(2)},
        "CLS 25% before the LLM": (0, lambda b, scores: cls_per_picture(b, scores["cls"])),
        **{f"last row 25% at layer {n}": (n, lambda b, scores: top(scores["last"], b.visual, KEEP)) for n in range(1, depth // 2 + 1)},
        **{f"random 25% at layer {n}": (n, lambda b, _: top(random_scores(b, 0), b.visual, KEEP)) for n in (depth // 2,)},
    }
    marks: dict[str, dict[str, float]] = {name: {} for name in ["all tokens", *conditions]}
    slices: dict[str, str] = {}
    for batch in batches(list(make_data.items(args.split, args.limit)), processor, args.batch):
        ids = [i.id for i in batch.items]
        slices |= {i.id: i.slice for i in batch.items}
        marks["all tokens"] |= zip(ids, batch.marks(model(**batch.inputs).logits), strict=True)
        for name, (layer, choose) in conditions.items():
            with selecting(model, batch, layer, lambda scores, choose=choose, batch=batch: choose(batch, scores)):
                marks[name] |= zip(ids, batch.marks(model(**batch.inputs).logits), strict=True)
    order, result = list(slices), {}
    for name, got in marks.items():
        values = [got[i] for i in order]
        loss = interval([marks["all tokens"][i] - got[i] for i in order])
        result[name] = dict(accuracy=sum(values) / len(values), interval=wilson(sum(values), len(values)), loss=loss, slices={
            s: sum(v) / len(v) for s in sorted(set(slices.values())) for v in [[got[i] for i in order if slices[i] == s]]})
        print(f"{name:36s} {100 * result[name]['accuracy']:5.1f}%  loses {points(loss)}", flush=True)
    blind = marks["random 25% before the LLM, seed 0"]
    gain = interval([marks["CLS 25% before the LLM"][i] - blind[i] for i in order])
    print(f"CLS over random {points(gain)}")
    print(json.dumps(dict(n=len(order), conditions=result, cls_over_random=gain)))


if __name__ == "__main__":
    main()
