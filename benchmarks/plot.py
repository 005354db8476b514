# SPDX-License-Identifier: Apache-2.0
"""Draws results: python -m benchmarks plot RESULT.json [--before BEFORE.json] [--kind bars,limit]

bars: every peer, by suite, at the longest sequences. lines: over the sequence length. limit: pfa as
a share of what the machine can do at most. before-after (with --before): what changed. Each becomes
RESULT-<kind>.png beside the JSON, or in the folder --out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import compare, results
from .tables import unit

COLOURS = {
    "pfa": "#1f6f8b", "pfa-bf16": "#9bb8c4", "pfa-fp16": "#9bb8c4", "sdpa-flash": "#c98b3b",
    "sdpa-efficient": "#dcb06f", "sdpa-cudnn": "#76b041", "sdpa-math": "#d8c3a5",
    "eager": "#b0b0b0", "flex": "#b5654a", "vllm-cpu": "#8a9a5b", "onnxruntime": "#7a6c9d",
    "openvino": "#4f7cac",
    "fa3": "#8a3b4e", "fa3-fp8": "#c08497", "flashinfer": "#5b8e7d", "sage": "#c2a83e",
}  # fmt: skip
VERDICTS = {"slower": "#b5482f", "faster": "#4c8c4a", "same": "0.65"}
Row = dict[str, Any]


def timed(row: Row) -> dict[str, Row]:
    return {name: x for name, x in row["peers"].items() if "median" in x}


def by_panel(rows: list[Row], *keys: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "median" in row["peers"].get("pfa", {}):
            found.setdefault(", ".join(str(row[key]) for key in keys), []).append(row)
    return found


def new_figure(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    lines = max(1, math.ceil(panels / columns))
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:panels])


def short(row: Row) -> str:
    return row["label"] or row["case"].partition(" B")[0]


def bars(result: Row) -> Figure:
    """A panel per suite; of the cases that differ in length alone the longest."""
    label, scale = unit(result["plan"]["device"])
    panels = by_panel(result["rows"], "suite")
    for suite, rows in panels.items():
        longest: dict[tuple, Row] = {}
        for row in rows:
            key = (row["dtype"], row["head_dim"], row["pattern"], row["label"])
            if key not in longest or row["seqlen"] > longest[key]["seqlen"]:
                longest[key] = row
        panels[suite] = list(longest.values())
    figure, grid = new_figure(len(panels), 1, 11, 2.7)
    for axes, (suite, rows) in zip(grid, panels.items(), strict=True):
        for place, row in enumerate(rows):
            entries = timed(row)
            width = 0.84 / len(entries)
            for i, (name, entry) in enumerate(entries.items()):
                rate, low, high = (1e-9 * row["flop"] / entry[q] for q in ("median", "p80", "p20"))
                axes.bar(
                    place - 0.42 + width * (i + 0.5), scale * rate, 0.92 * width,
                    color=COLOURS.get(name), label=name,
                    yerr=[[scale * max(rate - low, 0)], [scale * max(high - rate, 0)]],
                    error_kw={"elinewidth": 0.7, "ecolor": "0.35"},
                )  # fmt: skip
        axes.set_xticks(range(len(rows)), map(short, rows), rotation=25, ha="right")
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylabel(label)
        axes.set_title(suite, loc="left", weight="bold")
    return figure


def lines(result: Row) -> Figure:
    label, scale = unit(result["plan"]["device"])
    of_several = [row for row in result["rows"] if not row["label"] and row["suite"] != "head-dims"]
    panels = by_panel(of_several, "dtype", "head_dim", "pattern")
    panels = {name: rows for name, rows in panels.items() if len({r["seqlen"] for r in rows}) > 1}
    figure, grid = new_figure(len(panels), 4, 3.2, 2.4)
    for axes, rows in zip(grid, panels.values(), strict=True):
        rows = sorted(rows, key=lambda x: x["seqlen"])
        for peer in dict.fromkeys(p for row in rows for p in timed(row)):
            points = [(r["seqlen"], timed(r)[peer]["gflops"]) for r in rows if peer in timed(r)]
            axes.plot(
                [x for x, _ in points], [scale * y for _, y in points], "o-", ms=3, lw=1.4,
                color=COLOURS.get(peer), label=peer,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths := sorted({r["seqlen"] for r in rows}), map(str, lengths))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        first = rows[0]
        title = f"{first['dtype']} D{first['head_dim']} {first['pattern']}"
        axes.set_title(title, loc="left", weight="bold")
        axes.set_ylabel(label)
    return figure


def limit(result: Row) -> Figure:
    rows = [r for r in result["rows"] if "of_limit" in r["peers"].get("pfa", {})]
    figure, (axes,) = new_figure(1, 1, 8, 0.8 + 0.17 * len(rows))
    bounds = {"products": "#1f6f8b", "copy": "#c98b3b"}
    for place, row in enumerate(rows):
        bound = row["limit"]["bound"]
        axes.barh(place, 100 * row["peers"]["pfa"]["of_limit"], color=bounds[bound], label=bound)
    axes.axvline(100, color="0.4", lw=0.8)
    axes.set_yticks(range(len(rows)), (r["case"] for r in rows), size=6)
    axes.set_ylim(len(axes.get_yticks()) - 0.4, -0.6)
    axes.set_xlabel(
        "pfa, % of the least time that this machine's measured products or copies allow"
    )
    return figure


def before_after(before: Row, after: Row) -> Figure:
    found = compare.changes(before, after)["rows"]
    figure, (axes,) = new_figure(1, 1, 8, 0.8 + 0.17 * len(found))
    for place, row in enumerate(found):
        axes.barh(
            place, 100 * (1 / row["ratio"] - 1), color=VERDICTS[row["verdict"]],
            xerr=100 * row["noise"], error_kw={"elinewidth": 0.7, "ecolor": "0.35"},
            label=row["verdict"],
        )  # fmt: skip
    axes.axvline(0, color="0.4", lw=0.8)
    axes.set_yticks(range(len(found)), (r["case"] for r in found), size=6)
    axes.set_ylim(len(axes.get_yticks()) - 0.4, -0.6)
    axes.set_xlabel(f"speed against {before['sha']}, % (line: noise)")
    return figure


KINDS: dict[str, Callable[[Row], Figure]] = {"bars": bars, "lines": lines, "limit": limit}


def finish(figure: Figure, result: Row, out: Path) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=7, frameon=False
    )
    about = result["environment"]
    name = about.get("gpu") or f"{about['cpu']}, isa {about['isa']}, {about['threads']} threads"
    figure.supxlabel(
        f"{name}, torch {about['torch']}, {result['sha']}{' (modified)' * result['dirty']}",
        size=8,
        color="0.4",
    )
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier result of the same machine")
    parser.add_argument("--kind", help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--out", type=Path, help="folder (beside the JSON)")
    options = parser.parse_args(words)
    kinds = options.kind.split(",") if options.kind else list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kind must be of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    matplotlib.use("Agg")
    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    try:
        result = results.read(options.result)
        figures = {kind: KINDS[kind](result) for kind in kinds}
        if options.before:
            figures["before-after"] = before_after(results.read(options.before), result)
    except results.Invalid as error:
        sys.exit(str(error))
    for kind, figure in figures.items():
        out = (options.out or options.result.parent) / f"{options.result.stem}-{kind}.png"
        try:
            finish(figure, result, out)
        except OSError as error:
            sys.exit(f"--out must be a folder that can be written to, got {out.parent}: {error}")
        print(out)
