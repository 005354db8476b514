# SPDX-License-Identifier: Apache-2.0
"""Does the items of a plan that have no row yet: `python -m benchmarks.worker PLAN ROWS`.

A process of its own: one that is killed, or whose CUDA context breaks, costs one item. PLAN is a
Plan as JSON, ROWS a file of a JSON a line, which it appends to. Exit 3 means: start me again.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import launch, limits, machine, measure, memory, peers
from .plan import Item, Plan
from .rows import append, read
from .timing import Clock, CpuClock, CudaClock

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Worker:
    def __init__(self, plan: Plan, path: Path, clock: Clock, sampler: machine.Sampler | None):
        self.plan, self.path, self.clock, self.sampler = plan, path, clock, sampler
        self.peers, self.missing = peers.find(plan.device, plan.peers)
        rows = read(path)
        self.limits: dict[str, Any] = rows.get("limits", {}).get("limits", {})

    def do(self, item: Item) -> dict[str, Any]:
        plan = self.plan
        if item.kind == "environment":
            found = {peer.name: peer.version for peer in self.peers}
            about = machine.environment(plan.device, plan.threads)
            return {"environment": about, "peers": {"found": found, "missing": self.missing}}
        if item.kind == "limits":
            self.limits = limits.measure(plan.device, self.clock)
            return {"limits": self.limits}
        if item.kind == "launch":
            return {"launch": launch.measure(plan.device)}
        if item.kind == "memory":
            return {"memory": memory.measure(*item.arguments, plan.threads)}
        return {"row": {"suite": item.suite} | self.measure(item)}

    def measure(self, item: Item) -> dict[str, Any]:
        assert item.case is not None
        before, start = machine.preemptions(), time.monotonic()
        row = measure.measure(
            item.case, self.plan.device, self.peers, self.clock, self.limits, self.plan.seconds
        )
        took = time.monotonic() - start
        row["seconds"] = round(took, 2)
        row["preemptions"] = round((machine.preemptions() - before) / took, 1)  # a second
        if self.sampler is not None:
            row["gpu"] = self.sampler.since(start)
        return row

    def run(self) -> None:
        done = read(self.path)
        for item in self.plan.items():
            if item.key in done:
                continue
            append(self.path, {"key": item.key, "began": True})
            try:
                result = self.do(item)
            except Exception as error:
                append(self.path, {"key": item.key} | measure.failure(error))
                if measure.is_fatal(error):
                    sys.exit(3)
                continue
            append(self.path, {"key": item.key, "status": "ok"} | result)
            if self.plan.device == "cuda":
                torch.cuda.empty_cache()


def end_with_parent() -> None:
    """A worker that is left alone would go on writing beside the next one."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(text: str, path: str) -> None:
    end_with_parent()
    plan = Plan.from_json(text)
    if plan.device == "cpu":
        machine.pin(plan.threads)
    torch.set_num_threads(plan.threads)
    with torch.no_grad(), machine.sampling(plan.device) as sampler:
        clock: Clock = CudaClock() if plan.device == "cuda" else CpuClock()
        Worker(plan, Path(path), clock, sampler).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
