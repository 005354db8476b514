# SPDX-License-Identifier: Apache-2.0
"""Times calls in turns: A A B B A A B B ... Each turn begins with a call that is not counted.

A summary keeps the median, the 20th and 80th percentile, and the noise: the range of the turns'
medians over the median. Turns lie apart in time, so that noise sees what a busy or throttled
machine does to a whole run; `compare` decides by it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils import benchmark

TURNS = 3
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU so far
CALLS = (2, 200)  # of one peer in a turn on a GPU


class Clock(Protocol):
    def turn(self, call: Callable[[], Any], seconds: float) -> list[float]:
        """Seconds per call of about as many calls as fit."""

    def end_to_end(self, call: Callable[[], Any]) -> float | None:
        """Seconds on the host until the result is there; None where a turn says the same."""


class CpuClock:
    def turn(self, call: Callable[[], Any], seconds: float) -> list[float]:
        threads = torch.get_num_threads()
        timer = benchmark.Timer("call()", globals={"call": call}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=seconds).times

    def end_to_end(self, call: Callable[[], Any]) -> float | None:
        return None


class CudaClock:
    """Every call begins with an L2 that holds none of its inputs. The flush also keeps the GPU busy
    while the CPU prepares the launch, so that between two events lies the GPU's time alone: of all
    kernels of the call, its pre-passes too."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def turn(self, call: Callable[[], Any], seconds: float) -> list[float]:
        call()
        once = self._times(call, 1)[0]
        least, most = CALLS
        return self._times(call, min(most, max(least, round(seconds / max(once, 1e-6)))))

    def _times(self, call: Callable[[], Any], calls: int) -> list[float]:
        events = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in events]

    def end_to_end(self, call: Callable[[], Any]) -> float | None:
        self.flushed.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def interleave(
    calls: dict[str, Callable[[], Any]], clock: Clock, seconds: float
) -> dict[str, dict[str, float]]:
    """Summaries in seconds per call, of about `seconds` for all of them together."""
    share = seconds / (TURNS * len(calls))
    turns: dict[str, list[list[float]]] = {name: [] for name in calls}
    whole: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            turns[name].append(clock.turn(call, share))
            taken = clock.end_to_end(call)
            if taken is not None:
                whole[name].append(taken)
    summaries = {name: summarise(x) for name, x in turns.items()}
    for name, values in whole.items():
        if values:
            summaries[name]["end_to_end"] = statistics.median(values)
    return summaries


def summarise(turns: list[list[float]]) -> dict[str, float]:
    ordered = sorted(x for turn in turns for x in turn)
    last = len(ordered) - 1
    median = statistics.median(ordered)
    medians = [statistics.median(turn) for turn in turns]
    return {
        "median": median,
        "p20": ordered[math.floor(0.2 * last)],
        "p80": ordered[math.ceil(0.8 * last)],
        "samples": len(ordered),
        "noise": (max(medians) - min(medians)) / median,
    }


def best(call: Callable[[], Any], clock: Clock, seconds: float = 0.3) -> float:
    """The 20th percentile of one turn; of something slow, its first call."""
    start = time.perf_counter()
    call()
    if (once := time.perf_counter() - start) > seconds:
        return once
    return summarise([clock.turn(call, seconds)])["p20"]


def kernels(call: Callable[[], Any], device: str) -> dict[str, float] | str:
    """Seconds of each kernel (on a CPU: each operator) of one call, or why they are not known."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else None
    activities = [kind] if kind else [torch.profiler.ProfilerActivity.CPU]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
        found = {
            event.key: 1e-6 * (event.self_device_time_total or event.self_cpu_time_total)
            for event in profile.key_averages()
        }
    except RuntimeError as error:  # no CUPTI, or no permission to use it
        return f"not known: {error}"
    return {name: x for name, x in found.items() if x > 0}
