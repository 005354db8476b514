# SPDX-License-Identifier: Apache-2.0
"""Reads the records that nvcc_log.py left beside the objects of a build."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable


@dataclasses.dataclass
class Kernel:
    """What ptxas said of one kernel for one architecture; sizes in bytes."""

    name: str  # mangled
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_smem: int = 0


@dataclasses.dataclass
class Object:
    """One compiled .cu file."""

    source: str
    seconds: float  # of processor time
    peak_rss: int
    kernels: list[Kernel]
    warnings: list[str]


ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SMEM = re.compile(r"(\d+) bytes smem")
# (C75xx) are ptxas's remarks that it serialised or could not schedule matrix instructions.
WARNING = re.compile(r"\bwarning\b|\(C75\d\d\)", re.IGNORECASE)


def parse(log: str) -> list[Kernel]:
    """Read `ptxas -v`. Functions that were not inlined have properties too: they are left out."""
    kernels: list[Kernel] = []
    described = ""
    for line in log.splitlines():
        if found := ENTRY.search(line):
            kernels.append(Kernel(found[1], found[2]))
        elif found := PROPERTIES.search(line):
            described = found[1]
        elif kernels and described == kernels[-1].name and (found := FRAME.search(line)):
            kernel = kernels[-1]
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, found.groups())
        elif kernels and (found := USED.search(line)):
            kernels[-1].registers = int(found[1])
            smem = SMEM.search(line)
            kernels[-1].static_smem = int(smem[1]) if smem else 0
    return kernels


def read(build: pathlib.Path) -> list[Object]:
    """Return the objects of the last build in this folder, without those of deleted sources."""
    objects = []
    for rule in re.findall(r"^build (\S+): cuda_compile (\S+)$", ninja_file(build), re.MULTILINE):
        record = json.loads(pathlib.Path(rule[0] + ".json").read_text())
        log = record["log"]
        warnings = [line for line in log.splitlines() if WARNING.search(line)]
        name = pathlib.Path(rule[1]).name
        objects.append(Object(name, record["seconds"], record["peak_rss"], parse(log), warnings))
    return objects


def ninja_file(build: pathlib.Path) -> str:
    (path,) = build.glob("temp/build.ninja")
    return path.read_text()


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Map mangled names to readable ones, without return type and arguments."""
    names = sorted(set(names))
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return {name: shorten(text) for name, text in zip(names, run.stdout.splitlines(), strict=True)}


def shorten(signature: str) -> str:
    """`void pfa::cuda::sm80::kernel<pfa::cuda::Traits<1>, (bool)0>(Params)` to
    `sm80::kernel<Traits<1>, 0>`."""
    text = signature.removeprefix("void ")
    depth, end = 0, len(text)
    for position in range(len(text) - 1, -1, -1):  # the argument list closes the signature
        depth += {")": 1, "(": -1}.get(text[position], 0)
        if depth == 0:
            end = position
            break
    if text.endswith(")"):
        text = text[:end]
    text = re.sub(r"\((?:bool|int|unsigned int|long|pfa::[\w:]+)\)", "", text)
    return re.sub(r"\bpfa::(?:cuda::)?", "", text).replace("> >", ">>")
