# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against torch where both can, by hand where torch cannot."""

from __future__ import annotations

import math
import struct

import pytest
import reference
import torch
from cases import EDGE, SMOKE, as_params
from compare import P_ERROR, prepared
from reference import Plan
from torch.nn.functional import scaled_dot_product_attention

INF, NAN = math.inf, math.nan
ONE = torch.ones(1, dtype=torch.float64)


def attend(q, k, v, **options):
    """(B, N, Sq, D) fp64 as the output holds it before rounding."""
    p = reference.parts(q, k, v, **options)
    return p.requantise(reference.exact(p))


def seen_by(sq, sk, **options):
    """Who sees whom, in rows of 0 and 1: with equal scores and V = I a row is a uniform share."""
    q = torch.zeros(1, 1, sq, sk, dtype=torch.float64)
    out = attend(
        q, torch.zeros(1, 1, sk, sk), torch.eye(sk)[None, None], input_layout="BNSD", **options
    )[0, 0]
    assert torch.allclose(out.sum(-1), (out > 0).any(-1).double())
    return ["".join("1" if x > 0 else "0" for x in row) for row in out]


@pytest.mark.parametrize(
    "case", as_params([c for c in SMOKE + EDGE if c.dtype != "int8" and c.sk and not c.quant])
)
def test_against_torch(case):
    """torch adds -inf where we replace: the same wherever a row has a key and nothing is NaN."""
    call, _ = prepared(case)
    p = reference.parts(*call.args, **call.options)
    bias = torch.zeros(p.visible.shape, dtype=torch.float64)
    if p.bias is not None:
        bias += p.bias
    bias.masked_fill_(~p.visible, -INF)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = scaled_dot_product_attention(
            p.q.double(), p.k.double(), p.v.double(), attn_mask=bias, scale=p.scale
        )
    want = torch.where(p.seen, want, 0.0)
    torch.testing.assert_close(
        reference.exact(p), want, rtol=1e-9, atol=1e-9 * p.v.abs().max().item()
    )


@pytest.mark.parametrize(
    ("shape", "options", "want"),
    [
        ((2, 3), {}, ["111", "111"]),
        ((2, 3), {"pre_tokens": 0, "next_tokens": -5}, ["111", "111"]),
        ((3, 3), {"sparse_mode": 2}, ["100", "110", "111"]),
        ((2, 4), {"sparse_mode": 2, "pre_tokens": -9}, ["1000", "1100"]),
        ((4, 2), {"sparse_mode": 2}, ["10", "11", "11", "11"]),
        ((2, 4), {"sparse_mode": 3}, ["1110", "1111"]),
        ((4, 2), {"sparse_mode": 3}, ["00", "00", "10", "11"]),
        ((3, 3), {"sparse_mode": 4, "pre_tokens": 1}, ["100", "110", "011"]),
        ((2, 4), {"sparse_mode": 4, "pre_tokens": 1}, ["0110", "0011"]),
        ((2, 4), {"sparse_mode": 4, "pre_tokens": 0, "next_tokens": 1}, ["0011", "0001"]),
        ((3, 4), {"sparse_mode": 4, "pre_tokens": -1, "next_tokens": 2}, ["0011", "0001", "0000"]),
        ((4, 3), {"sparse_mode": 4, "next_tokens": -1}, ["000", "000", "100", "110"]),
        (
            (2, 2),
            {"sparse_mode": 4, "pre_tokens": 2**63 - 1, "next_tokens": 2**63 - 1},
            ["11", "11"],
        ),
        ((2, 3), {"actual_seq_lengths": [1]}, ["111", "000"]),
        ((2, 3), {"actual_seq_lengths_kv": [2]}, ["110", "110"]),
        ((2, 3), {"actual_seq_lengths_kv": [0]}, ["000", "000"]),
        ((3, 4), {"sparse_mode": 3, "actual_seq_lengths_kv": [3]}, ["1000", "1100", "1110"]),
        ((3, 4), {"sparse_mode": 3, "actual_seq_lengths": [2]}, ["1110", "1111", "0000"]),
        (
            (3, 4),
            {
                "sparse_mode": 4,
                "pre_tokens": 0,
                "actual_seq_lengths": [2],
                "actual_seq_lengths_kv": [3],
            },
            ["0100", "0010", "0000"],
        ),
    ],
)
def test_visible_keys(shape, options, want):
    assert seen_by(*shape, **options) == want


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"next_tokens": 9}, ["011", "101"]),
        ({}, ["000", "100"]),  # the default next_tokens = 0 cuts right of the diagonal
        ({"next_tokens": 9, "pre_tokens": 0}, ["011", "001"]),
        ({"next_tokens": 1, "pre_tokens": -1}, ["010", "001"]),
        ({"next_tokens": -1}, ["000", "100"]),
        ({"sparse_mode": 1, "pre_tokens": 0}, ["011", "101"]),
    ],
)
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_visible_keys_under_a_mask(options, want, ndim):
    mask = torch.ones(5, 7, dtype=torch.uint8)  # larger than the scores: its corner counts
    mask[:2, :3] = torch.tensor([[200, 0, 0], [0, 1, 0]], dtype=torch.uint8)
    mask = mask[(None,) * (ndim - 2)]
    assert seen_by(2, 3, atten_mask=mask, **options) == want


