# SPDX-License-Identifier: Apache-2.0
"""Makes what a release uploads, in dist/, checks it, and stops there. docs/releasing.md has the
rest. --rehearsal skips what is true only of the commit of a release, and needs no nvcc."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys

import distribution
from distribution import ROOT, run


def problems(version: str, changelog: str, changes: str) -> list[str]:
    """What keeps this commit from being a release; `changes` is git's list of them."""
    found = []
    if changes:
        found.append("the working tree must have no changes")
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f'CHANGELOG.md must have a heading "## {version} - DATE", as pfa/_version.py')
    unreleased = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if unreleased and unreleased[1].strip():
        found.append(f'CHANGELOG.md must have nothing under "Unreleased": it belongs to {version}')
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearsal", action="store_true")
    args = parser.parse_args()
    version = runpy.run_path(str(ROOT / "pfa" / "_version.py"))["__version__"]
    if not args.rehearsal:
        os.environ["FORCE_CUDA"] = "1"  # a wheel without CUDA kernels must not go out
        changelog = (ROOT / "CHANGELOG.md").read_text()
        found = problems(version, changelog, run("git", "-C", ROOT, "status", "--porcelain"))
        if found:
            sys.exit("\n".join(found))
    sdist, wheel = distribution.build(ROOT / "dist")
    print(*distribution.check(sdist, wheel), sep="\n")
    if not args.rehearsal:
        print(f"Nothing was uploaded or tagged. Next: git tag v{version}; twine upload dist/*")


if __name__ == "__main__":
    main()
