# SPDX-License-Identifier: Apache-2.0
"""What the scripts that draw docs/pictures share: colours, and files that come out the same each
time, so that --check can tell whether those that are there are what would be drawn now."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
INK, GREY, PALE = "#263238", "#cfd8dc", "#f5f7f8"
BLUE, TEAL, AMBER, RED, VIOLET = "#1e66b4", "#26a69a", "#f5a623", "#d9483b", "#7e57c2"

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "pfa", "font.size": 9, "text.color": INK})


IDENTIFIER = re.compile(r'(?<=#)[\w-]+|(?<=id=")[\w-]+')
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def is_same(one: str, other: str) -> bool:
    """Are two drawings alike, but for the last digits of numbers, which processors differ in, and
    for identifiers, which are made from those?"""
    texts = [IDENTIFIER.sub("", text) for text in (one, other)]
    if NUMBER.sub("", texts[0]) != NUMBER.sub("", texts[1]):
        return False
    pairs = zip(*(map(float, NUMBER.findall(text)) for text in texts), strict=True)
    return all(abs(a - b) < 0.01 for a, b in pairs)


def save_all(pictures: dict[str, Callable[[], plt.Figure]]) -> None:
    """Draw pictures by name, or with --check on the command line compare them with the files."""
    stale = []
    for name, draw in pictures.items():
        path = FOLDER / f"{name}.svg"
        new = path.with_suffix(".new.svg")
        figure = draw()
        figure.savefig(new, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        if "--check" not in sys.argv:
            new.replace(path)
            continue
        if not path.exists() or not is_same(path.read_text(), new.read_text()):
            stale.append(str(path.relative_to(ROOT)))
        new.unlink()
    if stale:
        sys.exit(f"{', '.join(stale)} would be drawn otherwise now: make pictures")
