# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, measured ceilings, and the peak memory of one call in its own process.

``python -m benchmarks.timing DTYPE PATTERN THREADS`` prints the extra memory of that call in bytes.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import peers
from .suites import Case

MEMORY_SEQLEN, MEMORY_HEAD_DIM = 16384, 128
MEMORY_CASES = (
    ("bf16", "full"),
    ("bf16", "causal3"),
    ("bf16", "band"),
    ("fp16", "band"),
    ("int8", "band"),
    ("int8", "full"),
)
MEMORY_LIMIT = 64 << 20


def interleave(
    calls: dict[str, Callable[[], Any]], seconds: float, rounds: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Times A B A B ... for about ``seconds``; statistics in seconds per call."""
    least, most = rounds
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: summarise(values) for name, values in times.items()}


def preemptions() -> int:
    """How often this process was pushed off a processor so far: the trace of a busy machine."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def summarise(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "rounds": len(ordered),
    }


def measure_limits() -> dict[str, float | None]:
    """Rates of torch's own products (GFLOP/s, 2 per multiply-add) and of exp (1e9 / s)."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    a8, b8 = (torch.randint(-127, 127, (size, size), dtype=torch.int8) for _ in range(2))
    scores = torch.randn(1 << 20)
    products = {
        "bf16": (torch.mm, a.bfloat16(), b.bfloat16()),
        "fp32": (torch.mm, a, b),
        "int8": (torch._int_mm, a8, b8),
    }
    limits: dict[str, float | None] = {}
    for name, (product, x, y) in products.items():
        try:
            limits[name] = 2e-9 * size**3 / _best(lambda p=product, x=x, y=y: p(x, y))
        except RuntimeError:  # not every torch has every product on the CPU
            limits[name] = None
    limits["exp"] = 1e-9 * scores.numel() / _best(lambda: torch.exp(scores, out=scores))
    return limits


def _best(call: Callable[[], Any]) -> float:
    call()
    return interleave({"": call}, 0.5, (3, 50))[""]["p20"]


def measure_memory(dtype: str, pattern: str, threads: int) -> int:
    """Peak bytes beyond inputs and output of one long call, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.timing", dtype, pattern, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the memory measurement of {dtype} {pattern} failed:\n{done.stderr}")
    return int(done.stdout)


def _print_memory(dtype: str, pattern: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    # The same call on 256 rows sets up libraries and thread stacks.
    peers.make_pfa(Case(dtype, 256, MEMORY_HEAD_DIM, pattern)).run()
    peer = peers.make_pfa(Case(dtype, MEMORY_SEQLEN, MEMORY_HEAD_DIM, pattern))
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = _status("VmRSS")
    out = peer.run()
    extra = _status("VmHWM") - before - out.numel() * out.element_size()
    sys.stdout.write(f"{extra}\n")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    _print_memory(*sys.argv[1:])
