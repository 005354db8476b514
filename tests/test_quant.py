# SPDX-License-Identifier: Apache-2.0
"""int8 in and out: exact integers where the contract fixes them, and the forms scales come in."""

from __future__ import annotations

import pytest
import torch
from compare import check, prepared
from inputs import Call, Case, Mask, Quant, pack

INT8 = Case("int8", 2, 4, 2, sq=70, sk=300, dim=64, quant=Quant())


def run(forward, call: Call) -> torch.Tensor:
    return forward(*call.args, **call.options)


def int8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


def unit_call(q, k, v, p_scale=127.0, deq1=1.0, deq2=1.0 / 127, **options) -> Call:
    scales = {"deq_scale1": one(deq1), "quant_scale1": one(p_scale), "deq_scale2": one(deq2)}
    return Call(q, k, v, {"input_layout": "BNSD", **scales, **options})


@pytest.mark.parametrize("dim", [1, 3, 64, 65, 128, 384, 500, 512])
def test_scores_are_exact_integers(forward, dim):
    """|q . k| up to 512 * 127 * 128: two keys whose scores differ by one in millions."""
    q = torch.full((1, 1, 33, dim), -128, dtype=torch.int8)
    k = torch.full((1, 1, 70, dim), -127, dtype=torch.int8)
    k[0, 0, 41, 0] = -128  # larger by 128
    v = torch.zeros(1, 1, 70, dim, dtype=torch.int8)
    v[0, 0, 41] = 127
    call = unit_call(q, k, v, deq1=0.25)  # exp(-32) is nothing
    assert (run(forward, call) == 127).all()
    check(run(forward, call), call)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dim", [384, 512])
def test_one_in_millions_counts(on_cuda, dim, sign):
    """Scores of 6 and 8 million, of either sign; two are larger by one, or by nine. (The CPU
    kernels scale before they subtract.)"""
    q = torch.full((1, 1, 33, dim), -128, dtype=torch.int8)
    k = torch.full((1, 1, 300, dim), -128 if sign > 0 else 127, dtype=torch.int8)
    q[..., 0] = sign
    k[..., 0] = 4
    k[0, 0, [41, 170], 0] = 5 * sign
    v = torch.zeros(1, 1, 300, dim, dtype=torch.int8)
    v[0, 0, 41], v[0, 0, 170] = 100, 50
    call = unit_call(q, k, v, deq1=40.0)  # exp(-40) is nothing
    assert (run(on_cuda.operator(), call) == 75).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("keys", [1, 63, 255, 256, 300, 1000])
def test_extreme_values_do_not_overflow(forward, sign, keys):
    """Equal scores at the ends of int8's range; every P is 127 and every V is -128 or 127."""
    q = torch.full((1, 1, 40, 512), -128, dtype=torch.int8)
    k = torch.full((1, 1, keys, 512), -128 if sign > 0 else 127, dtype=torch.int8)
    for value in (-128, 127):
        v = torch.full((1, 1, keys, 512), value, dtype=torch.int8)
        call = unit_call(q, k, v, deq1=1e-6)
        assert (run(forward, call) == value).all()


@pytest.mark.parametrize(
    ("p_scale", "p8"), [(62.5, 62), (63.5, 64), (126.5, 126), (127.4, 127), (200.0, 127), (0.5, 0)]
)
def test_p_rounds_half_to_even_and_saturates(forward, p_scale, p8):
    """Equal scores: P is quant_scale1 itself before it is rounded."""
    q, k = int8(0).expand(1, 1, 5, 3), int8(1).expand(1, 1, 20, 3)
    v = int8(100).expand(1, 1, 20, 3)
    call = unit_call(q, k, v, p_scale=p_scale, deq2=0.25)
    assert (run(forward, call) == p8 * 100 * 0.25).all()


@pytest.mark.parametrize("p_scale", [0.0, 1e-38, 0.49])
def test_p_that_rounds_to_zero(forward, p_scale):
    case = Case("int8", 1, 2, sq=40, sk=300, dim=64, quant=Quant(p_scale=p_scale))
    call, _ = prepared(case)
    assert not run(forward, call).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
