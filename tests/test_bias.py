# SPDX-License-Identifier: Apache-2.0
"""pse_shift: added after the scale, before the mask replaces."""

from __future__ import annotations

import math

import pytest
import torch
from compare import check
from inputs import FAR, Call

DTYPES = [torch.float16, torch.bfloat16]


def make_call(dtype, sq=70, sk=150, heads=2, batch=2, dim=64, **options) -> Call:
    rng = torch.Generator().manual_seed(sq * sk)
    q, k, v = (torch.randn(batch, heads, s, dim, generator=rng).to(dtype) for s in (sq, sk, sk))
    options = {"num_heads": heads, "input_layout": "BNSD", "scale_value": dim**-0.5} | options
    return Call(q, k, v, options)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_comes_after_the_scale(forward, dtype):
    """With scale 0 the bias alone decides: ln 3 against 0 gives three times the weight."""
    pse = torch.tensor([0.0, math.log(3)]).to(dtype).reshape(1, 1, 1, 2).expand(1, 1, 40, 2)
    q = torch.ones(1, 1, 40, 1, dtype=dtype)
    v = torch.tensor([4.0, 8.0]).to(dtype).reshape(1, 1, 2, 1)
    options = {"input_layout": "BNSD", "scale_value": 0.0, "pse_shift": pse}
    call = Call(q, v, v, options)
    out = forward(*call.args, **call.options)
    assert (out - 7).abs().max() < 0.05
    check(out, call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_bias_changes_nothing(forward, dtype):
    call = make_call(dtype)
    biased = call.with_(pse_shift=torch.zeros(1, 2, 70, 150, dtype=dtype))
    check(forward(*biased.args, **biased.options), call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_over_a_row_cancels(forward, dtype):
    call = make_call(dtype)
    pse = (noise(2, 2, 70, 1) * 30).to(dtype).expand(2, 2, 70, 150)
    biased = call.with_(pse_shift=pse)
    check(forward(*biased.args, **biased.options), call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", ["batch", "heads", "rows", "columns", "transposed"])
def test_any_strides(forward, dtype, stride):
    pse = {
        "batch": noise(1, 2, 70, 150).expand(2, 2, 70, 150),
        "heads": noise(2, 1, 70, 150).expand(2, 2, 70, 150),
        "rows": noise(2, 2, 1, 150).expand(2, 2, 70, 150),
        "columns": noise(2, 2, 80, 320)[:, :, 3:75, ::2],
        "transposed": noise(2, 2, 160, 75).mT,
    }[stride]
    layout = pse.stride()
    pse = pse.to(dtype) if 0 not in layout else _expand_again(pse, dtype)
    call = make_call(dtype, pse_shift=pse)
    check(forward(*call.args, **call.options), call)


def _expand_again(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    one = x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())]
    return one.to(dtype).expand(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_masks(forward, dtype, nan_filled_empty):
    """The same as a mask, and an all -inf row is a row without a key."""
    hidden = noise(1, 1, 70, 150) < 0
    hidden[..., 5, :] = hidden[..., 69, :] = True
    pse = torch.where(hidden, -math.inf, 0.0).to(dtype).expand(1, 2, 70, 150)
    call = make_call(dtype)
    biased, masked = call.with_(pse_shift=pse), call.with_(sparse_mode=1, atten_mask=hidden)
    got = forward(*biased.args, **biased.options)
    check(got, biased)
    check(got, masked)
    assert not got[:, :, [5, 69]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_poison_rows_that_see_them(forward, dtype, bad):
    pse = noise(1, 2, 70, 150)
    pse[0, 0, 3, 7] = pse[0, 1, 4, 149] = bad
    call = make_call(dtype, pse_shift=pse.to(dtype))
    out = forward(*call.args, **call.options)
    assert out[:, 0, 3].isnan().all()
    assert out[:, 1, 4].isnan().all()
    check(out, call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_under_a_mask_are_replaced(forward, dtype, bad):
    mask = noise(1, 1, 70, 150) < 0
    pse = torch.where(mask, bad, noise(1, 2, 70, 150, seed=1)).to(dtype)
    call = make_call(dtype, pse_shift=pse, atten_mask=mask, next_tokens=FAR)
    check(forward(*call.args, **call.options), call)
    outside = torch.ones(70, 150, dtype=torch.bool).triu(6)
    pse = torch.where(outside, bad, 0.0).to(dtype).expand(1, 2, 70, 150)
    nothing = torch.zeros(70, 150, dtype=torch.bool)
    call = make_call(dtype, pse_shift=pse, atten_mask=nothing, next_tokens=5)
    check(forward(*call.args, **call.options), call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_finite_value_as_a_mask(forward, dtype):
    """As transformers writes it: masked keys vanish, a row with nothing else is their mean."""
    lowest = torch.finfo(dtype).min
    pse = torch.zeros(1, 2, 70, 150)
    pse[..., 100:] = lowest
    pse[..., 3, :] = lowest
    call = make_call(dtype, pse_shift=pse.to(dtype))
    check(forward(*call.args, **call.options), call)
    flat = call.with_(scale_value=0.0)
    mean = forward(*flat.args, **flat.options)[:, :, 3]
    want = call.value.double().mean(2)
    torch.testing.assert_close(mean.double(), want, rtol=0.01, atol=2e-3)


def test_int8_takes_fp16(forward):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-127, 128, (1, 2, s, 64), generator=rng) for s in (70, 150, 150))
    options = {
        "num_heads": 2,
        "input_layout": "BNSD",
        "deq_scale1": torch.tensor([2e-5]),
        "quant_scale1": torch.tensor([127.0]),
        "deq_scale2": torch.tensor([1e-3]),
        "pse_shift": (noise(1, 2, 70, 150) * 3).half(),
    }
    call = Call(q.to(torch.int8), k.to(torch.int8), v.to(torch.int8), options)
    check(forward(*call.args, **call.options), call)
