# SPDX-License-Identifier: Apache-2.0
"""The quick suites of python -m benchmarks on the GPU, as far as the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import driver, results
from ..plan import OF_DEVICE, PEERS, Plan

# FlashInfer compiles for minutes where its kernels were not built before.
PLAN = Plan(
    "cuda",
    OF_DEVICE["cuda"],
    quick=True,
    peers=tuple(name for name in PEERS["cuda"] if name != "flashinfer"),
    seconds=0.4,
)


def plan() -> list[str]:
    return [f"{item.kind} {item.key}" for item in PLAN.items()]


def check(
    out: Path, seconds: float, plan: Plan = PLAN, module: str = "benchmarks.worker"
) -> dict[str, Any]:
    """Leaves timing.json in `out`, a result like any other; found again by `compare` and `plot`."""
    part = out / "timing.json.part"
    driver.open_rows(part, plan, fresh=True)
    problem = driver.run(plan, part, seconds, module=module)
    result = results.collect(part, problem)
    results.write(result, out / "timing.json")
    failed = [row["case"] for row in result["rows"] if row["status"] != "ok"]
    if failed or not result["rows"] or any(x["item"] != "the run" for x in result["problems"]):
        reasons = [f"{x['item']}: {x['reason']}" for x in result["problems"]]
        reasons += [f"{len(failed)} cases failed, first {failed[0]}"] if failed else []
        return {"status": "failed", "reason": " ".join(reasons)[:600], "result": result}
    return {"status": "ok", "reason": problem, "result": result}
