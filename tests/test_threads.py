# SPDX-License-Identifier: Apache-2.0
"""The number of threads changes the time and not one bit."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
from cases import SMOKE, as_params
from compare import prepared
from inputs import Case, Mask, Quant

pytestmark = pytest.mark.cpu

# More query blocks and heads than threads, more keys than one tile.
LARGER = [
    Case("bf16", 3, 5, sq=300, sk=700, dim=64, mode=3, k_lens=(700, 1, 333)),
    Case("fp16", 2, 6, 2, sq=400, sk=600, dim=96, mask=Mask(batched=True), layout="BSH"),
    Case("int8", 2, 6, 3, sq=300, sk=600, dim=64, mode=2, quant=Quant()),
    Case("bf16", 1, 1, sq=1, sk=3000, dim=128),
]


@pytest.mark.parametrize("case", as_params(SMOKE + LARGER))
def test_any_number_gives_the_same_bits(forward, threads, case):
    call = case.build()
    outputs = []
    for count in (1, 2, 3, 8):
        threads(count)
        outputs.append(forward(*call.args, **call.options))
    for out in outputs[1:]:
        assert torch.equal(out, outputs[0])


@pytest.mark.parametrize("case", as_params(LARGER))
def test_ten_calls_give_the_same_bits(forward, threads, case):
    threads(2)
    call = case.build()
    first = forward(*call.args, **call.options)
    for _ in range(9):
        assert torch.equal(forward(*call.args, **call.options), first)


def test_calls_from_several_threads(forward):
    calls = [prepared(case)[0] for case in SMOKE]
    want = [forward(*call.args, **call.options) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = pool.map(lambda call: forward(*call.args, **call.options), calls)
            assert all(map(torch.equal, got, want))
