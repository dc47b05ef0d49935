"""Flash decoding over a quantized cache, in Triton: partial softmax sums per piece of a partition, then one merge.

    partial     one program per (sample, key/value head, piece): reads each code once for all query heads of its group
    merge       one program per (sample, query head): log-sum-exp merge of all pieces of all partitions, and the new row

Letters: B samples, G key/value heads, R query heads per group, D head width, T rows of a partition, F codes per byte.
Codes of a byte are neighbours along D, as the dialect's `pack_kv` packs them; they are read as F streams of width D / F, so that nothing is ever interleaved:
stream j holds the channels j, j + F, j + 2F, ... of keys, queries, scales and results alike.
Arguments come as TensorRT's plug-ins pass them: tensors read, numbers, tensors written.
Scales never touch the codes where algebra allows: per channel they go into the query and the result, per token into logits and probabilities.
"""

import triton
import triton.language as tl

NONE, CHANNEL, TOKEN, GROUP = (tl.constexpr(i) for i in range(4))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _codes(raw, j: tl.constexpr, F: tl.constexpr):
    """Stream j of bytes that `pack_kv` packed; a cache of one code per byte (or of floats) as it is."""
    if F == 1:
        x = raw
    else:
        bits: tl.constexpr = 8 // F
        x = ((((raw.to(tl.int32) ^ 128) >> (j * bits)) & (2**bits - 1)) - 2 ** (bits - 1)).to(tl.int8)
    return x


