# SPDX-License-Identifier: Apache-2.0
"""Head dimensions above 256, whose CUDA kernels cut the columns of an output between warps or
blocks, some with chunks of K and V in one ring: many tiles, many blocks, every mask."""

from __future__ import annotations

import dataclasses
import math

import backends
import pytest
import torch
from cases import as_params
from compare import check, check_case, prepared
from inputs import Case, Mask, Pse, Quant
from simulate import simulate

CASES = [
    Case("fp16", sq=70, sk=460, dim=512, heads=4, kv_heads=2),
    Case("bf16", sq=130, sk=330, dim=264, heads=1, mode=3),
    Case("fp16", sq=200, sk=200, dim=320, heads=1, mode=2),
    Case("bf16", sq=200, sk=330, dim=448, heads=1, mode=4, pre=90, nxt=30),
    Case("fp16", sq=130, sk=390, dim=512, heads=1, mask=Mask(3, pattern="empty_rows"), nxt=100),
    Case("bf16", 2, sq=100, sk=200, dim=384, pse=Pse(pattern="holes"), k_lens=(200, 77)),
    Case("bf16", sq=70, sk=330, dim=512, heads=1, pse=Pse(), mask=Mask(2), mode=1),
    Case("fp16", sq=70, sk=330, dim=512, heads=1, scale=-0.05),
    Case("fp16", 2, sq=70, sk=200, dim=272, layout="BSH", q_lens=(3, 70), k_lens=(0, 200)),
    Case("bf16", 2, sq=70, sk=90, dim=400, layout="BNSD_BSND", strides="transposed", mode=3),
    Case("fp16", 2, sq=30, sk=200, dim=512, strides="expanded"),
    Case("fp16", sq=1, sk=64, dim=512, heads=3),
    Case("bf16", 2, sq=70, sk=200, dim=392, mode=3, quant=Quant(out="channel", offset=True)),
    *(
        dataclasses.replace(case, dtype="int8", quant=quant)
        for case, quant in (
            (Case(sq=130, sk=460, dim=512, heads=4, kv_heads=2), Quant()),
            (Case(sq=130, sk=330, dim=272, mode=3), Quant(out="channel", offset=True)),
            (Case(sq=200, sk=330, dim=448, mode=4, pre=90, nxt=30), Quant(sign_s=-1)),
            (Case(sq=130, sk=300, dim=384, mask=Mask(3, pattern="empty_rows"), nxt=9), Quant()),
            (Case(sq=70, sk=330, dim=512, pse=Pse(), mask=Mask(2), mode=1), Quant(out="tensor")),
            (Case(batch=2, sq=100, sk=200, dim=384, pse=Pse(pattern="holes")), Quant(sign_s=-1)),
            (Case(batch=2, sq=70, sk=200, dim=336, q_lens=(3, 70), k_lens=(0, 200)), Quant()),
        )
    ),
]


@pytest.mark.parametrize("case", as_params(CASES))
def test_case(forward, case):
    check_case(forward, case)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("case", as_params(CASES))
def test_splits(on_cuda, case, splits):
    call, expected = prepared(case)
    with backends.environment(PFA_NUM_SPLITS=str(splits)):
        check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


MASKS = {
    "causal": {"mode": 2},
    "band": {"mode": 4, "pre": 100, "nxt": 3},
    "mask": {"mask": Mask(), "nxt": 120},
    "pse": {"pse": Pse(pattern="holes")},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dim", [384, 512])
def test_nan_reaches_only_rows_that_see_it(forward, mask, where, dim):
    """NaN and both infinities, in the columns of either half."""
    case = Case("bf16", 1, 1, sq=200, sk=300, dim=dim, **MASKS[mask])
    call, _ = prepared(case)
    x = call.tensors()[where].clone()
    bad = (math.nan, math.inf, -math.inf)
    for key, value, channel in zip((5, 77, 170), bad, (0, dim // 2, dim - 1), strict=True):
        x[:, :, key, channel] = value
    poisoned = call.with_(**{where: x})
    out = forward(*poisoned.args, **poisoned.options)
    check(out, poisoned)
    assert out.isfinite().all(-1).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_contents_beyond_lengths(forward, bad):
    case = Case("fp16", 2, 1, sq=70, sk=150, dim=512, q_lens=(70, 33), k_lens=(65, 150))
    call, _ = prepared(case)
    tensors = {n: call.tensors()[n].clone() for n in ("query", "key", "value")}
    for b, (rows, keys) in enumerate(zip(case.q_lens, case.k_lens, strict=True)):
        tensors["query"][b, :, rows:] = bad
        tensors["key"][b, :, keys:] = bad
        tensors["value"][b, :, keys:] = bad
    poisoned = call.with_(**tensors)
    out = forward(*poisoned.args, **poisoned.options)
    assert torch.equal(out, forward(*call.args, **call.options))


ORDERS = {
    "few": {"CUDASIM_SMS": "2"},
    "war": {"CUDASIM_ASYNC": "war", "CUDASIM_SMS": "2"},
    **{
        f"random-{seed}": {"CUDASIM_ASYNC": "random", "CUDASIM_SEED": str(seed)}
        for seed in range(1, 4)
    },
}


@pytest.fixture(scope="module")
def outputs(on_cuda):
    if on_cuda.name != "sim":
        pytest.skip("needs the simulator: --backend sim")
    return simulate(CASES, PFA_NUM_SPLITS="1")


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_gives_the_same_bits(outputs, order):
    """Also where a block of threads takes many blocks of work."""
    for case, want, got in zip(
        CASES, outputs, simulate(CASES, PFA_NUM_SPLITS="1", **ORDERS[order]), strict=True
    ):
        assert torch.equal(want, got), case.id


def test_no_races(outputs):
    raced = simulate(CASES, PFA_NUM_SPLITS="1", CUDASIM_RACE="1")
    for case, want, got in zip(CASES, outputs, raced, strict=True):
        assert torch.equal(want, got), case.id
