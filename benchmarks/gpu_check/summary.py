# SPDX-License-Identifier: Apache-2.0
"""The report as JSON and as text that a person reads."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import tables

# What these checks themselves have not been through. A line leaves when a report has shown it.
NOT_RUN_YET = (
    "These checks were written on a machine without a GPU: their control flow and parsing are "
    "tested there, the timing with a clock of its own. CUDA events, compute-sanitizer's exact "
    "messages, the peers' calls on a GPU and FlexAttention had not run when they were written."
)


def write(report: dict[str, Any], out: Path) -> None:
    """Whole files in place of the old ones: an interrupted run leaves the last stage's."""
    for name, content in (
        ("gpu-check.json", json.dumps(report, indent=1) + "\n"),
        ("summary.txt", text(report)),
    ):
        part = out / f"{name}.part"
        part.write_text(content)
        part.rename(out / name)


def text(report: dict[str, Any]) -> str:
    lines = []
    for name, result in report["stages"].items():
        took = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
        lines.append(f"{name}: {result['status']}{took}")
        if result.get("reason"):
            lines.append(f"  {result['reason']}")
        lines += [f"  {line}" for line in details(name, result)]
    return "\n".join([*lines, "", NOT_RUN_YET, ""])


def details(name: str, result: dict[str, Any]) -> list[str]:
    """Whatever a stage left: a summary must not end the stages that are still to come."""
    try:
        return DETAILS.get(name, lambda _: [])(result)
    except Exception as error:
        return [f"cannot be shown: {type(error).__name__}: {error}"]


def environment_lines(result: dict[str, Any]) -> list[str]:
    gpu = result.get("gpu") or {}
    archs = result.get("architectures") or ["?"]
    dirty = " (modified)" if result.get("dirty") else ""
    return [
        f"{gpu.get('name', 'no GPU')}, nvidia-smi: {result.get('nvidia_smi')}",
        f"torch {result.get('torch')}, CUDA {result.get('torch_cuda')}, "
        f"cuDNN {result.get('cudnn')}, Python {result.get('python')}",
        f"sources {result.get('sha')}{dirty}; library {result.get('library')} "
        f"for {', '.join(archs)}, takes {result.get('kernel')}",
    ]


def suite_lines(result: dict[str, Any]) -> list[str]:
    counts = result.get("counts", {})
    lines = [", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))]
    lines += [f"FAILED {x['test']}: {x['message'][:160]}" for x in result.get("failures", [])[:10]]
    lines += [f"skipped {n}: {why[:160]}" for why, n in result.get("skipped", {}).items()]
    for test in result.get("tests", []):
        lines.append(f"{test['outcome']:<8}{test['seconds']:6.1f} s  {test['test']}")
    return lines


def sanitizer_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for tool, counts in result.get("counts", {}).items():
        lines.append(f"{tool}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    wrong = [x for x in result.get("rows", []) if x["result"] not in ("clean", "not run")]
    return lines + [
        f"{x['result'].upper()} {x['tool']} {x['case']} {x['detail'][:300]}" for x in wrong
    ]


def timing_lines(result: dict[str, Any]) -> list[str]:
    if "result" not in result:
        return []
    console = Console(file=io.StringIO(), width=200)
    tables.show(result["result"], console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


DETAILS = {
    "environment": environment_lines,
    "tests": suite_lines,
    "gpu tests": suite_lines,
    "timing": timing_lines,
    "sanitizer": sanitizer_lines,
}
