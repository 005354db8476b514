# SPDX-License-Identifier: Apache-2.0
"""Keys of a row cut into runs that several blocks compute and a last step merges (CUDA only)."""

from __future__ import annotations

import backends
import pytest
import torch
from cases import SMOKE, as_params
from compare import check, prepared
from inputs import Case, Mask, Pse, Quant

# Rows without a key in some run or in all, runs without a tile, infinities that a run alone sees.
CASES = [
    *SMOKE,
    Case("bf16", sq=1, sk=300, dim=128, heads=4, batch=3),
    Case("fp16", sq=300, sk=1, dim=72),
    Case("bf16", sq=130, sk=300, mode=2),
    Case("fp16", sq=130, sk=300, mode=4, pre=40, nxt=-7),
    Case("bf16", sq=70, sk=300, mask=Mask(3, pattern="empty_rows"), mode=1),
    Case("bf16", sq=70, sk=300, mask=Mask(4, pattern="left_half"), mode=1),
    Case("fp16", sq=70, sk=190, pse=Pse(pattern="empty_rows")),
    Case("fp16", sq=70, sk=190, pse=Pse(pattern="large")),
    Case("bf16", 3, sq=100, sk=130, q_lens=(100, 0, 1), k_lens=(130, 50, 0), mode=3),
    Case("bf16", sq=70, sk=200, dim=40, layout="BSH", batch=2),
    Case("fp16", heads=1, sq=40, sk=130, dim=512, mode=2),
    Case("bf16", sq=100, sk=300, values="large_logits"),
    Case("bf16", sq=100, sk=300, quant=Quant(out="channel")),
    Case("int8", 2, sq=70, sk=300, dim=72, k_lens=(17, 290), quant=Quant(out="tensor")),
    Case("int8", sq=70, sk=300, mode=4, pre=70, nxt=10, quant=Quant()),
    Case("int8", heads=1, sq=40, sk=300, dim=256, quant=Quant(sign_s=-1, sign_o=-1)),
]


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("case", as_params(CASES))
def test_case(on_cuda, case, splits):
    call, expected = prepared(case)
    with backends.environment(PFA_NUM_SPLITS=str(splits)):
        assert on_cuda.choice(call).num_splits == splits
        out = on_cuda.operator()(*call.args, **call.options)
        check(out, call, expected, on_cuda)
        assert torch.equal(out, on_cuda.operator()(*call.args, **call.options))


@pytest.mark.parametrize("splits", [2, 5])
def test_a_nan_stays_in_its_rows(on_cuda, splits):
    """In V, seen by the last rows of a causal mask and through one run alone."""
    call, _ = prepared(Case("bf16", sq=200, sk=200, mode=2))
    value = call.value.clone()
    value[:, :, 150, 3] = torch.nan
    value[:, :, 10, 5] = torch.inf
    poisoned = call.with_(value=value)
    with backends.environment(PFA_NUM_SPLITS=str(splits)):
        out = on_cuda.operator()(*poisoned.args, **poisoned.options)
        check(out, poisoned, backend=on_cuda)
        assert out[:, :, :10].isfinite().all()
        assert out[:, :, 150:, 3].isnan().all()


def test_what_it_takes_without_being_told(on_cuda):
    """Long rows and few of them are cut; one row's worth of work for every processor is not."""
    few = Case("bf16", heads=1, sq=1, sk=4096, dim=64)
    many = Case("bf16", batch=64, heads=64, kv_heads=1, sq=256, sk=64, dim=16)
    for case, cut in ((few, True), (many, False)):
        assert (on_cuda.choice(case.build()).num_splits > 1) == cut, case.id
