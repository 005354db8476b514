# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf wherever the contract says nobody looks, and in memory nobody has written."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import EDGE, SMOKE, as_params
from compare import check, check_case, prepared
from inputs import FAR, Call, Case, Mask, Pse, Quant, guarded_copy

DTYPES = ["bf16", "fp16"]
BAD = [math.nan, math.inf, -math.inf]
MODES = {
    "full": {},
    "causal": {"mode": 2},
    "bottom_right": {"mode": 3},
    "band": {"mode": 4, "pre": 30, "nxt": 3},
    "mask": {"mask": Mask(), "nxt": 20},
    "all_mask": {"mask": Mask(2), "mode": 1},
    "pse": {"pse": Pse(pattern="holes")},
}


def run(forward, call: Call) -> torch.Tensor:
    return forward(*call.args, **call.options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", BAD)
def test_contents_beyond_lengths(forward, dtype, mode, bad):
    """Not one bit depends on Q, K, V and pse_shift beyond the lengths."""
    case = Case(dtype, 2, 2, sq=70, sk=150, **MODES[mode], q_lens=(70, 33), k_lens=(65, 150))
    call, _ = prepared(case)
    tensors = {n: call.tensors()[n].clone() for n in ("query", "key", "value")}
    if "pse_shift" in call.options:
        tensors["pse_shift"] = call.options["pse_shift"].expand(2, -1, -1, -1).clone()
    for b, (rows, keys) in enumerate(zip(case.q_lens, case.k_lens, strict=True)):
        tensors["query"][b, :, rows:] = bad
        tensors["key"][b, :, keys:] = bad
        tensors["value"][b, :, keys:] = bad
        if "pse_shift" in tensors:
            tensors["pse_shift"][b, :, rows:] = bad
            tensors["pse_shift"][b, :, :, keys:] = bad
    assert torch.equal(run(forward, call.with_(**tensors)), run(forward, call))


@pytest.mark.parametrize("mode", [0, 1])
def test_mask_beyond_lengths_and_sizes(forward, mode):
    """The mask's padding, and what it says of rows and keys that do not exist."""
    case = Case("bf16", 2, 2, sq=70, sk=150, mode=mode, mask=Mask(3, batched=True, pad=70))
    call, _ = prepared(case)
    lens = {"actual_seq_lengths": [70, 33], "actual_seq_lengths_kv": [65, 150]}
    mask = call.options["atten_mask"]
    want = run(forward, call.with_(**lens))
    for fill in (True, False):
        other = mask.clone()
        other[:, 70:] = fill
        other[:, :, 150:] = fill
        other[1, 33:] = fill
        other[0, :, 65:] = fill
        assert torch.equal(run(forward, call.with_(atten_mask=other, **lens)), want)


def test_bias_beyond_sizes(forward):
    """make_pse pads with NaN."""
    call, expected = prepared(Case("fp16", 2, 2, sq=70, sk=150, pse=Pse(pad=70, batched=True)))
    assert call.options["pse_shift"].isnan().any()
    check(run(forward, call), call, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [m for m in MODES if m != "full"])
@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_inside_reaches_only_rows_that_see_it(forward, dtype, mode, where):
    """NaN and both infinities at keys that some rows see; other rows keep their bits."""
    call, _ = prepared(Case(dtype, 1, 2, sq=130, sk=300, dim=80, **MODES[mode]))
    x = call.tensors()[where].clone()
    keys = (201, 256, 299) if mode == "bottom_right" else (5, 77, 299)
    for key, bad, channel in zip(keys, BAD, (0, 64, 79), strict=True):
        x[:, :, key, channel] = bad
    poisoned = call.with_(**{where: x})
    out = run(forward, poisoned)
    check(out, poisoned)
    clean = run(forward, call)
    untouched = out.isfinite().all(-1, keepdim=True) | (out == clean)
    assert untouched.any()


@pytest.mark.parametrize("dim", [64, 192, 512])
def test_nan_stays_out_of_int8_rows(forward, dim):
    """As integers nothing tells a NaN: rows that do not see it hold what they should."""
    quant = Quant(out="channel", offset=True)
    call, _ = prepared(Case("bf16", 1, 2, sq=130, sk=130, dim=dim, mode=2, quant=quant))
    value = call.value.clone()
    value[:, :, 70, :: dim // 8] = math.nan
    poisoned = call.with_(value=value)
    out = run(forward, poisoned)
    check(out, poisoned)
    assert (out[:, :, 70:, :: dim // 8] == -128).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["key", "value"])
def test_whole_rows_of_nan(forward, dtype, bad, where):
    """Keys of nothing but NaN or Inf, one in each tile; a mask hides them from even rows."""
    keys = torch.tensor([3, 70, 255, 256, 511, 600])
    mask = torch.zeros(100, 700, dtype=torch.bool)
    mask[::2, keys] = True
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, s, 64, generator=rng) for s in (100, 700, 700))
    (k if where == "key" else v)[:, :, keys] = bad
    to = torch.bfloat16 if dtype == "bf16" else torch.float16
    options = {"sparse_mode": 1, "atten_mask": mask, "scale_value": 0.125, "input_layout": "BNSD"}
    call = Call(q.to(to), k.to(to), v.to(to), options)
    out = run(forward, call)
    check(out, call)
    assert out[:, :, ::2].isfinite().all()
    if where == "value" or math.isnan(bad):
        assert not out[:, :, 1::2].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_bad_query_rows_stay_alone(forward, dtype, bad):
    call, _ = prepared(Case(dtype, 2, 2, sq=130, sk=150, dim=40, mode=3))
    q = call.query.clone()
    q[0, 0, 5] = q[1, 1, 96, 39] = q[0, 1, 0, 0] = bad
    poisoned = call.with_(query=q)
    out = run(forward, poisoned)
    check(out, poisoned)
    if math.isnan(bad):
        assert out[0, 0, 5].isnan().all()
        assert out[1, 1, 96].isnan().all()


def test_infinite_value_with_weight_is_infinite(forward):
    """Inf in V is no error: rows that see it with weight get it, as torch's would."""
    x = torch.zeros(1, 1, 40, 16, dtype=torch.bfloat16)
    v = torch.ones_like(x)
    v[0, 0, 7, 3] = math.inf
    out = forward(x, x, v, input_layout="BNSD")
    assert (out[..., 3] == math.inf).all()
    assert (out[..., :3] == 1).all()
    assert (out[..., 4:] == 1).all()


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_smoke_into_dirty_memory(forward, case, nan_filled_empty):
    check_case(forward, case)


_SPARSE_ROWS = [c for c in EDGE if c.q_lens or c.k_lens or "empty_rows" in c.id or "all" in c.id]


@pytest.mark.parametrize("case", as_params(_SPARSE_ROWS))
def test_empty_rows_into_dirty_memory(forward, case, nan_filled_empty):
    check_case(forward, case)


@pytest.mark.cpu
def test_smoke_with_dirty_heap():
    """glibc fills what malloc returns: a workspace must not be read before it is written."""
    environment = os.environ | {"MALLOC_PERTURB_": "128"}  # every byte 0x7f: NaN in fp16, 3e38
    target = str(pathlib.Path(__file__).with_name("test_forward.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", target]
    done = subprocess.run(
        [*command, "-k", "test_smoke"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_guard_pages(forward):
    """No read before or after a tensor: each ends where a page without access begins."""
    for case in (
        Case("bf16", 1, 1, sq=33, sk=67, dim=40),
        Case("fp16", 1, 2, sq=5, sk=129, dim=65, mask=Mask(2), mode=1, pse=Pse()),
        Case("fp16", 1, 1, sq=3, sk=3, dim=7, layout="BSH"),
    ):
        call, expected = prepared(case)
        guarded = call.with_(**{n: guarded_copy(x) for n, x in call.tensors().items()})
        check(run(forward, guarded), call, expected)


def test_far_apart_tokens_with_poison(forward):
    """A band that leaves out whole tiles on both sides of NaN-filled keys."""
    case = Case("bf16", 1, 1, sq=600, sk=600, mode=4, pre=-100, nxt=140)
    call, _ = prepared(case)
    k, v = call.key.clone(), call.value.clone()
    k[:, :, :100] = v[:, :, :100] = math.nan  # row i sees i + 100 .. i + 140
    poisoned = call.with_(key=k, value=v)
    assert torch.equal(run(forward, poisoned), run(forward, call))
    assert call.options["next_tokens"] < FAR
