# SPDX-License-Identifier: Apache-2.0
"""What must hold for any call: random legal calls against fp64, and calls that must agree."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import torch
from compare import check
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import FAR, Call, Case, Mask, Pse, Quant, compressed_mask, to_layout

pytestmark = pytest.mark.usefixtures("one_split")

SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 63, 64, 65, 96, 97, 130, 193, 257, 300]))
DIMS = st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 63, 64, 65, 80, 96, 128, 129, 200]))
DTYPES = st.sampled_from(["bf16", "fp16", "int8"])
LAYOUTS = st.sampled_from(["BSH", "BSND", "BNSD", "BNSD_BSND"])


@st.composite
def masks_and_tokens(draw, sq: int, sk: int) -> dict:
    kind = draw(st.sampled_from(["none", "full", "all", "causal", "bottom_right", "band"]))
    if kind == "none":
        return {}
    if kind in ("causal", "bottom_right"):
        return {"mode": 2 if kind == "causal" else 3}
    first, last = (sk, sq) if kind == "full" else (sq, sk)  # what |pre| and |next| stay below
    most = max(first, last) + 5
    pre = draw(st.one_of(st.just(FAR), st.integers(1 - first, most)))
    nxt = draw(st.one_of(st.just(FAR), st.integers(max(-pre, 1 - last), most)))
    tokens = {"pre": pre, "nxt": nxt}
    if kind == "band":
        return tokens | {"mode": 4}
    mask = Mask(
        ndim=draw(st.sampled_from([2, 3, 4])),
        pad=draw(st.sampled_from([0, 1, 64])),
        dtype=draw(st.sampled_from([torch.bool, torch.int8, torch.uint8])),
        pattern=draw(st.sampled_from(["random", "causal", "empty_rows", "left_half", "none"])),
    )
    return tokens | {"mask": mask, "mode": 0 if kind == "full" else 1}


@st.composite
def cases(draw) -> Case:
    sq, sk, dtype = draw(SIZES), draw(SIZES), draw(DTYPES)
    batch, group, kv_heads = draw(st.tuples(*[st.integers(1, 3)] * 3))
    pattern = draw(st.sampled_from(["", "normal", "holes", "empty_rows"]))
    out = draw(st.sampled_from(["", "", "tensor", "channel"]))
    case = Case(
        dtype,
        batch,
        group * kv_heads,
        kv_heads,
        sq=sq,
        sk=sk,
        dim=draw(DIMS),
        layout=draw(LAYOUTS),
        pse=Pse(draw(st.booleans()), draw(st.sampled_from([0, 5])), pattern) if pattern else None,
        strides=draw(st.sampled_from(["", "", "transposed", "sliced", "last_dim"])),
        quant=Quant(out=out) if out or dtype == "int8" else None,
        scale=draw(st.sampled_from([None, None, 0.0, -0.05, 0.2])),
        **draw(masks_and_tokens(sq, sk)),
    )
    no_tokens_below_0 = case.pre >= 0 and case.nxt >= 0
    if case.mode == 4 and out and not no_tokens_below_0:  # the interception of section 7
        case = dataclasses.replace(case, pre=abs(case.pre), nxt=abs(case.nxt))
    if no_tokens_below_0 and draw(st.booleans()):
        lens = st.lists(st.integers(0, sk), min_size=batch, max_size=batch)
        case = dataclasses.replace(case, k_lens=tuple(draw(lens)))
        lens = st.lists(st.integers(0, sq), min_size=batch, max_size=batch)
        case = dataclasses.replace(case, q_lens=tuple(draw(lens)))
    return case


def run(forward, call: Call) -> torch.Tensor:
    return forward(*call.args, **call.options)


@settings(max_examples=150)
@given(cases())
def test_any_call_matches_fp64(forward, case):
    call = case.build()
    check(run(forward, call), call)


@settings(max_examples=60)
@given(cases(), LAYOUTS)
def test_layouts_agree(forward, case, layout):
    call = dataclasses.replace(case, layout="BNSD", strides="").build()
    q, k, v = (to_layout(x, layout) for x in call.args)
    other = call.with_(query=q, key=k, value=v, input_layout=layout)
    got = reference.split_output(run(forward, other), case.heads, layout)
    assert torch.equal(got, run(forward, call))


@settings(max_examples=60)
@given(cases(), st.data())
def test_batch_and_heads_are_independent(forward, case, data):
    """Permuting them permutes the output, bit by bit."""
    plain = dataclasses.replace(case, layout="BNSD", strides="", kv_heads=0, pse=None)
    if plain.quant and plain.quant.out:
        plain = dataclasses.replace(plain, quant=dataclasses.replace(plain.quant, out="tensor"))
    call = plain.build()
    batches = data.draw(st.permutations(range(case.batch)))
    heads = data.draw(st.permutations(range(case.heads)))
    moved = call.with_(
        **{
            n: x[batches][:, heads]
            for n, x in zip(("query", "key", "value"), call.args, strict=True)
        }
    )
    for name in ("actual_seq_lengths", "actual_seq_lengths_kv"):
        if name in call.options:
            moved = moved.with_(**{name: [call.options[name][b] for b in batches]})
    assert torch.equal(run(forward, moved), run(forward, call)[batches][:, heads])


@settings(max_examples=60)
@given(SIZES, SIZES, DTYPES, st.data())
def test_dense_mask_equals_sparse_mode(forward, sq, sk, dtype, data):
    """Modes 2, 3 and 4 spelled out as a mask in mode 1: the same rule, the same error bound."""
    mode = data.draw(st.sampled_from([2, 3, 4]))
    pre = data.draw(st.integers(0, sq + 5)) if mode == 4 else FAR
    nxt = data.draw(st.integers(0, sk + 5)) if mode == 4 else FAR
    quant = Quant() if dtype == "int8" else None
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=40, mode=mode, pre=pre, nxt=nxt, quant=quant).build()
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    rule = {"mode": mode, "masked": None, "pre": pre, "nxt": nxt, "q": sq, "kv": sk}
    mask = ~reference.allowed(i, j, **rule)
    dense = call.with_(sparse_mode=1, atten_mask=mask)
    assert torch.equal(run(forward, dense), run(forward, call))
    if mode == 2:
        nothing = torch.zeros(sq, sk, dtype=torch.bool)
        cut = call.with_(sparse_mode=0, atten_mask=nothing, pre_tokens=FAR, next_tokens=0)
        assert torch.equal(run(forward, cut), run(forward, call))


@settings(max_examples=60)
@given(SIZES, SIZES, DTYPES, st.integers(1, 300), st.booleans())
def test_padding_changes_nothing(forward, sq, sk, dtype, extra, by_length):
    """Keys appended behind the length, or behind a mask, leave every bit."""
    quant = Quant() if dtype == "int8" else None
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=40, quant=quant).build()
    k, v = (torch.cat([x, x.new_full((1, 2, extra, 40), 77)], 2) for x in call.args[1:])
    padded = call.with_(key=k, value=v)
    if by_length:
        padded = padded.with_(actual_seq_lengths_kv=[sk])
        assert torch.equal(run(forward, padded), run(forward, call))
    else:
        mask = (torch.arange(sk + extra) >= sk).expand(sq, -1)
        check(run(forward, padded.with_(sparse_mode=1, atten_mask=mask)), call)


@settings(max_examples=40)
@given(SIZES, SIZES, st.sampled_from(["bf16", "fp16"]), st.integers(-6, 6))
def test_power_of_two_moves_between_query_and_scale(forward, sq, sk, dtype, power):
    """Exact in floating point, so the two calls mean the same."""
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=64).build()
    factor = 2.0**power
    scaled = call.with_(query=call.query * factor, scale_value=call.options["scale_value"] / factor)
    check(run(forward, scaled), call)


@settings(max_examples=40)
@given(SIZES, SIZES, st.sampled_from(["bf16", "fp16"]), st.integers(-8, 8))
def test_output_follows_the_scale_of_values(forward, sq, sk, dtype, power):
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=64).build()
    scaled = call.with_(value=call.value * 2.0**power)
    check(run(forward, scaled), scaled)
    if dtype == "bf16":  # no denormals in reach: a power of two changes exponents only
        assert torch.equal(run(forward, scaled), run(forward, call) * 2.0**power)


@settings(max_examples=40)
@given(SIZES, SIZES, st.sampled_from(["bf16", "fp16"]))
def test_outputs_lie_between_values(forward, sq, sk, dtype):
    """Weights are shares: no output is outside the range of its column of V."""
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=64, mode=2).build()
    out = run(forward, call).double()
    low, high = call.value.double().aminmax(dim=2, keepdim=True)
    ulp = torch.finfo(call.query.dtype).eps * call.value.double().abs().amax(2, keepdim=True)
    assert (out >= low - ulp).all()
    assert (out <= high + ulp).all()


@settings(max_examples=40)
@given(SIZES, SIZES, st.sampled_from(["bf16", "fp16"]), st.data())
def test_order_of_keys_does_not_matter(forward, sq, sk, dtype, data):
    order = data.draw(st.permutations(range(sk)))
    call = Case(dtype, 1, 2, sq=sq, sk=sk, dim=40).build()
    check(run(forward, call.with_(key=call.key[:, :, order], value=call.value[:, :, order])), call)


@settings(max_examples=20)
@given(st.integers(1, 300), DTYPES)
def test_modes_2_and_3_agree_on_squares(forward, size, dtype):
    quant = Quant() if dtype == "int8" else None
    call = Case(dtype, 1, 2, sq=size, sk=size, dim=40, mode=2, quant=quant).build()
    want = run(forward, call)
    assert torch.equal(run(forward, call.with_(sparse_mode=3)), want)
    band = call.with_(sparse_mode=4, pre_tokens=FAR, next_tokens=0, atten_mask=compressed_mask())
    assert torch.equal(run(forward, band), want)
