# SPDX-License-Identifier: Apache-2.0
"""Predictions as tables."""

from __future__ import annotations

from typing import Any

from predictions import Machine
from rich import box
from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], machine: Machine, console: Console) -> None:
    rows = result["predicted_rows"]
    tables = (
        speed_table([r for r in rows if "predicted_ratio_to_no_mask" not in r], machine),
        ratio_table([r for r in rows if "predicted_ratio_to_no_mask" in r]),
        target_table(result["predicted_targets"]),
    )
    for table in tables:
        if table.row_count:
            console.print(table)
    console.print(f"[dim]{result['note']}[/]")


def make_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def speed_table(rows: list[dict[str, Any]], machine: Machine) -> Table:
    """A line per kernel, a column per sequence length."""
    cells: dict[str, dict[int, float]] = {}
    blocks: dict[str, str] = {}
    for row in rows:
        name, seqlen = row["case"].rsplit(" ", 1)
        cells.setdefault(name, {})[int(seqlen)] = row["predicted_tflops"]
        blocks[name] = f"{row['block_m']}x{row['block_n']} x{row['blocks_per_sm']}"
    seqlens = sorted({seqlen for line in cells.values() for seqlen in line})
    table = make_table(
        f"{machine.label}: PREDICTED TFLOP/s (int8: TOP/s), 16k tokens, heads x D = 2048",
        "",
        "tile, blocks per SM",
        *map(str, seqlens),
    )
    for name, line in cells.items():
        table.add_row(name, blocks[name], *(number(line.get(s)) for s in seqlens))
        dtype, head_dim, pattern = name.split()
        peer = machine.peer_tflops.get((dtype, int(head_dim[1:]), pattern), {})
        if peer:
            words = (f"[dim]{number(peer.get(s))}[/]" for s in seqlens)
            table.add_row(f"[dim]  {machine.peer}[/]", "", *words)
    return table


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def ratio_table(rows: list[dict[str, Any]]) -> Table:
    title = "PREDICTED time relative to no mask, which skipping tiles may bring below 1"
    table = make_table(title, "", "kernel", "pre-pass, us", "sum", "tile, blocks per SM")
    for row in rows:
        kernel = row.get("predicted_kernel_ratio_to_no_mask")
        pre_pass = row.get("predicted_pre_pass_us")
        table.add_row(
            row["case"],
            "" if kernel is None else f"{kernel:.3f}",
            "" if pre_pass is None else f"{pre_pass:.1f}",
            f"{row['predicted_ratio_to_no_mask']:.3f}",
            f"{row['block_m']}x{row['block_n']} x{row['blocks_per_sm']}",
        )
    return table


def target_table(judged: list[dict[str, Any]]) -> Table:
    table = make_table("targets", "", "wanted", "predicted", "", "by rounds replayed")
    for line in judged:
        wanted = f"<= {line['at_most']}" if "at_most" in line else f">= {line['at_least']}"
        met = "[green]met[/]" if line["met_by_prediction"] else "[red]MISSED[/]"
        if line["met_by_prediction"] != line["met_with_all_rounds"]:
            met = "[yellow]met, within the noise[/]"
        by_rounds = ", ".join(f"{n}: {x:.4g}" for n, x in line["predicted_by_rounds"].items())
        table.add_row(line["target"], wanted, f"{line['predicted']:.4g}", met, by_rounds)
    return table
