# SPDX-License-Identifier: Apache-2.0
"""Runs a plan in worker processes and keeps what they find, whatever happens to them.

The rows lie in a file until the run is complete; a run that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import rows
from .plan import Plan
from .revision import ROOT, revision

RESTARTS = 5  # in a row without a new item
POLL_SECONDS = 1.0  # seldom: the processors belong to what is measured


class OtherRun(Exception):
    """The file has rows of another plan or revision."""


def open_rows(path: Path, plan: Plan, fresh: bool = False) -> int:
    """Prepares the file and returns how many items it has."""
    heading = {"plan": plan.to_json(), **revision()}
    found = rows.lines(path)
    if found and not fresh:
        if found[0] != heading:
            differing = [name for name in heading if found[0].get(name) != heading[name]]
            raise OtherRun(
                f"{path} has rows of a run with another {' and '.join(differing)}: finish that "
                "one, name another --out, or drop them with --fresh"
            )
        return len(rows.read(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    rows.append(path, heading)
    return 0


def run(
    plan: Plan,
    path: Path,
    seconds: float = float("inf"),
    progress: Callable[[str, float], None] = lambda key, done: None,
    module: str = "benchmarks.worker",
) -> str:
    """Until every item has a row or the time is up; why it ended early, or "". `progress` is told
    the item begun last and the cost of what is done."""
    deadline = time.monotonic() + seconds
    items = plan.items()
    failures = 0
    while failures < RESTARTS:
        before = len(rows.read(path))
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = start(plan, path, module, log)
            try:
                ended = watch(process, lambda: report(plan, path, items, progress), deadline)
            finally:  # also when the user interrupts
                stop(process)
            log.seek(0)
            output = log.read().strip()
        done = rows.read(path)
        if all(item.key in done for item in items):
            return ""
        if not ended:
            return "the time was up: the last items are missing"
        item = rows.begun(path)
        if item is not None:
            reason = f"its process ended with {process.returncode}: {output[-300:]}"
            rows.append(path, {"key": item, "status": "failed", "reason": reason})
        failures = 0 if len(rows.read(path)) > before else failures + 1
        if item is None and process.returncode not in (0, 3):
            failures += 1
        last = f"a process ended with {process.returncode}: {output[-600:]}"
    return last


def start(plan: Plan, path: Path, module: str, log: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", module, plan.to_json(), str(path)]
    settings = {"OMP_NUM_THREADS": str(plan.threads)} if plan.device == "cpu" else {}
    search = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **settings, "PYTHONPATH": search},
        start_new_session=True,
    )


def watch(process: subprocess.Popen, tick: Callable[[], None], deadline: float) -> bool:
    """Whether it ended by itself."""
    while True:
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            tick()
            if time.monotonic() > deadline:
                return False
        else:
            tick()
            return True


def stop(process: subprocess.Popen) -> None:
    """With its children."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def report(plan: Plan, path: Path, items: list, progress: Callable[[str, float], None]) -> None:
    done = rows.read(path)
    cost = sum(plan.cost(item) for item in items if item.key in done)
    progress(rows.begun(path) or "", cost)
