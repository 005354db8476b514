# SPDX-License-Identifier: Apache-2.0
"""Single calls of transformers' attention function: masks, what is handed on, errors."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from pfa.integrations import transformers as integration  # noqa: E402


class Layer(torch.nn.Module):
    """Stands for the attention layer of a model in a direct call."""

    is_causal = False
    num_key_value_groups = 2


def make_qkv(dtype=torch.bfloat16, rows=17, keys=21, grad=False):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, rows, 4, 32), (2, keys, 2, 32), (2, keys, 2, 32))
    # Models pass transposed views.
    tensors = [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]
    return [t.requires_grad_(grad) for t in tensors]


def attend(qkv, mask=None, module=None, **arguments):
    return integration.pfa_attention_forward(module or Layer(), *qkv, mask, **arguments)[0]


def reference(qkv, added=None, keep=None):
    """float64, (B, S_q, N, D)"""
    q, k, v = (t.double() for t in qkv)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if added is not None:
        scores = scores + added.double()
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random_keep(*shape):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    keep[..., 0] = True
    return keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 4, 17, 21), (2, 1, 17, 21), (2, 1, 1, 21)], ids=str)
def test_float_mask_is_added(shape, dtype, calls):
    qkv = make_qkv(dtype)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out = attend(qkv, added)
    bias = calls[0]["pse_shift"]
    assert bias.dtype == dtype and bias.shape == (shape[0], 4, 17, 21)
    assert shape[1] == 4 or bias.stride(1) == 0
    torch.testing.assert_close(out.double(), reference(qkv, added), rtol=2e-2, atol=2e-2)


def test_lowest_value_of_float32_masks():
    qkv, keep = make_qkv(), random_keep(2, 1, 17, 21)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attend(qkv, added), attend(qkv, keep), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads", [1, 4])
def test_bool_mask_keeps_where_true(heads):
    qkv, keep = make_qkv(), random_keep(2, heads, 17, 21)
    expected = reference(qkv, keep=keep)
    torch.testing.assert_close(attend(qkv, keep).double(), expected, rtol=2e-2, atol=2e-2)


def test_padding_mask_is_inverted_once_per_key(calls):
    qkv, keep = make_qkv(), random_keep(2, 1, 1, 21).expand(2, 1, 17, 21)
    out = attend(qkv, keep)
    assert calls[0]["atten_mask"].stride(2) == 0
    expected = reference(qkv, keep=keep)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_position_bias_goes_on_top_of_the_mask(mask, calls):
    qkv, keep = make_qkv(), random_keep(2, 1, 17, 21)
    bias = torch.randn(1, 4, 17, 21, generator=torch.Generator().manual_seed(5)).bfloat16()
    lowest = torch.zeros(keep.shape, dtype=torch.bfloat16).masked_fill(~keep, float("-inf"))
    given = {"none": None, "bool": keep, "float": lowest}[mask]
    out = attend(qkv, given, position_bias=bias)
    assert len(calls) == 1
    expected = reference(qkv, bias, None if mask == "none" else keep)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_causal_call_with_a_longer_cache_is_aligned_top_left():
    qkv = make_qkv()
    keep = torch.ones(17, 21, dtype=torch.bool).tril()
    out = attend(qkv, is_causal=True)
    expected = reference(qkv, keep=keep)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


DELEGATED = {
    "float32": (lambda: make_qkv(torch.float32), {}),
    "dropout": (make_qkv, {"dropout": 0.5}),
    "one token": (lambda: make_qkv(rows=1), {}),
    "gradients": (lambda: make_qkv(grad=True), {}),
}


@pytest.mark.parametrize("case", DELEGATED)
def test_delegated_to_sdpa_with_a_debug_line(case, calls, caplog):
    make, arguments = DELEGATED[case]
    qkv = make()
    with caplog.at_level(logging.DEBUG, logger="pfa"):
        out = attend(qkv, **arguments)
    assert not calls
    assert len(caplog.records) == 1 and "SDPA takes this call" in caplog.text
    if case != "dropout":
        expected = reference(qkv)
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_sinks_and_softcap_against_the_formula():
    qkv, keep, sinks = make_qkv(torch.float32), random_keep(2, 1, 17, 21), torch.randn(4)
    q, k, v = (t.double() for t in qkv)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = 2 * torch.tanh(q @ k.transpose(-1, -2) / 32**0.5 / 2)
    weights = scores.exp() * keep
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.double().exp().view(4, 1, 1))
    out = attend(qkv, keep, s_aux=sinks, softcap=2.0)
    torch.testing.assert_close(out.double(), (weights @ v).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_sinks_of_a_row_without_keys():
    keep = torch.zeros(2, 1, 17, 21, dtype=torch.bool)
    assert not attend(make_qkv(torch.float32), keep, s_aux=torch.zeros(4)).any()


WRONG = {
    "mask shape": (
        {"mask": torch.zeros(2, 1, 17, 20)},
        ValueError,
        r"attention_mask .*\(2, 4, 17, 2",
    ),
    "mask rank": ({"mask": torch.zeros(1, 2, 1, 17, 21)}, ValueError, "attention_mask must be"),
    "mask dtype": ({"mask": torch.zeros(2, 21).long()}, TypeError, "attention_mask must be bool"),
    "mask device": (
        {"mask": torch.zeros(1, device="meta")},
        ValueError,
        "attention_mask must be on",
    ),
    "bias shape": ({"position_bias": torch.zeros(3, 17, 21)}, ValueError, "position_bias must be"),
    "paged sinks": ({"cache": 1, "s_aux": torch.zeros(4)}, NotImplementedError, "s_aux"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(arguments, kind, text, dtype):
    with pytest.raises(kind, match=text):
        attend(make_qkv(dtype), **arguments)


@pytest.mark.parametrize("name", ["", None])
def test_register_wants_a_name(name):
    with pytest.raises(ValueError, match="name must be a non-empty str"):
        integration.register(name)
