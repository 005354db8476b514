# SPDX-License-Identifier: Apache-2.0
"""Tells a change from noise: python -m benchmarks compare BEFORE.json AFTER.json

A case has changed when its median moved by more than both runs' own noise (the range of the turns'
medians), more than what peers did that are the same in both runs, and more than 2 %. Exit status 1
when a case became slower.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import results

LEAST = 0.02
SAME = ("device", "cpu", "gpu", "threads")  # what must not differ


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Per case of both, and what the peers say of the machine between the two runs."""
    controls = control_changes(before, after)
    drift = percentile([abs(math.log(x)) for x in controls], 0.8)
    rows = []
    for case, a, b in pairs(before, after, "pfa"):
        ratio = b["median"] / a["median"]
        noise = max(LEAST, drift, math.hypot(a["noise"], b["noise"]))
        moved = math.log(ratio)
        verdict = "same" if abs(moved) <= noise else "slower" if moved > 0 else "faster"
        rows.append({"case": case, "before": a["median"], "after": b["median"], "ratio": ratio,
                     "noise": noise, "verdict": verdict})  # fmt: skip
    return {"rows": rows, "drift": drift, "controls": len(controls)}


def pairs(before: dict[str, Any], after: dict[str, Any], peer: str) -> list[tuple]:
    found = {row["case"]: row["peers"].get(peer, {}) for row in before["rows"]}
    return [
        (row["case"], found[row["case"]], row["peers"][peer])
        for row in after["rows"]
        if "median" in row["peers"].get(peer, {}) and "median" in found.get(row["case"], {})
    ]


def control_changes(before: dict[str, Any], after: dict[str, Any]) -> list[float]:
    """Time ratios of everyone whose version is the same: what changed there is the machine."""
    versions = [x["peers"]["found"] for x in (before, after)]
    same = [n for n, v in versions[0].items() if versions[1].get(n) == v]
    names = [name for name in same if not name.startswith("pfa")]
    found = [(a, b) for n in names for _, a, b in pairs(before, after, n)]
    return [b["median"] / a["median"] for a, b in found if min(a["samples"], b["samples"]) > 1]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(share * (len(ordered) - 1))] if ordered else 0.0


def differing(before: dict[str, Any], after: dict[str, Any]) -> str:
    for name in SAME:
        a, b = (x["environment"].get(name) for x in (before, after))
        if a != b:
            return f"{name} must be the same in both runs, got {a} and {b}"
    return ""


def table(found: dict[str, Any]) -> Table:
    title = "time of pfa, after / before; a change is beyond the noise"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("case", "before ms", "after ms", "ratio", "noise", ""):
        made.add_column(heading, justify="left" if heading in ("case", "") else "right")
    for row in found["rows"]:
        colour = {"slower": "red", "faster": "green"}.get(row["verdict"])
        verdict = f"[{colour}]{row['verdict']}[/]" if colour else ""
        numbers = (f"{1e3 * row[name]:.3f}" for name in ("before", "after"))
        made.add_row(
            row["case"], *numbers, f"{row['ratio']:.3f}", f"{100 * row['noise']:.0f}%", verdict
        )
    return made


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(words)
    try:
        before, after = results.read(options.before), results.read(options.after)
    except results.Invalid as error:
        sys.exit(str(error))
    if reason := differing(before, after):
        sys.exit(reason)
    found = changes(before, after)
    if not found["rows"]:
        sys.exit("the two results have no case in common")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(found))
    counts = {v: sum(x["verdict"] == v for x in found["rows"]) for v in ("slower", "faster")}
    typical = statistics.median(x["ratio"] for x in found["rows"])
    console.print(
        f"{len(found['rows'])} cases: {counts['slower']} slower, {counts['faster']} faster; median "
        f"ratio {typical:.3f}; {found['controls']} timings of unchanged peers moved by at most "
        f"{100 * found['drift']:.1f} % (80th percentile)"
    )
    sys.exit(1 if counts["slower"] else 0)
