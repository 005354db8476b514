# SPDX-License-Identifier: Apache-2.0
"""Draws what happens in which order: docs/pictures/{int8,pipeline_sm80,pipeline_sm90,
pipeline_wide}.svg.

The numbers in int8 are those of a call: the picture is not drawn unless the operator's result is
the one shown. In the others, orders and overlaps are the code's, lengths are not to scale.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import torch
from drawing import AMBER, BLUE, GREY, INK, RED, ROOT, TEAL, VIOLET, save_all
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(ROOT / "tests"))
import reference

import pfa

# Of one query row, four channels and six keys.
QUERY = [[64, -32, 16, 96]]
KEY = [[60, -20, 8, 90], [-50, 30, 0, -80], [10, 10, 100, 20], [64, -32, 16, 60],
       [90, 0, -40, 70], [0, 0, 0, 0]]  # fmt: skip
VALUE = [[100, -100, 3, 50], [-90, 20, 40, 1], [5, 6, 7, 8], [-20, 60, 120, -5],
         [33, 11, -70, 90], [127, 0, -128, 64]]  # fmt: skip
SCALES = {"deq_scale1": 0.0004, "quant_scale1": 127.0, "deq_scale2": 0.02 / 127}
SCALE_OUT, OFFSET_OUT, SCALE_VALUE, VALID = 60.0, -3.0, 0.5, 5


def int8_steps() -> list[tuple[str, str, torch.Tensor]]:
    """Name, type and values of every step of the call. RuntimeError if they are not pfa's."""
    q, k, v = (torch.tensor([x], dtype=torch.int8) for x in (QUERY, KEY, VALUE))
    options: dict[str, Any] = {name: torch.tensor([x]) for name, x in SCALES.items()}
    options |= {"scale_value": SCALE_VALUE, "actual_seq_lengths_kv": [VALID]}
    options["quant_scale2"] = torch.tensor([SCALE_OUT])
    options["quant_offset2"] = torch.tensor([OFFSET_OUT])
    parts = reference.parts(q, k, v, **options)
    products = (q.double() @ k.double().mT)[0, 0]
    scores = parts.scores()[0, 0, 0]
    p = torch.exp(scores - scores.max())
    p8 = torch.round(p * parts.scale_p)
    sums = p8 @ v.double()[0]
    out = parts.requantise(reference.tiled(parts)[0])[0, 0, 0]
    out8 = torch.round(out).clamp(-128, 127)
    taken = pfa.prompt_flash_attention(q, k, v, **options)[0, 0]
    if not torch.equal(taken, out8.to(torch.int8)):
        raise RuntimeError(f"pfa gives {taken.tolist()}, the picture would show {out8.tolist()}")
    return [
        ("q · kᵀ", "int32, exact", products),
        ("· deq_scale1 · scale_value\n(+ pse_shift), mask", "float32", scores),
        ("exp(s − running maximum)", "float32; its sum l too", p),
        ("· quant_scale1, rounded half to even,\nsaturated", "int8", p8),
        ("p8 · v, added to\no · exp(old − new maximum)", "int32, exact in a tile", sums),
        ("· deq_scale2, / l", "float32", sums * parts.descale_o / p.sum()),
        ("· quant_scale2 + quant_offset2,\nrounded, saturated", "int8 output", out8),
    ]


def cell_text(x: float, kind: str) -> str:
    if x == float("-inf"):
        return "−∞"
    return f"{x:.0f}" if "int" in kind else f"{x:.3f}"


