# SPDX-License-Identifier: Apache-2.0
"""What this very machine can do at most: matrix products, copies; and the roofline of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import Case
from .timing import Clock, best

# The products a kernel may be made of. On a CPU 16-bit ones may be slower than float32's.
PRODUCTS = {
    "cuda": {"fp16": ("fp16",), "bf16": ("bf16",), "int8": ("int8",)},
    "cpu": {
        "fp16": ("fp16", "bf16", "fp32"),
        "bf16": ("bf16", "fp32"),
        "int8": ("int8", "bf16", "fp32"),
    },
}
DTYPES = {
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8},
    "cpu": {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "int8": torch.int8,
        "fp32": torch.float32,
    },
}
SLOW_SECONDS = 0.02
SIZES = {"cuda": (8192, 1 << 30), "cpu": (1024, 256 << 20)}  # of a matrix, of a copy


def measure(device: str, clock: Clock) -> dict[str, float | None]:
    """GFLOP/s of torch's products (2 per multiply-add), GB/s of a copy (read and written), and on
    a CPU 1e9 exp/s in cache; None where torch has no such product here."""
    size, copied = SIZES[device]
    limits: dict[str, float | None] = {}
    for name, dtype in DTYPES[device].items():
        try:
            limits[name] = product_rate(dtype, size, device, clock)
        except RuntimeError:
            limits[name] = None
    source = torch.ones(copied, dtype=torch.int8, device=device)
    limits["copy"] = 2e-9 * copied / best(bind(torch.empty_like(source).copy_, source), clock)
    if device == "cpu":
        scores = torch.randn(1 << 18)
        exp = best(lambda: torch.exp(scores, out=torch.empty_like(scores)), clock)
        limits["exp"] = 1e-9 * scores.numel() / exp
    return limits


def product_rate(dtype: torch.dtype, size: int, device: str, clock: Clock) -> float:
    """GFLOP/s of square matrices; small ones will do where torch has a plain loop for them."""
    rate = 0.0
    for side in (size // 4, size):
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        if dtype == torch.int8:
            a, b = (x.mul(40).clamp(-127, 127) for x in (a, b))
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        seconds = best(bind(multiply, a.to(dtype), b.to(dtype)), clock)
        rate = 2e-9 * side**3 / seconds
        if seconds > SLOW_SECONDS:
            break
    return rate


def bind(function: Callable[..., Any], *tensors: torch.Tensor) -> Callable[[], Any]:
    return lambda: function(*tensors)


def roofline(
    case: Case, device: str, limits: dict[str, float | None]
) -> dict[str, float | str] | None:
    """The least seconds for the pairs that take part, and what binds."""
    dtype = "int8" if case.dtype.startswith("int8") else case.dtype.split("-")[0]
    rates = [rate for name in PRODUCTS[device][dtype] if (rate := limits.get(name))]
    copy = limits.get("copy")
    if not rates or not copy:
        return None
    flop = 4.0 * case.batch * case.heads * case.seqlen * case.seqlen_k * case.head_dim
    seconds = {
        "products": 1e-9 * flop * case.visible_share() / max(rates),
        "copy": 1e-9 * case.bytes_moved() / copy,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return {"seconds": seconds[bound], "bound": bound}
