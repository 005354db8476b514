# SPDX-License-Identifier: Apache-2.0
"""Checks every peer against pfa, then times them in turns.

    python -m benchmarks --suite prefill,masks --device cpu --quick
    python -m benchmarks compare BEFORE.json AFTER.json
    python -m benchmarks plot RESULT.json
    python -m benchmarks report

A run that is interrupted goes on from there when the same command is given again.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import compare, driver, machine, plan, report, results, tables
from .plan import Plan
from .revision import revision

COLUMNS = (
    TextColumn("{task.description:<44}"),
    BarColumn(bar_width=20),
    TextColumn("{task.percentage:3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)
BUSY = 0.1


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", help=f"of {', '.join(plan.SUITES)}; several with commas (the device's own)")
    add("--device", choices=("cpu", "cuda"), help="(cuda where nvidia-smi finds a GPU)")
    add("--quick", action="store_true", help="few and small shapes")
    add("--filter", default="", metavar="TEXT", help="only cases whose name contains it")
    add("--peers", default="", metavar="NAMES", help="only these beside pfa, or none (all)")
    add("--threads", type=int, default=2, help="CPU threads of everyone (2)")
    add("--seconds", type=float, default=0.6, help="of timing a case, at least its turns (0.6)")
    add("--limit", type=float, default=float("inf"), help="seconds of the whole run")
    add("--out", type=Path, help="JSON path (benchmarks/results/<suite>-<machine>-<sha>.json)")
    add("--fresh", action="store_true", help="drop the rows of an interrupted run")
    options = parser.parse_args(words)
    gpu = isinstance(machine.nvidia_smi(), dict)
    options.device = options.device or ("cuda" if gpu else "cpu")
    if options.device == "cuda" and not gpu:
        parser.error(f"--device cuda needs a GPU: {machine.nvidia_smi()}")
    available = len(os.sched_getaffinity(0))
    if not 1 <= options.threads <= available:
        parser.error(f"--threads must be in 1..{available} here, got {options.threads}")
    if options.seconds <= 0 or options.limit <= 0:
        parser.error(f"--seconds and --limit must be positive, got {options.seconds:g} and "
                     f"{options.limit:g}")  # fmt: skip
    options.suite = options.suite or {"cpu": "cpu", "cuda": "gpu"}[options.device]
    try:
        options.suites = plan.resolve(options.suite.split(","), options.device)
        options.peers = check_peers(options.peers, options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_peers(text: str, device: str) -> tuple[str, ...]:
    known = plan.PEERS[device]
    chosen = tuple(name for name in text.split(",") if name)
    if unknown := set(chosen) - {*known, "none"}:
        raise ValueError(
            f"--peers must name peers of {', '.join(known)}, got {', '.join(sorted(unknown))}"
        )
    return chosen


def make_plan(options: argparse.Namespace) -> Plan:
    made = Plan(
        options.device, options.suites, options.quick, options.filter, options.peers,
        options.threads, options.seconds,
    )  # fmt: skip
    if options.filter and not any(item.case for item in made.items()):
        example = next(x.case for x in Plan(options.device, ("prefill",)).items() if x.case)
        sys.exit(f"--filter must be part of a case's name such as {str(example)!r}, "
                 f"got {options.filter!r}")  # fmt: skip
    return made


def name_of_machine(device: str) -> str:
    found = machine.nvidia_smi()
    return found["name"] if device == "cuda" and isinstance(found, dict) else machine.processor()[0]


def main() -> None:
    words = sys.argv[1:]
    commands = {"compare": compare.main, "report": report.main}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    if words and words[0] == "plot":
        from . import plot  # needs matplotlib, which a GPU machine may lack

        return plot.main(words[1:])
    options = parse_arguments(words)
    measured = make_plan(options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    label = options.suite.replace(",", "+")
    out = options.out or results.default_path(
        measured, label, name_of_machine(options.device), revision()
    )
    part = out.with_name(f"{out.name}.part")
    try:
        kept = driver.open_rows(part, measured, options.fresh)
    except (driver.OtherRun, OSError) as error:
        sys.exit(str(error))
    if kept:
        console.print(f"going on after {kept} of {len(measured.items())} items of {part}")
    try:
        result = run(measured, part, options.limit, console)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {part} has what was done, the same command goes on from there")
    results.write(result, out)
    tables.show(result, console)
    console.print(f"written: {out}")
    if result["not_run"]:
        sys.exit(f"{len(result['not_run'])} items are missing; the same command goes on with them")
    part.unlink()


def run(measured: Plan, part: Path, limit: float, console: Console) -> dict:
    busy = machine.busy()
    if measured.device == "cpu" and (busy or 0) > BUSY:
        console.print(f"[yellow]other processes take {100 * busy:.0f}% of this machine: noise[/]")
    items = measured.items()
    with Progress(*COLUMNS, console=console, refresh_per_second=1) as bar:
        task = bar.add_task("starting", total=sum(map(measured.cost, items)))
        problem = driver.run(
            measured,
            part,
            limit,
            lambda key, done: bar.update(task, description=key or "starting", completed=done),
        )
    return results.collect(part, problem)


if __name__ == "__main__":
    main()