def int8() -> plt.Figure:
    steps = int8_steps()
    figure, axes = plt.subplots(figsize=(9.6, 5.2))
    for number, (name, kind, values) in enumerate(steps):
        y = -number
        colour = BLUE if "int" in kind else TEAL
        axes.text(-0.25, y, name, ha="right", va="center")
        for column, x in enumerate(values.tolist()):
            over = number < 4 and column >= VALID
            axes.add_patch(plt.Rectangle((column, y - 0.32), 0.94, 0.64, alpha=0.22 if over else 1,
                                         color=GREY if over else colour))  # fmt: skip
            axes.text(column + 0.47, y, cell_text(x, kind), ha="center", va="center",
                      color=INK if over else "white")  # fmt: skip
        axes.text(6.25, y, kind, va="center", color=colour, weight="bold")
    axes.text(2.95, 0.62, f"six keys, {VALID} of them valid", ha="center", va="center")
    axes.text(4.15, -4, "four channels", va="center")
    axes.set_xlim(-3.6, 8.8)
    axes.set_ylim(-6.6, 0.9)
    axes.axis("off")
    return figure


LOAD, QK, SOFTMAX, PV, SEND = AMBER, BLUE, TEAL, VIOLET, RED


def timeline(lanes: dict[str, list[tuple[float, float, str, str]]], legend: dict[str, str],
             height: float, notes: str) -> plt.Figure:  # fmt: skip
    """lanes: name -> (start, length, text, colour)."""
    figure, axes = plt.subplots(figsize=(10.4, height))
    for row, (lane, bars) in enumerate(lanes.items()):
        axes.text(-0.15, -row, lane, ha="right", va="center")
        for start, length, text, colour in bars:
            box = FancyBboxPatch((start + 0.03, -row - 0.34), length - 0.06, 0.68, color=colour,
                                 boxstyle="round,pad=0,rounding_size=0.05")  # fmt: skip
            axes.add_patch(box)
            axes.text(start + length / 2, -row, text, ha="center", va="center", color="white",
                      fontsize=8)  # fmt: skip
    end = max(start + length for bars in lanes.values() for start, length, *_ in bars)
    bottom = -len(lanes) + 0.35
    axes.annotate("", (end, bottom), (0, bottom), arrowprops={"arrowstyle": "->", "color": INK})
    axes.text(-0.15, bottom, "time", ha="right", va="center")
    axes.text(0, bottom - 0.12, notes, va="top", fontsize=8)
    axes.set_xlim(-2.4, end + 0.2)
    axes.set_ylim(bottom - 0.95, 0.5)
    axes.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in legend.values()]
    figure.legend(handles, list(legend), loc="upper center", ncols=len(legend), frameon=False,
                  bbox_to_anchor=(0.5, 1.02))  # fmt: skip
    return figure


LEGEND = {"copy into shared memory": LOAD, "S = Q Kᵀ": QK, "softmax": SOFTMAX, "O += P V": PV}


def pipeline_sm80() -> plt.Figure:
    """One K and one V buffer: each is refilled while the other is multiplied."""
    copies, work = [(0.0, 1.0, "K 0", LOAD)], []
    for tile in range(3):
        t = 1.0 + 3.3 * tile
        copies.append((t, 1.3, f"V {tile}", LOAD))
        work += [(t, 1.3, f"S {tile}", QK), (t + 1.3, 0.7, f"P {tile}", SOFTMAX)]
        work.append((t + 2.0, 1.3, f"PV {tile}", PV))
        if tile < 2:
            copies.append((t + 2.0, 1.3, f"K {tile + 1}", LOAD))
    other = [(start + 1.65, length, text, colour) for start, length, text, colour in work]
    lanes = {
        "cp.async": copies,
        "warps of a block\n(16 rows each)": work,
        "another block\non the same SM": [bar for bar in other if bar[0] + bar[1] < 11.5],
    }
    notes = (
        "A tile of V arrives while Q Kᵀ runs, the next tile of K while P V runs;\n"
        "blocks that share an SM fill each other's gaps."
    )
    return timeline(lanes, LEGEND, 2.6, notes)


