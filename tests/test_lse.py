# SPDX-License-Identifier: Apache-2.0
"""torch.ops.pfa.forward_lse and the exact merge of what it returns for parts of the keys."""

from __future__ import annotations

import math

import backends
import pytest
import reference
import torch
from cases import EDGE, SMOKE, as_params
from compare import Expected, check, prepared
from inputs import Call, Case, Mask, Pse, Quant
from torch.library import opcheck

import pfa

# Rows without a key by a mask, a length, a band; large scores, both signs of the scale; no keys.
CASES = [*SMOKE, *(case for case in EDGE[::6] if case.heads * case.batch * case.sq <= 700)]
SPLITS = [
    *SMOKE[:6],
    Case("bf16", sq=70, sk=300, mask=Mask(3, pattern="empty_rows"), mode=1),
    Case("fp16", sq=70, sk=190, pse=Pse(pattern="empty_rows")),
    Case("bf16", 3, sq=100, sk=130, q_lens=(100, 0, 1), k_lens=(130, 50, 0), mode=3),
    Case("fp16", heads=1, sq=40, sk=130, dim=512, mode=2),
    Case("bf16", sq=100, sk=300, values="large_logits"),
    Case("int8", sq=70, sk=300, mode=4, pre=70, nxt=10, quant=Quant()),
]
ROUNDING = 2.0**-16  # a 32nd of what a weight of exp(lse) loses when it is rounded to float16


def check_lse(lse: torch.Tensor, call: Call, expected: Expected) -> None:
    """At most twice plain torch's error per head, and a rounding; exact where nothing is seen."""
    p = expected.parts
    exact, seen = reference.lse(p), p.seen[..., 0].expand(lse.shape)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert (lse[~seen] == -math.inf).all()
    live = seen & ~p.free
    assert lse[live].isfinite().all()
    assert lse[p.nan & seen].isnan().all()
    plain = torch.logsumexp(reference.plain_scores(p).float(), -1)
    bound = torch.where(live, 2 * (plain - exact).abs(), 0.0).amax((0, 2), keepdim=True)
    largest = torch.where(p.visible, p.scores(), 0.0).abs().amax() if p.k.shape[2] else 0.0
    rounding = ROUNDING + 2.0**-22 * largest
    error = torch.where(live, (lse - exact).abs(), 0.0)
    assert (error <= bound + rounding).all(), (error - bound).amax()


@pytest.mark.parametrize("case", as_params(CASES))
def test_lse(forward_lse, case):
    call, expected = prepared(case)
    out, lse = forward_lse(*call.args, **call.options)
    check(out, call, expected)
    check_lse(lse, call, expected)


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_output_has_the_bits_of_forward(forward, forward_lse, case):
    call, _ = prepared(case)
    assert torch.equal(
        forward_lse(*call.args, **call.options)[0], forward(*call.args, **call.options)
    )


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("case", as_params(SPLITS))
def test_splits(on_cuda, case, splits):
    """Where the keys of a row are cut into runs, the last step has what the sums add up to."""
    call, expected = prepared(case)
    with backends.environment(PFA_NUM_SPLITS=str(splits)):
        out, lse = on_cuda.operator_lse()(*call.args, **call.options)
    check_lse(lse, call, expected)
    assert out.isfinite().all()


def test_nan_in_keys_and_values(forward_lse):
    """Rows that see neither keep their numbers; a NaN of V is none of the scores'."""
    call, _ = prepared(Case("bf16", sq=200, sk=200, mode=2))
    value, key = call.value.clone(), call.key.clone()
    value[:, :, 90, 3] = torch.nan
    key[:, :, 150] = torch.nan
    clean = forward_lse(*call.args, **call.options)[1]
    out, lse = forward_lse(call.query, key, value, **call.options)
    torch.testing.assert_close(lse[:, :, :150], clean[:, :, :150], rtol=0, atol=1e-4)
    assert lse[:, :, 150:].isnan().all()
    assert out[:, :, :90].isfinite().all()
    assert out[:, :, 90:, 3].isnan().all()


def parts_of(call: Call, cuts: list[int]) -> list[Call]:
    """The call over [0, cuts[0]), [cuts[0], cuts[1]), ...: masks and biases cut alike, no mode."""
    bounds = [0, *cuts, call.key.shape[2]]
    calls = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        own = slice(first, last)
        cut = {
            n: call.options[n][..., own] for n in ("atten_mask", "pse_shift") if n in call.options
        }
        calls.append(call.with_(key=call.key[:, :, own], value=call.value[:, :, own], **cut))
    return calls


