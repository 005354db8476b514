# SPDX-License-Identifier: Apache-2.0
"""diffusers' attention backend and torch's flash attention hook, on tiny random models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pfa.integrations import torch_sdpa

attention = pytest.importorskip("diffusers.models.attention_dispatch")
from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # noqa: E402

from pfa.integrations import diffusers as integration  # noqa: E402

Calls = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    integration.register()
    torch_sdpa.register()


@pytest.fixture(autouse=True)
def _native_afterwards() -> Iterator[None]:
    """model.set_attention_backend makes its backend the default of the process too."""
    yield
    registry = attention._AttentionBackendRegistry
    registry.set_active_backend(attention.AttentionBackendName.NATIVE)


@pytest.fixture
def activated() -> Iterator[None]:
    torch.nn.attention.activate_flash_attention_impl("PFA")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flux(dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(5)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": random(2, 64, 4),
        "encoder_hidden_states": random(2, 7, 32),
        "pooled_projections": random(2, 32),
        "timestep": torch.tensor([1.0, 0.5]),
        "img_ids": torch.stack([torch.arange(64) % n for n in (1, 8, 64)], 1),
        "txt_ids": torch.zeros(7, 3),
    }
    return model.to(dtype).eval(), {k: v.to(dtype) for k, v in inputs.items()}


def unet(dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(5)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    inputs = {
        "sample": random(2, 4, 16, 16),
        "timestep": torch.tensor([10.0, 20.0]),
        "encoder_hidden_states": random(2, 7, 32),
    }
    return model.to(dtype).eval(), {k: v.to(dtype) for k, v in inputs.items()}


def output(make: Callable[..., Any], dtype: torch.dtype, backend: str | None = None) -> Tensor:
    model, inputs = make(torch.float16)  # the same rounded weights for every dtype
    model, inputs = model.to(dtype), {k: v.to(dtype) for k, v in inputs.items()}
    if backend is not None:
        model.set_attention_backend(backend)
    with torch.inference_mode():
        return model(**inputs)[0].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_diffusion_transformer(dtype: torch.dtype, calls: Calls) -> None:
    exact = output(flux, torch.float32, "native")
    ours, native = (output(flux, dtype, backend) for backend in ("pfa", "native"))
    assert len(calls) == 2
    assert (ours - exact).abs().max() <= 2 * (native - exact).abs().max()
    assert torch.equal(output(flux, torch.float32, "pfa"), exact)
    assert len(calls) == 2


def test_diffusers_context_manager(calls: Calls) -> None:
    q, k = random(2, 9, 4, 16), random(2, 5, 4, 16)
    with attention.attention_backend("pfa"):
        attention.dispatch_attention_fn(q, k, k)
    attention.dispatch_attention_fn(q, k, k)
    assert len(calls) == 1


MASKS = {
    "none": None,
    "per key": torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool(),
    "bool": torch.rand(2, 1, 9, 5, generator=torch.Generator().manual_seed(1)) < 0.7,
    "per head": torch.rand(1, 4, 9, 5, generator=torch.Generator().manual_seed(1)) < 0.7,
    "added": random(2, 4, 9, 5),
    "2-D": random(9, 5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_diffusers_masks(mask: Tensor | None, calls: Calls) -> None:
    q, k, v = random(2, 9, 4, 16), random(2, 5, 2, 16, seed=4), random(2, 5, 2, 16, seed=5)
    arguments = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True}
    ours = integration.pfa_attention(q, k, v, **arguments)
    assert len(calls) == 1 and ours.shape == q.shape
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.double()
    native = attention._native_attention(q.double(), k.double(), v.double(), **arguments)
    torch.testing.assert_close(ours.double(), native, rtol=2e-3, atol=2e-3)


def test_diffusers_delegates(caplog: pytest.LogCaptureFixture, calls: Calls) -> None:
    q, k = random(1, 9, 4, 16), random(1, 5, 4, 16)
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((q.float(), k.float(), k.float()), {}),
        ((q, k, k), {"dropout_p": 0.5}),
        ((q.clone().requires_grad_(), k, k), {}),
    ]
    for tensors, arguments in cases:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="pfa"):
            integration.pfa_attention(*tensors, **arguments)
        assert len(caplog.records) == 1 and "diffusers: SDPA takes this call" in caplog.text
    assert not calls


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"attn_mask": torch.zeros(9, 6)}, "attn_mask must be broadcastable"),
    "both": ({"attn_mask": torch.zeros(9, 5), "is_causal": True}, "is_causal must be False"),
    "lse": ({"return_lse": True}, "return_lse must be False"),
}


@pytest.mark.parametrize(("arguments", "text"), WRONG.values(), ids=WRONG)
def test_diffusers_errors_name_the_argument(arguments: dict[str, Any], text: str) -> None:
    q, k = random(1, 9, 4, 16), random(1, 5, 4, 16)
    with pytest.raises(ValueError, match=text):
        integration.pfa_attention(q, k, k, **arguments)


@pytest.mark.parametrize("name", ["native", "PFA", "", None])
def test_diffusers_names(name: Any) -> None:
    with pytest.raises(ValueError, match="name must"):
        integration.register(name)
    integration.register()  # again


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_hook(dtype: torch.dtype, causal: bool, activated: None, calls: Calls) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    q = random(2, 9, 4, 16, dtype=dtype).transpose(1, 2)
    k, v = (random(2, 2, 7, 16, dtype=dtype, seed=seed) for seed in (4, 5))
    ours = sdpa(q, k, v, is_causal=causal, enable_gqa=True)
    assert len(calls) == 1
    exact = sdpa(q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    assert ours.stride() == torch.empty_like(q).stride()
    torch.nn.attention.restore_flash_attention_impl()
    assert sdpa(q, k, v, enable_gqa=True).stride() == ours.stride()
    assert len(calls) == 1
    torch.nn.attention.activate_flash_attention_impl("PFA")  # the fixture restores


@pytest.mark.parametrize("mask", [x for x in MASKS.values() if x is None or x.dim() == 4])
def test_torch_hook_masks(mask: Tensor | None, activated: None, calls: Calls) -> None:
    q, k, v = random(2, 4, 9, 16), random(2, 4, 5, 16, seed=4), random(2, 4, 5, 16, seed=5)
    ours = sdpa(q, k, v, attn_mask=mask, scale=0.3)
    assert len(calls) == 1
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    exact = sdpa(q.double(), k.double(), v.double(), attn_mask=wide, scale=0.3)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=2e-3)


def test_torch_hook_delegates(
    activated: None, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    q = random(1, 4, 9, 16)
    with caplog.at_level(logging.DEBUG, logger="pfa"):
        torch.testing.assert_close(sdpa(q.float(), q.float(), q.float()).half(), sdpa(q, q, q))
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "torch: SDPA takes this call: dtype torch.float32" in caplog.text


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_hook_leaves_training_right(compiled: bool, activated: None, calls: Calls) -> None:
    """Compiled code runs the forward pass without gradients: its backward pass repeats it."""

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return sdpa(q, k, k, is_causal=True)

    function = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    grads = []
    for f in (function, attend):
        q, k = (random(2, 4, 9, 16, seed=s).requires_grad_() for s in (3, 4))
        f(q, k).square().sum().backward()
        grads.append((q.grad, k.grad))
        if f is function:
            assert len(calls) == int(compiled)
            torch.nn.attention.restore_flash_attention_impl()
    torch.nn.attention.activate_flash_attention_impl("PFA")
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-2, atol=1e-2)


def test_torch_hook_in_a_model(calls: Calls) -> None:
    """Stable Diffusion's UNet calls scaled_dot_product_attention itself."""
    exact, theirs = output(unet, torch.float32), output(unet, torch.float16)
    torch.nn.attention.activate_flash_attention_impl("PFA")
    try:
        ours = output(unet, torch.float16)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) > 0
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_torch_hook_name() -> None:
    assert "PFA" in torch.nn.attention.list_flash_attention_impls()
    with pytest.raises(ValueError, match="name must be a non-empty str"):
        torch_sdpa.register("")


