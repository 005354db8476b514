# SPDX-License-Identifier: Apache-2.0
"""Draws who sees whom: docs/pictures/{modes,tokens,tiles}.svg.

Every cell is an answer of tests/reference.py, the predicate that the kernels are tested against.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import torch
from drawing import AMBER, BLUE, GREY, INK, PALE, RED, ROOT, save_all
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

sys.path.insert(0, str(ROOT / "tests"))
import reference

FAR = reference.FAR
OUTSIDE, MASKED, VISIBLE = range(3)
CELLS = ListedColormap([PALE, GREY, BLUE])


def grid(sq: int, sk: int, q: int, kv: int, **rule: Any) -> torch.Tensor:
    """(Sq, Sk): what a pair is; q and kv are the valid lengths."""
    i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    rule = {"pre": FAR, "nxt": FAR, "masked": None} | rule
    visible = reference.allowed(i, j, q=q, kv=kv, **rule).expand(sq, sk)
    cells = torch.full((sq, sk), MASKED)
    cells[(i >= q) | (j >= kv)] = OUTSIDE
    cells[visible] = VISIBLE
    return cells


def draw_grid(axes: plt.Axes, cells: torch.Tensor) -> None:
    rows, keys = cells.shape
    axes.pcolormesh(cells.flip(0), cmap=CELLS, vmin=0, vmax=2, edgecolors="white", linewidth=1.2)
    for row in range(rows):
        if not (cells[row] == VISIBLE).any():
            axes.text(keys + 0.3, rows - row - 0.5, "0", color=RED, va="center", weight="bold")
    axes.set_xlim(0, 9.2)
    axes.set_ylim(rows - 8, rows)
    axes.set_aspect("equal")
    axes.axis("off")


def legend(figure: plt.Figure, y: float) -> None:
    handles = [
        Patch(color=BLUE, label="takes part"),
        Patch(color=GREY, label="masked"),
        Patch(facecolor=PALE, edgecolor=GREY, label="beyond a valid length"),
        Patch(color="white", label="0   a row that sees nothing: zeros"),
    ]
    drawn = figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False,
                          bbox_to_anchor=(0.5, y))  # fmt: skip
    drawn.get_texts()[3].set_color(RED)


def figure_of(rows: list[str], columns: list[str]) -> tuple[plt.Figure, Any]:
    size = (2.1 + 1.75 * len(columns), 1.62 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9, color=INK, pad=6)
    for row, title in zip(axes, rows, strict=True):
        row[0].annotate(title, (-0.12, 0.5), xycoords="axes fraction", ha="right", va="center")
    return figure, axes


def block_mask(sq: int, sk: int) -> torch.Tensor:
    """A mask tensor of two blocks, nonzero = masked out."""
    i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    return (i // 4 != j // 4).to(torch.int64)


def modes() -> plt.Figure:
    lengths = {
        "Sq = Skv = 8": (8, 8, 8, 8),
        "Sq = 5, Skv = 8": (5, 8, 5, 8),
        "Sq = 8, Skv = 5": (8, 5, 8, 5),
        "8 × 8,\nvalid: q = 5, kv = 7": (8, 8, 5, 7),
        "8 × 8,\nvalid: q = 7, kv = 4": (8, 8, 7, 4),
    }
    rules: dict[str, dict[str, Any]] = {
        "0, no mask": {"mode": 0},
        "0, with a mask,\npre_tokens = 3,\nnext_tokens = 1": {"mode": 0, "pre": 3, "nxt": 1},
        "1, mask alone": {"mode": 1},
        "2, causal,\ntop left": {"mode": 2},
        "3, causal,\nbottom right": {"mode": 3},
        "4, band,\npre_tokens = 2,\nnext_tokens = 1": {"mode": 4, "pre": 2, "nxt": 1},
    }
    figure, axes = figure_of(list(rules), list(lengths))
    for row, (name, rule) in zip(axes, rules.items(), strict=True):
        for axis, (sq, sk, q, kv) in zip(row, lengths.values(), strict=True):
            masked = block_mask(sq, sk) if "mask" in name and name != "0, no mask" else None
            draw_grid(axis, grid(sq, sk, q, kv, masked=masked, **rule))
    legend(figure, 0.955)
    return figure


def tokens() -> plt.Figure:
    """Mode 0 with a mask of zeros and mode 4, by tokens."""
    pairs = [(FAR, FAR), (FAR, 0), (2, 1), (0, 0), (4, -2), (-1, 3)]
    text = {FAR: "∞"}
    columns = [f"pre = {text.get(a, a)}, next = {text.get(b, b)}" for a, b in pairs]
    rows = {
        "mode 0 with a mask\nof zeros, 6 × 8": (0, torch.zeros(6, 8, dtype=torch.int64)),
        "mode 4, 6 × 8": (4, None),
    }
    figure, axes = figure_of(list(rows), columns)
    for row, (mode, masked) in zip(axes, rows.values(), strict=True):
        for axis, (pre, nxt) in zip(row, pairs, strict=True):
            draw_grid(axis, grid(6, 8, 6, 8, mode=mode, pre=pre, nxt=nxt, masked=masked))
    legend(figure, 1.1)
    return figure


def tiles() -> plt.Figure:
    """What a kernel does with each tile of 128 rows by 128 keys, for 1024 of both."""
    size, tile = 1024, 128
    scattered = torch.ones(size, size, dtype=torch.int64)
    for block in range(0, size, 256):  # documents of 256 tokens in one sequence
        scattered[block : block + 256, block : block + 256] = 0
    cases: dict[str, dict[str, Any]] = {
        "no mask": {"mode": 0},
        "causal (2, 3)": {"mode": 3},
        "band (4), pre_tokens = 256,\nnext_tokens = 0": {"mode": 4, "pre": 256, "nxt": 0},
        "mask tensor (1):\nfour documents": {"mode": 1, "masked": scattered},
    }
    figure, axes = plt.subplots(1, len(cases), figsize=(10.5, 3.1))
    colours = ListedColormap([PALE, AMBER, BLUE])
    for axis, (title, rule) in zip(axes, cases.items(), strict=True):
        seen = grid(size, size, size, size, **rule) == VISIBLE
        parts = seen.unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).double().mean((1, 3))
        kinds = (parts > 0).int() + (parts == 1).int()
        axis.pcolormesh(kinds.flip(0), cmap=colours, vmin=0, vmax=2, edgecolors="white")
        axis.set_aspect("equal")
        axis.axis("off")
        share = (kinds > 0).double().mean().item()
        axis.set_title(f"{title}\n{share:.0%} of the tiles are computed", fontsize=9)
    handles = [
        Patch(color=BLUE, label="every pair takes part: no test per score"),
        Patch(color=AMBER, label="some do: scores are compared with limits or mask bits"),
        Patch(facecolor=PALE, edgecolor=GREY, label="none does: neither loaded nor computed"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.subplots_adjust(bottom=0.12, wspace=0.1)
    return figure


if __name__ == "__main__":
    save_all({"modes": modes, "tokens": tokens, "tiles": tiles})