@pytest.mark.parametrize(
    "case",
    as_params(
        [
            Case("bf16", 2, sq=70, sk=300, heads=4, kv_heads=2),
            Case("fp16", sq=70, sk=300, mask=Mask(3, pattern="empty_rows"), mode=1),
            Case("fp16", sq=70, sk=300, mask=Mask(4, pattern="left_half"), mode=1),
            Case("bf16", sq=70, sk=300, pse=Pse(pattern="holes")),
            Case("bf16", sq=70, sk=300, values="large_logits"),
            Case("int8", sq=70, sk=300, quant=Quant()),
        ]
    ),
)
def test_merged_parts_equal_one_pass(forward_lse, case):
    call, expected = prepared(case)
    parts = [forward_lse(*part.args, **part.options) for part in parts_of(call, [1, 120, 150])]
    outs, lses = zip(*parts, strict=True)
    merged, lse = pfa.merge_states(outs, lses, input_layout="BNSD")
    check_lse(lse, call, expected)
    if case.dtype != "int8":  # whose tiles start elsewhere
        check(merged, call, expected)
    pair, pair_lse = pfa.merge_states(outs[:2], lses[:2], input_layout="BNSD")
    sums = pair.float()
    again, again_lse = pfa.merge_states(
        [sums, *outs[2:]], [pair_lse, *lses[2:]], input_layout="BNSD", out=sums
    )
    assert again is sums
    torch.testing.assert_close(again_lse, lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, merged.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
def test_merge_in_every_layout(layout):
    """A part that saw nothing changes no bit; only it and the result is zeros and -inf."""
    torch.manual_seed(0)
    shapes = {"BSH": (2, 5, 12), "BNSD": (2, 3, 5, 4)}
    x = torch.randn(shapes.get(layout, (2, 5, 3, 4))).half()
    lse, nothing = torch.randn(2, 3, 5), torch.full((2, 3, 5), -math.inf)
    out, merged = pfa.merge_states([x, torch.zeros_like(x)], [lse, nothing], input_layout=layout)
    assert torch.equal(out, x)
    torch.testing.assert_close(merged, lse)
    out, merged = pfa.merge_states([x * 0, x * 0], [nothing, nothing], input_layout=layout)
    assert not out.any()
    assert torch.equal(merged, nothing)


def test_merge_refuses():
    x, lse = torch.zeros(1, 5, 12).half(), torch.zeros(1, 3, 5)
    for text, outs, lses, more in [
        ("outs and lses must be as many", [], [], {}),
        ("outs and lses must be as many", [x], [], {}),
        (r"lses must have shape \(B, N, Sq\)", [x], [lse.mT], {}),
        (r"outs\[1\] and lses\[1\]", [x, x[:, 1:]], [lse, lse], {}),
        ("input_layout must be", [x], [lse], {"input_layout": "SBH"}),
        ("outs must have the rank", [x], [lse], {"input_layout": "BNSD"}),
        (r"outs\[0\] must have dtype", [x.char()], [lse], {}),
        (r"lses\[0\] must have dtype", [x], [lse.half()], {}),
        ("out must have shape", [x], [lse], {"out": x[:, 1:]}),
    ]:
        with pytest.raises((ValueError, TypeError), match=text):
            pfa.merge_states(outs, lses, **more)


@pytest.mark.parametrize("case", as_params([SMOKE[0], SMOKE[1], SMOKE[3], SMOKE[6]]))
def test_opcheck_and_compile(case):
    call, _ = prepared(case)
    opcheck(torch.ops.pfa.forward_lse.default, call.args, call.options)
    compiled = torch.compile(torch.ops.pfa.forward_lse.default, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(*call.args, **call.options),
        torch.ops.pfa.forward_lse.default(*call.args, **call.options),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_tensor_lengths(forward_lse):
    call, _ = prepared(Case("bf16", 2, sq=70, sk=90, q_lens=(70, 31), k_lens=(17, 90), mode=3))
    names = ("actual_seq_lengths", "actual_seq_lengths_kv")
    tensors = call.with_(**{name: torch.tensor(call.options[name]) for name in names})
    for got, want in zip(
        forward_lse.tensor_lens(*tensors.args, **tensors.options),
        forward_lse.default(*call.args, **call.options),
        strict=True,
    ):
        assert torch.equal(got, want)
    opcheck(torch.ops.pfa.forward_lse.tensor_lens, tensors.args, tensors.options)


@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
def test_nothing_to_compute(forward_lse, layout):
    q, k = torch.zeros(2, 3, 8).half(), torch.zeros(2, 0, 8).half()
    if layout == "BNSD":
        q, k = q.unsqueeze(1), k.unsqueeze(1)
    out, lse = forward_lse(q, k, k, input_layout=layout)
    assert not out.any()
    assert torch.equal(lse, torch.full((2, 1, 3), -math.inf))
    out, lse = forward_lse(k, q, q, input_layout=layout)
    assert (out.shape, lse.shape) == (k.shape, (2, 1, 0))
