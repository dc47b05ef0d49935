"""How ONNX Runtime gets what chooses tokens: few nodes, the same choice."""

import functools

import lowering
import numpy as np
import onnx
import pytest
import torch

from foveate.export.onnx_builder import nodes_within
from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import capture
from foveate.graph.families._tiny import build
from foveate.graph.families.base import REGISTRY
from foveate.passes.base import make

F = torch.ops.foveate


@functools.cache
def llava():
    """Three layers, four heads on two groups, 64 visual tokens."""
    torch.set_num_threads(1)
    return capture(build(REGISTRY["llava"], 3).model)


def cut(*passes):
    program = llava().clone()
    for name, parameters in passes:
        make(name, parameters).run(program)
    return program


@pytest.mark.parametrize("more", [[], [("gather-early", {}), ("clean-up", {})]], ids=["drop", "early"])
def test_the_fused_rows_choose_what_eager_chooses(more, tmp_path):
    program = cut(("drop-fastv", {"layer": 2, "keep": 6}), *more)
    feeds = lowering.prompt(program, 2, 64, 7, padding=3)
    with torch.no_grad():
        want = program["prefill"].run({n: torch.from_numpy(a) for n, a in feeds.items()})
    outputs, _ = lowering.engine(program, tmp_path, "ort", threads=1).prefill(feeds, 80)
    assert (outputs["kept.layer2"] == want["kept.layer2"].numpy()).all()
    assert np.abs(outputs["logits"] - want["logits"].numpy()).max() <= 1e-5 * float(want["logits"].abs().max())  # float32, other kernels
    graph = onnx.load(str(tmp_path / "ort/components/prefill.onnx"), load_external_data=False).graph
    assert [n.op_type for n in graph.node].count("FusedMatMul") == 1, "the scores are one product with the keys as they are"


def test_a_choice_adds_few_nodes(tmp_path):
    """130 before this was spelt by hand; a node costs its dispatch."""
    counts = {}
    for name, program in {"whole": llava(), "dropped": cut(("drop-fastv", {"layer": 2, "keep": 6}), ("clean-up", {}))}.items():
        lowering.engine(program, tmp_path / name, "ort", threads=1)
        counts[name] = len(onnx.load(str(tmp_path / name / "ort/components/prefill.onnx"), load_external_data=False).graph.node)
    assert counts["dropped"] - counts["whole"] < 115


GREEDY = {"farthest": lambda k: lambda x: F.farthest_tokens(x, k, False), "dpp": lambda k: lambda x: F.dpp_tokens(x @ x.mT, k, 1e-6)}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_choice_is_one_loop_whatever_it_keeps(name):
    few, many = (to_onnx(lowering.stage_of(GREEDY[name](k), (torch.randn(2, 40, 8),)), "stage").graph.node for k in (3, 30))
    assert [n.op_type for n in few] == [n.op_type for n in many]
    assert [n.op_type for n in few].count("Loop") == 1
    loop = next(n for n in many if n.op_type == "Loop")
    inside = [n.op_type for n in nodes_within(loop) if n is not loop]
    assert inside.count("MatMul") == (name == "dpp"), "nothing quadratic is made anew in a round"


def test_a_loop_may_read_what_becomes_an_output():
    """Outputs are renamed after they are made, and bodies read them by name."""

    def both(x):
        kernel = x @ x.mT
        return kernel, F.dpp_tokens(kernel, 4, 1e-6)

    stage = lowering.stage_of(both, (torch.randn(2, 9, 5),))
    model = to_onnx(stage, "stage")
    onnx.checker.check_model(model, full_check=True)
    loop = next(n for n in model.graph.node if n.op_type == "Loop")
    assert "out0" in {name for inner in nodes_within(loop) for name in inner.input}
