# SPDX-License-Identifier: Apache-2.0
"""What the operator refuses, one row per check, and the corner cases that it must not refuse."""

from __future__ import annotations

import pathlib
import re
from typing import Any, NamedTuple

import pytest
import torch

import pfa

FAR = 2**63 - 1
B, N, SQ, SK, D = 2, 4, 8, 10, 16
SOURCES = pathlib.Path(__file__).parent.parent / "csrc" / "ops"


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def int8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def one(dtype: torch.dtype = torch.float32, count: int = 1) -> torch.Tensor:
    return torch.ones(count).to(dtype)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


COMPRESSED = torch.zeros(1, dtype=torch.bool).expand(2048, 2048)
FULL = mask(SQ, SK)
INT8 = {
    "query": int8(B, N, SQ, D),
    "key": int8(B, N, SK, D),
    "value": int8(B, N, SK, D),
    "deq_scale1": one(),
    "quant_scale1": one(),
    "deq_scale2": one(),
}
TO_INT8 = {"quant_scale2": one(), "quant_offset2": one()}


def arguments(**changes: Any) -> dict[str, Any]:
    base = {
        "query": half(B, N, SQ, D),
        "key": half(B, N, SK, D),
        "value": half(B, N, SK, D),
        "num_heads": N,
        "input_layout": "BNSD",
    }
    return base | changes


def call(function: Any, changes: dict[str, Any]) -> torch.Tensor:
    args = arguments(**changes)
    out: torch.Tensor = function(args.pop("query"), args.pop("key"), args.pop("value"), **args)
    return out


def raw(changes: dict[str, Any]) -> torch.Tensor:
    # The packet torch.ops.pfa.forward would turn a tensor of lengths into a list.
    lengths = (changes.get("actual_seq_lengths"), changes.get("actual_seq_lengths_kv"))
    tensors = any(isinstance(x, torch.Tensor) for x in lengths)
    overloads = torch.ops.pfa.forward
    return call(overloads.tensor_lens if tensors else overloads.default, changes)


def front(changes: dict[str, Any]) -> torch.Tensor:
    return call(pfa.prompt_flash_attention, changes)


class Row(NamedTuple):
    id: str
    error: type[Exception]  # of the front end; the operator itself raises RuntimeError
    text: str
    changes: dict[str, Any]
    raw_only: bool = False


def bsh(width_q: int = N * D, width_k: int = N * D, **changes: Any) -> dict[str, Any]:
    key = half(B, SK, width_k)
    shapes = {"query": half(B, SQ, width_q), "key": key, "value": key}
    return shapes | {"input_layout": "BSH"} | changes


def heads(count: int, count_k: int, **changes: Any) -> dict[str, Any]:
    key = half(1, count_k, 2, 8)
    shapes = {"query": half(1, count, 2, 8), "key": key, "value": key}
    return shapes | {"num_heads": count, "num_key_value_heads": count_k} | changes


