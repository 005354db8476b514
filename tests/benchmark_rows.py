# SPDX-License-Identifier: Apache-2.0
"""Rows and results for the tests of benchmarks/, measured with a clock of their own."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from benchmarks import measure, peers, results, tables
from benchmarks.cases import Case
from benchmarks.peers.base import Peer

SMALL = {"seqlen": 32, "batch": 2, "heads": 4, "heads_k": 2}
LIMITS = {"bf16": 100.0, "fp16": 50.0, "fp32": 80.0, "int8": None, "copy": 10.0}


class FakeClock:
    """Each call takes a second longer than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def turn(self, call, seconds):
        call()
        self.now += 1.0
        return [self.now, self.now + 0.25]

    def end_to_end(self, call):
        return 9.0


def case(dtype: str = "fp16", pattern: str = "full", **changed: Any) -> Case:
    return Case(dtype, 16, pattern, **(SMALL | changed))


def measured(of: Case, *others: Peer) -> dict[str, Any]:
    ours = next(x for x in peers.ours.FINDERS if x.name == "pfa").find("cpu")
    return measure.measure(of, "cpu", [ours, *others], FakeClock(), LIMITS, 0.01)


def peer(make: Any, name: str = "other") -> Peer:
    return Peer(name, "1", make)


def make_result(found: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "schema": results.SCHEMA, "sha": "s", "dirty": False,
        "plan": {"device": "cpu"}, "environment": {"device": "cpu", "cpu": "C", "threads": 1,
        "isa": "i", "torch": "t", "date": "2026-01-01T", "busy": 0.5},
        "peers": {"found": {"pfa": "1", "sdpa-flash": "2"}, "missing": {}},
        "limits": {"bf16": 1.0}, "launch": [], "memory": [], "problems": [], "not_run": [],
        "rows": [row | {"suite": "prefill"} for row in found],
    }  # fmt: skip
    return made | changed


def shown(changed: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    tables.show(make_result([], **changed), console)
    return console.file.getvalue()


def timed_row(of: Case, **medians: float) -> dict[str, Any]:
    names = {"pfa": "pfa", "flash": "sdpa-flash"}
    entries = {
        names[name]: {"status": "ok", "median": x, "p20": x, "p80": x, "samples": 3, "noise": 0.01}
        for name, x in medians.items()
    }
    row = measure.describe(of) | {"suite": "prefill", "peers": entries}
    return row | measure.rate(of, "cpu", entries, LIMITS)
