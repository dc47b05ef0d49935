"""The dialect: importing this package registers every op file in it. One file per op; the body is reference, fake kernel and default lowering.

    attention           q, k, v -> context, one node per layer (GQA, masks, windows, soft cap inside)
    attention_varlen    the same for packed vision segments
    attention_rows      probabilities of chosen query rows only: the score tap
    attention_columns   what every token receives, summed over weighted rows: the second pass, one head at a time
    top_tokens          mark the k best tokens of a row
    farthest_tokens     greedy max-min choice
    dpp_tokens          greedy choice by relevance and difference
    thin_tokens         removal of near-duplicates
    compact_tokens      a keep mask as a gather index
    keep_tokens         gather K of T tokens
    merge_tokens        weighted sums of groups of tokens
    insert_tokens       put learned tokens between others
    scatter_tokens      put processed tokens back among those that bypassed
    kv_store            marks what goes to the cache
    kv_append           past and new rows as one sequence
    kv_mask             which rows of past + new are valid
    last_token          the last valid row
    splice_image_features   image features into the places that wait for them
    kv_held             which rows of a partition that is only read are valid
    kv_scale            scales and centres of keys or values
    quantize_kv, dequantize_kv   keys or values as codes, and back
    quantize_fp8, dequantize_fp8   the same in E4M3
    quantize_fsq, dequantize_fsq   the same by finite scalar quantization
    pack_kv, unpack_kv  codes of less than a byte

Add an op: a file with a decorated body; `graph/ops/_define.py` explains the rule.
"""

import importlib
import pkgutil

from ._define import REFERENCE, op

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["REFERENCE", "op"]
