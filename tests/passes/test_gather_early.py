"""gather-early: the same numbers from fewer rows, and no further than where something reads them all."""

import functools

import helpers
import pytest
import torch

from foveate.graph.capture import capture
from foveate.graph.cost import cost
from foveate.graph.families._tiny import build
from foveate.graph.families.base import REGISTRY
from foveate.passes.base import make

SIZES = {"B": 1, "S": 70, "N": 64}


@functools.cache
def llava():
    torch.set_num_threads(1)
    return capture(build(REGISTRY["llava"], 3).model)


def cut(method="drop-fastv", **more):
    program = llava().clone()
    make(method, {"layer": 2, "keep": 6, **more}).run(program)
    return program


def flops(program):
    return cost(program, "prefill").at(**SIZES)["flops"]


def linears(program, layer):
    """Rows of every linear of a language layer: the sizes of its outputs."""
    paths = {n: [p for p, _ in (n.meta.get("nn_module_stack") or {}).values()] for n in program["prefill"].graph.nodes}
    return {ps[-1].rsplit(".", 1)[-1]: str(n.meta["val"].shape[1]) for n, ps in paths.items()
            if n.target is torch.ops.aten.linear.default and any(f"layers.{layer}." in p for p in ps)}


def test_what_is_behind_the_last_attention_before_a_cut_runs_on_kept_rows_only():
    before = cut()
    after = before.clone()
    assert make("gather-early").run(after)
    rows = linears(after, 1)
    assert {rows[n] for n in ("o_proj", "up_proj", "gate_proj", "down_proj")} == {linears(after, 2)["o_proj"]}
    assert {rows[n] for n in ("q_proj", "k_proj", "v_proj")} == {linears(before, 1)["q_proj"]}
    assert flops(after) < 0.9 * flops(before) < 0.9 * flops(llava())
    with torch.no_grad():
        feed = _feed(before)
        want, got = before["prefill"].run(feed), after["prefill"].run(feed)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)  # products of another height sum in another order


def _feed(program):
    torch.manual_seed(3)
    ids = torch.tensor([[1, *[program.facts.image_token_id] * 64, 7, 8, 9, 10, 11]]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "image_features": torch.randn(2, 64, program.facts.hidden_size), "position_ids": torch.arange(70).repeat(2, 1),
            "attention_mask": mask}


def test_stops_where_a_method_reads_every_row():
    program = cut("drop-dart")  # compares the normed stream of all tokens
    assert not make("gather-early").run(program) or "up_proj" not in {
        n for n, rows in linears(program, 1).items() if rows == linears(program, 2)["o_proj"]}


def test_without_a_cut_nothing_happens():
    assert not make("gather-early").run(llava().clone())


@pytest.mark.parametrize("method", ["drop-fastv", "drop-random"])
def test_two_cuts_on_the_toy(method):
    program = helpers.toy()
    for layer, keep in ((1, 4), (2, 2)):
        make(method, {"layer": layer, "keep": keep}).run(program)
    feed = helpers.feeds([1, 1], [4, 4])
    want = program["prefill"].run(feed)
    make("gather-early").run(program)
    for name, value in program["prefill"].run(feed).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
