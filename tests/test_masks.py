# SPDX-License-Identifier: Apache-2.0
"""Which pairs take part, exactly: equal scores and V = I make each output row show whom it saw."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from compare import check
from inputs import FAR, Call, compressed_mask

FAR64 = 2**63 - 1
DTYPES = [torch.float16, torch.bfloat16]


def one_hot_call(sq, sk, dtype=torch.bfloat16, batch=1, **options) -> Call:
    """head_dim >= sk, so that key j is column j of the output."""
    dim = max(sk, 1)
    q = torch.zeros(batch, 1, sq, dim, dtype=dtype)
    k = torch.zeros(batch, 1, sk, dim, dtype=dtype)
    v = torch.eye(sk, dim).to(dtype).expand(batch, 1, sk, dim)
    return Call(q, k, v, {"input_layout": "BNSD", **options})


def check_support(forward, call: Call) -> None:
    """The right keys and no other, each with the same share."""
    visible = reference.parts(*call.args, **call.options).visible
    out = forward(*call.args, **call.options)
    seen = out[..., : call.key.shape[2]] != 0
    wrong = (seen != visible).nonzero()
    assert not len(wrong), f"{len(wrong)} pairs differ, the first (b, n, i, j) {wrong[:4].tolist()}"
    check(out, call)


SIZES = [(1, 1), (5, 7), (7, 5), (130, 300), (300, 130), (97, 257), (193, 193), (20, 512)]
BANDS = [
    (0, 0),
    (1, 0),
    (0, 1),
    (3, 2),
    (-1, 2),
    (2, -1),
    (FAR, 0),
    (0, FAR),
    (FAR64, 1),
    (1, FAR64),
    (63, 0),
    (64, 64),
    (95, 0),
    (96, 1),
    (200, -100),
    (-100, 256),
]


def legal(pre: int, nxt: int, rows: int, keys: int) -> bool:
    """The token rules of mode 4; mode 0 has them with rows and keys swapped."""
    return (pre >= 0 or -pre < rows) and (nxt >= 0 or -nxt < keys)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
@pytest.mark.parametrize("mode", [2, 3])
def test_causal(forward, sq, sk, mode):
    call = one_hot_call(sq, sk, sparse_mode=mode, atten_mask=compressed_mask())
    check_support(forward, call)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_band(forward, sq, sk):
    bands = [band for band in BANDS if legal(*band, sq, sk)]
    assert len(bands) >= 12 or sq == 1
    for pre, nxt in bands:
        call = one_hot_call(
            sq,
            sk,
            sparse_mode=4,
            pre_tokens=pre,
            next_tokens=nxt,
            atten_mask=compressed_mask(),
        )
        check_support(forward, call)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_tokens_with_a_mask(forward, sq, sk):
    mask = torch.rand(sq, sk, generator=torch.Generator().manual_seed(sq)) < 0.3
    for pre, nxt in BANDS:
        if legal(pre, nxt, sk, sq):
            call = one_hot_call(sq, sk, pre_tokens=pre, next_tokens=nxt, atten_mask=mask)
            check_support(forward, call)


@pytest.mark.parametrize(("mode", "pre", "nxt"), [(3, FAR, 0), (4, 70, 3), (4, 0, 100), (2, 0, 0)])
def test_anchor_follows_lengths(forward, mode, pre, nxt):
    pairs = [(150, 200), (150, 64), (64, 200), (1, 200), (150, 1), (97, 96), (0, 9), (9, 0)]
    q_lens, k_lens = zip(*pairs, strict=True)
    call = one_hot_call(
        150,
        200,
        batch=len(pairs),
        sparse_mode=mode,
        pre_tokens=pre,
        next_tokens=nxt,
        atten_mask=compressed_mask(),
        actual_seq_lengths=list(q_lens),
        actual_seq_lengths_kv=list(k_lens),
    )
    check_support(forward, call)


def test_tokens_are_ignored_where_they_do_not_apply(forward):
    mask = torch.rand(1, 1, 70, 90, generator=torch.Generator().manual_seed(0)) < 0.3
    modes = [(0, None), (1, mask), (2, compressed_mask()), (3, compressed_mask())]
    for (mode, atten_mask), (pre, nxt) in itertools.product(
        modes, [(-5, -5), (0, -9), (-FAR, FAR)]
    ):
        options = {"sparse_mode": mode, "pre_tokens": pre, "next_tokens": nxt}
        call = one_hot_call(70, 90, **options)
        if atten_mask is not None:
            call = call.with_(atten_mask=atten_mask)
        check_support(forward, call)


def test_next_tokens_default_cuts_under_a_mask_only(forward):
    nothing = torch.zeros(40, 50, dtype=torch.bool)
    open_, cut = one_hot_call(40, 50), one_hot_call(40, 50, atten_mask=nothing)
    assert (forward(*open_.args, **open_.options)[..., :50] != 0).all()
    assert forward(*cut.args, **cut.options)[0, 0].triu(1).count_nonzero() == 0


@pytest.mark.parametrize("compressed", [(2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
def test_content_of_the_compressed_mask_is_not_read(forward, compressed, dtype):
    mask = torch.ones(compressed, dtype=dtype)
    check_support(forward, one_hot_call(70, 90, sparse_mode=3, atten_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("ndim", [2, 3, 4])
@pytest.mark.parametrize("mode", [0, 1])
def test_any_nonzero_masks(forward, dtype, ndim, mode):
    values = torch.randint(0, 4, (75, 97), generator=torch.Generator().manual_seed(ndim))
    values = torch.tensor([0, 1, 255, 128], dtype=torch.uint8)[values]
    mask = (values != 0) if dtype == torch.bool else values.view(dtype)
    options = {"sparse_mode": mode, "atten_mask": mask[(None,) * (ndim - 2)]}
    check_support(forward, one_hot_call(70, 90, batch=2, next_tokens=FAR, **options))


@pytest.mark.parametrize("stride", ["rows", "columns", "batch", "transposed"])
def test_masks_of_any_strides(forward, stride):
    wide = torch.rand(4, 150, 200, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = {
        "rows": wide[:2, ::2],
        "columns": wide[:2, :75, ::2],
        "batch": wide[::2, 10:80, 20:120],
        "transposed": wide[:2, :120, :100].mT,
    }[stride]
    call = one_hot_call(70, 90, batch=2, sparse_mode=1, atten_mask=mask)
    check_support(forward, call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_the_mask_leaves_empty(forward, dtype, nan_filled_empty):
    """All keys masked in some rows, in whole blocks of rows, in all rows: exact zeros."""
    mask = torch.zeros(3, 200, 150, dtype=torch.bool)
    mask[0, [0, 7, 95, 96, 199]] = True
    mask[1, 64:] = True
    mask[2] = True
    call = one_hot_call(200, 150, dtype, batch=3, sparse_mode=1, atten_mask=mask)
    check_support(forward, call)


def test_one_key_left_anywhere(forward):
    """The only visible key on either side of every border of a tile or a vector."""
    keys = torch.tensor([0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 383, 384, 510, 511])
    mask = torch.ones(len(keys), 512, dtype=torch.bool)
    mask[torch.arange(len(keys)), keys] = False
    check_support(forward, one_hot_call(len(keys), 512, sparse_mode=1, atten_mask=mask))


def test_one_key_missing_anywhere(forward):
    keys = torch.tensor([0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 383, 384, 510, 511])
    mask = torch.zeros(len(keys), 512, dtype=torch.bool)
    mask[torch.arange(len(keys)), keys] = True
    check_support(forward, one_hot_call(len(keys), 512, sparse_mode=1, atten_mask=mask))
