# SPDX-License-Identifier: Apache-2.0
"""What is measured: the cases of each suite, their tensors and the speed they must reach."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

BATCH, HEADS = 1, 8
WINDOW = 512  # keys that a row of the band sees, its own included
BLOCK = 128  # side of the squares of the block-structured mask
PATTERNS = ("full", "causal2", "causal3", "band", "blocks", "random", "bias")
INT8_PATTERNS = ("full", "causal3")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Speed relative to the peer that a row has to reach.
TARGETS = {
    ("bf16", "sdpa"): 1.5,
    ("fp16", "sdpa"): 2.0,
    ("bf16", "vllm"): 1.1,
    ("int8", "pfa-bf16"): 1.3,
    ("int8-int8", "pfa-bf16"): 1.3,
}


@dataclass(frozen=True)
class Case:
    """One cell: (BATCH, HEADS, seqlen, head_dim) queries, keys and values under one pattern."""

    dtype: str  # bf16, fp16, int8 (float16 output) or int8-int8
    seqlen: int
    head_dim: int
    pattern: str

    def __str__(self) -> str:
        return f"{self.dtype}-S{self.seqlen}-D{self.head_dim}-{self.pattern}"

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def nominal_flops(self) -> float:
        """The usual count: two products over all pairs, half of them when causal."""
        pairs = self.seqlen**2 * (0.5 if self.causal else 1.0)
        return 4.0 * BATCH * HEADS * pairs * self.head_dim

    def visible_share(self) -> float:
        """Fraction of the S x S pairs that take part."""
        keep = keep_mask(self.pattern, self.seqlen)
        return 1.0 if keep is None else float(keep.float().mean())


def cpu_suite(quick: bool) -> list[Case]:
    seqlens, head_dims = ((512, 2048), (64,)) if quick else ((512, 2048, 4096), (64, 128))
    return list(_cases(seqlens, head_dims))


def _cases(seqlens: tuple[int, ...], head_dims: tuple[int, ...]) -> Iterator[Case]:
    # The cached masks and biases depend on the pattern and the length only: head_dim runs fastest.
    for seqlen in seqlens:
        for dtype in DTYPES:
            for pattern in PATTERNS:
                for head_dim in head_dims:
                    yield Case(dtype, seqlen, head_dim, pattern)
        for dtype in ("int8", "int8-int8"):
            for pattern in INT8_PATTERNS:
                for head_dim in head_dims:
                    yield Case(dtype, seqlen, head_dim, pattern)


@functools.lru_cache(maxsize=2)
def keep_mask(pattern: str, seqlen: int) -> torch.Tensor | None:
    """(S, S), True = takes part, as torch SDPA wants it; None where nothing is masked."""
    generator = torch.Generator().manual_seed(1)
    ones = torch.ones(seqlen, seqlen, dtype=torch.bool)
    if pattern in ("causal2", "causal3"):
        return ones.tril()
    if pattern == "band":
        return ones.tril().triu(1 - WINDOW)
    if pattern == "random":
        return (torch.rand(seqlen, seqlen, generator=generator) < 0.5) | torch.eye(seqlen).bool()
    if pattern == "blocks":
        side = seqlen // BLOCK
        squares = (torch.rand(side, side, generator=generator) < 0.5) | torch.eye(side).bool()
        return squares.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return None


@functools.lru_cache(maxsize=1)
def make_bias(seqlen: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, HEADS, seqlen, seqlen, generator=generator, dtype=dtype)


def make_qkv(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, HEADS, case.seqlen, case.head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def pattern_arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's arguments that express the case's pattern."""
    if case.pattern in ("causal2", "causal3"):
        return {"sparse_mode": int(case.pattern[-1])}
    if case.pattern == "band":
        return {"sparse_mode": 4, "pre_tokens": WINDOW - 1, "next_tokens": 0}
    if case.pattern in ("blocks", "random"):
        keep = keep_mask(case.pattern, case.seqlen)
        assert keep is not None
        return {"sparse_mode": 1, "atten_mask": (~keep)[None, None]}
    if case.pattern == "bias":
        return {"pse_shift": make_bias(case.seqlen, dtype)}
    return {}


def common_arguments(case: Case) -> dict[str, Any]:
    scale = 1 / math.sqrt(case.head_dim)
    return {"num_heads": HEADS, "scale_value": scale, "input_layout": "BNSD"}
