# SPDX-License-Identifier: Apache-2.0
"""The file that a run grows in: a JSON a line, so that an interrupted run loses one at most."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(f"\n{json.dumps(row)}\n")  # on a line of its own whatever came before


def lines(path: Path) -> list[dict[str, Any]]:
    """Without lines that were cut short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished items by key, in the order in which they were finished."""
    return {x["key"]: x for x in lines(path) if "key" in x and "began" not in x}


def begun(path: Path) -> str | None:
    """The item that was begun last and not finished."""
    found = [x["key"] for x in lines(path) if "began" in x]
    return found[-1] if found and found[-1] not in read(path) else None
