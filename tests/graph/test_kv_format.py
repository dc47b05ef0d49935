"""Formats of the cache: what they weigh, how they are written down, and attention over stored rows for many shapes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.graph import ops  # noqa: F401  (registers the dialect)
from foveate.graph.errors import GraphError
from foveate.graph.kv_format import BITS, FLOAT, KVFormat, Partition

F = torch.ops.foveate
PER = st.sampled_from(["channel", "token", "group:16", "block:32"])


def ratio(part, rows, element=2, heads=8, width=128):
    """How many times smaller than float16"""
    return heads * rows * 2 * width * element / part.bytes(rows, heads, width, width, element)


@pytest.mark.parametrize(("part", "want"), [  # T = 2048, D = 128, 16-bit scales: 16 / (bits + overhead per element)
    (Partition(code="int8"), 16 / (8 + 16 / 2048)), (Partition(code="int8", k_per="token", v_per="token"), 16 / (8 + 16 / 128)),
    (Partition(code="int4", centred=True), 16 / (4 + 32 / 2048)), (Partition(code="int4", k_per="group:32", v_per="group:32", centred=True), 16 / 5),
    (Partition(code="int2", k_per="block:32", v_per="group:32", centred=True), 16 / 3), (Partition(code="float"), 1)])
def test_ratios_count_every_overhead(part, want):
    assert ratio(part, 2048) == pytest.approx(want, rel=1e-12)


def test_zipcache_of_the_paper_is_nearly_five_times_smaller():
    """60 % of 4,096 tokens in 4 bits, the rest in 2: 16 / 3.2 less the parameters; the paper reports 4.98."""
    parts = Partition(code="int4", centred=True), Partition("lo", "int2", centred=True)
    rows = {"": 2458, "lo": 1638}
    small = KVFormat(parts).bytes(rows, 32, 128, 128, 2)
    assert 4.9 < FLOAT.bytes({"": 4096}, 32, 128, 128, 2) / small < 5.0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(BITS)), PER, PER, st.booleans(), st.integers(1, 300), st.integers(1, 4), st.sampled_from([64, 80, 128, 256]))
def test_bytes_are_those_of_the_tensors(code, k_per, v_per, centred, rows, heads, width):
    """Counted by hand from what the ops return; an expression gives the same as a number."""
    part = Partition("", code, k_per, v_per, centred)
    want = 0
    for which in "kv":
        x, held = torch.empty(1, heads, rows, width, device="meta"), torch.empty(1, rows, dtype=torch.bool, device="meta")
        if code == "float":
            want += x.numel() * 4
            continue
        stored = F.pack_kv(x.to(torch.int8), BITS[code]) if BITS[code] < 8 else x.to(torch.int8)
        scale, _ = F.kv_scale(x, held, 8, part.per(which), centred, 1.0)
        want += stored.numel() + scale.numel() * 4 * (2 if centred else 1)
    assert part.bytes(rows, heads, width, width, 4) == want
    T = sympy.Symbol("T", integer=True, positive=True)
    assert int(sympy.sympify(part.bytes(T, heads, width, width, 4)).subs(T, rows)) == want


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([64, 80, 96, 128, 256]), st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 7)]), st.integers(1, 200), st.integers(1, 3),
       st.sampled_from([8, 4, 2]), PER, st.booleans(), st.integers(0, 2**31))
def test_attention_over_stored_rows_equals_numpy(width, heads, rows, batch, bits, per, centred, seed):
    attend(width, heads, rows, batch, bits, per, centred, seed)


@pytest.mark.parametrize("rows", [1, 8192])
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_at_the_ends_of_the_range(rows, bits):
    attend(64, (2, 2), rows, 1, bits, "channel", True, rows)


def attend(width, heads, rows, batch, bits, per, centred, seed):
    """One query over rows that were stored and read, with grouped heads, against float64 numpy over rows stored by numpy."""
    G, ratio = heads
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, G, rows, width, generator=generator) * torch.rand(width, generator=generator) for _ in range(2))
    q = torch.randn(batch, G * ratio, 1, width, generator=generator)
    held = torch.ones(batch, rows, dtype=torch.bool)
    block = 32 if per.startswith("block") else 0
    stored = []
    for x in (k, v):
        scale, center = F.kv_scale(x, held, bits, per, centred, 1.0)
        codes = F.quantize_kv(x, scale, center if centred else None, bits, block)
        stored.append((F.dequantize_kv(codes, scale, center if centred else None, block), codes.numpy(), scale.numpy(), center.numpy()))
    got = F.attention(q, stored[0][0], stored[1][0], held, None, None, width**-0.5, False, 0, 0.0, 0)
    keys, values = (np.repeat(c * wide(s, c.shape, block) + (wide(z, c.shape, block) if centred else 0), ratio, 1) for _, c, s, z in stored)
    logits = q.numpy().astype(np.float64) @ keys.swapaxes(2, 3).astype(np.float64) * width**-0.5
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = (p / p.sum(-1, keepdims=True)) @ values
    np.testing.assert_allclose(got.numpy().transpose(0, 2, 1, 3), want, rtol=0, atol=2e-5 * np.abs(want).max())  # float32 sums of up to 8k terms


def wide(state, shape, block):
    """A scale or centre spread over the elements that share it, by repetition."""
    state = np.repeat(state, block, 2)[:, :, : shape[2]] if block else state
    return np.repeat(state, shape[3] // state.shape[3], 3)


def test_fp8_is_the_hardware_type():
    """Every finite value, all midpoints between neighbours, and random ones: the same bytes as torch's cast (but for the sign of zero)."""
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()].sort().values
    x = torch.cat([every, (every[1:] + every[:-1]) / 2, torch.randn(4096) * torch.logspace(-4, 2, 4096)])
    x = x[: len(x) // 8 * 8].reshape(1, 1, -1, 8).clamp(-448, 448)
    one = torch.ones(1, 1, 1, 8)
    codes = F.quantize_fp8(x, one, 0)
    torch.testing.assert_close(F.dequantize_fp8(codes, one, 0), x.to(torch.float8_e4m3fn).float(), rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(-7, 7), st.floats(0.01, 10))
def test_fsq_levels_come_back(level, size):
    scale, center = torch.full((1, 1, 1, 1), size), torch.full((1, 1, 1, 1), 0.5)
    codes = torch.full((1, 1, 1, 1), level, dtype=torch.int8)
    assert int(F.quantize_fsq(F.dequantize_fsq(codes, scale, center, 15, 0), scale, center, 15, 0)) == level


def test_a_format_is_written_down_and_read():
    form = KVFormat((Partition(code="float"), Partition("lo", "int4", "block:32", "group:32", True, "k")), (("lo", 64),), 64)
    assert KVFormat.read(json.loads(json.dumps(dataclasses.asdict(form)))) == form and form.residual == 64
    assert KVFormat.read(None) is None


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Partition(code="int3"), r"kv: no code 'int3'; codes are float, int8, int4, int2, fp8, sign, fsq4"),
    (lambda: Partition(k_per="group:0"), r"kv: no granularity 'group:0'; possible are channel, token, group:<channels>, block:<tokens>"),
    (lambda: KVFormat(()), r"kv: a format has one partition named '' first"),
    (lambda: KVFormat((Partition("lo"),)), r"kv: a format has one partition named '' first"),
    (lambda: KVFormat((Partition(),), (("lo", 4),)), r"kv: a flush moves rows to \['lo'\]; partitions that are not appended to are \[\]"),
    (lambda: KVFormat.read("int8"), r"kv: 'int8' is no format; a format is an object with 'partitions', 'flush' and 'keep'"),
    (lambda: KVFormat.read({"partitions": [{"bits": 4}], "flush": [], "keep": 0}), r"kv: a partition has no \['bits'\]")])
def test_what_is_no_format_is_refused(make, message):
    with pytest.raises(GraphError, match=message):
        make()
