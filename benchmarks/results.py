# SPDX-License-Identifier: Apache-2.0
"""A run as JSON and as a table. plot.py reads the same JSON."""

import datetime
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import pfa

from . import suites
from .revision import revision
from .suites import Case

FOLDER = Path(__file__).with_name("results")
# The processor's flags that decide which kernel can run.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def environment(threads: int) -> dict[str, Any]:
    model, flags = _processor()
    return {
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "isa": pfa.cpu_isa(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "busy": _busy(),
        **revision(),
    }


def _busy() -> float | None:
    """Share of the processors' time that others take while this process sleeps for a second."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    samples = []
    for pause in (1.0, 0.0):
        times = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
        samples.append((sum(times), times[3] + times[4]))  # all, idle and waiting for a disk
        time.sleep(pause)
    (total, idle), (total_after, idle_after) = samples
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def _processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return name[1] if name else platform.machine(), set(flags[1].split()) if flags else set()


def make_row(
    case: Case, times: dict[str, dict[str, float]], notes: dict[str, str], difference: float
) -> dict[str, Any]:
    """Seconds and GFLOP/s per peer, and pfa's speed relative to each."""
    ours = times["pfa"]["median"]
    for summary in times.values():
        summary["gflops"] = 1e-9 * case.nominal_flops / summary["median"]
        summary["ratio"] = summary["median"] / ours
    return {
        "case": str(case),
        "dtype": case.dtype,
        "seqlen": case.seqlen,
        "head_dim": case.head_dim,
        "pattern": case.pattern,
        "visible": case.visible_share(),
        "difference": difference,
        "targets": {
            p: suites.TARGETS[case.dtype, p] for p in times if (case.dtype, p) in suites.TARGETS
        },
        "notes": {name: note for name, note in notes.items() if note},
        "times": times,
    }


def share_of_limit(row: dict[str, Any], limits: dict[str, float | None]) -> float | None:
    """pfa's rate over visible pairs, relative to torch's matrix product in the same type.

    float16, whose own product torch runs slowly on many processors, is measured against the
    faster of bfloat16's and float32's.
    """
    names = {"bf16": ("bf16",), "fp16": ("bf16", "fp32")}.get(row["dtype"], ("int8",))
    rates = [rate for name in names if (rate := limits[name]) is not None]
    if not rates:
        return None
    return useful_rate(row, row["times"]["pfa"]["median"]) / max(rates)


def useful_rate(row: dict[str, Any], seconds: float) -> float:
    """GFLOP/s over the pairs that take part."""
    case = Case(row["dtype"], row["seqlen"], row["head_dim"], "full")
    return 1e-9 * case.nominal_flops * row["visible"] / seconds


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether other processes ran on the same processors while the row was timed.

    Measured on 2 cores: 37 to 51 preemptions a second alone, 170 to 260 beside busy processes.
    """
    return bool(row["preemptions"] > 90)


def rate_tables(rows: list[dict[str, Any]], limits: dict[str, float | None]) -> list[Table]:
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    return [_rate_table([r for r in rows if r["dtype"] == dtype], limits) for dtype in dtypes]


def _rate_table(rows: list[dict[str, Any]], limits: dict[str, float | None]) -> Table:
    """The rows of one dtype; limit is the share of torch's matrix product."""
    peers = list(dict.fromkeys(p for row in rows for p in row["times"] if p != "pfa"))
    title = f"{rows[0]['dtype']}: GFLOP/s (medians), and how much faster pfa is"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for heading in ("seen", "pfa", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for peer in peers:
        target = suites.TARGETS.get((rows[0]["dtype"], peer))
        table.add_column(peer, justify="right", no_wrap=True)
        table.add_column(f"≥ {target}x" if target else "", justify="right", no_wrap=True)
    for row in rows:
        share = share_of_limit(row, limits)
        cells = [
            row["case"].removeprefix(row["dtype"] + "-") + (" ~" if is_disturbed(row) else ""),
            f"{100 * row['visible']:.0f}%",
            f"{row['times']['pfa']['gflops']:.0f}",
            "" if share is None else f"{100 * share:.0f}%",
        ]
        for peer in peers:
            cells += _peer_cells(row, peer)
        table.add_row(*cells)
    return table


def _peer_cells(row: dict[str, Any], peer: str) -> list[str]:
    summary = row["times"].get(peer)
    if summary is None:
        return ["", ""]
    ratio, target = summary["ratio"], row["targets"].get(peer)
    text = f"{ratio:.2f}x"
    if target is not None:
        text = f"[green]{text} ✓[/]" if ratio >= target else f"[red]{text} ✗[/]"
    return [f"{summary['gflops']:.0f}", text]


def memory_table(rows: list[dict[str, Any]], limit: int) -> Table:
    title = f"peak extra memory, goal {limit >> 20} MiB"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case")
    table.add_column("MiB", justify="right")
    for row in rows:
        colour = "green" if row["bytes"] <= limit else "red"
        table.add_row(
            row["case"].removeprefix("memory "), f"[{colour}]{row['bytes'] / 2**20:.1f}[/]"
        )
    return table


def write(result: dict[str, Any], suite: str, out: Path | None) -> Path:
    about = result["environment"]
    cpu = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
    dirty = "-dirty" if about["dirty"] else ""
    path = out or FOLDER / f"{suite}-{cpu}-{about['sha']}{dirty}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
