# SPDX-License-Identifier: Apache-2.0
"""Which sources a result comes from."""

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def revision() -> dict[str, Any]:
    """The commit, and whether tracked files differed from it; "unknown" outside a repository."""
    sha = _git("rev-parse", "--short=10", "HEAD")
    return {
        "sha": sha or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
