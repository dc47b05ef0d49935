"""The fused decode attention over quantized caches: Triton's interpreter against plain torch, and what it refuses. No GPU is needed."""

import os

import pytest
import torch
from helpers import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import distance, engine, prompt, rollout

pytest.importorskip("triton", reason="the kernels are Triton: pip install 'foveate[triton]'")

from foveate.export.errors import LowerError
from foveate.export.kernels import kv_attention as kernel
from foveate.export.kernels.fuse import attend_step
from foveate.export.kernels.kv_attention import Partition, attend, flat, pieces_of, reference, rows_of
from foveate.graph import ops  # noqa: F401
from foveate.passes.pipeline import run
from foveate.passes.recipe import load

F = torch.ops.foveate
CLOSE = 3e-6  # float32: the same sums in another order, over at most 300 rows of unit-sized values
HALF = 4e-3  # float16 operands, float32 sums: some roundings of 2^-11 on logits and on probabilities

pytestmark = pytest.mark.skipif(
    not (kernel.interpreted() or torch.cuda.is_available()), reason="neither CUDA nor TRITON_INTERPRET=1, which tests/conftest.py sets"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def partition(B, G, T, D, bits, k_per="channel", v_per="channel", centred=False, token_major=False, dtype=torch.float32, offset=2.0):
    """Random rows with a shift per channel, in this format."""
    held = []
    for per in (k_per, v_per):
        x = torch.randn(B, G, T, D) + offset * torch.randn(B, G, 1, D)
        if not bits:
            held.append((x.to(dtype), None, None, 0))
            continue
        scale, center = F.kv_scale(x, torch.ones(B, T, dtype=torch.bool), bits, per, centred, 1.0)
        block = int(per.partition(":")[2]) if per.startswith("block") else 0
        codes = F.quantize_kv(x, scale, center if centred else None, bits, block)
        held.append((F.pack_kv(codes, bits) if bits < 8 else codes, scale, center if centred else None, block))
    (k, ks, kz, kb), (v, vs, vz, vb) = held
    if token_major:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    given = [None if t is None else t.to(DEVICE) for t in (k, v, ks, kz, vs, vz)]
    return Partition(*given, bits=bits, k_block=kb, v_block=vb)


def agree(B, H, G, D, parts, lengths, new=True, dtype=torch.float32, softcap=0.0, bound=CLOSE):
    q = torch.randn(B, H, D, device=DEVICE).to(dtype)
    rows = tuple(torch.randn(B, G, 1, D, device=DEVICE).to(dtype) for _ in "kv") if new else None
    lengths = torch.tensor(lengths, device=DEVICE)
    have = attend(q, parts, lengths, rows, softcap=softcap)
    want = reference(*flat(q.float(), parts, lengths, rows, None, softcap))
    assert have.dtype == dtype and not have.isnan().any()
    assert (have.float() - want).abs().max() <= bound * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per", [("channel", "channel"), ("channel", "token"), ("token", "group:16"), ("block:32", "token")])
@pytest.mark.parametrize("centred", [False, True])
def test_every_granularity(bits, per, centred):
    torch.manual_seed(0)
    agree(2, 4, 2, 64, [partition(2, 2, 101, 64, bits, *per, centred=centred)], [[101, 37]])


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 4), (8, 2), (7, 1), (28, 4)]),
    D=st.sampled_from([64, 80, 96, 128, 256]),
    batch=st.integers(1, 3),
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=2),
    bits=st.sampled_from([8, 4, 2, 0]),
    token_major=st.booleans(),
    data=st.data(),
)
def test_shapes(heads, D, batch, rows, bits, token_major, data):
    """Heads, ratios, widths (powers of two or not), odd lengths, one or two partitions, either layout; a sample may hold none of a partition."""
    torch.manual_seed(len(rows) + batch)
    H, G = heads
    parts = [partition(batch, G, T, D, b, token_major=token_major) for T, b in zip(rows, (bits, 4), strict=False)]
    lengths = [[data.draw(st.integers(0, T)) for _ in range(batch)] for T in rows]
    agree(batch, H, G, D, parts, lengths)


def test_int8_beside_packed_int4_and_a_float_window():
    """The mixed format: important rows in 8 bits, the rest in 4, the last ones as they are."""
    torch.manual_seed(1)
    parts = [partition(2, 2, 40, 128, 8), partition(2, 2, 200, 128, 4, "channel", "token", centred=True), partition(2, 2, 17, 128, 0)]
    agree(2, 8, 2, 128, parts, [[40, 9], [200, 133], [17, 3]])


@pytest.mark.parametrize("bits", [8, 4])
def test_half_precision_and_small_scales(bits):
    """Scales of 1e-6 times queries of 1e-3 are below float16: the folded query is brought to one first."""
    torch.manual_seed(2)
    part = partition(1, 2, 130, 64, bits)
    small = Partition(part.k, part.v, part.k_scale * 1e-6, None, part.v_scale, None, bits)
    agree(1, 4, 2, 64, [small], [[130]], dtype=torch.float16, bound=HALF)
    agree(1, 4, 2, 64, [part], [[130]], dtype=torch.float16, bound=HALF)


