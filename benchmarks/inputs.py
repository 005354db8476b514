# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case, the same for everyone who computes it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .cases import BLOCKS, MASKED_SHARE, WINDOW, Case

# What the floating-point tensors of an int8 case are, for peers that have no int8.
FLOAT_OF_INT8 = {"cuda": torch.float16, "cpu": torch.bfloat16}
QUANT_STEP = 4.0 / 127  # normal values beyond 4 saturate
DENSE = ("causal-mask", "random", "blocks")


class Inputs:
    """Random values, never zeros: constant data draws less power and times better than it should.

    query (batch, heads, seqlen, head_dim), key and value (batch, heads_k, seqlen_k, head_dim).
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.scale = 1 / math.sqrt(case.head_dim)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            case.dtype.split("-")[0], FLOAT_OF_INT8.get(device, torch.float16)
        )
        rng = torch.Generator(device).manual_seed(3)
        q = (case.batch, case.heads, case.seqlen, case.head_dim)
        kv = (case.batch, case.heads_k, case.seqlen_k, case.head_dim)
        self.qkv = [
            torch.randn(shape, generator=rng, device=device).to(self.dtype) for shape in (q, kv, kv)
        ]
        self.masked = self._masked(rng) if case.pattern in DENSE else None
        self.bias: Tensor | None = None  # (1, heads, seqlen, seqlen_k)
        if case.pattern == "bias":
            shape = (1, case.heads, case.seqlen, case.seqlen_k)
            dtype = torch.float16 if case.dtype.startswith("int8") else self.dtype
            self.bias = torch.empty(shape, dtype=dtype, device=device).normal_(generator=rng)

    def _masked(self, rng: torch.Generator) -> Tensor:
        """(seqlen, seqlen_k), True takes no part."""
        case = self.case
        if case.pattern == "random":
            shape = (case.seqlen, case.seqlen_k)
            return torch.rand(shape, generator=rng, device=self.device) < MASKED_SHARE
        i = torch.arange(case.seqlen, device=self.device)[:, None]
        j = torch.arange(case.seqlen_k, device=self.device)
        if case.pattern == "causal-mask":
            return j > i
        return i * BLOCKS // case.seqlen != j * BLOCKS // case.seqlen_k

    def int8(self) -> list[Tensor]:
        steps = ((x.float() / QUANT_STEP).round() for x in self.qkv)
        return [x.clamp(-128, 127).to(torch.int8) for x in steps]

    @property
    def causal(self) -> bool:
        """Aligned at the top left, without a mask tensor."""
        return self.case.pattern == "causal"

    @functools.cached_property
    def keep(self) -> Tensor | None:
        """Broadcasts to (batch, heads, seqlen, seqlen_k), True takes part; None where a causal
        flag or nothing at all says the same."""
        case, device = self.case, self.qkv[0].device
        if self.masked is not None:
            return ~self.masked
        ones = torch.ones(case.seqlen, case.seqlen_k, dtype=torch.bool, device=device)
        if case.pattern == "band":
            return ones.tril().triu(1 - WINDOW)
        if case.pattern == "causal-end":
            return ones.tril(case.seqlen_k - case.seqlen)
        if case.pattern == "padding":
            lengths = torch.tensor(case.lengths(), device=device)
            return (torch.arange(case.seqlen_k, device=device) < lengths[:, None])[:, None, None]
        return None

    @functools.cached_property
    def added(self) -> Tensor | None:
        """What is added to the scores, as (batch, heads, seqlen, seqlen_k) of the inputs' dtype."""
        shape = (self.case.batch, self.case.heads, self.case.seqlen, self.case.seqlen_k)
        if self.bias is not None:
            return self.bias.to(self.dtype).expand(shape)
        if self.keep is None:
            return None
        zeros = torch.zeros(self.keep.shape, dtype=self.dtype, device=self.keep.device)
        return zeros.masked_fill_(~self.keep, -math.inf).expand(shape)
