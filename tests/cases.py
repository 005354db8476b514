# SPDX-License-Identifier: Apache-2.0
"""The lists of cases: SMOKE in seconds, EDGE one corner each, FULL (marked slow) at real sizes.

Every case is legal and runs; there are no cross products with skips.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from inputs import FAR, Case, Mask, Pse, Quant

FAR64 = 2**63 - 1
U8, I8 = torch.uint8, torch.int8
BF16 = torch.bfloat16


def _bf16(sq: int, sk: int, dim: int, **more) -> Case:
    return Case("bf16", sq=sq, sk=sk, dim=dim, **more)


def _fp16(sq: int, sk: int, dim: int, **more) -> Case:
    return Case("fp16", sq=sq, sk=sk, dim=dim, **more)


def _int8(sq: int, sk: int, dim: int, quant: Quant | None = None, **more) -> Case:
    return Case("int8", sq=sq, sk=sk, dim=dim, quant=quant or Quant(), **more)


SMOKE = [
    _bf16(113, 203, 128, batch=2, heads=8, kv_heads=2, mode=4, pre=60, nxt=5),
    _bf16(150, 150, 64, batch=2, layout="BSH", mode=2),
    _bf16(77, 77, 40, layout="BSND", mask=Mask(batched=True), batch=2),
    _fp16(130, 190, 64, layout="BNSD_BSND", mode=3, batch=2, k_lens=(190, 131)),
    _fp16(65, 129, 128, pse=Pse(), heads=3),
    _int8(100, 170, 64, heads=4, kv_heads=2),
    _int8(96, 160, 128, Quant(out="channel", offset=True), mode=2),
    _fp16(64, 100, 80, quant=Quant(out="tensor")),
]

_SIZES = [
    _bf16(1, 1, 1),
    _fp16(1, 1, 64),
    _bf16(1, 300, 128, batch=3, heads=4),
    _fp16(300, 1, 72),
    _bf16(2, 3, 7, layout="BSH"),
    _bf16(37, 401, 96, mode=3),
    _fp16(401, 37, 160, mode=3),
    _bf16(401, 37, 80, mode=2),
    _bf16(63, 64, 192),
    _bf16(65, 63, 256),
    _bf16(64, 65, 500, heads=1),
    _fp16(40, 70, 512, heads=1),
    _bf16(40, 130, 512, heads=1, mode=2),
    _fp16(95, 96, 40),
    _fp16(97, 97, 256, mode=2),
    _fp16(96, 95, 7),
    _bf16(255, 257, 64, mode=2),
    _fp16(257, 256, 64, mode=3),
    _bf16(513, 511, 64, heads=1, mode=4, pre=100, nxt=0),
    _fp16(511, 513, 32, heads=1, mode=4, pre=0, nxt=100),
    _bf16(33, 1023, 64, heads=1),
    _fp16(31, 1023, 128, heads=1),
    _bf16(1023, 33, 64, heads=1),
    _fp16(20, 20, 1, batch=4),
    _bf16(77, 77, 65),
    _fp16(50, 66, 33),
]

_HEADS = [
    _bf16(9, 40, 64, heads=64, kv_heads=1),
    _fp16(70, 40, 32, heads=6, kv_heads=3, layout="BSH"),
    _bf16(1, 200, 128, heads=16, kv_heads=2, layout="BSND", batch=2),
    _bf16(8, 8, 16, heads=256, layout="BSH"),
    _fp16(33, 33, 48, batch=33, heads=1),
]

_MASKS = [
    _bf16(70, 90, 64, mask=Mask(2, pad=5)),
    _fp16(70, 90, 64, mask=Mask(3, pad=61, batched=True), batch=2),
    _bf16(130, 70, 128, mask=Mask(4, pad=3, dtype=U8)),
    _fp16(130, 70, 64, mask=Mask(4, dtype=I8, batched=True), batch=3, mode=1),
    _bf16(70, 300, 64, mask=Mask(3, pattern="empty_rows"), mode=1),
    _fp16(70, 70, 64, mask=Mask(2, pattern="all")),
    _bf16(70, 70, 64, mask=Mask(2, pattern="none"), nxt=0),
    _fp16(300, 310, 64, mask=Mask(2, pattern="blocks"), heads=1),
    _bf16(300, 310, 64, mask=Mask(4, pattern="left_half"), heads=1, mode=1),
    _bf16(64, 129, 64, mask=Mask(4, pad=7, pattern="causal")),
    _bf16(90, 140, 64, mask=Mask(), pre=20, nxt=13),
    _fp16(90, 140, 64, mask=Mask(), pre=-30, nxt=70),
    _fp16(140, 90, 64, mask=Mask(pattern="empty_rows"), pre=90, nxt=-20),
    _bf16(90, 90, 64, mask=Mask(), pre=FAR64, nxt=FAR64),
    _bf16(90, 90, 64, mask=Mask(), pre=0, nxt=0),
    _fp16(90, 90, 64, mask=Mask(pattern="none"), pre=FAR64, nxt=-3),
    _bf16(90, 90, 64, mask=Mask(), mode=1, pre=-5, nxt=-5),  # modes 1, 2, 3: tokens are ignored
    _fp16(90, 120, 64, mode=2, pre=3, nxt=-7),
    _bf16(90, 120, 64, mode=3, pre=-3, nxt=1),
    _fp16(90, 120, 64, pre=3, nxt=-7),  # and so are they in mode 0 without a mask
    _bf16(200, 300, 64, mode=4, pre=-20, nxt=60),
    _fp16(300, 200, 64, mode=4, pre=150, nxt=-30),
    _bf16(130, 130, 64, mode=4, pre=FAR64, nxt=FAR64),
    _fp16(130, 170, 64, mode=4, pre=FAR64, nxt=0),
    _bf16(170, 130, 64, mode=4, pre=0, nxt=FAR),
    _bf16(170, 130, 64, mode=4, pre=0, nxt=0),
    _fp16(90, 90, 64, mode=4, pre=FAR, nxt=-89),
]

_LENGTHS = [
    _bf16(100, 130, 64, batch=3, q_lens=(100, 0, 1), k_lens=(130, 50, 0)),
    _fp16(100, 130, 64, batch=3, q_lens=(64, 65, 99), k_lens=(1, 64, 129), layout="BSH"),
    _bf16(100, 130, 64, batch=2, k_lens=(65,), layout="BSND"),
    _fp16(100, 130, 128, batch=2, q_lens=(33,), mode=3),
    _bf16(100, 130, 64, batch=2, q_lens=(90, 100, 7), k_lens=(60, 130, 7, 9), mode=3),
    _bf16(100, 130, 64, batch=2, q_lens=(100, 40), k_lens=(80, 120), mode=4, pre=30, nxt=10),
    _fp16(100, 130, 64, batch=2, q_lens=(50, 90), k_lens=(130, 31), mode=2),
    _fp16(70, 90, 64, batch=2, q_lens=(70, 31), k_lens=(17, 90), mask=Mask(batched=True)),
    _bf16(70, 90, 64, batch=2, k_lens=(17, 90), pse=Pse(batched=True)),
    _int8(70, 90, 64, batch=2, q_lens=(70, 31), k_lens=(17, 90)),
    _fp16(20, 0, 64, batch=2),
]

_BIAS = [
    _bf16(70, 90, 64, batch=2, pse=Pse(batched=True, pad=4), layout="BSH"),
    _fp16(70, 90, 64, batch=2, pse=Pse(pad=64), layout="BSND"),
    _bf16(70, 90, 64, pse=Pse(pattern="holes")),
    _fp16(70, 190, 64, pse=Pse(pattern="empty_rows")),
    _fp16(90, 90, 64, heads=8, kv_heads=2, pse=Pse(pattern="alibi"), mode=2),
    _bf16(90, 90, 128, pse=Pse(pattern="large")),
    _fp16(90, 90, 64, pse=Pse(pattern="additive_mask", pad=1)),
    _bf16(90, 140, 64, pse=Pse(pattern="holes"), mask=Mask(pattern="empty_rows"), nxt=30),
    _int8(70, 90, 64, pse=Pse(batched=True), batch=2),
    _int8(70, 190, 64, pse=Pse(pattern="empty_rows"), mode=4, pre=70, nxt=10),
    _fp16(40, 60, 64, scale=0.0, pse=Pse()),
]

_STRIDES = [
    _bf16(70, 90, 64, batch=2, strides="transposed"),
    _fp16(70, 90, 40, batch=2, strides="sliced", layout="BSND"),
    _bf16(70, 90, 64, batch=3, strides="expanded", mode=2),
    _fp16(70, 90, 64, batch=2, strides="last_dim"),
    _bf16(70, 90, 40, batch=2, strides="sliced", layout="BSH"),
    _fp16(70, 90, 64, batch=2, strides="transposed", layout="BSH"),
    _int8(70, 90, 64, batch=2, strides="sliced"),
    _int8(70, 90, 72, batch=2, strides="last_dim", layout="BNSD_BSND"),
]

_SCALES = [
    _bf16(70, 90, 64, scale=0.0),
    _fp16(70, 90, 64, scale=-0.125),
    _bf16(70, 190, 64, scale=-0.2, mode=3),
    # Whole vectors of keys and nothing masked: no kernel has a reason to look at single scores.
    _bf16(70, 192, 64, scale=-0.3, values="large_logits"),
    _fp16(70, 192, 64, scale=-0.3, values="large_logits"),
    _int8(70, 256, 64, Quant(sign_s=-1), layout="BSND"),
    _bf16(192, 512, 128, heads=1),
    _fp16(192, 512, 64, heads=1),
    _int8(192, 512, 64, heads=1),
    _int8(96, 512, 64, heads=1, scale=-0.125),
]

_QUANT = [
    _int8(1, 1, 1),
    _int8(7, 300, 40, layout="BSH"),
    _int8(130, 70, 80, mode=3),
    _int8(64, 257, 256, heads=1, layout="BSND"),
    _int8(40, 100, 512, heads=1),
    _int8(90, 600, 64, heads=1, mode=4, pre=200, nxt=50),
    _int8(90, 140, 64, mask=Mask(pattern="empty_rows"), nxt=30),
    _int8(90, 140, 64, Quant(out="tensor"), mask=Mask(2, pattern="empty_rows"), mode=1),
    _int8(90, 140, 64, Quant(deq="uint64")),
    _int8(90, 140, 96, Quant(deq="int64", sign_s=-1, sign_o=-1)),
    _int8(90, 140, 64, Quant(sign_s=-1)),
    _int8(90, 140, 64, scale=-0.125),
    _int8(90, 140, 64, scale=0.0),
    _int8(90, 140, 64, Quant(p_scale=0.0)),
    _int8(90, 140, 64, Quant(p_scale=1e-30)),
    _int8(90, 140, 64, Quant(p_scale=0.75)),
    _int8(90, 140, 64, Quant(p_scale=200.0)),
    _int8(90, 300, 64, Quant(p_scale=-127.0)),
    _int8(40, 1000, 64, Quant(p_scale=20.0), heads=1),
    _int8(90, 140, 64, Quant(out="tensor", offset=True), layout="BSH"),
    _int8(90, 140, 40, Quant(out="channel", shape="1N1D", offset=True), heads=6, kv_heads=2),
    _int8(90, 140, 40, Quant(out="channel", shape="11H", deq="int64"), batch=2, layout="BSH"),
    _bf16(90, 140, 64, quant=Quant(out="channel", shape="11ND", scale_dtype=BF16, offset=True)),
    _bf16(90, 140, 72, quant=Quant(out="channel", shape="ND"), layout="BSND", batch=2),
    _bf16(90, 140, 64, quant=Quant(out="tensor", scale_dtype=BF16), mode=3),
    _fp16(90, 140, 64, quant=Quant(out="channel", offset=True), layout="BSH", batch=2),
    _fp16(90, 140, 64, quant=Quant(out="tensor", offset=True), mask=Mask(2, pattern="empty_rows")),
]

# What breaks arithmetic on fewer bits than it pretends to have.
HARD = [
    _fp16(100, 130, 64, values="outlier_channel"),
    _fp16(100, 130, 64, values="outlier_in_v"),
    _fp16(100, 130, 64, values="outlier_in_v_seen"),
    _fp16(100, 130, 64, values="wide_v"),
    _fp16(100, 130, 64, values="wide_v_columns"),
    _fp16(100, 130, 64, values="wide_qk", scale=1.0),
    _fp16(100, 130, 64, values="denormal", scale=1.0),
    _fp16(100, 130, 64, values="large_logits"),
    _fp16(100, 100, 128, values="diagonal", scale=0.25),
    _fp16(100, 130, 64, values="constant_v"),
    _bf16(100, 130, 64, values="outlier_channel"),
    _bf16(100, 130, 64, values="outlier_in_v"),
    _bf16(100, 130, 64, values="wide_v"),
    _bf16(100, 130, 64, values="wide_v_columns"),
    _bf16(100, 130, 64, values="large_logits"),
    _bf16(100, 100, 128, values="diagonal", scale=0.25),
    _bf16(100, 130, 64, values="constant_v"),
]

EDGE = _SIZES + _HEADS + _MASKS + _LENGTHS + _BIAS + _STRIDES + _SCALES + _QUANT + HARD

_FULL_MODES = [
    {},
    {"mode": 2},
    {"mode": 3},
    {"mode": 4, "pre": 512, "nxt": 0},
    {"mask": Mask(2), "mode": 1},
    {"pse": Pse()},
]
FULL = [
    dataclasses.replace(base, **mode)
    for base in (
        _bf16(2048, 2048, 128, heads=2),
        _fp16(2048, 2048, 64, heads=2),
        _fp16(1024, 2000, 160, heads=4, kv_heads=2, layout="BSH"),
        _int8(2048, 2048, 128),
        _int8(1500, 2048, 64, Quant(out="channel"), layout="BSND"),
    )
    for mode in _FULL_MODES
] + [
    _bf16(4096, 4096, 40, layout="BSND"),
    _fp16(1, 16384, 128, batch=4, heads=16, kv_heads=2),
    _bf16(77, 4096, 256, heads=4, batch=2),
    _bf16(300, 300, 64, heads=256, kv_heads=4),
    _fp16(17, 23, 8, batch=1000, heads=3, layout="BSND"),
]


def as_params(cases: list[Case]) -> list:
    return [pytest.param(case, id=case.id) for case in cases]
