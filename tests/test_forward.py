# SPDX-License-Identifier: Apache-2.0
"""Every case of the lists against fp64, and what holds for every call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import EDGE, FULL, SMOKE, as_params
from compare import check, check_case, prepared
from inputs import Call


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_smoke(forward, case):
    check_case(forward, case)


@pytest.mark.parametrize("case", as_params(EDGE))
def test_edge(forward, case):
    check_case(forward, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", as_params(FULL))
def test_full(forward, case):
    call = case.build()
    check(forward(*call.args, **call.options), call)


def test_ids_are_unique():
    ids = [case.id for case in SMOKE + EDGE + FULL]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_same_call_gives_same_bits(forward, case):
    call, _ = prepared(case)
    first, second = (forward(*call.args, **call.options) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_inputs_are_not_modified(forward, case):
    call = case.build()
    before = {name: x.clone() for name, x in call.tensors().items()}
    forward(*call.args, **call.options)
    for name, x in call.tensors().items():
        assert x.view(torch.uint8).equal(before[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_defaults(forward, dtype):
    """BSH, one head, scale 1, no mask: every key takes part although next_tokens is 0."""
    q, k, v = (torch.randn(2, s, 24).to(dtype) for s in (20, 30, 30))
    check(forward(q, k, v), Call(q, k, v, {}))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (1, 2, 0, 8)])
def test_empty_output(forward, shape):
    q = torch.empty(shape, dtype=torch.float16)
    out = forward(q, q, q, num_heads=2, input_layout="BNSD")
    assert out.shape == q.shape
    assert out.dtype == torch.float16


def test_no_keys_give_zeros(forward, nan_filled_empty):
    case = next(c for c in EDGE if c.sk == 0)
    call, _ = prepared(case)
    assert not forward(*call.args, **call.options).any()
    int8 = dataclasses.replace(call, options=call.options | {"quant_scale2": torch.tensor([2.0])})
    out = forward(*int8.args, **int8.options)
    assert out.dtype == torch.int8
    assert not out.any()
