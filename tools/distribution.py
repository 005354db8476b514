# SPDX-License-Identifier: Apache-2.0
"""Builds the sdist and the wheel and checks both; for check_install.py and release.py."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Libraries of torch, which the wheel finds in the process that has imported it.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
NOT_SHIPPED = (".ci/", ".git")


def run(*command: str | pathlib.Path, **options: object) -> str:
    """The output of a command; it is shown where the command fails, and this process ends."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{' '.join(words)} failed")
    return done.stdout + done.stderr


def tool(name: str, *arguments: str | pathlib.Path) -> str:
    """The output of a command that pip installed beside this Python."""
    folder = os.path.dirname(sys.executable)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return run(pathlib.Path(folder, name), *arguments, env=os.environ | {"PATH": path})


def build(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Leave an sdist and the wheel that is built from it in an empty folder; return both paths.

    The wheel gets the lowest manylinux tag that it is right for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (plain,) = folder.glob("*.whl")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    tool("auditwheel", "repair", *excluded, "-w", folder, plain)
    plain.unlink()
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return sdist, wheel


def check(sdist: pathlib.Path, wheel: pathlib.Path) -> list[str]:
    """Return what was found, in a line each; this process ends where something is wrong."""
    tool("twine", "check", "--strict", sdist, wheel)
    tool("abi3audit", "--strict", wheel)
    missing = sorted(tracked_files() - files_of(sdist))
    if missing:
        sys.exit(f"{sdist.name} lacks {', '.join(missing)}: see MANIFEST.in")
    sources = {f"pfa/{name}" for name in tracked_files() if name.startswith("csrc/")}
    missing = sorted(sources - set(zipfile.ZipFile(wheel).namelist()))
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}, which pfa.jit needs: see setup.py")
    unstable = unstable_symbols(wheel)
    if unstable:
        sys.exit(f"{wheel.name} needs symbols outside the stable ABI: {', '.join(unstable[:5])}")
    return [
        f"{sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB, every tracked file is inside",
        f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, abi3, metadata valid",
        "undefined symbols of at::, c10:: or Python's: none",
    ]


def tracked_files() -> set[str]:
    names = run("git", "-C", ROOT, "ls-files").splitlines()
    return {name for name in names if not name.startswith(NOT_SHIPPED)}


def files_of(sdist: pathlib.Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def unstable_symbols(wheel: pathlib.Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        library = archive.extract("pfa/_C.abi3.so", folder)
        listing = run("nm", "-D", "--undefined-only", library)
    symbols = [line.split()[-1] for line in listing.splitlines()]
    return [x for x in symbols if re.match(r"_Z\w*?\d(at|c10|torch|caffe2)\d|_?Py", x)]
