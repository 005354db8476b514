# SPDX-License-Identifier: Apache-2.0
"""The calls that are timed on a GPU, or whose time is predicted (tools/predict.py). No torch."""

import dataclasses

TOKENS, WIDTH = 16384, 2048  # batch * sequence, heads * head_dim
LENGTHS = (1024, 2048, 4096, 8192)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Patterns are those of benchmarks/cuda/attention.cu."""

    dtype: str
    head_dim: int
    pattern: str
    seqlen: int
    tokens: int = TOKENS
    width: int = WIDTH

    def __str__(self) -> str:
        return f"{self.dtype} D{self.head_dim} {self.pattern} {self.seqlen}"

    @property
    def batch(self) -> int:
        return self.tokens // self.seqlen

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def nominal_flop(self) -> float:
        """The usual count, not what is executed: two products over all pairs, half if causal."""
        share = 0.5 if self.pattern == "causal" else 1.0
        return share * 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim


def timed_cases() -> list[Case]:
    """Those with targets first: what does not fit the time is left out from the end."""
    bands = ("full", "causal")
    cases = [
        *(Case(t, 128, p, 4096) for t in ("fp16", "bf16", "int8") for p in bands),
        *(Case(t, 128, p, 4096) for t in ("fp16", "bf16") for p in ("random", "bias")),
        *(Case("bf16", d, p, s) for d in (64, 128, 256) for p in bands for s in LENGTHS),
        *(Case("bf16", d, p, s) for d in (64, 128) for p in ("random", "bias") for s in LENGTHS),
        *(Case("int8", d, p, s) for d in (64, 128, 256) for p in bands for s in LENGTHS),
        *(Case("fp16", 128, p, s) for p in bands for s in LENGTHS),
    ]
    return list(dict.fromkeys(cases))


def work() -> list[tuple[Case, bool]]:
    """All of them, then those with FlexAttention: its compiler takes seconds for each."""
    flex = [Case("bf16", 128, p, 4096) for p in ("full", "causal", "random", "bias")]
    return [*((case, False) for case in timed_cases()), *((case, True) for case in flex)]


@dataclasses.dataclass(frozen=True)
class Target:
    """Our speed over a peer's, in every case that matches."""

    dtypes: tuple[str, ...]
    patterns: tuple[str, ...]
    peer: str
    ratio: float

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} {'/'.join(self.patterns)} >= {self.ratio} x {self.peer}"

    def applies(self, case: Case) -> bool:
        of_size = (case.head_dim, case.seqlen) == (128, 4096)
        return of_size and case.dtype in self.dtypes and case.pattern in self.patterns


TARGETS = (
    Target(("fp16", "bf16"), ("full",), "flash", 0.95),
    Target(("int8",), ("full",), "flash", 1.4),  # of float16
    Target(("fp16", "bf16"), ("random", "bias"), "efficient", 1.5),  # with the same mask or bias
)
