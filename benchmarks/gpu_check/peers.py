# SPDX-License-Identifier: Apache-2.0
"""Who is timed on the GPU, each as a callable over the tensors of one case, ours first."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pfa import prompt_flash_attention

from ..peers import QUANT_RANGE, TOLERANCE
from .cases import Case

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
OURS, FLEX = "pfa", "flex"
MASKED_SHARE = 0.1
Call = Callable[[], Tensor]


class Inputs:
    """(batch, heads, seqlen, head_dim) queries, keys and values, and what the pattern adds."""

    def __init__(self, case: Case, device: str) -> None:
        rng = torch.Generator(device).manual_seed(3)
        dtype = DTYPES[case.dtype]
        shape = (case.batch, case.heads, case.seqlen, case.head_dim)
        self.case = case
        self.qkv = [torch.randn(shape, generator=rng, device=device).to(dtype) for _ in range(3)]
        self.scale = 1 / math.sqrt(case.head_dim)
        self.masked: Tensor | None = None  # (seqlen, seqlen), True takes no part
        self.bias: Tensor | None = None  # (1, heads, seqlen, seqlen)
        if case.pattern == "random":
            pairs = torch.rand(case.seqlen, case.seqlen, generator=rng, device=device)
            self.masked = pairs < MASKED_SHARE
        elif case.pattern == "bias":
            shape = (1, case.heads, case.seqlen, case.seqlen)
            self.bias = torch.empty(shape, dtype=dtype, device=device).normal_(generator=rng)

    def added(self) -> Tensor | None:
        """The mask or the bias as SDPA adds it, made beforehand: it is not to be timed."""
        if self.bias is not None:
            return self.bias.expand(self.case.batch, -1, -1, -1)
        if self.masked is None:
            return None
        zeros = torch.zeros(self.masked.shape, dtype=self.qkv[0].dtype, device=self.masked.device)
        added = zeros.masked_fill_(self.masked, -math.inf)
        return added.expand(self.case.batch, self.case.heads, -1, -1)


def make(inputs: Inputs, with_flex: bool) -> dict[str, Call]:
    """Peers by name. Whether they can do the case shows when they are called."""
    calls = {OURS: ours(inputs)}
    if inputs.case.dtype == "int8":
        calls["pfa-fp16"] = ours_of_floats(inputs)
    added = inputs.added()
    calls |= {name: sdpa(inputs, added, backend) for name, backend in SDPA.items()}
    if with_flex:
        calls[FLEX] = flex(inputs)
    return calls


def arguments(inputs: Inputs) -> dict[str, Any]:
    given: dict[str, Any] = {"num_heads": inputs.case.heads, "scale_value": inputs.scale}
    given |= {"input_layout": "BNSD"}
    if inputs.case.pattern == "causal":
        given |= {"sparse_mode": 2}
    if inputs.masked is not None:
        given |= {"sparse_mode": 1, "atten_mask": inputs.masked[None, None]}
    if inputs.bias is not None:
        given |= {"pse_shift": inputs.bias}
    return given


def ours_of_floats(inputs: Inputs) -> Call:
    given = arguments(inputs)
    return lambda: prompt_flash_attention(*inputs.qkv, **given)


def ours(inputs: Inputs) -> Call:
    if inputs.case.dtype != "int8":
        return ours_of_floats(inputs)
    step = QUANT_RANGE / 127
    q, k, v = ((x / step).round().clamp(-128, 127).to(torch.int8) for x in inputs.qkv)
    scale = lambda value: torch.tensor([value])  # noqa: E731  (on the CPU: read at the call)
    given = arguments(inputs) | {
        "deq_scale1": scale(step * step),
        "quant_scale1": scale(127.0),
        "deq_scale2": scale(step / 127),
    }
    return lambda: prompt_flash_attention(q, k, v, **given)


def sdpa(inputs: Inputs, added: Tensor | None, backend: SDPBackend) -> Call:
    causal = inputs.case.pattern == "causal"

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                *inputs.qkv, attn_mask=added, is_causal=causal, scale=inputs.scale
            )

    return run


def flex(inputs: Inputs) -> Call:
    """Compiled at the first call, for seconds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, bias, masked = inputs.case, inputs.bias, inputs.masked
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"scale": inputs.scale}
    keep = None
    if bias is not None:
        options["score_mod"] = lambda score, b, h, i, j: score + bias[0, h, i, j]
    elif masked is not None:
        keep = lambda b, h, i, j: ~masked[i, j]  # noqa: E731
    elif case.pattern == "causal":
        keep = lambda b, h, i, j: i >= j  # noqa: E731
    if keep is not None:
        device = inputs.qkv[0].device
        options["block_mask"] = create_block_mask(
            keep, None, None, case.seqlen, case.seqlen, device=device
        )
    return lambda: compiled(*inputs.qkv, **options)


def difference(case: Case, ours: Tensor, theirs: Tensor) -> tuple[float, bool]:
    """Relative, as a Frobenius norm; and whether it is small enough to compare speeds."""
    a, b = ours.float(), theirs.float()
    relative = float((a - b).norm() / b.norm())
    return relative, relative <= TOLERANCE[case.dtype]
