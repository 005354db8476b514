# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks: checks every peer against pfa, then times them in turns."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import peers, results, suites, timing
from .suites import Case

SECONDS_PER_CASE = 0.8
ROUNDS = (3, 300)
COLUMNS = (
    TextColumn("{task.description:<28}"),
    BarColumn(),
    TextColumn("{task.percentage:3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=("cpu",), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short sequences, head_dim 64 only")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every peer (2)")
    parser.add_argument("--out", type=Path, help="JSON path (benchmarks/results/<cpu>-<sha>.json)")
    arguments = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= available:
        parser.error(f"--threads must be in 1..{available} here, got {arguments.threads}")
    return arguments


def measure_case(case: Case, vllm: peers.Vllm | None) -> dict[str, Any]:
    group = peers.make_peers(case, vllm)
    difference = max(peers.check(case, group[0], peer) for peer in group[1:])
    calls = {peer.name: peer.run for peer in group}
    before, start = timing.preemptions(), time.perf_counter()
    times = timing.interleave(calls, SECONDS_PER_CASE, ROUNDS)
    rate = (timing.preemptions() - before) / (time.perf_counter() - start)
    row = results.make_row(case, times, {peer.name: peer.note for peer in group}, difference)
    return row | {"preemptions": round(rate, 1)}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    console = Console()
    cases = [c for c in suites.cpu_suite(arguments.quick) if arguments.filter in str(c)]
    if not cases:
        sys.exit(f"--filter must be part of a case's name such as {suites.cpu_suite(True)[0]}, "
                 f"got {arguments.filter!r}")  # fmt: skip
    vllm, note = peers.find_vllm()
    console.print(note)
    environment = results.environment(arguments.threads)
    console.print(
        f"{environment['cpu']}, isa {environment['isa']}, {arguments.threads} threads, "
        f"torch {environment['torch']}"
    )
    if (environment["busy"] or 0) > 0.1:
        share = f"{100 * environment['busy']:.0f}%"
        console.print(f"[yellow]other processes take {share} of this machine: expect noise[/]")
    memory_cases = () if arguments.filter or arguments.quick else timing.MEMORY_CASES
    rows, memory = [], []
    with Progress(*COLUMNS, console=console) as progress:
        # A case costs its time budget or its least rounds, whichever is longer.
        costs = [SECONDS_PER_CASE + 2e-11 * case.nominal_flops for case in cases]
        task = progress.add_task("limits", total=sum(costs) + 4.0 * len(memory_cases))
        limits = timing.measure_limits()
        for case, cost in zip(cases, costs, strict=True):
            progress.update(task, description=str(case))
            rows.append(measure_case(case, vllm))
            progress.advance(task, cost)
        for dtype, pattern in memory_cases:
            name = f"memory {dtype} {pattern}"
            progress.update(task, description=name)
            extra = timing.measure_memory(dtype, pattern, arguments.threads)
            memory.append({"case": name, "bytes": extra})
            progress.advance(task, 4.0)
    for table in results.rate_tables(rows, limits):
        console.print(table)
    if disturbed := sum(map(results.is_disturbed, rows)):
        console.print(f"[yellow]~: other processes disturbed {disturbed} of {len(rows)} cases[/]")
    if memory:
        console.print(results.memory_table(memory, timing.MEMORY_LIMIT))
    result = {
        "environment": environment,
        "peers": note,
        "limits": limits,
        "rows": rows,
        "memory": memory,
    }
    console.print(f"written: {results.write(result, arguments.suite, arguments.out)}")


if __name__ == "__main__":
    main()
