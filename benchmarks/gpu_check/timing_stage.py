# SPDX-License-Identifier: Apache-2.0
"""Runs timing.py in a process of its own, again where a case broke it, and reads its rows."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from .cases import TARGETS, work
from .process import run

RESTARTS = 3


def plan() -> list[str]:
    cases = [f"{case}{' against FlexAttention' * with_flex}" for case, with_flex in work()]
    return cases + [f"target: {target}" for target in TARGETS]


def check(path: Path, seconds: float, module: str = "benchmarks.gpu_check.timing") -> dict:
    deadline = time.monotonic() + seconds
    path.write_text("")
    reason = ""
    for _ in range(1 + RESTARTS):
        begun = len(read_rows(path))
        if begun == len(work()):
            break
        command = [sys.executable, "-m", module, str(path), str(begun)]
        done = run(command, deadline - time.monotonic())
        if done.timed_out:
            reason = "the time was up: the last cases are missing"
            break
        if done.returncode == 0:
            reason = ""
            break
        reason = f"a process ended with {done.returncode}: {done.output.strip()[-300:]}"
        if len(read_rows(path)) == begun:  # it died without a word: that case is not tried again
            append(path, {"case": str(work()[begun][0]), "error": reason})
    return conclude(read_rows(path), reason)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Without lines that were cut short."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(f"\n{json.dumps(row)}\n")  # on a line of its own whatever came before


def conclude(rows: list[dict[str, Any]], reason: str) -> dict[str, Any]:
    targets = [line | {"case": row["case"]} for row in rows for line in row.get("targets", [])]
    errors = [row for row in rows if "error" in row]
    result = {"rows": rows, "targets": targets, "reason": reason, "status": "ok"}
    if errors or not rows:
        result["status"] = "failed"
        result["reason"] = f"{len(errors)} of {len(rows)} cases failed. {reason}".strip()
    return result