bf16 = torch.bfloat16
ROWS = [
    # dtypes
    Row("query_dtype", TypeError, "query must have dtype float16, bfloat16 or int8, got float32",
        {"query": torch.zeros(B, N, SQ, D)}),
    Row("query_dtype_unknown", TypeError, "int8, got another one",
        {"query": torch.zeros(B, N, SQ, D, dtype=torch.complex64)}),
    Row("key_dtype", TypeError, "key must have dtype float16 like query, got bfloat16",
        {"key": half(B, N, SK, D).to(bf16)}),
    Row("value_dtype", TypeError, "value must have dtype float16 like query, got int8",
        {"value": int8(B, N, SK, D)}),
    Row("padding_mask", ValueError, "padding_mask is reserved and must be None, got a tensor",
        {"padding_mask": FULL}),
    Row("pse_dtype", TypeError, "pse_shift must have dtype float16 when query is float16",
        {"pse_shift": torch.zeros(1, N, SQ, SK)}),
    Row("pse_dtype_int8", TypeError, "pse_shift must have dtype float16 when query is int8",
        INT8 | {"pse_shift": half(1, N, SQ, SK).to(bf16)}),
    Row("mask_dtype", TypeError, "atten_mask must have dtype bool, int8 or uint8",
        {"atten_mask": half(SQ, SK)}),
    Row("deq_dtype", TypeError, "deq_scale1 must have dtype float32, uint64 or int64, got float16",
        INT8 | {"deq_scale1": one(torch.float16)}),
    Row("deq_dtypes_differ", TypeError, "deq_scale2 must have dtype float32 like deq_scale1",
        INT8 | {"deq_scale2": one(torch.int64)}),
    Row("quant_scale1_dtype", TypeError, "quant_scale1 must have dtype float32, got float64",
        INT8 | {"quant_scale1": one(torch.float64)}),
    Row("quant_scale2_dtype", TypeError, "quant_scale2 must have dtype float32 (bfloat16 needs",
        {"quant_scale2": one(bf16)}),
    Row("quant_offset2_dtype", TypeError, "quant_offset2 must have dtype float32 (bfloat16 needs",
        {"quant_scale2": one(), "quant_offset2": one(torch.int32)}),
    Row("quant2_dtypes_differ", TypeError, "quant_offset2 must have dtype float32 like",
        {name: half(B, N, SK, D).to(bf16) for name in ("query", "key", "value")}
        | {"quant_scale2": one(), "quant_offset2": one(bf16)}),
    Row("lengths_dtype", TypeError, "actual_seq_lengths must have dtype int32 or int64, got int16",
        {"actual_seq_lengths": one(torch.int16)}),
    # heads, layout, ranks
    Row("num_heads", ValueError, "num_heads must be positive, got 0", {"num_heads": 0}),
    Row("num_key_value_heads", ValueError, "num_key_value_heads must be positive, or 0",
        {"num_key_value_heads": -1}),
    Row("layout", ValueError, "input_layout must be BSH, BSND, BNSD or BNSD_BSND, got bnsd",
        {"input_layout": "bnsd"}),
    Row("rank", ValueError, "query must have 3 dimensions for input_layout BSH, got shape (2, 4,",
        {"input_layout": "BSH"}),
    Row("rank_value", ValueError, "value must have 4 dimensions for input_layout BNSD",
        {"value": half(B, SK, D)}),
    Row("heads_width", ValueError, "query's last dimension must be a multiple of num_heads = 4",
        bsh(width_q=N * D + 2)),
    Row("heads_query", ValueError, "query must have num_heads = 8 heads, got 4", {"num_heads": 8}),
    Row("heads_key", ValueError, "key must have num_key_value_heads = 4 heads, got 2",
        {"key": half(B, 2, SK, D)}),
    Row("heads_value", ValueError, "value must have num_key_value_heads = 4 heads, got 2",
        {"value": half(B, 2, SK, D)}),
    # head dimension
    Row("head_dim", ValueError, "query must have a head dimension of 1 to 512, got 513",
        {name: half(1, N, 2, 513) for name in ("query", "key", "value")}),
    Row("head_dim_key", ValueError, "key must have query's head dimension 16, got 8 from shape",
        {"key": half(B, N, SK, 8)}),
    Row("head_dim_bsh", ValueError, "key must have query's head dimension 16, got 8",
        bsh(width_k=2 * D)),
    # which scales go together
    Row("scale_missing", ValueError, "deq_scale1 must be given when query is int8, got None",
        INT8 | {"deq_scale1": None}),
    Row("scale_missing_quant", ValueError, "quant_scale1 must be given when query is int8",
        INT8 | {"quant_scale1": None}),
    Row("scale_forbidden", ValueError, "deq_scale2 must be None unless query is int8",
        {"deq_scale2": one(), "quant_scale2": one()}),
    Row("offset_alone", ValueError, "quant_offset2 must be None unless quant_scale2 is given",
        {"quant_offset2": one()}),
    Row("offset_alone_int8", ValueError, "quant_offset2 must be None unless quant_scale2 is given",
        INT8 | {"quant_offset2": one()}),
    # groups, batch, limits
    Row("groups", ValueError, "num_key_value_heads must divide num_heads, got 3 and 8",
        heads(8, 3)),
    Row("group_size", ValueError, "num_heads must be at most 64 times num_key_value_heads",
        heads(130, 2)),
    Row("batch_key", ValueError, "key must have query's batch size 2, got 1",
        {"key": half(1, N, SK, D)}),
    Row("batch_value", ValueError, "value must have query's batch size 2, got 3",
        {"value": half(3, N, SK, D)}),
    Row("seqlen_value", ValueError, "value must have key's sequence length 10, got 9",
        {"value": half(B, N, 9, D)}),
    Row("batch", ValueError, "query must have a batch size of at most 65536, got 65537",
        {name: half(65537, 1, 1, 1) for name in ("query", "key", "value")} | {"num_heads": 1}),
    Row("heads", ValueError, "num_heads must be at most 256, got 257", heads(257, 257)),
    Row("empty_key_int8", ValueError, "key must not be empty when query is int8",
        INT8 | {"key": int8(B, N, 0, D), "value": int8(B, N, 0, D)}),
    # lengths
    Row("lengths_count", ValueError, "actual_seq_lengths must have one entry or at least one per",
        {"query": half(3, N, SQ, D), "key": half(3, N, SK, D), "value": half(3, N, SK, D),
         "actual_seq_lengths": [1, 2]}),
    Row("lengths_large", ValueError, "actual_seq_lengths_kv must lie between 0 and the sequence "
        "length 10, got 11 for batch element 1", {"actual_seq_lengths_kv": [3, 11]}),
    Row("lengths_negative", ValueError, "actual_seq_lengths must lie between 0 and the sequence "
        "length 8, got -1 for batch element 0", {"actual_seq_lengths": [-1]}),
    Row("lengths_rank", ValueError, "actual_seq_lengths must have one dimension, got shape (1, 2)",
        {"actual_seq_lengths": torch.ones(1, 2, dtype=torch.int64)}),
    Row("lengths_tensor_count", ValueError, "actual_seq_lengths_kv must have one entry or at least",
        {"actual_seq_lengths_kv": torch.ones(0, dtype=torch.int32)}),
    # sparse_mode and masks
    Row("mode_prefix", NotImplementedError, "sparse_mode 5 (prefix) is not implemented",
        {"sparse_mode": 5}),
    Row("mode_block_local", NotImplementedError, "sparse_mode 8 (block_local) is not implemented",
        {"sparse_mode": 8, "atten_mask": mask(3, 3)}),
    Row("mode", ValueError, "sparse_mode must be 0, 1, 2, 3 or 4, got 9", {"sparse_mode": 9}),
    Row("mode_negative", ValueError, "sparse_mode must be 0, 1, 2, 3 or 4, got -1",
        {"sparse_mode": -1}),
    Row("mask_missing", ValueError, "atten_mask must be given for sparse_mode 1, got None",
        {"sparse_mode": 1}),
    Row("mask_rows", ValueError, "Sq >= 8 and Skv >= 10, got (7, 10)", {"atten_mask": mask(7, SK)}),
    Row("mask_columns", ValueError, "Sq >= 8 and Skv >= 10, got (8, 9)",
        {"atten_mask": mask(SQ, 9)}),
    Row("mask_batch", ValueError, "atten_mask must have shape (Sq, Skv), (1 or B, Sq, Skv)",
        {"atten_mask": mask(3, SQ, SK)}),
    Row("mask_heads", ValueError, "got (2, 4, 8, 10)", {"atten_mask": mask(B, N, SQ, SK)}),
    Row("mask_rank", ValueError, "got (1, 1, 1, 8, 10)", {"atten_mask": mask(1, 1, 1, SQ, SK)}),
    Row("mask_empty", ValueError, "got (0,)", {"atten_mask": mask(0)}),
    Row("mask_compressed_missing", ValueError,
        "atten_mask must be the compressed (2048, 2048) mask for sparse_mode 2, got None",
        {"sparse_mode": 2}, raw_only=True),
    Row("mask_compressed", ValueError, "for sparse_mode 3, got (8, 10)",
        {"sparse_mode": 3, "atten_mask": FULL}),
    Row("mask_compressed_batch", ValueError, "for sparse_mode 4, got (2, 1, 2048, 2048)",
        {"sparse_mode": 4, "atten_mask": COMPRESSED.expand(2, 1, 2048, 2048)}),
    Row("pse_rank", ValueError, "pse_shift must have shape (1 or B, N, Sq, Skv)",
        {"pse_shift": half(N, SQ, SK)}),
    Row("pse_heads", ValueError, "got (1, 1, 8, 10)", {"pse_shift": half(1, 1, SQ, SK)}),
    Row("pse_batch", ValueError, "got (3, 4, 8, 10)", {"pse_shift": half(3, N, SQ, SK)}),
    Row("pse_rows", ValueError, "got (1, 4, 7, 10)", {"pse_shift": half(1, N, 7, SK)}),
    Row("pse_empty", ValueError, "got (0,)", {"pse_shift": half(0)}),
    # tokens
    Row("tokens_both", ValueError, "pre_tokens and next_tokens must not both be negative",
        {"atten_mask": FULL, "pre_tokens": -1, "next_tokens": -1}),
    Row("tokens_crossed", ValueError, "-next_tokens must be at most pre_tokens",
        {"atten_mask": FULL, "pre_tokens": 2, "next_tokens": -3}),
    Row("tokens_crossed_wide", ValueError, "-next_tokens must be at most pre_tokens",
        {"atten_mask": FULL, "pre_tokens": FAR, "next_tokens": -FAR - 1}),
    Row("tokens_next", ValueError, "next_tokens must be greater than minus the query length 5 of "
        "batch element 1, got -5",
        {"atten_mask": FULL, "next_tokens": -5, "actual_seq_lengths": [8, 5]}),
    Row("tokens_pre", ValueError, "pre_tokens must be greater than minus the key length 10",
        {"atten_mask": FULL, "next_tokens": FAR, "pre_tokens": -10}),
    Row("tokens_next_band", ValueError, "next_tokens must be greater than minus the key length 10",
        {"atten_mask": COMPRESSED, "sparse_mode": 4, "next_tokens": -10}),
    Row("tokens_pre_band", ValueError, "pre_tokens must be greater than minus the query length 8",
        {"atten_mask": COMPRESSED, "sparse_mode": 4, "next_tokens": 99, "pre_tokens": -8}),
    Row("tokens_tensor", ValueError, "next_tokens must be greater than minus the query length 8",
        {"atten_mask": FULL, "next_tokens": -8, "actual_seq_lengths": torch.tensor([0])}),
    # int8 output and rows that take no part
    Row("band_int8", ValueError, "pre_tokens and next_tokens must not be negative for an int8",
        {"atten_mask": COMPRESSED, "sparse_mode": 4, "next_tokens": -1, "quant_scale2": one()}),
    Row("offset_next", ValueError, "next_tokens must not be negative when quant_offset2 is given",
        TO_INT8 | {"atten_mask": FULL, "next_tokens": -1}),
    Row("offset_mask", ValueError, "quant_offset2 must be None when the band of sparse_mode 0",
        TO_INT8 | {"atten_mask": FULL, "pre_tokens": 2, "actual_seq_lengths_kv": [10, 5]}),
    Row("offset_causal", ValueError, "quant_offset2 must be None when the band of sparse_mode 3",
        TO_INT8 | {"atten_mask": COMPRESSED, "sparse_mode": 3, "actual_seq_lengths_kv": [7]}),
    Row("offset_band", ValueError, "quant_offset2 must be None when the band of sparse_mode 4",
        TO_INT8 | {"atten_mask": COMPRESSED, "sparse_mode": 4, "next_tokens": 2,
                   "actual_seq_lengths_kv": [5]}),
    # scale shapes
    Row("scale_size", ValueError, "deq_scale1 must have one element, got shape (2,)",
        INT8 | {"deq_scale1": one(count=2)}),
    Row("scale_size_quant1", ValueError, "quant_scale1 must have one element, got shape (0,)",
        INT8 | {"quant_scale1": one(count=0)}),
    Row("scale2_size", ValueError, "quant_scale2 must have one element or num_heads * head_dim",
        {"quant_scale2": one(count=D)}),
    Row("scale2_empty", ValueError, "quant_scale2 must have one element or",
        {"quant_scale2": one(count=0)}),
    Row("offset2_size", ValueError, "quant_offset2 must have as many elements as quant_scale2 (64)",
        {"quant_scale2": one(count=N * D), "quant_offset2": one()}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_operator_refuses(row: Row) -> None:
    with pytest.raises(RuntimeError) as caught:
        raw(row.changes)
    assert caught.type is RuntimeError
    text = str(caught.value)
    assert text.startswith("pfa.forward: ")
    assert row.text in text
    assert "\n" not in text


@pytest.mark.parametrize("row", [r for r in ROWS if not r.raw_only], ids=lambda row: row.id)
def test_front_end_refuses(row: Row) -> None:
    with pytest.raises(row.error) as caught:
        front(row.changes)
    assert caught.type is row.error
    with pytest.raises(RuntimeError) as from_operator:
        raw(row.changes)
    assert str(caught.value) == str(from_operator.value)


def checks() -> list[str]:
    """The longest literal of every PFA_CHECK in the sources."""
    found = []
    for path in sorted(SOURCES.glob("*.cpp")):
        source = path.read_text()
        for match in re.finditer(r"PFA_CHECK\(", source):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(source[end], 0)
                end += 1
            body = re.sub(r'"\s*"', "", source[match.end() : end])
            found.append(max(re.findall(r'"([^"]*)"', body), key=len))
    return found


# Two devices in one call reach the operator only where there is a second backend.
NEEDS_TWO_DEVICES = " must be on the device of query"


def test_every_check_has_a_row() -> None:
    texts = []
    for row in ROWS:
        with pytest.raises(RuntimeError) as caught:
            raw(row.changes)
        texts.append(str(caught.value))
    literals = checks()
    assert len(ROWS) >= len(literals) >= 40
    missing = [x for x in literals if x != NEEDS_TWO_DEVICES and not any(x in t for t in texts)]
    assert missing == []


ORDER = [
    # Of two faults the one that comes first in docs/semantics.md is named.
    ("dtype before num_heads", "dtype", {"query": torch.zeros(1), "num_heads": 0}),
    ("mask dtype before num_heads", "dtype", {"atten_mask": half(1), "num_heads": 0}),
    ("num_heads before layout", "num_heads", {"num_heads": 0, "input_layout": "?"}),
    ("layout before shapes", "input_layout", {"input_layout": "?", "num_heads": 3}),
    ("head_dim before scales", "head dimension", {"key": half(B, N, SK, 8), "deq_scale1": one()}),
    ("scales before groups", "deq_scale1", heads(8, 3, deq_scale1=one())),
    ("groups before lengths", "divide", heads(8, 3, actual_seq_lengths=[99])),
    ("lengths before mode", "actual_seq_lengths", {"actual_seq_lengths": [99], "sparse_mode": 9}),
    ("mode before mask", "sparse_mode", {"sparse_mode": 9, "atten_mask": mask(1, 1)}),
    ("mask before pse", "atten_mask", {"atten_mask": mask(1, 1), "pse_shift": half(1)}),
    ("pse before tokens", "pse_shift",
     {"pse_shift": half(1), "atten_mask": FULL, "pre_tokens": -99}),
    ("tokens before scale shapes", "pre_tokens",
     {"atten_mask": FULL, "pre_tokens": -99, "quant_scale2": one(count=3)}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "changes"), [x[1:] for x in ORDER], ids=[x[0] for x in ORDER])
def test_order(text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"^pfa.forward: [^,]*{text}"):
        raw(changes)


EMPTY = {"query": half(0, N, SQ, D)}
ACCEPTED = {
    "tokens ignored without mask": {"pre_tokens": -5, "next_tokens": -7},
    "tokens ignored in mode 1": {"sparse_mode": 1, "atten_mask": FULL, "pre_tokens": -FAR - 1},
    "tokens ignored in mode 2": {"sparse_mode": 2, "atten_mask": COMPRESSED, "next_tokens": -99},
    "largest tokens": {"atten_mask": FULL, "pre_tokens": FAR, "next_tokens": FAR},
    "largest tokens in a band": {
        "atten_mask": COMPRESSED, "sparse_mode": 4, "pre_tokens": FAR, "next_tokens": FAR},
    "negative tokens that leave a band": {"atten_mask": FULL, "pre_tokens": 9, "next_tokens": -7},
    "empty batch elements have no band": {
        "atten_mask": FULL, "next_tokens": -7, "actual_seq_lengths": [8, 0]},
    "compressed mask of rank 4": {
        "sparse_mode": 3, "atten_mask": COMPRESSED.expand(1, 1, 2048, 2048)},
    "empty length list": {"actual_seq_lengths": [], "actual_seq_lengths_kv": []},
    "one length": {"actual_seq_lengths_kv": [3]},
    "unused lengths": {"actual_seq_lengths": [8, 3, -1, 99]},
    "tensor lengths beyond the sequence": {"actual_seq_lengths": torch.tensor([-3, 99])},
    "empty offset": {"quant_offset2": one(count=0)},
    "empty offset of any dtype": {"quant_offset2": one(torch.int32, 0), "quant_scale2": one()},
    "offset and a row without keys by lengths": TO_INT8 | {"actual_seq_lengths_kv": [0]},
    "tensor lengths are not judged": {
        "quant_scale2": one(), "quant_offset2": torch.zeros(1), "sparse_mode": 3,
        "atten_mask": COMPRESSED, "actual_seq_lengths_kv": torch.tensor([1])},
    "per-channel scale of any shape": {"quant_scale2": torch.ones(1, N, 1, D)},
    "no keys": {"key": half(B, N, 0, D), "value": half(B, N, 0, D)},
    "no keys, mask and pse": {
        "key": half(B, N, 0, D), "value": half(B, N, 0, D),
        "atten_mask": mask(SQ, 0), "pse_shift": half(1, N, SQ, 0)},
    "empty query": EMPTY,
    "empty query, wrong everything else": EMPTY | {
        "num_heads": -1, "sparse_mode": 99, "actual_seq_lengths": [99], "deq_scale1": one(bf16)},
}  # fmt: skip


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(changes: dict[str, Any]) -> None:
    out = raw(changes)
    assert out.shape == arguments(**changes)["query"].shape
    assert torch.equal(out, front(changes))
    assert not out.any()  # every value above is zero


@pytest.mark.parametrize("query", [torch.zeros(0, N, SQ, D), half(0, SQ, D)], ids=["dtype", "rank"])
def test_empty_query_has_a_dtype_and_a_rank(query: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="query must have"):
        raw({"query": query})


def test_empty_results_keep_the_dtype_rule() -> None:
    query = half(2, 3, 0, D)
    assert raw({"query": query, "input_layout": "BNSD_BSND"}).shape == (2, 0, 3, D)
    assert raw({"query": query, "quant_scale2": one()}).dtype == torch.int8
    empty = int8(0, N, SQ, D)
    assert raw({"query": empty, "key": empty, "value": empty}).dtype == torch.float16