@triton.jit
def _capped(logits, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(logits / softcap), by an exponential that cannot overflow"""
    if SOFTCAP:
        x = logits / softcap
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        logits = softcap * tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return logits


@triton.jit
def _query(q_rows, s_row, z_row, hm, d, dm, scale, j: tl.constexpr, F: tl.constexpr, PER: tl.constexpr, CENTRED: tl.constexpr):
    """Stream j of the queries of a group, times the softmax scale: (folded with a per-channel scale, its product with the centre [R], its sum [R])"""
    at = d * F + j
    q = tl.load(q_rows[:, None] + at[None, :], mask=hm[:, None] & dm[None, :], other=0.0).to(tl.float32) * scale
    total = tl.sum(q, 1)
    along = tl.zeros_like(total)
    if PER == CHANNEL:
        if CENTRED:
            along = tl.sum(q * tl.load(z_row + at, mask=dm, other=0.0).to(tl.float32)[None, :], 1)
        q = q * tl.load(s_row + at, mask=dm, other=0.0).to(tl.float32)[None, :]
    return q, along, total


@triton.jit
def _grouped(codes, s_rows, z_rows, tm, d, dm, j: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """Codes [T, D / F] of stream j with a scale per WIDTH channels of a token (or of a block of tokens), as float32"""
    at = s_rows[:, None] + ((d * F + j) // WIDTH)[None, :]
    seen = tm[:, None] & dm[None, :]
    x = codes.to(tl.float32) * tl.load(at, mask=seen, other=0.0).to(tl.float32)
    if CENTRED:
        x += tl.load(z_rows[:, None] + ((d * F + j) // WIDTH)[None, :], mask=seen, other=0.0).to(tl.float32)
    return x


@triton.jit
def _logits(logits, q, raw, s_rows, z_rows, tm, d, dm, j: tl.constexpr, F: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
            COMPUTE: tl.constexpr, IEEE: tl.constexpr):
    k = _codes(raw, j, F)
    if PER == GROUP:
        k = _grouped(k, s_rows, z_rows, tm, d, dm, j, F, WIDTH, CENTRED)
    return tl.dot(q, tl.trans(k.to(COMPUTE)), logits, input_precision=IEEE)


@triton.jit
def _values(acc, p, raw, s_rows, z_rows, tm, d, dm, j: tl.constexpr, F: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
            COMPUTE: tl.constexpr, IEEE: tl.constexpr):
    v = _codes(raw, j, F)
    if PER == GROUP:
        v = _grouped(v, s_rows, z_rows, tm, d, dm, j, F, WIDTH, CENTRED)
    return tl.dot(p, v.to(COMPUTE), acc, input_precision=IEEE)


@triton.jit
def _store(out_rows, acc, l, s_row, z_row, hm, d, dm, j: tl.constexpr, F: tl.constexpr, PER: tl.constexpr, CENTRED: tl.constexpr):
    at = d * F + j
    if PER == CHANNEL:
        acc = acc * tl.load(s_row + at, mask=dm, other=0.0).to(tl.float32)[None, :]
        if CENTRED:
            acc += l[:, None] * tl.load(z_row + at, mask=dm, other=0.0).to(tl.float32)[None, :]
    tl.store(out_rows[:, None] + at[None, :], acc, mask=hm[:, None] & dm[None, :])


@triton.jit
def partial(
    q, k, v, ks, kz, vs, vz, lengths,
    q_b, q_h, k_b, k_g, k_t, v_b, v_g, v_t, ks_b, ks_g, ks_t, vs_b, vs_g, vs_t, rows, first, pieces, G, R, scale, softcap,
    sums, peaks, totals,
    D: tl.constexpr, F: tl.constexpr, K_PER: tl.constexpr, K_WIDTH: tl.constexpr, V_PER: tl.constexpr, V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    K_CENTRED: tl.constexpr, V_CENTRED: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Rows [piece * rows, (piece + 1) * rows) of one partition  ->  sums[B, H, pieces, D] = sum exp(logit - peak) v, peaks, totals[B, H, pieces]

    first: where this partition's pieces begin among all pieces. A piece beyond a sample's length says peak -inf, total 0.
    """
    b, g, piece = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    length = tl.load(lengths + b)
    start = piece * rows
    end = tl.minimum(start + rows, length).to(tl.int32)
    h, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    hm, dm = h < R, d < D // F
    q_rows = q + b * q_b + (g * R + h) * q_h
    ks_row, kz_row, vs_row, vz_row = ks + b * ks_b + g * ks_g, kz + b * ks_b + g * ks_g, vs + b * vs_b + g * vs_g, vz + b * vs_b + g * vs_g

    q0, along, total = _query(q_rows, ks_row, kz_row, hm, d, dm, scale, 0, F, K_PER, K_CENTRED)
    high = tl.max(tl.abs(q0), 1)
    q1, q2, q3 = q0, q0, q0
    if F >= 2:
        q1, more, most = _query(q_rows, ks_row, kz_row, hm, d, dm, scale, 1, F, K_PER, K_CENTRED)
        along, total, high = along + more, total + most, tl.maximum(high, tl.max(tl.abs(q1), 1))
    if F == 4:
        q2, more, most = _query(q_rows, ks_row, kz_row, hm, d, dm, scale, 2, F, K_PER, K_CENTRED)
        along, total, high = along + more, total + most, tl.maximum(high, tl.max(tl.abs(q2), 1))
        q3, more, most = _query(q_rows, ks_row, kz_row, hm, d, dm, scale, 3, F, K_PER, K_CENTRED)
        along, total, high = along + more, total + most, tl.maximum(high, tl.max(tl.abs(q3), 1))
    high = tl.maximum(high, 1e-30)  # the folded query may leave float16's range: to one, and the logits back
    q0 = (q0 / high[:, None]).to(COMPUTE)
    q1, q2, q3 = (q1 / high[:, None]).to(COMPUTE), (q2 / high[:, None]).to(COMPUTE), (q3 / high[:, None]).to(COMPUTE)

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    moved = tl.zeros([BLOCK_R], tl.float32)  # per-token centres of values: one number for all channels
    a0 = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    a1, a2, a3 = a0, a0, a0
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        tm = t < end
        seen = tm[:, None] & dm[None, :]
        t = t.to(tl.int64)
        raw = tl.load(k + b * k_b + g * k_g + t[:, None] * k_t + d[None, :], mask=seen, other=0)
        s_rows, z_rows = ks_row + t // K_BLOCK * ks_t, kz_row + t // K_BLOCK * ks_t
        x = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
        x = _logits(x, q0, raw, s_rows, z_rows, tm, d, dm, 0, F, K_PER, K_WIDTH, K_CENTRED, COMPUTE, IEEE)
        if F >= 2:
            x = _logits(x, q1, raw, s_rows, z_rows, tm, d, dm, 1, F, K_PER, K_WIDTH, K_CENTRED, COMPUTE, IEEE)
        if F == 4:
            x = _logits(x, q2, raw, s_rows, z_rows, tm, d, dm, 2, F, K_PER, K_WIDTH, K_CENTRED, COMPUTE, IEEE)
            x = _logits(x, q3, raw, s_rows, z_rows, tm, d, dm, 3, F, K_PER, K_WIDTH, K_CENTRED, COMPUTE, IEEE)
        x = x * high[:, None]
        if K_PER == CHANNEL:
            x += along[:, None]
        if K_PER == TOKEN:
            x = x * tl.load(s_rows, mask=tm, other=0.0).to(tl.float32)[None, :]
            if K_CENTRED:
                x += total[:, None] * tl.load(z_rows, mask=tm, other=0.0).to(tl.float32)[None, :]
        x = tl.where(tm[None, :], _capped(x, softcap, SOFTCAP), float("-inf"))
        peak = tl.maximum(m, tl.max(x, 1))  # finite: the first row of a block is inside
        p = tl.exp2((x - peak[:, None]) * LOG2E)
        fade = tl.exp2((m - peak) * LOG2E)
        l = l * fade + tl.sum(p, 1)
        m = peak
        s_rows, z_rows = vs_row + t // V_BLOCK * vs_t, vz_row + t // V_BLOCK * vs_t
        if V_PER == TOKEN:
            if V_CENTRED:
                moved = moved * fade + tl.sum(p * tl.load(z_rows, mask=tm, other=0.0).to(tl.float32)[None, :], 1)
            p = p * tl.load(s_rows, mask=tm, other=0.0).to(tl.float32)[None, :]
        p = p.to(COMPUTE)
        raw = tl.load(v + b * v_b + g * v_g + t[:, None] * v_t + d[None, :], mask=seen, other=0)
        a0 = _values(a0 * fade[:, None], p, raw, s_rows, z_rows, tm, d, dm, 0, F, V_PER, V_WIDTH, V_CENTRED, COMPUTE, IEEE)
        if F >= 2:
            a1 = _values(a1 * fade[:, None], p, raw, s_rows, z_rows, tm, d, dm, 1, F, V_PER, V_WIDTH, V_CENTRED, COMPUTE, IEEE)
        if F == 4:
            a2 = _values(a2 * fade[:, None], p, raw, s_rows, z_rows, tm, d, dm, 2, F, V_PER, V_WIDTH, V_CENTRED, COMPUTE, IEEE)
            a3 = _values(a3 * fade[:, None], p, raw, s_rows, z_rows, tm, d, dm, 3, F, V_PER, V_WIDTH, V_CENTRED, COMPUTE, IEEE)

    at = (b * G * R + g * R + h) * pieces + first + piece
    out_rows = sums + at * D
    if V_PER == TOKEN:
        if V_CENTRED:
            a0, a1, a2, a3 = a0 + moved[:, None], a1 + moved[:, None], a2 + moved[:, None], a3 + moved[:, None]
    _store(out_rows, a0, l, vs_row, vz_row, hm, d, dm, 0, F, V_PER, V_CENTRED)
    if F >= 2:
        _store(out_rows, a1, l, vs_row, vz_row, hm, d, dm, 1, F, V_PER, V_CENTRED)
    if F == 4:
        _store(out_rows, a2, l, vs_row, vz_row, hm, d, dm, 2, F, V_PER, V_CENTRED)
        _store(out_rows, a3, l, vs_row, vz_row, hm, d, dm, 3, F, V_PER, V_CENTRED)
    tl.store(peaks + at, m, mask=hm)
    tl.store(totals + at, l, mask=hm)


@triton.jit
def merge(
    sums, peaks, totals, q, new_k, new_v,
    q_b, q_h, nk_b, nk_g, nv_b, nv_g, pieces, H, R, scale, softcap,
    out,
    D: tl.constexpr, NEW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """sums, peaks, totals of all pieces, and the new row if there is one  ->  out[B, H, D]; a sample that sees nothing gets zeros"""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    d = tl.arange(0, BLOCK_D)
    dm = d < D
    at = b * H + h
    m = float("-inf")
    x = m
    if NEW:
        row = tl.load(q + b * q_b + h * q_h + d, mask=dm, other=0.0).to(tl.float32)
        key = tl.load(new_k + b * nk_b + (h // R) * nk_g + d, mask=dm, other=0.0).to(tl.float32)
        x = _capped(tl.sum(row * key, 0) * scale, softcap, SOFTCAP)
        m = x
    p = tl.arange(0, BLOCK_P)
    for p0 in range(0, pieces, BLOCK_P):
        m = tl.maximum(m, tl.max(tl.load(peaks + at * pieces + p0 + p, mask=p0 + p < pieces, other=float("-inf")), 0))
    m = tl.where(m == float("-inf"), 0.0, m)
    l = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for p0 in range(0, pieces, BLOCK_P):
        pm = p0 + p < pieces
        w = tl.exp2((tl.load(peaks + at * pieces + p0 + p, mask=pm, other=float("-inf")) - m) * LOG2E)
        l += tl.sum(w * tl.load(totals + at * pieces + p0 + p, mask=pm, other=0.0), 0)
        part = tl.load(sums + (at * pieces + p0 + p)[:, None] * D + d[None, :], mask=pm[:, None] & dm[None, :], other=0.0)
        acc += tl.sum(w[:, None] * part, 0)
    if NEW:
        w = tl.exp2((x - m) * LOG2E)
        l += w
        acc += w * tl.load(new_v + b * nv_b + (h // R) * nv_g + d, mask=dm, other=0.0).to(tl.float32)
    acc = acc / tl.where(l == 0.0, 1.0, l)
    tl.store(out + at * D + d, acc.to(out.dtype.element_ty), mask=dm)
