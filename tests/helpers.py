"""A toy VLM of two or three ten-node blocks, and what tests ask of graphs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.export import Dim

from foveate.graph import ops  # noqa: F401  (registers the dialect)
from foveate.graph.program import Facts, KVLayer, Program
from foveate.graph.stage import from_exported

F = torch.ops.foveate
IMAGE = 9  # the toy's image token
VOCAB, WIDTH = 12, 4


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor, mask: Tensor, cos: Tensor, past: tuple[Tensor, Tensor] | None, lengths: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v = (x[:, None] for x in self.qkv(h).chunk(3, -1))
        q, k = q * cos[:, None], k * cos[:, None]
        k, v = F.kv_store(k, self.layer, "k"), F.kv_store(v, self.layer, "v")
        if past is None:
            context = F.attention(q, k, v, mask, None, None, 0.5, True, 0, 0.0, self.layer)
        else:
            valid = F.kv_mask(past[0], lengths, self.layer)
            keys, values = F.kv_append(past[0], k, self.layer, "k"), F.kv_append(past[1], v, self.layer, "v")
            context = F.attention(q, keys, values, valid, None, None, 0.5, False, 0, 0.0, self.layer)
        h = h + context.flatten(2)
        return h + self.mlp(h).relu(), k, v, mask.sum(1)


class Toy(nn.Module):
    """Embeds, splices, runs the blocks, and reads the last valid token (a mean would hide an unsorted cut)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(i) for i in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def angles(self, position_ids: Tensor) -> Tensor:
        return torch.cos(position_ids[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))


class Prefill(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.lm = toy

    def forward(self, input_ids: Tensor, image_features: Tensor, position_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        mask = attention_mask != 0
        h = F.splice_image_features(self.lm.embed(input_ids), image_features, input_ids == IMAGE)
        cos = self.lm.angles(position_ids)
        kv, lengths = [], []
        for block in self.lm.layers:
            h, k, v, length = block(h, mask, cos, None, None)
            kv += [k, v]
            lengths.append(length)
        return (self.lm.head(F.last_token(h, mask)), torch.stack(lengths), *kv)


class Decode(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.lm = toy

    def forward(self, input_ids: Tensor, position_ids: Tensor, lengths: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        h, cos, kv = self.lm.embed(input_ids), self.lm.angles(position_ids), []
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        for block in self.lm.layers:
            h, k, v, _ = block(h, mask, cos, tuple(past[2 * block.layer : 2 * block.layer + 2]), lengths)
            kv += [k, v]
        return (self.lm.head(h[:, -1]), *kv)


class Vision(nn.Module):
    """A tower of two attention layers over CLS + 6 patches, and a projector that drops the CLS."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3, WIDTH)
        self.cls = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.projector = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = self.patch(pixel_values)
        x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], 1)
        for i, block in enumerate(self.blocks):
            q, k, v = (y[:, None] for y in block(x).chunk(3, -1))
            x = x + F.attention(q, k, v, None, None, None, 0.5, False, 0, 0.0, i).flatten(2)
        return (self.projector(x[:, 1:]).flatten(0, 1),)


def toy(layers: int = 3, seed: int = 0) -> Program:
    """A fresh toy program; weights are random and large enough that masks and positions matter."""
    program = _toy(layers, seed)
    return program.clone()


@functools.lru_cache
def _toy(layers: int, seed: int) -> Program:
    torch.manual_seed(seed)
    model, vision = Toy(layers), Vision()
    for parameter in [*model.parameters(), *vision.parameters()]:
        parameter.data.normal_()
    B, S, N, images = Dim("B", min=1, max=64), Dim("S", min=4, max=4096), Dim("N", min=4, max=2048), Dim("images", min=1, max=64)
    ids = torch.tensor([[1, *[IMAGE] * 6, 2, 3, 4]] * 5)
    example = dict(input_ids=ids, image_features=torch.randn(5, 6, WIDTH), position_ids=torch.arange(10).repeat(5, 1), attention_mask=torch.ones_like(ids))
    shapes = ({0: B, 1: S}, {0: B, 1: N}, {0: B, 1: S}, {0: B, 1: S})
    prefill = torch.export.export(Prefill(model), tuple(example.values()), dynamic_shapes=shapes, strict=False)
    past = [torch.randn(5, 1, 7 + 2 * (i // 2), WIDTH) for i in range(2 * layers)]
    step = (ids[:, :1], torch.full((5, 1), 10), torch.full((layers, 5), 3), past)
    rows = [Dim(f"P{i}", min=1, max=4096) for i in range(layers)]
    decode = torch.export.export(
        Decode(model), step, dynamic_shapes=({0: B}, {0: B}, {1: B}, [{0: B, 2: rows[i // 2]} for i in range(2 * layers)]), strict=False
    )
    pixels = torch.randn(5, 6, 3)
    tower = torch.export.export(vision, (pixels,), dynamic_shapes=({0: images},), strict=False)
    kv_names = [f"{w}.{i}" for i in range(layers) for w in "kv"]
    return Program(
        stages={
            "vision": from_exported(tower, ["pixel_values"], ["image_features"]),
            "prefill": from_exported(prefill, list(example), ["logits", "kv_lengths", *kv_names]),
            "decode": from_exported(decode, ["input_ids", "position_ids", "lengths", *[f"past_{n}" for n in kv_names]], ["logits", *kv_names]),
        },
        facts=Facts(
            model_type="toy",
            image_token_id=IMAGE,
            eos_token_ids=(0,),
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            layers=layers,
            layer_path=r"lm\.layers\.(\d+)",
            vision_layer_path=r"^blocks\.(\d+)",
            vision_grid=(2, 3),
            has_cls=True,
            tokens_per_image=6,
            features_per_image=6,
        ),
        kv=[KVLayer(i, 1, WIDTH, WIDTH) for i in range(layers)],
        example={"prefill": example, "vision": {"pixel_values": pixels}},
    )


def feeds(images: list[int], text: list[int], seed: int = 0, left: bool = False, per_image: int = 6, minimum: int = 0) -> dict[str, Tensor]:
    """Prefill inputs for samples with these numbers of images and of text tokens (>= 1), padded as the runtime does: S = max text + N."""
    generator = torch.Generator().manual_seed(seed)
    N = max(minimum, *[per_image * i for i in images], 1)
    S = max(text) + N
    ids, mask = torch.zeros(len(images), S, dtype=torch.long), torch.zeros(len(images), S, dtype=torch.long)
    for b, (count, words) in enumerate(zip(images, text, strict=True)):
        spoken = torch.randint(1, IMAGE, (words,), generator=generator).tolist()
        cuts = sorted(torch.randint(0, words, (count,), generator=generator).tolist())  # before the last word: a prompt ends with text
        row: list[int] = []
        for position, word in enumerate(spoken):
            row += [IMAGE] * per_image * cuts.count(position) + [word]
        start = S - len(row) if left else 0
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=ids, image_features=torch.randn(len(images), N, WIDTH, generator=generator), position_ids=positions, attention_mask=mask)


def close(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    """Equal within `relative` of the largest wanted value: float32 sums in another order differ by a few 1e-7 per addend."""
    torch.testing.assert_close(got, want, rtol=0, atol=relative * max(1.0, float(want.detach().abs().max())))
