# SPDX-License-Identifier: Apache-2.0
"""Whole models through transformers with pfa as their attention, against its own SDPA.

The models are tiny, random and made here; nothing is downloaded.
"""

import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")

import pfa  # noqa: E402
from pfa.integrations import transformers as integration  # noqa: E402

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
}
CAUSAL = COMMON | {"bos_token_id": 1, "eos_token_id": None, "num_key_value_heads": 2}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**COMMON)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**CAUSAL, sliding_window=8)
    ),
}
LENGTHS = (23, 9, 16)  # of the three sequences of a padded batch


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call that reached the operator."""
    seen = []

    def spy(*tensors, **arguments):
        seen.append(arguments)
        return pfa.prompt_flash_attention(*tensors, **arguments)

    monkeypatch.setattr(integration, "prompt_flash_attention", spy)
    return seen


def make_model(name, dtype):
    torch.manual_seed(7)
    return MODELS[name]().to(dtype).eval()


def make_batch(padding):
    generator = torch.Generator().manual_seed(11)
    longest = max(LENGTHS)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    keep = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        if padding == "left":
            keep[row, : longest - length] = 0
        elif padding == "right":
            keep[row, length:] = 0
    return {"input_ids": ids.masked_fill(keep == 0, 0), "attention_mask": keep}


def last_hidden(model, implementation, batch):
    model.set_attn_implementation(implementation)
    with torch.inference_mode():
        return model(**batch, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_sdpa(name, dtype, padding, calls):
    batch = make_batch(padding)
    model = make_model(name, dtype)
    ours = last_hidden(model, "pfa", batch)
    assert len(calls) == COMMON["num_hidden_layers"]
    theirs = last_hidden(model, "sdpa", batch)
    exact = last_hidden(make_model(name, dtype).float(), "eager", batch)
    real = batch["attention_mask"] == 1
    error = (ours.float() - exact)[real].abs().max()
    baseline = (theirs.float() - exact)[real].abs().max()
    assert error <= 2 * baseline


def generate(model, implementation, batch):
    model.set_attn_implementation(implementation)
    return model.generate(
        **batch, max_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_gives_the_same_tokens(name, padding, calls):
    """Equal until two tokens tie: closer than twice the noise between eager and SDPA."""
    batch = make_batch(padding)
    model = make_model(name, torch.float16)
    runs = {kind: generate(model, kind, batch) for kind in ("pfa", "sdpa", "eager")}
    assert calls, "the prefill did not reach the operator"
    scores = {kind: torch.stack(run.scores).float() for kind, run in runs.items()}
    noise = (scores["eager"][0] - scores["sdpa"][0]).abs().max()
    assert (scores["pfa"][0] - scores["sdpa"][0]).abs().max() <= 2 * noise
    tokens = {kind: score.argmax(-1).T.tolist() for kind, score in scores.items()}
    for row, (ours, theirs) in enumerate(zip(tokens["pfa"], tokens["sdpa"], strict=True)):
        step = next((i for i in range(len(ours)) if ours[i] != theirs[i]), None)
        if step is not None:
            at = scores["sdpa"][step, row]
            assert at[theirs[step]] - at[ours[step]] <= 2 * noise, (row, step)


def test_causal_prefill_uses_the_band_and_padding_uses_a_mask(calls):
    model = make_model("llama", torch.bfloat16)
    last_hidden(model, "pfa", make_batch("none"))
    assert all(call["sparse_mode"] == 2 and call["atten_mask"] is None for call in calls)
    calls.clear()
    last_hidden(model, "pfa", make_batch("left"))
    assert all(call["sparse_mode"] == 0 and call["atten_mask"] is not None for call in calls)


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


def test_sinks_and_softcap_are_errors():
    with pytest.raises(NotImplementedError, match="s_aux"):
        attend(make_qkv(), s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="softcap"):
        attend(make_qkv(), softcap=30.0)