@pytest.mark.parametrize("real", [0.0123, -0.0071, 3e-5])
def test_packed_scales_equal_float32(forward, dtype, real):
    call, _ = prepared(INT8)
    for name in ("deq_scale1", "deq_scale2"):
        other = {"deq_scale1": "deq_scale2", "deq_scale2": "deq_scale1"}[name]
        rest = call.options[other].item()
        packed = call.with_(**{name: pack(real, dtype), other: pack(rest, dtype)})
        plain = call.with_(**{name: one(real)})
        assert torch.equal(run(forward, packed), run(forward, plain))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_shapes_of_single_scales(forward, shape):
    case = Case("int8", 1, 2, sq=40, sk=100, dim=64, quant=Quant(out="tensor", offset=True))
    call, _ = prepared(case)
    names = ("deq_scale1", "quant_scale1", "deq_scale2", "quant_scale2", "quant_offset2")
    shaped = call.with_(**{name: call.options[name].reshape(shape) for name in names})
    assert torch.equal(run(forward, shaped), run(forward, call))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("shape", ["H", "11H", "ND", "1N1D", "11ND"])
def test_shapes_of_channel_scales(forward, dtype, shape):
    """Read in (n, d) order whatever the shape and whatever the layout."""
    quant = Quant(out="channel", offset=True, shape=shape)
    for layout in ("BSH", "BNSD"):
        call = Case(dtype, 1, 3, sq=40, sk=100, dim=24, layout=layout, quant=quant).build()
        flat = {n: call.options[n].reshape(-1) for n in ("quant_scale2", "quant_offset2")}
        out = run(forward, call)
        check(out, call)
        assert torch.equal(out, run(forward, call.with_(**flat)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_rounds_half_to_even_and_saturates(forward, dtype):
    """One key, so the output is V: its product with the scale is a half, or far outside."""
    v = torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0, 255.0, 257.0, -255.0, -257.0, 1000.0, -1000.0])
    want = int8(0, 2, 2, 0, -2, 127, 127, -128, -128, 127, -128)
    v = v.to(dtype).reshape(1, 1, 1, -1)
    q = torch.zeros(1, 1, 9, v.shape[-1], dtype=dtype)
    exact = v.double().flatten() == torch.tensor(
        [1.0, 3.0, 5.0, -1.0, -3.0, 255.0, 257.0, -255.0, -257.0, 1000.0, -1000.0]
    )
    out = forward(q, v, v, input_layout="BNSD", quant_scale2=one(0.5))
    assert out.dtype == torch.int8
    assert (out[0, 0][:, exact] == want[exact]).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_offset_comes_after_the_scale(forward, dtype):
    case = Case(dtype, 1, 2, sq=40, sk=100, dim=64, quant=Quant(out="tensor"))
    call, _ = prepared(case)
    tripled = {"quant_scale2": call.options["quant_scale2"] * 0.1}
    base = run(forward, call.with_(**tripled))
    moved = run(forward, call.with_(**tripled, quant_offset2=one(17.0)))
    assert torch.equal(moved, base + 17)
    empty = run(forward, call.with_(**tripled, quant_offset2=torch.empty(0)))
    assert torch.equal(empty, base)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_rows_without_a_key_get_no_offset(forward, dtype, nan_filled_empty):
    quant = Quant(out="channel", offset=True)
    mask = Mask(2, pattern="empty_rows")
    lens = {"q_lens": (40, 21), "k_lens": (100, 0), "batch": 2}
    case = Case(dtype, heads=2, sq=40, sk=100, dim=64, mode=1, mask=mask, quant=quant, **lens)
    call, expected = prepared(case)
    out = run(forward, call)
    check(out, call, expected)
    assert not out[0, :, 1::3].any()
    assert not out[1].any()


def test_bf16_scales_are_widened_exactly(forward):
    quant = Quant(out="channel", offset=True, scale_dtype=torch.bfloat16)
    call, _ = prepared(Case("bf16", 1, 2, sq=40, sk=100, dim=64, quant=quant))
    wide = {n: call.options[n].float() for n in ("quant_scale2", "quant_offset2")}
    assert torch.equal(run(forward, call), run(forward, call.with_(**wide)))


def test_masked_v_is_not_multiplied(forward):
    """The same bits whatever stands in K and V at keys that nobody sees."""
    case = Case("int8", 1, 2, sq=40, sk=300, dim=64, mode=2, quant=Quant())
    call, _ = prepared(case)
    k, v = call.key.clone(), call.value.clone()
    k[:, :, 40:] = v[:, :, 40:] = -128
    assert torch.equal(run(forward, call.with_(key=k, value=v)), run(forward, call))
