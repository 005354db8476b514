# SPDX-License-Identifier: Apache-2.0
"""A result as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .plan import PEERS

# Measured on 2 cores: 37 to 51 preemptions a second alone, 170 to 260 beside busy processes.
DISTURBED = 90


def show(result: dict[str, Any], console: Console) -> None:
    about, device = result["environment"], result["plan"]["device"]
    what = about.get("gpu") or f"{about.get('cpu')}, isa {about.get('isa')}"
    console.print(f"{what}, {about.get('threads')} threads, torch {about.get('torch')}")
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite]
        console.print(rate_table(suite, rows, device))
    for name, table in (("launch", launch_table), ("memory", memory_table)):
        if result[name]:
            console.print(table(result[name]))
    console.print("\n".join(notes(result)), markup=False, highlight=False)


def unit(device: str) -> tuple[str, float]:
    return ("TFLOP/s", 1e-3) if device == "cuda" else ("GFLOP/s", 1.0)


def timed_peers(rows: list[dict[str, Any]], device: str) -> list[str]:
    """Those beside pfa with a time in some row, in their usual order."""
    return [p for p in PEERS[device] if any("median" in row["peers"].get(p, {}) for row in rows)]


def rate_table(suite: str, rows: list[dict[str, Any]], device: str) -> Table:
    """A column for each peer: its rate, and how much faster pfa is."""
    label, scale = unit(device)
    peers = timed_peers(rows, device)
    title = f"{suite}: {label} (medians), and how much faster pfa is"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for heading in ("pfa", "limit", *peers):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ours = row["peers"].get("pfa", {})
        if "median" not in ours:
            table.add_row(row["case"], f"[red]{row['status']}[/]")
            continue
        share = f"{100 * ours['of_limit']:.0f}%" if "of_limit" in ours else ""
        disturbed = " ~" if device == "cpu" and row.get("preemptions", 0) > DISTURBED else ""
        cells = [f"{peer_cell(row, p, scale)}" for p in peers]
        rate = f"{scale * ours['gflops']:.0f}"
        table.add_row(row["case"] + disturbed, rate, share, *cells)
    return table


def peer_cell(row: dict[str, Any], peer: str, scale: float) -> str:
    entry = row["peers"].get(peer)
    if entry is None:
        return ""
    if "median" not in entry:
        return {"unsupported": "-", "out of memory": "memory"}.get(
            entry["status"], f"[red]{entry['status']}[/]"
        )
    text = f"{scale * entry['gflops']:.0f} {entry['ratio']:.2f}x"
    met = next((t["met"] for t in row["targets"] if t["target"].endswith(f" x {peer}")), None)
    return text if met is None else f"[{'green' if met else 'red'}]{text}[/]"


def launch_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="host time of a call", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("call")
    for heading in ("us", "empty operator", "pfa", "target"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "us" not in row:
            table.add_row(row["case"], row.get("reason", ""))
            continue
        empty = row.get("empty_us")
        parts = ("", "") if empty is None else (f"{empty:.2f}", f"{row['us'] - empty:.2f}")
        target = f"{row['target_us']:.0f}" if "target_us" in row else ""
        table.add_row(row["case"], f"{row['us']:.2f}", *parts, target)
    return table


def memory_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="peak extra memory", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case")
    table.add_column("MiB", justify="right")
    for row in rows:
        text = f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else row["reason"]
        colour = (
            "green" if row.get("bytes", row.get("goal", 0) + 1) <= row.get("goal", 0) else "red"
        )
        table.add_row(row["case"], f"[{colour}]{text}[/]")
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Who is not in the tables and why, targets, problems."""
    lines = [f"{name} is missing: {why}" for name, why in result["peers"]["missing"].items()]
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, entry in row["peers"].items():
            if "median" not in entry and entry["status"] != "unsupported":
                text = f"{name}, {entry['status']}: {entry.get('reason', '')}"
                reasons.setdefault(text, []).append(row["case"])
        if row["status"] != "ok":
            lines.append(f"{row['case']}, {row['status']}: {row.get('reason', '')}")
    lines += [f"{why} ({len(cases)} cases, first {cases[0]})" for why, cases in reasons.items()]
    lines += [f"{x['item']}: {x['reason']}" for x in result["problems"]]
    lines += target_lines(result)
    disturbed = sum(row.get("preemptions", 0) > DISTURBED for row in result["rows"])
    if disturbed and result["plan"]["device"] == "cpu":
        lines.append(f"~: other processes disturbed {disturbed} of {len(result['rows'])} cases")
    return lines


def target_lines(result: dict[str, Any]) -> list[str]:
    verdicts: dict[str, list[tuple[bool | None, str, float | None]]] = {}
    for row in result["rows"]:
        for x in row["targets"]:
            verdicts.setdefault(x["target"], []).append((x["met"], row["case"], x["ratio"]))
    lines = []
    for target, found in verdicts.items():
        met, unknown = sum(m is True for m, _, _ in found), sum(m is None for m, _, _ in found)
        text = f"target {target}: met in {met} of {len(found)} cases"
        text += f", {unknown} unknown" if unknown else ""
        missed = [f"{case} {ratio:.2f}x" for m, case, ratio in found if m is False]
        lines.append(text + (f"; MISSED: {', '.join(missed[:4])}" if missed else ""))
    return lines
