"""The TensorRT plug-ins of the decode attention: PTX made without a GPU and assembled, and what is registered, against a stand-in for
tensorrt.plugin that checks signatures as the real one does."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels are Triton: pip install 'foveate[triton]'")

from foveate.export.errors import LowerError
from foveate.export.kernels.trt_plugin import Compiled, Spec, compile_partial, register, without_hidden

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, sys, pathlib
from foveate.export.kernels.trt_plugin import Spec, compile_merge, compile_partial
folder, found = pathlib.Path(sys.argv[1]), {}
specs = {"int8": Spec(32, 8, 128, 8), "int4": Spec(8, 8, 64, 4, "channel", "token", True), "float": Spec(4, 1, 64, 0)}
made = {n: compile_partial(s, "9.0") for n, s in specs.items()} | {"merge": compile_merge(specs["int8"], 32, "9.0")}
for name, kernel in made.items():
    (folder / f"{name}.ptx").write_text(kernel.ptx)
    found[name] = [kernel.name, kernel.threads, kernel.shared]
print(json.dumps(found))
"""


def test_ptx_without_a_gpu(tmp_path):
    """In a process of its own, as this one interprets Triton. Parameters: tensors read, numbers, tensors written, and nothing hidden."""
    import triton

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {n: f[0] for n, f in found.items()} == {"int8": "partial", "int4": "partial", "float": "partial", "merge": "merge"}
    assert all(threads == 128 and shared <= 100_000 for _, threads, shared in found.values()), "two programs fit on a multiprocessor"
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for name in found:
        text = (tmp_path / f"{name}.ptx").read_text()
        assert text.count(".param .") == (16 if name != "merge" else 7)
        if ptxas.is_file():
            built = subprocess.run([str(ptxas), "-arch=sm_90a", "-o", str(tmp_path / "k"), str(tmp_path / f"{name}.ptx")], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr


def test_hidden_parameters_are_dropped_only_if_unused():
    text = ".visible .entry f(\n.param .u64 f_param_0,\n.param .u64 f_param_1\n)\n{ ld.param.u64 %r, [f_param_0]; }"
    assert "f_param_1" not in without_hidden(text, "f", 1)
    assert without_hidden(text, "f", 2).count(".param .") == 2
    with pytest.raises(LowerError, match="f uses f_param_1, memory that Triton's launcher gives"):
        without_hidden(text.replace("f_param_0];", "f_param_1];"), "f", 1)
    with pytest.raises(LowerError, match="f has 2 parameters, 3 were declared"):
        without_hidden(text, "f", 3)


def test_interpreted_triton_cannot_compile(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here")
    with pytest.raises(LowerError, match="Triton was imported with TRITON_INTERPRET=1, which cannot compile"):
        compile_partial(Spec(4, 2, 64, 8), "9.0")


class Desc:
    """A TensorDesc whose sizes are numbers."""

    def __init__(self, shape, dtype="half"):
        self.shape_expr, self.dtype = tuple(shape), dtype

    def like(self):
        return Desc(self.shape_expr, self.dtype)


class Registry:
    """Of tensorrt.plugin, what the plug-ins use: signatures must match as `_validate_aot_impl` of TensorRT 11 wants them."""

    TensorDesc, float32, SymInt32 = Desc, "float", int
    KernelLaunchParams = SimpleNamespace

    def __init__(self):
        self.shapes, self.kernels = {}, {}

    def register(self, name):
        def keep(function):
            kinds = [p.annotation for p in inspect.signature(function).parameters.values()]
            assert all(k is Desc or k in (int, float, str, bool) for k in kinds), "TensorRT reads annotations as objects"
            self.shapes[name] = function
            return function

        return keep

    def aot_impl(self, name):
        def keep(function):
            want = [*inspect.signature(self.shapes[name]).parameters, "outputs", "tactic"]
            assert list(inspect.signature(function).parameters) == want
            self.kernels[name] = function
            return function

        return keep

    from_shape_expr = staticmethod(Desc)
    cdiv = staticmethod(lambda a, b: -(-a // b))
    SymIntExprs = staticmethod(lambda n: [None] * n)


def test_what_is_registered_launches_the_kernels_with_their_numbers():
    asked = []

    def compiled(spec, *rest):
        asked.append((spec, *rest))
        return Compiled("kernel", "ptx", 128, 4096)

    trtp = Registry()
    register(trtp, "9.0", (compiled, compiled))
    B, T, H, G, D = 3, 1000, 8, 2, 64
    inputs = [Desc((B, H, D)), *[Desc((B, T, G, D // 2))] * 2, *[Desc((B, 1, G, D))] * 2, *[Desc((B, T, G, 1))] * 2, Desc((B,))]
    attributes = (H, G, D, 4, "channel", "token", True, "float16", 4, 0.0, 0.0)
    sums, peaks, totals = trtp.shapes["foveate::kv_partial"](*inputs, *attributes)
    assert sums.shape_expr == (B, H, 4, D) and peaks.shape_expr == totals.shape_expr == (B, H, 4)
    name, ptx, launch, numbers = trtp.kernels["foveate::kv_partial"](*inputs, *attributes, (), None)
    assert (name, ptx, launch.grid_x, launch.grid_y, launch.block_x, launch.shared_mem) == ("kernel", "ptx", B * G, 4, 128, 4096)
    assert numbers == [T * G * 32, T * G * 32, G * D, T * G, 256], "strides of samples, and whole blocks that cover 1000 rows in 4 pieces"
    assert asked[0][0] == Spec(H, G, D, 4, "channel", "token", True, "float16", 4)
    rows = [sums, peaks, totals, inputs[0], Desc((B, 1, G, D)), Desc((B, 1, G, D))]
    attributes = (H, G, D, "float16", 4, 0.0, 0.0)
    assert trtp.shapes["foveate::kv_merge"](*rows, *attributes)[0].shape_expr == (B, H, D)
    assert trtp.kernels["foveate::kv_merge"](*rows, *attributes, (), None)[2].grid_x == B * H


def test_scales_that_the_plugin_cannot_read_are_refused():
    with pytest.raises(LowerError, match="scales per block:32; the plug-in reads channel, token and group"):
        Spec(4, 2, 64, 8, "block:32").spread("block:32")
