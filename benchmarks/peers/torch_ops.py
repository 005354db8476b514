# SPDX-License-Identifier: Apache-2.0
"""torch's own: each backend of SDPA by itself, plain operators, and FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import WINDOW, Case
from ..inputs import Inputs
from ..machine import free_bytes
from .base import Call, Finder, Peer, Unaffordable, only

SDPA = {
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, ("cuda", "cpu")),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    "sdpa-math": (SDPBackend.MATH, ("cuda", "cpu")),
}
# Of the scores, that plain operators hold at once: themselves, a copy as float32, probabilities.
SCORES_BYTES = {"eager": 10, "sdpa-math": 12}


CPU_FLOP = 1.5e9  # of a call by plain operators, which may run at 1 GFLOP/s there


def check_scores(name: str, case: Case, device: str) -> None:
    """Before it is tried: a process that the system kills takes its whole run along."""
    only(
        device != "cpu" or case.nominal_flop <= CPU_FLOP,
        f"plain operators are measured up to {1e-9 * CPU_FLOP} GFLOP on a CPU",
    )
    needed = SCORES_BYTES[name] * case.batch * case.heads * case.seqlen * case.seqlen_k
    free = free_bytes(device)
    if needed > 0.8 * free:
        raise Unaffordable(f"its scores take {needed / 2**30:.1f} GiB of {free / 2**30:.1f} free")


def make_sdpa(name: str, backend: SDPBackend) -> Callable[[Inputs], Call]:
    def make(inputs: Inputs) -> Call:
        if name in SCORES_BYTES:
            check_scores(name, inputs.case, inputs.device)
        mask = inputs.added if inputs.bias is not None else inputs.keep
        # On a GPU some backends take a mask only as what is added: it is made beforehand.
        if mask is not None and inputs.device == "cuda":
            mask = inputs.added
        gqa = {"enable_gqa": True} if inputs.case.heads != inputs.case.heads_k else {}

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    *inputs.qkv, attn_mask=mask, is_causal=inputs.causal, scale=inputs.scale, **gqa
                )

        return Call(run)

    return make


def make_eager(inputs: Inputs) -> Call:
    """softmax(scale * q @ k.T + mask) @ v with plain operators, the softmax in float32."""
    case = inputs.case
    check_scores("eager", case, inputs.device)
    q, k, v = inputs.qkv
    if case.heads != case.heads_k:
        k, v = (x.repeat_interleave(case.heads // case.heads_k, 1) for x in (k, v))
    masked = None if inputs.keep is None else ~inputs.keep
    if inputs.causal:
        square = torch.ones(case.seqlen, case.seqlen_k, dtype=torch.bool, device=q.device)
        masked = square.triu(1)
    bias = None if inputs.bias is None else inputs.added

    def run() -> Tensor:
        scores = torch.matmul(q * inputs.scale, k.transpose(2, 3))
        if bias is not None:
            scores += bias
        if masked is not None:
            scores.masked_fill_(masked, float("-inf"))
        p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(p, v)

    return Call(run)


def make_flex(inputs: Inputs) -> Call:
    """Compiled at the first call, for seconds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    only(
        case.head_dim == 128 and case.seqlen >= 4096 or inputs.device == "cpu",
        "its compiler takes seconds for each shape: measured at head_dim 128 from 4096 rows on",
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"scale": inputs.scale, "enable_gqa": case.heads != case.heads_k}
    if inputs.bias is not None:
        bias = inputs.bias
        options["score_mod"] = lambda score, b, h, i, j: score + bias[0, h, i, j]
    preparation, keep = None, predicate(inputs)
    if keep is not None:
        shape = (case.batch if case.pattern == "padding" else None, None)

        def build() -> Any:
            mask = create_block_mask(keep, *shape, case.seqlen, case.seqlen_k, device=inputs.device)
            if inputs.device == "cuda":
                torch.cuda.synchronize()
            return mask

        build()
        start = time.perf_counter()
        options["block_mask"] = build()
        preparation = time.perf_counter() - start
    return Call(lambda: compiled(*inputs.qkv, **options), preparation=preparation)


def predicate(inputs: Inputs) -> Callable[..., Tensor] | None:
    """FlexAttention's mask_mod."""
    case, masked = inputs.case, inputs.masked
    shift = case.seqlen_k - case.seqlen
    if masked is not None:
        return lambda b, h, i, j: ~masked[i, j]
    if case.pattern == "padding":
        lengths = torch.tensor(case.lengths(), device=inputs.device)
        return lambda b, h, i, j: j < lengths[b]
    return {
        "causal": lambda b, h, i, j: i >= j,
        "causal-end": lambda b, h, i, j: i + shift >= j,
        "band": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
    }.get(case.pattern)


def finder(name: str, devices: tuple[str, ...], make: Callable[[Inputs], Call]) -> Finder:
    return Finder(name, devices, lambda device: Peer(name, torch.__version__, make))


FINDERS = (
    *(finder(name, devices, make_sdpa(name, x)) for name, (x, devices) in SDPA.items()),
    finder("eager", ("cuda", "cpu"), make_eager),
    finder("flex", ("cuda",), make_flex),
)
