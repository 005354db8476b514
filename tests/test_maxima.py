# SPDX-License-Identifier: Apache-2.0
"""Scores whose maximum moves along the keys, by more than fp16, or even float, holds of a softmax
that is relative to an earlier one."""

from __future__ import annotations

import pytest
import torch
from compare import check
from inputs import Call

SQ, SK = 200, 700
NATS = {
    "climbs": lambda j: 0.05 * j,  # a few nats in each tile
    "climbs fast": lambda j: 0.5 * j,  # more than fp16 holds in each tile
    "jumps": lambda j: torch.where(j < 300, -5000.0, 0.0),  # more than float holds
    "jumps twice": lambda j: torch.where(j < 300, -40.0, torch.where(j < 500, -20.0, 0.0)),
    "falls": lambda j: -0.5 * j,
    "sink": lambda j: torch.where(j < 1, 400.0, 0.0),
    "last": lambda j: torch.where(j == SK - 1, 30.0, 0.0),
    "low": lambda j: -2000.0 + 0.0 * j,
}
MODES = {
    "full": {},
    "causal": {"sparse_mode": 3},
    "window": {"sparse_mode": 4, "pre_tokens": 250, "next_tokens": 60},
}


def make(dtype: torch.dtype, dim: int, nats: str, signs: bool) -> Call:
    """Channel 0 of K carries the slope, the others noise; half the rows see it upside down."""
    rng = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(1, 1, s, dim, generator=rng) for s in (SQ, SK, SK))
    q[..., 0] = 1.0
    if signs:
        q[:, :, ::2, 0] = -1.0
    k[..., 0] = NATS[nats](torch.arange(SK).float())
    scale = 1.0  # of one nat; noise of sqrt(dim) / 4 nats on top
    q[..., 1:] /= 4
    options = {"input_layout": "BNSD", "scale_value": scale}
    return Call(*(x.to(dtype) for x in (q, k, v)), options)


def with_mode(call: Call, mode: str) -> Call:
    options = dict(MODES[mode])
    if options:
        options["atten_mask"] = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    return call.with_(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("nats", NATS)
def test_moving_maximum(forward, dtype, dim, nats):
    call = make(dtype, dim, nats, signs=False)
    check(forward(*call.args, **call.options), call)


@pytest.mark.parametrize("nats", NATS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_differ(forward, nats, mode):
    """Every other row sees the slope upside down; bands leave rows without a key at first."""
    call = with_mode(make(torch.float16, 64, nats, signs=True), mode)
    check(forward(*call.args, **call.options), call)


@pytest.mark.parametrize("nats", ["climbs fast", "jumps twice", "sink"])
def test_by_bias(forward, nats):
    """The slope as pse_shift."""
    call = make(torch.bfloat16, 128, "low", signs=False)
    slope = NATS[nats](torch.arange(SK).float())
    bias = slope.expand(1, 1, SQ, SK).to(torch.bfloat16).contiguous()
    call = call.with_(pse_shift=bias)
    check(forward(*call.args, **call.options), call)


@pytest.mark.parametrize("nats", ["climbs fast", "jumps", "falls"])
def test_parts_of_splits(forward, nats, monkeypatch):
    monkeypatch.setenv("PFA_NUM_SPLITS", "3")
    call = make(torch.float16, 128, nats, signs=True)
    check(forward(*call.args, **call.options), call)
