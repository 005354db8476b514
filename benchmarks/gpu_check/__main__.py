# SPDX-License-Identifier: Apache-2.0
"""Runs every check that needs a GPU, each stage within its time, and keeps what each one found."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..revision import ROOT
from . import environment, sanitizer, suites, summary, timing_stage

TOTAL_SECONDS = 480.0
LEAST_SECONDS = 5.0  # a stage with less than that left is not begun


@dataclass
class Context:
    out: Path
    pack: Path | None  # the folder that make gpu-pack left

    @property
    def harness(self) -> Path | None:
        path = self.pack and self.pack / "attention"
        return path if path and path.exists() else None


@dataclass
class Stage:
    name: str
    seconds: float  # its share; what earlier stages did not use comes on top
    plan: Callable[[Context], list[str]]
    run: Callable[[Context, float], dict[str, Any]]
    needs_gpu: bool = True


def suite(kind: str, seconds: float) -> Stage:
    return Stage(
        "tests" if kind == "matrix" else "gpu tests",
        seconds,
        lambda c: [" ".join(suites.command(kind, c.out))],
        lambda c, s: suites.check(kind, c.out, s),
    )


STAGES = [
    Stage(
        "environment",
        30,
        lambda c: environment.plan(),
        lambda c, s: environment.collect(c.pack, s),
        needs_gpu=False,
    ),
    suite("matrix", 180),
    suite("gpu", 80),
    Stage(
        "timing",
        100,
        lambda c: timing_stage.plan(),
        lambda c, s: timing_stage.check(c.out, s),
    ),
    Stage(
        "sanitizer",
        90,
        lambda c: sanitizer.plan(c.harness),
        lambda c, s: sanitizer.check(c.harness, c.out / "sanitizer.log", s),
    ),
]


def run_stage(stage: Stage, context: Context, seconds: float) -> dict[str, Any]:
    if seconds < LEAST_SECONDS:
        return {"status": "not run", "reason": "no time left"}
    started = time.monotonic()
    try:
        result = stage.run(context, seconds)
    except Exception:
        result = {"status": "failed", "reason": traceback.format_exc()[-1500:]}
    return result | {
        "seconds": round(time.monotonic() - started, 1),
        "seconds_allowed": round(seconds, 1),
    }


def run_all(
    stages: list[Stage], context: Context, total: float, console: Console
) -> dict[str, Any]:
    """Writes the report again after every stage."""
    report: dict[str, Any] = {"stages": {}}
    deadline = time.monotonic() + total
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(stages))
        for i, stage in enumerate(stages):
            progress.update(task, description=stage.name)
            reserved = sum(later.seconds for later in stages[i + 1 :])
            left = deadline - time.monotonic()
            gpu = report["stages"].get("environment", {}).get("available", True)
            if stage.needs_gpu and not gpu:
                result = {"status": "not run", "reason": "torch sees no GPU"}
            else:
                result = run_stage(stage, context, max(left - reserved, min(left, stage.seconds)))
            report["stages"][stage.name] = result
            summary.write(report, context.out)
            progress.advance(task)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--pack", type=Path, default=ROOT / "build" / "gpu-pack")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    options = parser.parse_args()
    names = [stage.name for stage in STAGES]
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - set(names):
        parser.error(f"--only must name stages of {', '.join(names)}, got {', '.join(unknown)}")
    return options


def use_pack(pack: Path) -> Path | None:
    """The packed library, unless another one is named. It has the CUDA kernels."""
    if not pack.is_dir():
        return None
    library = pack / "_C.abi3.so"
    if library.exists() and not os.environ.get("PFA_LIBRARY"):
        os.environ["PFA_LIBRARY"] = str(library)
    return pack


def main() -> None:
    options = parse_arguments()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    context = Context(options.out.resolve(), use_pack(options.pack.resolve()))
    stages = [s for s in STAGES if not options.only or s.name in options.only]
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name} ({stage.seconds:.0f} s)")
            print("".join(f"  {line}\n" for line in stage.plan(context)), end="")
        return
    context.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    report = run_all(stages, context, options.seconds, console)
    console.print(summary.text(report), markup=False, highlight=False)
    console.print(f"written: {context.out}")
    statuses = {result["status"] for result in report["stages"].values()}
    sys.exit(0 if statuses <= {"ok", "skipped"} else 1)


if __name__ == "__main__":
    main()