def pipeline_sm90() -> plt.Figure:
    """The next Q K^T is started before this P V; warpgroups take turns; blocks run together."""
    lanes: dict[str, list] = {"producer warp\n(TMA)": [], "warpgroup 1": [], "warpgroup 2": []}
    order = ["Q", "K 0", "K 1", "V 0", "K 2", "V 1", "Q'", "K' 0", "V 2", "K' 1", "V' 0"]
    lanes["producer warp\n(TMA)"] = [(0.75 * n, 0.75, x, LOAD) for n, x in enumerate(order)]
    for warpgroup, lane in enumerate(["warpgroup 1", "warpgroup 2"]):
        t = 1.6 + 1.2 * warpgroup
        bars = [(t, 0.8, "S 0", QK), (t + 0.8, 1.2, "P 0", SOFTMAX)]
        t += 2.0
        for tile in range(2):
            bars += [(t, 0.6, f"S {tile + 1}", QK), (t + 0.6, 0.6, f"PV {tile}", PV)]
            bars.append((t + 1.2, 1.2, f"P {tile + 1}", SOFTMAX))
            t += 2.4
        bars += [(t, 0.6, "S' 0", QK), (t + 0.6, 0.6, "PV 2", PV)]
        bars += [(t + 1.2, 0.7, "store", SEND), (t + 1.9, 1.2, "P' 0", SOFTMAX)]
        lanes[lane] = bars
    notes = (
        "Tiles 0, 1, 2 of one block of work, ' of the next. Both products of a pair S, PV are\n"
        "under way at once. While one warpgroup computes a softmax, the other multiplies.\n"
        "The next block begins before the sums of this one are stored."
    )
    return timeline(lanes, {**LEGEND, "divide, store": SEND}, 2.7, notes)


def pipeline_wide() -> plt.Figure:
    """head_dim above 256: two blocks of a cluster share 128 rows and each other's P."""
    kinds = {"S": (1.0, QK), "P": (0.9, SOFTMAX), "PV": (0.5, PV)}
    orders = [
        [
            "S0",
            "P0",
            "PV0",
            "S2",
            "PV1",
            "P2",
            "PV2",
            "S4",
            "PV3",
            "P4",
            "PV4",
        ],
        ["S1", "PV0", "P1", "PV1", "S3", "PV2", "P3", "PV3", "PV4"],
    ]
    lanes: list[list] = [[], []]
    known: dict[str, float] = {}  # when a P is there, for both
    clock = [0.0, 0.0]
    while any(orders):
        for block, order in enumerate(orders):
            of_values = bool(order) and order[0].startswith("PV")
            needed = f"P{order[0][2:]}" if of_values else ""
            if int(needed[1:] or block) % 2 == block:  # its own
                needed = ""
            if not order or (needed and needed not in known):
                continue
            operation = order.pop(0)
            length, colour = kinds[operation.rstrip("0123456789")]
            start = max(clock[block], known.get(needed, 0.0))
            clock[block] = start + length
            if colour == SOFTMAX:
                known[operation] = clock[block] + 0.2
            text = f"{operation[:-1]} {operation[-1]}"
            lanes[block].append((start, length, text, colour))
    copies = [
        (there - 0.2, 0.55, f"{p} {'↑' if int(p[1]) % 2 else '↓'}", SEND)
        for p, there in known.items()
    ]
    notes = (
        "Each block loads K of its own tiles and its columns of V: half of what 128 rows need.\n"
        "It multiplies its own P from registers, the other's from shared memory."
    )
    legend = {name: LEGEND[name] for name in list(LEGEND)[1:]}
    names = ("block 0: even tiles,\nleft half of O", "block 1: odd tiles,\nright half of O")
    return timeline(
        {names[0]: lanes[0], "P, row maxima:\nshared to shared": copies, names[1]: lanes[1]},
        {**legend, "P to the other block": SEND},
        2.7,
        notes,
    )


if __name__ == "__main__":
    save_all(
        {
            "int8": int8,
            "pipeline_sm80": pipeline_sm80,
            "pipeline_sm90": pipeline_sm90,
            "pipeline_wide": pipeline_wide,
        }
    )
