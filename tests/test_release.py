# SPDX-License-Identifier: Apache-2.0
"""What make release refuses, and facts of the packages that are written in two places."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import distribution
import release

ROOT = Path(__file__).parent.parent
CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-01-31\n\n- all\n\n## 1.1.0 - 2025-12-01\n"
)


def test_a_release_commit() -> None:
    assert release.problems("1.2.0", CHANGELOG, "") == []
    assert release.problems("1.2.0", CHANGELOG.replace("## Unreleased\n\n", ""), "") == []


def test_what_is_no_release_commit() -> None:
    assert release.problems("1.2.0", CHANGELOG, " M setup.py") == [
        "the working tree must have no changes"
    ]
    (text,) = release.problems("1.3.0", CHANGELOG, "")
    assert text.startswith('CHANGELOG.md must have a heading "## 1.3.0 - DATE"')
    assert len(release.problems("1.2", CHANGELOG, "")) == 1
    (text,) = release.problems(
        "1.2.0", CHANGELOG.replace("Unreleased\n", "Unreleased\n\n- x\n"), ""
    )
    assert text.startswith('CHANGELOG.md must have nothing under "Unreleased"')


def test_sdist_takes_what_git_tracks() -> None:
    """MANIFEST.in by its own rules; make check-install compares the files themselves."""
    rules = (ROOT / "MANIFEST.in").read_text()
    grafted = set(re.findall(r"^graft (\S+)", rules, re.MULTILINE))
    folders = {name.split("/")[0] for name in distribution.tracked_files() if "/" in name}
    assert folders - grafted <= {"pfa", "third_party"}  # setup.py finds pfa; the rest is named


def test_oldest_torch_and_python_are_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dependencies = \["torch>=2\.10"\]', project, re.MULTILINE)
    flags = runpy.run_path(str(ROOT / "pfa" / "_build.py"))["CXX_FLAGS"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags  # 2.10
    assert 'requires-python = ">=3.10"' in project
    assert '"py_limited_api": "cp310"' in (ROOT / "setup.py").read_text()
