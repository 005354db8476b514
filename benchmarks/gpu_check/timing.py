# SPDX-License-Identifier: Apache-2.0
"""Times ours and its peers in turns (A B A B) with CUDA events.

`python -m benchmarks.gpu_check.timing ROWS FIRST` writes a line of JSON per case to ROWS, from
case number FIRST on: a process of its own, so that a broken CUDA context costs one case.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..timing import summarise
from . import peers
from .cases import TARGETS, Case, work
from .timing_stage import append

SECONDS_PER_CASE = 0.4
ROUNDS = (7, 60)
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU so far


class Clock(Protocol):
    def start(self, call: Callable[[], Any]) -> Any: ...

    def seconds(self, started: list[Any]) -> list[float]: ...


class CudaClock:
    """Every call begins with an L2 that holds none of its inputs. The flush also keeps the GPU busy
    while the CPU prepares the launch, so that only the GPU's time counts."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def start(self, call: Callable[[], Any]) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def seconds(self, started: list[Any]) -> list[float]:
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in started]


def interleave(
    calls: dict[str, Callable[[], Any]], clock: Clock, seconds: float = SECONDS_PER_CASE
) -> dict[str, dict[str, float]]:
    """Statistics in seconds per call, of as many rounds as fit the time, by a first one."""
    for call in calls.values():
        call()
    first = clock.seconds([clock.start(call) for call in calls.values()])
    least, most = ROUNDS
    rounds = min(most, max(least, round(seconds / max(sum(first), 1e-9))))
    started: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started[name].append(clock.start(call))
    return {name: summarise(clock.seconds(x)) for name, x in started.items()}


def measure(case: Case, device: str, clock: Clock, with_flex: bool = False) -> dict[str, Any]:
    """A row: times, what is missing and why, ratios to each peer, the targets that apply."""
    row: dict[str, Any] = {"case": str(case), "missing": {}, "differences": {}}
    calls = peers.make(peers.Inputs(case, device), with_flex)
    if with_flex:
        calls = {name: calls[name] for name in (peers.OURS, peers.FLEX)}
    out = calls[peers.OURS]()
    usable = {peers.OURS: calls[peers.OURS]}
    for name, call in calls.items():
        if name == peers.OURS:
            continue
        try:
            relative, close = peers.difference(case, out, call())
        except Exception as error:  # whatever a peer raises, the others are timed
            if is_fatal(error):
                raise
            row["missing"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            continue
        row["differences"][name] = relative
        if close:
            usable[name] = call
        else:
            row["missing"][name] = f"its result differs from ours by {relative:.1e}"
    return row | rate(case, interleave(usable, clock))


def rate(case: Case, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    ours = times[peers.OURS]["median"]
    ratios = {name: x["median"] / ours for name, x in times.items() if name != peers.OURS}
    for summary in times.values():
        summary["tflops"] = case.nominal_flop / summary["median"] * 1e-12
    applying = [t for t in TARGETS if t.applies(case)]
    targets = [
        {
            "target": str(t),
            "ratio": ratios.get(t.peer),
            "met": ratios[t.peer] >= t.ratio if t.peer in ratios else None,
        }
        for t in applying
    ]
    return {"times": times, "ratios": ratios, "targets": targets}


def is_fatal(error: Exception) -> bool:
    """Does the process's CUDA context not survive it?"""
    return "CUDA error" in str(error)


def main(path: str, first: str) -> None:
    clock = CudaClock()
    for case, with_flex in work()[int(first) :]:
        fatal = False
        try:
            row = measure(case, "cuda", clock, with_flex)
        except Exception as error:
            fatal = is_fatal(error)
            row = {"case": str(case), "error": f"{type(error).__name__}: {error}"[:600]}
        append(Path(path), row)
        if fatal:
            sys.exit(3)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
