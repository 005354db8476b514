# SPDX-License-Identifier: Apache-2.0
"""A run as JSON: what `driver` collected, checked against its own schema when it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import rows
from .plan import Plan

FOLDER = Path(__file__).with_name("results")
SCHEMA = 2
ROW_FIELDS = ("case", "suite", "dtype", "head_dim", "pattern", "seqlen", "status", "peers", "flop")
FIELDS = {
    "schema": int, "sha": str, "dirty": bool, "plan": dict, "environment": dict, "peers": dict,
    "limits": dict, "rows": list, "launch": list, "memory": list, "problems": list,
}  # fmt: skip


class Invalid(Exception):
    """Not a result of this harness; the text names the file and what is wrong."""


def collect(path: Path, problem: str) -> dict[str, Any]:
    """The result of the rows in a driver's file, complete or not."""
    heading = rows.lines(path)[0]
    found = list(rows.read(path).values())
    about = next((x for x in found if "environment" in x), {})
    bad = [{"item": x["key"], "reason": x["reason"]} for x in found if x["status"] != "ok"]
    planned = Plan.from_json(heading["plan"])
    done = {x["key"] for x in found}
    unfinished = [item.key for item in planned.items() if item.key not in done]
    return {
        "schema": SCHEMA,
        "sha": heading["sha"],
        "dirty": heading["dirty"],
        "plan": json.loads(heading["plan"]),
        "environment": about.get("environment", {}),
        "peers": about.get("peers", {"found": {}, "missing": {}}),
        "limits": next((x["limits"] for x in found if "limits" in x), {}),
        "rows": [x["row"] for x in found if "row" in x],
        "launch": next((x["launch"] for x in found if "launch" in x), []),
        "memory": [x["memory"] for x in found if "memory" in x],
        "problems": bad + ([{"item": "the run", "reason": problem}] if problem else []),
        "not_run": unfinished,
    }


def read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Invalid(f"{path} cannot be read as JSON: {error}") from error
    if wrong := problems_of(result):
        raise Invalid(f"{path} is no result of python -m benchmarks: {wrong}")
    return dict(result)


def problems_of(result: Any) -> str:
    """What is not as the schema has it, or ""."""
    if not isinstance(result, dict):
        return "it holds no object"
    for name, kind in FIELDS.items():
        if not isinstance(result.get(name), kind):
            return f"{name} must be {kind.__name__}, got {type(result.get(name)).__name__}"
    if result["schema"] != SCHEMA:
        return f"schema must be {SCHEMA}, got {result['schema']}"
    for row in result["rows"]:
        if lacking := [name for name in ROW_FIELDS if name not in row]:
            return f"the row {row.get('case')} has no {', '.join(lacking)}"
        for name, peer in row["peers"].items():
            timed = {"median", "p20", "p80", "samples", "noise", "gflops"} <= peer.keys()
            if timed != (peer.get("status") == "ok"):
                return f"the row {row['case']} has {name} {peer.get('status')}, timed: {timed}"
            if not timed and not peer.get("reason"):
                return f"the row {row['case']} does not say why {name} is {peer.get('status')}"
    return ""


def write(result: dict[str, Any], path: Path) -> None:
    part = path.with_name(f"{path.name}.writing")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)


def default_path(plan: Plan, name: str, machine: str, about: dict[str, Any]) -> Path:
    """benchmarks/results/<suite>-<machine>-<sha>.json"""
    label = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    quick = "-quick" if plan.quick else ""
    dirty = "-dirty" if about["dirty"] else ""
    return FOLDER / f"{name}{quick}-{label}-{about['sha']}{dirty}.json"
