# SPDX-License-Identifier: Apache-2.0
"""Layouts, grouped heads and strides: the same numbers, found wherever they lie."""

from __future__ import annotations

import pytest
import reference
import torch
from backends import current
from compare import check, prepared
from inputs import Call, Case, Mask, Pse, Quant, restride, to_layout

pytestmark = pytest.mark.usefixtures("one_split")

LAYOUTS = ["BSH", "BSND", "BNSD", "BNSD_BSND"]
BASE = {
    "bf16": Case("bf16", 2, 4, 2, sq=70, sk=150, dim=40, mode=3, k_lens=(150, 90)),
    "fp16": Case("fp16", 2, 4, 2, sq=70, sk=150, dim=40, mask=Mask(batched=True), pse=Pse()),
    "int8": Case("int8", 2, 4, 2, sq=70, sk=150, dim=40, quant=Quant(out="channel")),
}


def in_layout(call: Call, layout: str) -> Call:
    """A BNSD call in another layout."""
    q, k, v = (to_layout(x, layout) for x in call.args)
    return call.with_(query=q, key=k, value=v, input_layout=layout)


def run(forward, call: Call) -> torch.Tensor:
    return forward(*call.args, **call.options)


@pytest.mark.parametrize("dtype", BASE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_bit_by_bit(forward, dtype, layout):
    call, _ = prepared(BASE[dtype])
    want = run(forward, call)
    got = run(forward, in_layout(call, layout))
    assert got.is_contiguous()
    assert torch.equal(reference.split_output(got, 4, layout), want)


def check_moved(forward, moved, call):
    """Not one bit may change, unless the strides lead to another kernel: Hopper's own cannot read
    all of them."""
    if current().kernel(moved) == current().kernel(call):
        assert torch.equal(run(forward, moved), run(forward, call))
    else:
        check(run(forward, moved), moved)


@pytest.mark.parametrize("dtype", BASE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", ["transposed", "sliced", "last_dim"])
def test_strides_change_no_bit(forward, dtype, layout, strides):
    call = in_layout(prepared(BASE[dtype])[0], layout)
    moved = call.with_(
        **{
            n: restride(x, strides)
            for n, x in zip(("query", "key", "value"), call.args, strict=True)
        }
    )
    assert any(not x.is_contiguous() for x in moved.args)
    check_moved(forward, moved, call)


@pytest.mark.parametrize("dtype", BASE)
def test_inputs_of_different_strides(forward, dtype):
    call, _ = prepared(BASE[dtype])
    mixed = call.with_(
        key=restride(call.key, "last_dim"),
        value=restride(call.value, "transposed"),
    )
    check_moved(forward, mixed, call)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_tensor_as_all_three(forward, dtype):
    x = torch.randn(2, 50, 3 * 24, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    call = Call(x, x, x, {"num_heads": 3, "scale_value": 0.2})
    check(run(forward, call), call)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_slices_of_one_projection(forward, dtype):
    """q, k and v as a fused projection leaves them: (B, S, 3, N, D)."""
    x = torch.randn(2, 50, 3, 4, 24, generator=torch.Generator().manual_seed(0))
    q, k, v = x.to(torch.bfloat16 if dtype == "bf16" else torch.float16).unbind(2)
    call = Call(q, k, v, {"num_heads": 4, "scale_value": 0.2, "input_layout": "BSND"})
    check(run(forward, call), call)


def test_overlapping_rows(forward):
    """Windows over one sequence: stride 1 between rows that are 16 long."""
    x = torch.randn(80, generator=torch.Generator().manual_seed(0)).bfloat16()
    windows = x.unfold(0, 16, 1)[None, None]
    call = Call(windows, windows, windows, {"input_layout": "BNSD"})
    check(run(forward, call), call)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (8, 2), (8, 4), (64, 1), (6, 3)])
def test_groups_equal_repeated_heads(forward, dtype, heads, kv_heads):
    case = Case(dtype, 2, heads, kv_heads, sq=20, sk=70, dim=32, mode=2)
    call, _ = prepared(case)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (call.key, call.value))
    full = call.with_(key=k, value=v, num_key_value_heads=None)
    assert torch.equal(run(forward, call), run(forward, full))


def test_heads_default_to_one(forward):
    x = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0)).half()
    call = Call(x, x, x, {})
    check(run(forward, call), call)


def test_storage_offset_that_is_not_aligned(forward):
    """No pointer is a multiple of a vector's size."""
    storage = torch.randn(3 * 2 * 50 * 24 + 7, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = storage[5:-2].view(3, 1, 2, 50, 24).unbind(0)
    assert q.data_ptr() % 4 == 2
    call = Call(q, k, v, {"num_heads": 2, "input_layout": "BNSD"})
    check(run(forward, call), call)
