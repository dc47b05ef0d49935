"""Toy vision towers with real layer modules: CLS or not, projectors that merge patches, any grid. Programs of a vision stage alone."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from foveate.graph import ops  # noqa: F401  (registers the dialect)
from foveate.graph.program import Facts, Program
from foveate.graph.stage import from_exported

F = torch.ops.foveate
WIDTH, HEADS, OUT = 8, 2, 6


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out, self.mlp = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).view(*h.shape[:-1], -1, WIDTH // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.attention(q, k, v, None, None, None, (WIDTH // HEADS) ** -0.5, False, 0, 0.0, self.index)
        x = x + self.out(y.reshape(*h.shape[:-1], -1))
        return x + self.mlp(self.norm2(x)).relu()


class Tower(nn.Module):
    def __init__(self, layers: int, cls: bool, grid: tuple[int, int], merge: int) -> None:
        super().__init__()
        self.grid, self.merge = grid, merge
        self.patch = nn.Linear(3, WIDTH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH)) if cls else None
        self.place = nn.Parameter(torch.randn(1, grid[0] * grid[1] + cls, WIDTH))
        self.layers = nn.ModuleList(Layer(i) for i in range(layers))
        self.projector = nn.Linear(WIDTH * merge * merge, OUT)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = self.patch(pixel_values)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.place
        for layer in self.layers:
            x = layer(x)
        if self.cls is not None:
            x = x[:, 1:]
        if self.merge > 1:
            rows, columns, m = self.grid[0] // self.merge, self.grid[1] // self.merge, self.merge
            x = x.view(x.shape[0], rows, m, columns, m, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * columns, -1)
        return (self.projector(x).flatten(0, 1),)


def tower(cls: bool = True, grid: tuple[int, int] = (3, 5), merge: int = 1, layers: int = 3, positions: str = "linear") -> Program:
    """A fresh program: images of grid patches, each 3 numbers; 3 x 5 = 15 patches is a multiple of little."""
    program = _tower(cls, grid, merge, layers).clone()
    program.facts = replace(program.facts, positions={"kind": positions})
    return program


@functools.lru_cache
def _tower(cls: bool, grid: tuple[int, int], merge: int, layers: int) -> Program:
    model = Tower(layers, cls, grid, merge).eval()
    torch.manual_seed(0)  # towers that differ in the projector alone have the same layers
    for parameter in model.parameters():
        parameter.data.normal_()
    n = grid[0] * grid[1]
    pixels = torch.randn(5, n, 3)
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: Dim("images", min=1, max=64)},), strict=False)
    facts = Facts(model_type="tower", image_token_id=9, eos_token_ids=(0,), vocab_size=12, hidden_size=OUT, layers=1, layer_path="none",
                  vision_layer_path=r"^layers\.(\d+)", vision_grid=grid, has_cls=cls, tokens_per_image=n // merge**2)
    return Program({"vision": from_exported(exported, ["pixel_values"], ["image_features"])}, facts, [], example={"vision": {"pixel_values": pixels}})


def feeds(program: Program, pixels: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """pixels[images, n, 3] and what passes added; that is drawn per image from its first pixel, so that batches agree with singles."""
    given = {"pixel_values": pixels}
    for name in program.facts.vision_extra:
        width = int(program["vision"].placeholder(name).meta["val"].shape[1])
        given[name] = torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(seed + int(1000 * abs(float(p[0, 0]))))) for p in pixels])
    return given


def run(program: Program, pixels: Tensor, seed: int = 0) -> dict[str, Tensor]:
    with torch.no_grad():
        return program["vision"].run(feeds(program, pixels, seed))
