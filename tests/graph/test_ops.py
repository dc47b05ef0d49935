"""Every dialect op: its declaration holds, its body agrees with another route, and its gradient with finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from foveate.graph.ops import REFERENCE

F = torch.ops.foveate


def _examples():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    mask = torch.rand(2, 7) > 0.3
    mask[:, 0] = True
    x, keep = torch.randn(2, 6, 3), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]]).bool()
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    held = torch.ones(2, 7, dtype=torch.bool)
    scale, center = F.kv_scale(k, held, 8, "token", True, 1.0)
    codes = F.quantize_kv(k, scale, center, 8, 0)
    return {
        "attention": (q, k, v, mask, None, None, 0.3, True, 0, 0.0, 0),
        "attention_varlen": (q, q, q, torch.tensor([0, 2, 5]), 0.3, 0),
        "attention_rows": (q, k[:, :, :5].contiguous(), mask[:, :5], torch.tensor([[4], [3]]), 0.3, True, 0.0),
        "attention_columns": (q, k[:, :, :5].contiguous(), mask[:, :5], torch.tensor([[0.0, 1, 2, 0, 1], [1, 1, 1, 1, 1]]), 0.3, True, 0.0),
        "keep_tokens": (x, index),
        "compact_tokens": (keep, 4),
        "top_tokens": (torch.randn(2, 6), 3, None),
        "merge_tokens": (x, torch.rand(2, 4, 6)),
        "insert_tokens": (x, torch.randn(2, 3), torch.tensor([2, 0])),
        "scatter_tokens": (x, torch.randn(2, 3, 3), keep),
        "kv_store": (k, 0, "k"),
        "kv_append": (k, k[:, :, :1].contiguous(), 0, "k"),
        "kv_mask": (k, torch.tensor([[3, 7]]), 0),
        "last_token": (x, keep),
        "splice_image_features": (x, torch.randn(2, 4, 3), keep),
        "kv_held": (k, torch.tensor([[3, 7]]), 0),
        "kv_scale": (k, held, 4, "block:3", True, 1.0),
        "quantize_kv": (k, scale, center, 8, 0),
        "dequantize_kv": (codes, scale, center, 0),
        "pack_kv": (codes, 2),
        "unpack_kv": (codes, 2, 31),
    }


EXAMPLES = _examples()
NAMES = {str(op._name).split("::")[1]: op for op in REFERENCE}


@pytest.mark.parametrize("name", EXAMPLES)
def test_declaration(name):
    """Schema, fake kernel (= the body) and no mutation or aliasing, as torch checks them."""
    torch.library.opcheck(NAMES[name], EXAMPLES[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "attention_rows",
        "attention_columns",
        "keep_tokens",
        "merge_tokens",
        "insert_tokens",
        "scatter_tokens",
        "last_token",
        "splice_image_features",
    ],
)
def test_gradient(name):
    """Against finite differences, in float64 with the softmax in float32: 1e-3 is what float32 leaves of a difference quotient."""

    def double(a):
        return a.double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    loose = {"eps": 1e-2, "atol": 2e-2, "rtol": 1e-2} if name.startswith(("attention", "merge")) else {}
    assert gradcheck(NAMES[name], tuple(double(a) for a in EXAMPLES[name]), **loose)


def test_attention_equals_torch():
    q, k, v, mask, *_ = EXAMPLES["attention"]
    seen = mask[:, None, None, :] & torch.ones(5, 7, dtype=torch.bool).tril(2)
    k2, v2 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, k2, v2, attn_mask=seen, scale=0.3).transpose(1, 2)
    rows = seen.any(-1)[:, 0]  # a row that sees nothing is anybody's business
    got = F.attention(*EXAMPLES["attention"])
    torch.testing.assert_close(got[rows], want[rows], rtol=0, atol=1e-6)


def test_a_window_counts_positions_not_rows():
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    pos = torch.tensor([[0, 5, 6]])  # three tokens left of seven
    got = F.attention(q, k, v, None, pos, pos, 1.0, True, 2, 0.0, 0)
    torch.testing.assert_close(got[0, 1, 0], v[0, 0, 1])  # 5 - 0 is outside a window of 2
    assert not torch.allclose(F.attention(q, k, v, None, None, None, 1.0, True, 2, 0.0, 0)[0, 1, 0], v[0, 0, 1])


def test_varlen_is_attention_inside_each_segment():
    q = EXAMPLES["attention_varlen"][0][:1]
    got = F.attention_varlen(q, q, q, torch.tensor([0, 2, 5]), 0.3, 0)
    for a, b in ((0, 2), (2, 5)):
        part = q[:, :, a:b]
        torch.testing.assert_close(got[:, a:b], F.attention(part, part, part, None, None, None, 0.3, False, 0, 0.0, 0), rtol=0, atol=1e-6)


def test_rows_are_rows_of_the_whole_attention():
    q, k, mask, rows, scale, causal, _ = EXAMPLES["attention_rows"]
    identity = torch.eye(5).expand(2, 2, 5, 5).contiguous()
    whole = F.attention(q, k, identity, mask, None, None, scale, causal, 0, 0.0, 0).transpose(1, 2)
    got = F.attention_rows(q, k, mask, rows, scale, causal, 0.0)
    torch.testing.assert_close(got[:, :, 0], torch.stack([whole[b, :, int(rows[b, 0])] for b in range(2)]), rtol=0, atol=1e-6)


def test_compact_lists_kept_positions_then_filler():
    assert F.compact_tokens(EXAMPLES["compact_tokens"][0], 4).tolist() == [[0, 2, 3, 5], [2, 5, 5, 5]]


def test_top_prefers_the_lower_index_and_ranks_nan_last():
    score = torch.tensor([[1.0, float("nan"), 1.0, 1.0], [0.0, 2.0, 2.0, 3.0]])
    assert F.top_tokens(score, 2, None).tolist() == [[True, False, True, False], [False, True, False, True]]
    assert F.top_tokens(score, 3, torch.tensor([1, 3])).sum(1).tolist() == [1, 3]


def test_last_token_of_left_and_right_padding():
    x = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert F.last_token(x, mask).tolist() == [[3.0], [5.0]]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per", ["channel", "token", "group:2", "block:3"])
@pytest.mark.parametrize("centred", [False, True])
def test_quantization_error_is_at_most_half_a_step(bits, per, centred):
    x = EXAMPLES["quantize_kv"][0]
    held = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    block = 3 if per.startswith("block") else 0
    scale, center = F.kv_scale(x, held, bits, per, centred, 1.0)
    codes = F.quantize_kv(x, scale, center, bits, block)
    step = scale.repeat_interleave(3, 2)[:, :, :7] if block else scale.repeat_interleave(2, 3) if "group" in per else scale.expand(x.shape)
    error = (F.dequantize_kv(codes, scale, center, block) - x).abs()[held[:, None, :].expand(2, 2, 7)]
    assert bool((error <= step[held[:, None, :].expand(2, 2, 7)] / 2 + 1e-6).all())
    top = 2 ** (bits - 1)
    assert int(codes.max()) <= top - 1 and int(codes.min()) >= -top


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 7, 1])
def test_packed_codes_come_back(bits, width):
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (2, 3, width), dtype=torch.int8) if bits > 1 else torch.randint(0, 2, (2, 3, width), dtype=torch.int8) * 2 - 1
    packed = F.pack_kv(codes, bits)
    assert packed.shape[-1] == -(-width * bits // 8)
    torch.testing.assert_close(F.unpack_kv(packed, bits, width), codes)


def test_four_bits_are_packed_as_group_query_attention_reads_them():
    codes = torch.tensor([-8, 7, 0, 3], dtype=torch.int8)
    assert (F.pack_kv(codes, 4).int() + 128).tolist() == [(-8 + 8) | (7 + 8) << 4, (0 + 8) | (3 + 8) << 4]


def test_attention_columns_add_up_the_rows_of_eager_attention():
    q, k, mask, weight, scale, causal, cap = EXAMPLES["attention_columns"]
    every = torch.arange(5)[None].expand(2, 5)
    rows = F.attention_rows(q, k, mask, every, scale, causal, cap)  # eager: [B, H, S, T]
    got = F.attention_columns(q, k, mask, weight, scale, causal, cap)
    torch.testing.assert_close(got, (rows * weight[:, None, :, None]).sum(2), rtol=0, atol=1e-6)  # five addends of size 1 in float32
    assert got.shape == (2, 4, 5)


def test_scatter_is_the_inverse_of_a_gather_whatever_the_filler_holds():
    x, _, keep = EXAMPLES["scatter_tokens"]
    y = F.keep_tokens(x, F.compact_tokens(keep, 5)) * 2
    torch.testing.assert_close(F.scatter_tokens(x, y, keep), torch.where(keep[..., None], 2 * x, x), rtol=0, atol=0)
