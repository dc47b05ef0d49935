"""Victor: learned registers behind the image take it over, and every visual token leaves."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from ...graph.program import Program
from ...graph.sites import layers, role, site
from ...graph.splice import splice
from ..cut import cut, require_visual
from ..evict import evict_dropped
from ..insert import Insertion
from ..reduce import Layer, last_valid
from ..registers import blind, even, insert_registers, scattered


@dataclass(frozen=True)
class Victor(Insertion):
    """M learned registers stand behind the visual tokens; from the entry of `layer` on there are no visual tokens, only registers and text.

    rewrite:
        h[B, S, D]           ->  insert_tokens(h, registers[M, D], behind the last visual token)[B, S + M, D]      (entry of the first layer)
        h[B, S + M, D], ...  ->  i = compact(not visual)[B, S + M - N], and each crossing value gathered by i        (entry of `layer`)

    Wen et al., "Efficient Vision-Language Models by Summarizing Visual Tokens into Compact Registers" (2024), algorithm 1. Text keeps the
    positions it had, registers take those of visual tokens spread over the image (the paper does not say). `layer` may be the number of layers: no
    cut. `registers` 0 is the control without summary. `table`: the registers are the first of so many learned ones (elastic M: one training
    serves several). `content`: visual adds to every register the visual token whose position it takes, as LLaVA-Mini's compressed tokens are made
    of the image; registers learn several times faster from there (docs/distill_victor.md). `evict_summarised_kv`: the layers before the cut give
    up their visual rows too. `question_blind`: no text ever attends to a visual token, so what the registers hold depends on the image alone; the
    cache then never holds visual rows.
    """

    name: ClassVar[str] = "victor"
    paper: ClassVar[str] = "arXiv:2410.14072"
    elastic: ClassVar[str] = "registers"

    registers: Annotated[int, Ge(0)] = 8
    layer: Layer = 3
    table: Annotated[int, Ge(0)] = 0
    order: Literal["scattered", "even"] = "scattered"
    content: Literal["none", "visual"] = "none"
    evict_summarised_kv: bool = False
    question_blind: bool = False

    def run(self, program: Program) -> bool:
        count, size = self.registers, self.table or self.registers
        starts = layers(program["prefill"], program.facts.layer_path)
        last = max(starts) + 1
        known = program.facts.visual_per_image
        if size < count:
            raise self.fail(f"registers={count} is more than the table of {size}")
        if known is not None and size > known:
            raise self.fail(f"{size} registers are more than the {known} visual tokens of an image")
        if self.layer > last:
            raise self.fail(f"no layer {self.layer} in prefill; this program has 0..{last - 1}, and {last} stands for no cut")
        if self.question_blind and not count:
            raise self.fail("question_blind without registers leaves nothing of the image; registers must be at least 1")
        if count:
            self._insert(program, count, size)
        if self.question_blind:
            blind(program, self.layer)
        if self.layer < last:
            self._cut(program)
            if (self.evict_summarised_kv or self.question_blind) and self.layer:
                evict_dropped(program, 0, self.layer)
        return bool(count) or self.layer < last

    def _insert(self, program: Program, count: int, size: int) -> None:
        width = program.facts.hidden_size
        first = site(program, 0).first
        node = self.learn(program, "prefill", first, "registers", lambda: self._initial(program, size, width))
        if size > count:
            node = splice(program["prefill"], first, lambda t: t[:count].clone(), node)
        fractions = {"scattered": scattered, "even": even}[self.order](count)
        insert_registers(program, node, fractions, self.name, self.content == "visual")

    def _initial(self, program: Program, size: int, width: int) -> Tensor:
        """Nothing where visual tokens are the content; else the mean row of the word embeddings, which stands for no word, with noise of their scale."""
        if self.content == "visual":
            return torch.zeros(size, width)
        table = next((t for n, t in program["prefill"].module.named_parameters() if n.endswith("embed_tokens.weight") and t.device.type != "meta"), None)
        mean, scale = (table.detach().float().mean(0).cpu(), float(table.detach().float().std())) if table is not None else (torch.zeros(width), 0.02)
        return mean + self.noise("registers", size, width, std=scale)

    def _cut(self, program: Program) -> None:
        stage, where = program["prefill"], site(program, self.layer)
        roles = [role(program, name, where.first) for name in ("visual", "valid")]
        inputs = [stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]
        spare = 0 if self.registers else 1  # a prompt that ends with an image keeps its last token, which predicts the answer

        def choose(visual: Tensor, valid: Tensor, ids: Tensor, features: Tensor) -> tuple[Tensor, int]:
            stays = valid & ~visual
            if spare:
                at = torch.arange(valid.shape[1], device=valid.device)[None]
                stays = stays | (valid & (at == last_valid(valid)))
            return stays, ids.shape[1] - features.shape[1] + self.registers + spare

        keep, length = splice(stage, where.first, choose, *roles, *inputs)
        cut(program, where, keep, length, 1)
        require_visual(program, 1)
