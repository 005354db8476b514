# SPDX-License-Identifier: Apache-2.0
"""The calls that are measured or predicted, by suite. No torch: tools/predict.py reads this too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

TOKENS, WIDTH = 16384, 2048  # batch * sequence, heads * head_dim, where a case says nothing else
WINDOW = 512  # keys that a row of the band sees, its own included
BLOCKS = 8  # squares along the diagonal
MASKED_SHARE = 0.1  # of the pairs of a random mask
# causal aligns at the top left, causal-end at the bottom right; causal-mask, random and blocks are
# dense bool masks; padding is valid lengths from a third of the sequence up.
PATTERNS = (
    "full", "causal", "causal-end", "band", "causal-mask", "random", "blocks", "bias", "padding",
)  # fmt: skip
DTYPES = ("fp16", "bf16", "int8", "int8-int8", "fp16-int8")  # int8: float16 output; a-b: b output


@dataclasses.dataclass(frozen=True)
class Case:
    """One call on tensors of (batch, heads, seqlen, head_dim)."""

    dtype: str
    head_dim: int
    pattern: str
    seqlen: int  # of the query
    batch: int = 0
    heads: int = 0
    seqlen_k: int = 0
    heads_k: int = 0
    label: str = ""  # whose call it is

    def __post_init__(self) -> None:
        defaults = {
            "batch": max(1, TOKENS // self.seqlen),
            "heads": max(1, WIDTH // self.head_dim),
            "seqlen_k": self.seqlen,
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "heads_k", self.heads_k or self.heads)

    def __str__(self) -> str:
        keys = f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen else ""
        text = f"{self.dtype} D{self.head_dim} {self.pattern} {self.seqlen}{keys}"
        groups = f"/{self.heads_k}" if self.heads_k != self.heads else ""
        usual = Case(self.dtype, self.head_dim, self.pattern, self.seqlen)
        if groups or (self.batch, self.heads) != (usual.batch, usual.heads):
            text += f" B{self.batch} N{self.heads}{groups}"
        return f"{self.label}: {text}" if self.label else text

    @property
    def nominal_flop(self) -> float:
        """The usual count, not what is executed: two products over all pairs, half if causal."""
        share = 0.5 if self.pattern == "causal" else 1.0
        pairs = self.batch * self.heads * self.seqlen * self.seqlen_k
        return share * 4.0 * pairs * self.head_dim

    def lengths(self) -> list[int]:
        """Valid keys of each batch element."""
        if self.pattern != "padding":
            return [self.seqlen_k] * self.batch
        least = -(-self.seqlen_k // 3)
        steps = max(1, self.batch - 1)
        return [least + (self.seqlen_k - least) * b // steps for b in range(self.batch)]

    def visible_share(self) -> float:
        """Fraction of the query-key pairs that take part; of a random mask, the expected one."""
        rows, keys = self.seqlen, self.seqlen_k
        if self.pattern in ("causal", "causal-mask"):
            return sum(min(i + 1, keys) for i in range(rows)) / (rows * keys)
        if self.pattern == "causal-end":
            return sum(max(0, i + 1 + keys - rows) for i in range(rows)) / (rows * keys)
        if self.pattern == "band":
            return sum(min(i + 1, WINDOW) for i in range(rows)) / (rows * keys)
        if self.pattern == "blocks":
            widths = [sum(i * BLOCKS // n == b for i in range(n)) for n in (rows, keys)
                      for b in range(BLOCKS)]  # fmt: skip
            return sum(math.prod(x) for x in zip(widths[:BLOCKS], widths[BLOCKS:], strict=True)) / (
                rows * keys
            )
        if self.pattern == "random":
            return 1 - MASKED_SHARE
        return sum(self.lengths()) / (self.batch * keys)

    def bytes_moved(self) -> float:
        """Every tensor once: what has to come from memory and to go there."""
        item, out = {"int8": (1, 2), "int8-int8": (1, 1), "fp16-int8": (2, 1)}.get(
            self.dtype, (2, 2)
        )
        q = self.batch * self.heads * self.seqlen * self.head_dim
        kv = 2 * self.batch * self.heads_k * self.seqlen_k * self.head_dim
        pairs = self.seqlen * self.seqlen_k
        extra = {"bias": 2 * self.heads * pairs}.get(self.pattern, 0)
        if self.pattern in ("causal-mask", "random", "blocks"):
            extra = pairs
        return item * (q + kv) + out * q + extra


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the cases of a device are."""

    lengths: tuple[int, ...]
    length: int  # where something else varies
    head_dims: tuple[int, ...]
    odd_head_dims: tuple[int, ...]
    batch: int = 0
    heads: int = 0
    longest: int = 0  # of bfloat16 prefill alone

    def case(self, dtype: str, head_dim: int, pattern: str, seqlen: int) -> Case:
        return Case(dtype, head_dim, pattern, seqlen, self.batch, self.heads)

    def cases(self, dtypes: str, patterns: str, head_dims: tuple[int, ...] = ()) -> Iterator[Case]:
        # Masks depend on the pattern and the length alone: head_dim runs fastest.
        for seqlen in self.lengths:
            for dtype in dtypes.split():
                for pattern in patterns.split():
                    for head_dim in head_dims or self.head_dims:
                        yield self.case(dtype, head_dim, pattern, seqlen)


