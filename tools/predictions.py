# SPDX-License-Identifier: Apache-2.0
"""What predict.py predicts: the machines, their cases, targets, and figures to compare with.

A machine is added by an entry in MACHINES; a case, a target or a figure by a row in it. Everything
here is a prediction of the simulator's timing model, the peers' figures too (its README has them);
nothing was measured on a GPU. Kernels that take their work from a global counter cannot be sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.cases import Case

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
# Patterns of the harness whose packed mask comes from a kernel before the attention. Sampling would
# leave that mask incomplete: these run whole, on a slice of the machine. There they are compared
# with a pattern that can be sampled and whose blocks are about as unequal: the fewer blocks a
# multiprocessor has, the more equal ones wait for the last round.
DENSE = {"random": "full", "causal-mask": "causal", "blocks": "full"}
RATIO_SEQLEN = 2048
# Blocks of an SM that are replayed one after the other. The last ones have the SM to themselves and
# look too quick: fp16 D128 full 8192, three at a time, 232 TFLOP/s with 2 rounds, 228 with 4, 222
# with 8 (and 222 from the difference of 4 and 8). The model's own default, 8 blocks, is 4 rounds of
# the two that FlashAttention has on an SM: its published predictions are to be compared with these.
# What the choice is worth shows beside each target.
ROUNDS = 4
SLICE = 18  # 1 / 18 of the SMs, of the memory bandwidth and of the blocks


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    bound: float  # least, or most if `at_most`, that the value may be
    cases: tuple[Case, ...]
    value: Callable[..., float]  # of the rows of those cases
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclasses.dataclass(frozen=True)
class Machine:
    label: str
    cc: int
    sms: int
    hbm_tbs: float
    cases: tuple[Case, ...]
    targets: tuple[Target, ...]
    rounds: int = ROUNDS
    counts_first_reads: bool = False  # as the peer's figures do
    peer: str = ""  # whose predicted TFLOP/s stand beside ours, by (dtype, head_dim, pattern)
    peer_tflops: dict[tuple[str, int, str], dict[int, float]] = dataclasses.field(
        default_factory=dict
    )


def speeds(
    dtype: str, seqlens: tuple[int, ...], head_dims: tuple[int, ...] = HEAD_DIMS
) -> list[Case]:
    return [
        Case(dtype, head_dim, pattern, seqlen)
        for head_dim in head_dims
        for pattern in ("full", "causal")
        for seqlen in seqlens
    ]


def ratios(dtype: str, head_dim: int) -> list[Case]:
    return [Case(dtype, head_dim, pattern, RATIO_SEQLEN) for pattern in (*DENSE, "bias")]


def by_seqlen(*tflops: float) -> dict[int, float]:
    return dict(zip(SEQLENS, tflops, strict=True))


def speed(case: Case, least: float) -> Target:
    return Target(f"{case}: TFLOP/s", least, (case,), lambda row: row["predicted_tflops"])


def speedup(case: Case, base: Case, least: float) -> Target:
    return Target(
        f"{case}: speed / {base.dtype}",
        least,
        (case, base),
        lambda row, other: row["predicted_tflops"] / other["predicted_tflops"],
    )


def slowdown(case: Case, most: float) -> Target:
    return Target(
        f"{case}: time / no mask",
        most,
        (case,),
        lambda row: row["predicted_ratio_to_no_mask"],
        at_most=True,
    )


def slowdown_to(case: Case, base: Case, most: float) -> Target:
    return Target(
        f"{case}: time / {base.pattern}",
        most,
        (case, base),
        lambda row, other: row["predicted_us"] / other["predicted_us"],
        at_most=True,
    )


# FlashAttention-3's, by (dtype, head_dim, pattern); beside int8 stands its e4m3.
FA3_TFLOPS = {
    ("fp16", 64, "full"): by_seqlen(342, 396, 456, 470, 499, 502),
    ("fp16", 64, "causal"): by_seqlen(199, 273, 382, 423, 471, 487),
    ("fp16", 128, "full"): by_seqlen(490, 567, 598, 614, 635, 639),
    ("fp16", 128, "causal"): by_seqlen(331, 461, 553, 604, 632, 647),
    ("fp16", 256, "full"): by_seqlen(499, 612, 661, 687, 707, 717),
    ("fp16", 256, "causal"): by_seqlen(324, 475, 583, 659, 700, 726),
    ("int8", 64, "full"): {16384: 574},
    ("int8", 128, "full"): {1024: 745, 2048: 816, 4096: 900, 8192: 948, 16384: 961},
    ("int8", 256, "full"): {16384: 1231},
}
CUDNN_BIAS_TFLOPS = 431  # published, with a bias of T5's shape


def against_fa3(case: Case) -> Target:
    lead = 1.05 if case.head_dim == 64 and case.dtype == "fp16" else 1.0
    peer = FA3_TFLOPS[case.dtype, case.head_dim, case.pattern][case.seqlen]
    return speed(case, round(lead * peer, 1))


def of_width_128(pattern: str) -> Case:
    return Case("fp16", 128, pattern, RATIO_SEQLEN)


MACHINES = {
    "sm80": Machine(
        label="A100",
        cc=80,
        sms=108,
        hbm_tbs=2.0,
        cases=(
            *speeds("fp16", SEQLENS),
            *speeds("bf16", (1024, 8192)),  # as fp16 but for the conversions of P and of the output
            *speeds("int8", (1024, 4096, 8192, 16384)),
            *ratios("fp16", 128),
        ),
        targets=(
            speed(Case("fp16", 128, "full", 8192), 225),
            speedup(Case("int8", 128, "full", 8192), Case("fp16", 128, "full", 8192), 1.5),
            *(slowdown(case, 1.15) for case in ratios("fp16", 128)),
        ),
        peer="FlashAttention's sm_80 kernel",
        peer_tflops={("fp16", 128, "full"): {1024: 220, 4096: 227, 8192: 228}},
    ),
    # Without code for compute_90a (SIM_ARCHS) this shows the sm_80 kernels.
    "sm90": Machine(
        label="H100",
        cc=90,
        sms=132,
        hbm_tbs=3.35,
        cases=(
            *speeds("fp16", SEQLENS, (64, 96, 128, 192, 256)),
            *speeds("int8", SEQLENS[1:], (*HEAD_DIMS, 512)),
            *ratios("fp16", 128),
        ),
        targets=(
            *map(against_fa3, speeds("fp16", SEQLENS)),
            *(against_fa3(Case("int8", 128, "full", seqlen)) for seqlen in SEQLENS[1:]),
            *(against_fa3(Case("int8", head_dim, "full", 16384)) for head_dim in (64, 256)),
            speed(Case("int8", 128, "full", 16384), 1000),
            slowdown_to(of_width_128("causal-mask"), of_width_128("causal"), round(1 / 0.95, 3)),
            slowdown(of_width_128("random"), round(1 / 0.9, 3)),
            speed(of_width_128("bias"), round(1.1 * CUDNN_BIAS_TFLOPS, 1)),
        ),
        rounds=2,  # a block of threads that stays is replayed whole: one shows what all are like
        counts_first_reads=True,
        peer="FlashAttention-3",
        peer_tflops=FA3_TFLOPS,
    ),
}