def test_soft_cap():
    torch.manual_seed(3)
    agree(1, 4, 2, 64, [partition(1, 2, 70, 64, 8, offset=10.0)], [[66]], softcap=5.0)


def test_pieces_merge_to_the_whole(monkeypatch):
    """Split over many programs: one piece and seven pieces of the same rows say the same."""
    torch.manual_seed(4)
    q, part = torch.randn(1, 4, 64, device=DEVICE), partition(1, 2, 64 * 6 + 5, 64, 8)
    lengths = torch.tensor([[300]], device=DEVICE)
    found = []
    for cores in (0, 10):
        monkeypatch.setattr(kernel, "cores", lambda device, cores=cores: cores)
        found.append(attend(q, [part], lengths))
    assert (found[0] - found[1]).abs().max() <= CLOSE


def test_nothing_to_see_is_zero_and_stale_rows_are_never_read():
    part = partition(2, 1, 70, 64, 0)
    part.k[0, :, 5:], part.v[0, :, 5:] = float("nan"), float("nan")
    out = attend(torch.randn(2, 2, 64, device=DEVICE), [part], torch.tensor([[5, 0]], device=DEVICE))
    assert not out.isnan().any() and (out[1] == 0).all()


@pytest.mark.parametrize(("rows", "pairs", "cores", "want"), [(8192, 64, 132, 9), (100, 64, 132, 2), (8192, 1, 132, 128), (0, 8, 132, 0), (8192, 9999, 132, 1)])
def test_how_many_pieces(rows, pairs, cores, want):
    assert pieces_of(rows, pairs, cores) == want
    assert not want or rows_of(rows, want) * want >= rows


def test_the_op_is_a_good_torch_citizen():
    part = partition(1, 2, 20, 64, 8)
    arguments = flat(torch.randn(1, 4, 64, device=DEVICE), [part], torch.tensor([[20]], device=DEVICE), None, None, 0.0)
    torch.library.opcheck(torch.ops.foveate_kernels.kv_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals():
    q, part = torch.randn(2, 4, 64), partition(2, 2, 20, 64, 8)
    L = torch.tensor([[20, 20]])
    cases = [
        (lambda: attend(q[..., :32], [part], L), r"k of partition 0 is \[2, 2, 20, 64\]; 4 query heads of 32 channels at 8 bits want"),
        (lambda: attend(q[:, :3], [part], L), r"3 query heads of 64 channels at 8 bits want \[2, a divisor of 3, T, 64\]"),
        (lambda: attend(q, [part], L[:, :1]), r"1 partitions of 2 samples need .* and lengths \[1, 2\]; given are 2, 4, 2 and \[1, 1\]"),
        (lambda: attend(q, [Partition(part.k.float(), part.v)], L), r"k of partition 0 is float32; codes are int8 or float8_e4m3fn"),
        (lambda: attend(q, [Partition(part.k, part.v, part.k_scale[:, :1])], L), r"has a scale \[2, 1, 1, 64\]; it is \[B, 2, 1, 64\]"),
        (lambda: attend(q, [Partition(part.k, part.v, bits=3)], L), r"3 bits; the kernel reads 2, 4 and 8"),
        (lambda: attend(q, [part], L, (q[:, :1, None], q[:, :1, None])), r"new rows are .* not two of \[2, 2, 1, 64\]"),
        (lambda: attend(q, [Partition(part.k.transpose(2, 3).contiguous().transpose(2, 3), part.v)], L), r"has stride 20 along channels"),
    ]
    for call, message in cases:
        with pytest.raises(LowerError, match=message):
            call()


def test_without_triton_or_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    assert "torch sees no CUDA device" in kernel.available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernel.available() == "the package triton is not installed; pip install 'foveate[triton]'"


@pytest.mark.parametrize("recipe", ["kv-int8", "kv-zipcache{recent=2,probes=2}", "kv-kivi{group=4,residual=8}"])
def test_the_eager_target_decodes_with_the_kernel(recipe, tmp_path):
    """Same program, same prompts of unequal lengths: the fused kernel instead of dequantizing, in every layer."""
    from foveate.export.backends.eager import EagerEngine

    program = run(toy(2), load(recipe))
    plain = engine(program, tmp_path / "plain", "eager")
    fused = engine(program, tmp_path / "fused", "eager", attention="triton", device=DEVICE)
    assert isinstance(fused, EagerEngine)
    steps = [n for n in fused.modules["decode"].graph.nodes if n.target is attend_step]
    assert len(steps) == 2 and not [n for n in fused.modules["decode"].graph.nodes if "foveate.attention" in str(n.target)]
    feeds = prompt(program, 2, 6, 5, padding=2)
    want, _ = rollout(program, plain, feeds, 3)
    have, _ = rollout(program, fused, feeds, 3)
    assert distance(have, want) <= 1e-4


def test_what_the_kernel_cannot_say_stays(tmp_path):
    """Balanced channels (kv-mikv) are multiplied behind the codes; the step still says the same."""
    program = run(toy(2), load("kv-mikv{recent=2}"))
    fused = engine(program, tmp_path, "eager", attention="triton", device=DEVICE)
    assert not [n for n in fused.modules["decode"].graph.nodes if n.target is attend_step]