def test_allowed_is_the_same_on_tensors_and_on_numbers():
    i, j = torch.arange(5)[:, None], torch.arange(6)[None, :]
    masked = torch.arange(30).reshape(5, 6) % 3
    for mode in range(5):
        for pre, nxt in [(1, 0), (-1, 2), (3, -1), (2**40, 2**40)]:
            rule = {"mode": mode, "pre": pre, "nxt": nxt, "q": 4, "kv": 5}
            whole = reference.allowed(i, j, masked=masked, **rule)
            for a in range(5):
                for b in range(6):
                    one = reference.allowed(a, b, masked=int(masked[a, b]), **rule)
                    assert one == bool(whole[a, b])


def test_softmax_by_hand():
    """Scores 0 and ln 3 give shares 1/4 and 3/4."""
    q, k = ONE.reshape(1, 1, 1), torch.tensor([[[0.0], [math.log(3) / 2]]])
    v = torch.tensor([[[4.0], [8.0]]])
    assert attend(q, k, v, scale_value=2.0).item() == pytest.approx(7)
    pse = torch.tensor([[[[math.log(9), 0.0]]]])  # after the scale: 9 : 3
    assert attend(q, k, v, scale_value=2.0, pse_shift=pse).item() == pytest.approx(5)
    assert attend(q, k, v, scale_value=0.0).item() == pytest.approx(6)
    assert attend(q, k, v, scale_value=-2.0).item() == pytest.approx(5)