ODD_HEAD_DIMS = (32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512)
SCALES = {  # (device, quick)
    ("cuda", False): Scale(
        (512, 1024, 2048, 4096, 8192, 16384), 4096, (64, 128, 256), ODD_HEAD_DIMS
    ),
    ("cuda", True): Scale((1024, 4096), 4096, (64, 128), (40, 80, 96, 192, 256, 512)),
    ("cpu", False): Scale((512, 2048), 512, (64, 128), ODD_HEAD_DIMS, 1, 8, longest=4096),
    ("cpu", True): Scale((256, 512), 256, (64,), (40, 80, 256), 1, 4),
}


def serving_shapes(device: str) -> list[Case]:
    """Calls that real models make; smaller where a CPU would take them for seconds."""
    rows = [
        # label, dtype, head_dim, pattern, then (batch, heads, heads_k, seqlen, seqlen_k) on a GPU
        # and on a CPU
        ("SAM window, rel-pos", "fp16", 64, "bias", (25, 12, 12, 196, 196), (25, 12, 12, 196, 196)),
        ("SAM global, rel-pos", "fp16", 64, "bias", (1, 12, 12, 4096, 4096), (1, 3, 3, 1024, 1024)),
        ("SD cross-attention", "fp16", 40, "full", (2, 8, 8, 4096, 77), (2, 8, 8, 4096, 77)),
        ("SD self-attention", "fp16", 40, "full", (2, 8, 8, 4096, 4096), (1, 8, 8, 1024, 1024)),
        ("Qwen-VL vision", "bf16", 80, "blocks", (1, 16, 16, 8192, 8192), (1, 16, 16, 1024, 1024)),
        ("Llama prefill", "bf16", 128, "causal", (1, 32, 8, 8192, 8192), (1, 32, 8, 512, 512)),
        ("Llama chunk", "bf16", 128, "causal-end", (1, 32, 8, 512, 8192), (1, 32, 8, 128, 1024)),
        ("Qwen prefill", "bf16", 128, "causal", (4, 28, 4, 2048, 2048), (1, 28, 4, 512, 512)),
        ("BERT padding", "fp16", 64, "padding", (64, 12, 12, 512, 512), (16, 12, 12, 128, 128)),
        ("DiT", "bf16", 72, "full", (8, 16, 16, 1024, 1024), (1, 16, 16, 1024, 1024)),
    ]
    cases = []
    for label, dtype, head_dim, pattern, *shapes in rows:
        batch, heads, heads_k, rows_q, rows_k = shapes[device == "cpu"]
        cases.append(Case(dtype, head_dim, pattern, rows_q, batch, heads, rows_k, heads_k, label))
    return cases


def prefill(scale: Scale, device: str) -> list[Case]:
    cases = list(scale.cases("bf16", "full causal"))
    if scale.longest:
        cases += dataclasses.replace(scale, lengths=(scale.longest,)).cases("bf16", "full causal")
    return cases + list(scale.cases("fp16", "full causal", () if device == "cpu" else (128,)))


def masks(scale: Scale, device: str) -> list[Case]:
    dims = (64,) if device == "cpu" else ()
    cases = list(scale.cases("bf16", "causal-mask random blocks band", dims))
    return cases + [scale.case("fp16", 128, "random", scale.length)]


def bias(scale: Scale, device: str) -> list[Case]:
    dims = (64,) if device == "cpu" else ()
    return [*scale.cases("bf16", "bias", dims), scale.case("fp16", 128, "bias", scale.length)]


def int8(scale: Scale, device: str) -> list[Case]:
    cases = list(scale.cases("int8", "full causal"))
    return cases + [scale.case(t, 128, "full", scale.length) for t in ("int8-int8", "fp16-int8")]


def head_dims(scale: Scale, device: str) -> list[Case]:
    return [scale.case("bf16", d, "full", scale.length) for d in scale.odd_head_dims]


SUITES: dict[str, Callable[[Scale, str], list[Case]]] = {
    "prefill": prefill,
    "masks": masks,
    "bias": bias,
    "int8": int8,
    "head-dims": head_dims,
    "serving-shapes": lambda scale, device: serving_shapes(device),
}


def suite(name: str, device: str, quick: bool) -> list[Case]:
    return SUITES[name](SCALES[device, quick], device)


@dataclasses.dataclass(frozen=True)
class Target:
    """Our speed over a peer's, in every case that matches."""

    dtypes: tuple[str, ...]
    patterns: tuple[str, ...]
    peer: str
    ratio: float
    device: str
    shape: tuple[int, int] | None = None  # head_dim and seqlen, or all of them

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} {'/'.join(self.patterns)} >= {self.ratio} x {self.peer}"

    def applies(self, case: Case, device: str) -> bool:
        of_size = self.shape in (None, (case.head_dim, case.seqlen)) and not case.label
        of_kind = case.dtype in self.dtypes and case.pattern in self.patterns
        return of_size and of_kind and device == self.device


_ALL = ("full", "causal", "causal-mask", "band", "random", "blocks", "bias")
TARGETS = (
    Target(("fp16", "bf16"), ("full",), "sdpa-flash", 0.95, "cuda", (128, 4096)),
    Target(("int8",), ("full",), "sdpa-flash", 1.4, "cuda", (128, 4096)),  # of float16
    # with the same mask or bias
    Target(("fp16", "bf16"), ("random", "bias"), "sdpa-efficient", 1.5, "cuda", (128, 4096)),
    Target(("bf16",), _ALL, "sdpa-flash", 1.5, "cpu"),
    Target(("fp16",), _ALL, "sdpa-flash", 2.0, "cpu"),
    Target(("bf16",), ("full", "causal"), "vllm-cpu", 1.1, "cpu"),
    Target(("int8", "int8-int8"), ("full", "causal"), "pfa-bf16", 1.3, "cpu"),
)
