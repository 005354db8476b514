# SPDX-License-Identifier: Apache-2.0
"""Blocks of the last round on Hopper: whole, they would leave much of it idle, so keys are cut."""

from __future__ import annotations

import backends
import pytest
import reference
import torch
from compare import check, check_error, check_form, check_special, check_tiles, prepared
from inputs import Call, Case, Pse, Quant
from simulate import simulate, simulated_choices, simulated_log
from test_lse import check_lse

# On four multiprocessors: 6 blocks, or 3 of two multiprocessors each, of 13 tiles of keys.
SMS = {"CUDASIM_SMS": "4"}
WHOLE = {"PFA_NUM_SPLITS": "1", **SMS}
CASES = [
    Case("fp16", heads=6, kv_heads=3, sq=190, sk=1600, dim=64),
    Case("bf16", batch=2, heads=3, sq=20, sk=1600, dim=96, layout="BSND"),
    Case("bf16", heads=3, sq=130, sk=1000, dim=256),
    Case("fp16", heads=3, kv_heads=1, sq=100, sk=780, dim=512),
    Case("fp16", batch=2, heads=3, sq=20, sk=1601, dim=128, pse=Pse()),
    Case(
        "fp16",
        heads=6,
        sq=20,
        sk=1601,
        dim=72,
        pse=Pse(pattern="empty_rows"),
        quant=Quant("tensor"),
    ),
    Case("int8", heads=6, sq=100, sk=3300, dim=64, quant=Quant()),
    Case("int8", heads=3, kv_heads=1, sq=130, sk=2800, dim=128, quant=Quant()),
    Case("int8", heads=3, sq=130, sk=2730, dim=112, quant=Quant("channel", offset=True)),
    Case("int8", batch=2, heads=3, sq=20, sk=1600, dim=64, pse=Pse(), quant=Quant()),
    Case("int8", heads=3, sq=100, sk=1200, dim=512, quant=Quant()),
]


@pytest.fixture(scope="module")
def hopper(on_cuda):
    if on_cuda.compute_capability() != "90":
        pytest.skip("the last round is cut on compute capability 9.0 alone")
    return on_cuda


@pytest.fixture(scope="module")
def sim(hopper):
    if hopper.name != "sim":
        pytest.skip("needs the simulator: --backend sim")


@pytest.fixture(scope="module")
def outputs(sim):
    return simulate(CASES, **SMS)


@pytest.fixture(scope="module")
def plans(sim):
    choices = simulated_choices(CASES, **SMS)
    assert all(x.kernel.startswith("sm90") and x.num_splits == 1 for x in choices)
    return [backends.plan_of(x, prepared(case)[0]) for case, x in zip(CASES, choices, strict=True)]


def test_cases(outputs, plans):
    for case, out, plan in zip(CASES, outputs, plans, strict=True):
        call, expected = prepared(case)
        assert plan.cut_blocks in (1, 2), case.id
        o = check_form(out, call)
        check_special(o, expected)
        check_error(o, expected)
        if expected.int8:
            check_tiles(o, expected, plan)


def test_blocks_before_the_last_round_are_whole(outputs, plans):
    """They have the bits that they have where nothing is cut; those of the last round do not."""
    wholes = simulate(CASES, **WHOLE)
    for case, out, want, plan in zip(CASES, outputs, wholes, plans, strict=True):
        call, expected = prepared(case)
        borders = reference.cuts(expected.parts, plan)
        whole = (borders[1] == borders[-1]) & (borders[0] == 0)
        o, o_whole = check_form(out, call), check_form(want, call)
        assert torch.equal(o[whole], o_whole[whole]), case.id
        if call.dtype_out != torch.int8:
            assert not torch.equal(o[~whole], o_whole[~whole]), case.id


@pytest.mark.parametrize(
    "settings",
    [{"CUDASIM_ASYNC": "lazy", "CUDASIM_SEED": "2"}, {"CUDASIM_RACE": "1"}],
    ids=["lazy", "race"],
)
def test_any_order_gives_the_same_bits(outputs, settings):
    some = slice(0, None, 3)
    got = simulate(CASES[some], **SMS, **settings)
    for case, want, out in zip(CASES[some], outputs[some], got, strict=True):
        assert torch.equal(want, out), case.id


def test_the_log_says_so(sim):
    (line,) = simulated_log(CASES[:1], PFA_LOG="debug", **SMS)
    assert line.endswith("sm90 float16 D64 band, 192 x 128, 1 split, last round cut")


# On 132 multiprocessors.
def test_lse_and_nan(hopper):
    """A NaN of V stays in its channel: the blocks that it reaches run twice."""
    call, expected = prepared(Case("fp16", batch=133, heads=1, sq=1, sk=1025))
    assert hopper.choice(call).cut_blocks == 1
    out, lse = hopper.operator_lse()(*call.args, **call.options)
    check(out, call, expected)
    check_lse(lse, call, expected)
    value = call.value.clone()
    value[:, :, 1000, 3] = torch.nan
    got = hopper.operator()(call.query, call.key, value, **call.options)
    assert got[..., 3].isnan().all()
    assert torch.equal(got[..., 4:], out[..., 4:])


def cut(hopper, blocks: int, keys: int, **options) -> tuple[int, int, int]:
    """The blocks that are cut and their shares, of a call with so many; and the keys of a tile."""
    query, key = (torch.zeros(1, 1, n, 64, dtype=torch.float16) for n in (1, keys))
    query, key = (x.expand(blocks, -1, -1, -1) for x in (query, key))
    call = Call(query, key, key, {"num_heads": 1, "input_layout": "BNSD", **options})
    choice = hopper.choice(call)
    assert choice.kernel.startswith("sm90")
    return choice.cut_blocks, choice.cut_tiles, choice.block_n


@pytest.mark.parametrize("blocks", [107, 133, 150, 198, 230, 265, 2048])
@pytest.mark.parametrize("keys", [4096, 16384, 100_000])
def test_shares(hopper, blocks, keys):
    """They cover all tiles, none is as long as a block, and no row has more than 32 pieces."""
    left, share, block_n = cut(hopper, blocks, keys)
    tiles = -(-keys // block_n)
    assert left == blocks % 132
    assert 2 <= share < tiles
    assert 132 * share >= left * tiles
    assert -(-(tiles - 1) // share) + 1 <= 32


FEW = (133, 1025)
UNCUT = {
    "whole rounds": (264, 8192),
    "few tiles": (133, 640),
    "many rounds": (132 * 60 + 1, 1025),
    "nearly a whole round": (263, 1025),
    "even splits": (20, 8192),
}
MASKED = torch.zeros(1025, dtype=torch.bool).expand(1, -1)
OPTIONS = {
    "causal": {"sparse_mode": 2, "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1)},
    "a mask": {"sparse_mode": 1, "atten_mask": MASKED},
    "lengths": {"actual_seq_lengths_kv": [1024]},
}


@pytest.mark.parametrize("name", UNCUT)
def test_what_does_not_pay(hopper, name):
    assert cut(hopper, *UNCUT[name])[0] == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_that_see_less_are_not_cut(hopper, name):
    assert cut(hopper, *FEW)[0] == 1
    assert cut(hopper, *FEW, **OPTIONS[name])[0] == 0


def test_nothing_is_cut_on_request(hopper):
    with backends.environment(PFA_NUM_SPLITS="1"):
        assert cut(hopper, *FEW)[0] == 0