def test_layouts_and_groups_by_hand():
    """One key each: out = v of the head's group."""
    v = torch.arange(4.0).reshape(1, 1, 2, 2)  # (B, Sk, Nkv, D)
    q = torch.zeros(1, 1, 4, 2)
    out = attend(q, v, v, num_heads=4, num_key_value_heads=2, input_layout="BSND")
    assert out[0, :, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    q, v = q.flatten(2), v.flatten(2)
    assert attend(q, v, v, num_heads=4, num_key_value_heads=2).equal(out)
    joined = reference.join_heads(out, "BSH")
    assert reference.split_output(joined, 4, "BSH").equal(out)
    assert reference.join_heads(out, "BNSD_BSND").shape == (1, 1, 4, 2)


def test_nan_reaches_only_rows_that_see_it():
    mask = torch.tensor([[0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    options = {"input_layout": "BNSD", "sparse_mode": 1, "atten_mask": mask}
    q, k, v = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for name in "kv":
        x = {"k": k.clone(), "v": v.clone()}
        x[name][0, 0, 1, 0] = NAN
        p = reference.parts(q, x["k"], x["v"], **options)
        assert p.free.flatten().tolist() == [False, True, False]
        assert not p.nan.any()
        assert reference.exact(p)[0, 0, 0].tolist() == [1, 1]
    q[0, 0, 0] = NAN  # sees a key
    q[0, 0, 2] = NAN  # sees none
    p = reference.parts(q, k, v, **options)
    assert p.free.flatten().tolist() == [True, False, False]
    assert not reference.exact(p)[0, 0, 2].any()


def test_nan_and_infinities_of_the_bias():
    pse = torch.tensor([[-INF, 0], [NAN, 0], [INF, 0], [-INF, -INF], [0, 0]])[None, None]
    mask = torch.zeros(5, 2, dtype=torch.bool)
    q, k = torch.ones(1, 1, 5, 1), torch.ones(1, 1, 2, 1)
    v = torch.tensor([[[[2.0], [4.0]]]])
    options = {"input_layout": "BNSD", "sparse_mode": 1, "pse_shift": pse}
    p = reference.parts(q, k, v, atten_mask=mask, **options)
    assert p.nan.flatten().tolist() == [False, True, True, False, False]
    assert reference.exact(p)[0, 0, :, 0][[0, 3, 4]].tolist() == [4, 0, 3]
    mask[1:3, 0] = True  # NaN and +inf are replaced like any other score
    p = reference.parts(q, k, v, atten_mask=mask, **options)
    assert not p.free.any()
    assert reference.exact(p).flatten().tolist() == [4, 4, 4, 0, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_packed_scale(dtype):
    for real in (0.0123, -3.5):
        low = struct.unpack("<I", struct.pack("<f", real))[0]
        word = torch.tensor([low | 0x7ABC << 33]).view(dtype)
        assert reference.read_deq_scale(word) == struct.unpack("<f", struct.pack("<f", real))[0]


def _int8_call(p_scale=127.0, **more):
    """Scores 0 and ln 2; shares 1/3 and 2/3."""
    return {
        "deq_scale1": torch.tensor([math.log(2)]),
        "quant_scale1": torch.tensor([p_scale]),
        "deq_scale2": torch.tensor([0.5]),
        "input_layout": "BNSD",
        **more,
    }


def _int8_tensors():
    q, k = torch.tensor([[[[1]]]], dtype=torch.int8), torch.tensor([[[[0], [1]]]], dtype=torch.int8)
    return q, k, torch.tensor([[[[10], [100]]]], dtype=torch.int8)


@pytest.mark.parametrize(
    ("p_scale", "width", "sum_pv"),
    [
        # exp(s - max) is 0.5 and 1, its sum 1.5 in every case
        (126.0, None, 63 * 10 + 126 * 100),
        (200.0, None, 100 * 10 + 127 * 100),  # 200 saturates
        (0.9, None, 0 * 10 + 1 * 100),
        (0.0, None, 0),
        (127.0, 1, 127 * 0.5 * 10 + 127 * 100),  # the first tile's own maximum made 127 of it
        (200.0, 1, 127 * 0.5 * 10 + 127 * 100),
    ],
)
def test_int8_by_hand(p_scale, width, sum_pv):
    p = reference.parts(*_int8_tensors(), **_int8_call(p_scale))
    o, slack = reference.tiled(p, width and Plan(4, width))
    assert o.item() == pytest.approx(sum_pv * 0.5 / 1.5, rel=1e-6)
    assert not slack.any()


@pytest.mark.parametrize(("p_scale", "p8"), [(62.5, 62), (63.5, 64), (127.0, 127), (127.5, 127)])
def test_int8_rounds_half_to_even(p_scale, p8):
    p = reference.parts(*_int8_tensors(), scale_value=0.0, **_int8_call(p_scale))
    assert reference.tiled(p)[0].item() == pytest.approx(p8 * 110 * 0.5 / 2)


def test_int8_slack_covers_a_tie():
    p = reference.parts(*_int8_tensors(), **_int8_call())
    _, slack = reference.tiled(p, None, 1e-6)
    assert slack.item() == pytest.approx(1 * 10 * 0.5 / 1.5, rel=1e-6)
    p = reference.parts(*_int8_tensors(), **_int8_call(120.0))
    assert not reference.tiled(p, None, 1e-6)[1].any()


def test_tile_width_matters():
    """The check by tiles would notice another width."""
    call, _ = prepared(next(c for c in EDGE if c.dtype == "int8" and c.sk == 1000))
    p = reference.parts(*call.args, **call.options)
    (a, slack), (b, _) = (reference.tiled(p, Plan(64, n), P_ERROR) for n in (256, 128))
    assert ((a - b).abs() > slack + a.abs() * 2.0**-10).any()


def test_splits_by_hand():
    """Two runs of one tile of one key: each has its own maximum, as two tiles of width 1 have."""
    p = reference.parts(*_int8_tensors(), **_int8_call())
    o, _ = reference.tiled(p, Plan(4, 1, 2))
    assert o.item() == pytest.approx((127 * 0.5 * 10 + 127 * 100) * 0.5 / 1.5, rel=1e-6)
    p = reference.parts(*_int8_tensors(), **_int8_call(126.0))
    o, _ = reference.tiled(p, Plan(4, 2, 7))  # six runs are empty
    assert o.item() == pytest.approx((63 * 10 + 126 * 100) * 0.5 / 1.5, rel=1e-6)


def test_splits_follow_the_band():
    """Blocks of 2 rows, tiles of 2 keys; row i sees keys i - 2 to i, and two rows are not valid."""
    q, k = torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 7, 1)
    call = {"input_layout": "BNSD", "sparse_mode": 4, "pre_tokens": 2, "next_tokens": 0}
    p = reference.parts(q, k, k, actual_seq_lengths=[6], actual_seq_lengths_kv=[6], **call)
    cuts = torch.stack(reference.cuts(p, Plan(2, 2, 2)))[:, 0, 0, ::2]
    # tiles 0, 0 and 1, 1 and 2, none
    assert cuts.T.tolist() == [[0, 0, 2], [0, 2, 4], [2, 4, 6], [4, 4, 4]]


@pytest.mark.parametrize("batch_innermost", [False, True])
def test_shares_of_the_last_blocks(batch_innermost):
    """Blocks of 2 rows; of the last two, 5 tiles of 2 keys each, shares of 4 tiles."""
    q, k = torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 9, 1)
    p = reference.parts(q, k, k, input_layout="BNSD", next_tokens=9)
    plan = Plan(2, 2, cut_blocks=2, cut_tiles=4, batch_innermost=batch_innermost)
    cuts = torch.stack(reference.cuts(p, plan))[:, :, 0, ::2].permute(1, 2, 0).tolist()
    whole, first, second = [0, 10, 10], [0, 8, 10], [0, 6, 10]
    assert cuts == (
        [[whole, first], [whole, second]] if batch_innermost else [[whole, whole], [first, second]]
    )


def test_splits_are_as_close_to_exact():
    for case in (c for c in SMOKE if c.dtype == "int8"):
        p, exact = prepared(case)[1].parts, prepared(case)[1].exact
        whole, split = (reference.tiled(p, Plan(16, 32, n))[0] for n in (1, 3))
        assert not torch.equal(whole, split)
        assert (split - exact).norm() <= 1.5 * (whole - exact).norm()


def test_requantise_by_hand():
    q, v = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    options = {
        "quant_scale2": torch.tensor([10.0, 100.0]),
        "quant_offset2": torch.tensor([1.0, 0.5]),
    }
    out = attend(q, v, v, actual_seq_lengths=[1], num_heads=2, **options)
    assert out.flatten().tolist() == [21, 0, 300.5, 0]  # (head, row); without a key no offset
    assert attend(q, v, v, quant_scale2=torch.tensor([2.0])).tolist() == [[[[4, 6], [4, 6]]]]
