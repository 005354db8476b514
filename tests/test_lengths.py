# SPDX-License-Identifier: Apache-2.0
"""actual_seq_lengths: what lies beyond a length does not exist; the lists and the tensors agree."""

from __future__ import annotations

import pytest
import torch
from compare import check, prepared
from inputs import FAR, Call, Case, Mask, Pse, Quant

pytestmark = pytest.mark.usefixtures("one_split")

Q_LENS, K_LENS = (70, 0, 1, 33), (150, 64, 65, 0)
MODES = {
    "full": {},
    "causal": {"mode": 2},
    "bottom_right": {"mode": 3},
    "band": {"mode": 4, "pre": 40, "nxt": 5},
    "mask": {"mask": Mask(batched=True), "nxt": 20},
    "all_mask": {"mask": Mask(2), "mode": 1},
    "pse": {"pse": Pse(batched=True)},
}


def make_case(dtype: str, mode: str) -> Case:
    quant = Quant() if dtype == "int8" else None
    shape = {"batch": 4, "heads": 2, "sq": 70, "sk": 150, "dim": 64, "quant": quant}
    return Case(dtype, **shape, **MODES[mode], q_lens=Q_LENS, k_lens=K_LENS)


def run(forward, call: Call) -> torch.Tensor:
    return forward(*call.args, **call.options)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_each_element_equals_the_shorter_call(forward, dtype, mode):
    """Batch element b alone, its tensors cut to its lengths, gives the same bits."""
    call, expected = prepared(make_case(dtype, mode))
    out = run(forward, call)
    check(out, call, expected)
    for b, (rows, keys) in enumerate(zip(Q_LENS, K_LENS, strict=True)):
        assert not out[b, :, rows:].any()
        if rows == 0 or keys == 0:
            assert not out[b].any()
            continue
        cut = call.with_(
            query=call.query[b : b + 1, :, :rows],
            key=call.key[b : b + 1, :, :keys],
            value=call.value[b : b + 1, :, :keys],
            actual_seq_lengths=None,
            actual_seq_lengths_kv=None,
        )
        for name in ("pse_shift", "atten_mask"):
            x = call.options.get(name)
            if x is not None and x.ndim == 4 and len(x) == len(Q_LENS):
                cut = cut.with_(**{name: x[b : b + 1]})
        assert torch.equal(run(forward, cut)[0], out[b, :, :rows])


@pytest.mark.parametrize("which", ["actual_seq_lengths", "actual_seq_lengths_kv"])
def test_forms_of_a_list(forward, which):
    call, _ = prepared(Case("bf16", 3, 2, sq=70, sk=70, mode=3))
    wants = {"none": [70, 70, 70], "empty": [70, 70, 70], "one": [9, 9, 9], "longer": [70, 9, 1]}
    forms = {"none": None, "empty": [], "one": [9], "longer": [70, 9, 1, 999, -5]}
    for name, form in forms.items():
        got = run(forward, call.with_(**{which: form}))
        assert torch.equal(got, run(forward, call.with_(**{which: wants[name]}))), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", MODES)
def test_tensor_lengths_equal_lists(forward, dtype, mode):
    call, _ = prepared(make_case("bf16", mode))
    lens = {
        "actual_seq_lengths": torch.tensor(Q_LENS, dtype=dtype),
        "actual_seq_lengths_kv": torch.tensor(K_LENS, dtype=dtype),
    }
    want = run(forward, call)
    got = forward.tensor_lens(*call.args, **(call.options | lens))
    assert torch.equal(got, want)
    assert torch.equal(forward(*call.args, **(call.options | lens)), want)


def test_tensor_lengths_are_clamped(forward):
    call, _ = prepared(Case("fp16", 4, 2, sq=70, sk=90, mode=3))
    wild = torch.tensor([-1, 71, -(2**62), 2**62])
    tame = torch.tensor([0, 70, 0, 70])
    got = forward.tensor_lens(*call.args, **(call.options | {"actual_seq_lengths": wild}))
    want = forward.tensor_lens(*call.args, **(call.options | {"actual_seq_lengths": tame}))
    assert torch.equal(got, want)
    got = forward.tensor_lens(*call.args, **(call.options | {"actual_seq_lengths_kv": wild}))
    tame = torch.tensor([0, 71, 0, 90])
    want = forward.tensor_lens(*call.args, **(call.options | {"actual_seq_lengths_kv": tame}))
    assert torch.equal(got, want)


def test_forms_of_a_tensor(forward):
    call, _ = prepared(Case("bf16", 3, 2, sq=70, sk=90, mode=3))
    forms = {
        "one": torch.tensor([50]),
        "longer": torch.tensor([50, 50, 50, 7, 7]),
        "strided": torch.tensor([50, 1, 50, 1, 50, 1])[::2],
        "expanded": torch.tensor([50]).expand(3),
        "int32": torch.tensor([50, 50, 50], dtype=torch.int32),
    }
    want = run(forward, call.with_(actual_seq_lengths_kv=[50] * 3))
    for name, form in forms.items():
        options = call.options | {"actual_seq_lengths_kv": form}
        assert torch.equal(forward.tensor_lens(*call.args, **options), want), name
    options = call.options | {"actual_seq_lengths": None, "actual_seq_lengths_kv": None}
    assert torch.equal(forward.tensor_lens(*call.args, **options), run(forward, call))


def test_all_lengths_zero(forward, nan_filled_empty):
    call, _ = prepared(Case("bf16", 3, 2, sq=70, sk=90))
    for lens in ({"actual_seq_lengths": [0]}, {"actual_seq_lengths_kv": [0, 0, 0]}):
        assert not run(forward, call.with_(**lens)).any()


def test_zero_length_needs_no_legal_tokens(forward):
    """The magnitude rules of mode 4 skip an element without rows or keys."""
    case = Case("bf16", 2, 2, sq=70, sk=90, mode=4, pre=-3, nxt=FAR, q_lens=(70, 0), k_lens=(90, 9))
    call, expected = prepared(case)
    check(run(forward, call), call, expected)
