# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over small calls of the harness without torch (benchmarks/cuda)."""

import concurrent.futures
import re
import time
from pathlib import Path
from typing import Any

from ..process import Outcome, run
from .environment import find_tool

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CASE_SECONDS = 40.0
AT_ONCE = 4  # processes; each spends most of its time on the CPU
FOUND_ERRORS = 86
# Every kind of kernel: masks, bias, splits, grouped heads, rows that vectors do not divide.
CASES = [
    "--dtype fp16 --head-dim 64 --seqlen 200 --heads 2",
    "--dtype bf16 --head-dim 64 --seqlen 257 --heads 1 --pattern causal",
    "--dtype fp16 --head-dim 128 --seqlen 300 --heads 2 --pattern causal",
    "--dtype bf16 --head-dim 128 --seqlen 200 --heads 1 --pattern random",
    "--dtype fp16 --head-dim 128 --seqlen 130 --heads 4 --kv-heads 2 --pattern bias",
    "--dtype int8 --head-dim 128 --seqlen 300 --heads 1 --pattern causal",
    "--dtype int8 --head-dim 64 --seqlen 200 --heads 1 --pattern blocks",
    "--dtype int8 --head-dim 256 --seqlen 100 --heads 1 --pattern bias",
    "--dtype bf16 --head-dim 256 --seqlen 130 --heads 1",
    "--dtype fp16 --head-dim 192 --seqlen 150 --heads 1 --pattern causal-mask",
    "--dtype bf16 --head-dim 512 --seqlen 70 --heads 1 --pattern causal",
    "--dtype fp16 --head-dim 96 --seqlen 64 --seqlen-k 2000 --heads 1",
    "--dtype bf16 --head-dim 65 --seqlen 90 --heads 1 --pattern bias",
]
REFUSALS = re.compile(
    "Device not supported|insufficient permissions|ERR_NVGPUCTRPERM"
    "|Failed to (?:initialize|launch target)",
    re.IGNORECASE,
)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def command(program: str, tool: str, harness: Path, case: str) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "5"]
    return [program, *options, str(harness), *case.split()]


def plan(harness: Path | None) -> list[str]:
    program, shown = find_tool("compute-sanitizer") or "compute-sanitizer", harness or Path("?")
    return [" ".join(command(program, tool, shown, case)) for tool in TOOLS for case in CASES]


def check(harness: Path | None, log: Path, seconds: float) -> dict[str, Any]:
    program = find_tool("compute-sanitizer")
    if program is None:
        return {"status": "skipped", "reason": "compute-sanitizer was not found"}
    if harness is None or not harness.exists():
        return {"status": "skipped", "reason": "no harness was brought along: make gpu-pack"}
    deadline = time.monotonic() + seconds
    alone = run([str(harness), *CASES[0].split()], min(CASE_SECONDS, seconds))
    if alone.returncode != 0:
        tail = alone.output.strip()[-500:]
        return {"status": "failed", "reason": f"the harness alone fails: {tail}"}
    first_command = command(program, TOOLS[0], harness, CASES[0])
    first = judge(TOOLS[0], CASES[0], run(first_command, min(CASE_SECONDS, seconds)))
    if first["result"] == "refused":
        return {"status": "skipped", "reason": f"compute-sanitizer refuses: {first['detail']}"}
    rows = [first, *run_rest(program, harness, deadline)]
    log.write_text("\n\n".join(f"{x['tool']} {x['case']}\n{x.pop('output')}" for x in rows))
    return conclude(rows)


def run_rest(program: str, harness: Path, deadline: float) -> list[dict[str, Any]]:
    pairs = [(tool, case) for tool in TOOLS for case in CASES][1:]

    def one(pair: tuple[str, str]) -> dict[str, Any]:
        left = deadline - time.monotonic()
        if left < 5:
            detail = {"result": "not run", "detail": "no time left", "seconds": 0.0, "output": ""}
            return {"tool": pair[0], "case": pair[1], **detail}
        done = run(command(program, pair[0], harness, pair[1]), min(CASE_SECONDS, left))
        return judge(*pair, done)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, pairs))


def judge(tool: str, case: str, done: Outcome) -> dict[str, Any]:
    """clean, errors, refused, timed out or failed."""
    summary = SUMMARY.search(done.output)
    refusal = REFUSALS.search(done.output)
    detail = ""
    if done.timed_out:
        result = "timed out"
    elif refusal is not None and done.returncode != 0:  # errors of CUDA may follow from it
        result, detail = "refused", refusal[0]
    elif summary is not None and int(summary[1]) > 0 or done.returncode == FOUND_ERRORS:
        result = "errors"
        lines = [x for x in done.output.splitlines() if x.startswith("========= ")]
        detail = "\n".join([x for x in lines if "COMPUTE-SANITIZER" not in x][:8])
    elif done.returncode == 0 and summary is not None:
        result = "clean"
    else:
        result, detail = "failed", done.output.strip()[-400:]
    row = {"tool": tool, "case": case, "result": result, "detail": detail}
    return row | {"seconds": round(done.seconds, 1), "output": done.output[-20000:]}


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {tool: {} for tool in TOOLS}
    for row in rows:
        of_tool = counts[row["tool"]]
        of_tool[row["result"]] = of_tool.get(row["result"], 0) + 1
    wrong = [x for x in rows if x["result"] in ("errors", "failed")]
    result = {"counts": counts, "rows": rows, "status": "failed" if wrong else "ok"}
    if wrong:
        first = wrong[0]
        reason = f"{first['tool']} {first['case']}: {first['result']} {first['detail'][:300]}"
        result["reason"] = reason
    return result