def test_torch_hook_for_cuda_with_cpu_tensors(calls: Calls) -> None:
    """The nine results that torch's schema wants, in its shapes and dtypes."""
    overrides = torch_sdpa._Overrides()
    try:
        q, k = random(2, 4, 9, 16), random(2, 4, 5, 16, seed=4)
        ours = overrides._forward_cuda(q, k, k, 0.0, True, scale=0.3)
    finally:
        overrides.remove()
    assert len(calls) == 1
    meta = torch.ops.aten._scaled_dot_product_flash_attention(
        q.to("meta"), k.to("meta"), k.to("meta"), 0.0, True, scale=0.3
    )
    for got, wanted in zip(ours, meta, strict=True):
        if isinstance(wanted, Tensor):
            assert (got.shape, got.dtype, got.stride()) == (
                wanted.shape, wanted.dtype, wanted.stride(),
            )  # fmt: skip
        else:
            assert got == wanted
    exact = sdpa(q.double(), k.double(), k.double(), is_causal=True, scale=0.3)
    torch.testing.assert_close(ours[0].double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_torch_hook_on_a_gpu(on_cuda: Any, activated: None, calls: Calls) -> None:
    if on_cuda.name != "cuda":
        pytest.skip("needs a GPU")
    q, k = random(2, 4, 90, 64).cuda(), random(2, 4, 70, 64, seed=4).cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ours = sdpa(q, k, k)
        assert len(calls) == 1
        leaf = q.clone().requires_grad_()
        sdpa(leaf, k, k).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    exact = sdpa(q.double().cpu(), k.double().cpu(), k.double().cpu())
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-3, atol=2e-3)
