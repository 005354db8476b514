# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of every kernel of a library by kind, as JSON: tensor-core products,
copies, exponentials, and the local memory that spills use.

`sass.py build/cuda/_C.abi3.so [--match REGEX]`; needs cuobjdump (PyPI: nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import site
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import objects

# Each with the width that follows it: LDG.E.128 counts as LDG.128.
COUNTED = re.compile(
    "[HI]G?MMA|LDSM|STSM|LDGSTS|UTMA\\w+|(LD|ST)[GSL]|MUFU|SHFL|BAR|FFMA|FMUL|FADD|F2FP?|I2F|F2I|IMAD"
)
FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCH = re.compile(r"^\s*code for (sm_\w+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([\w.]*)")
WIDTH = re.compile(r"\.(64|128|16816|16832|1688)\b")


def find_cuobjdump() -> str:
    folders = [*site.getsitepackages(), sys.prefix]
    pip = [str(p.parent) for x in folders for p in pathlib.Path(x).glob("nvidia/*/bin/cuobjdump")]
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *pip])
    return shutil.which("cuobjdump", path=path) or sys.exit(
        "cuobjdump was not found: pip install nvidia-cuda-cuobjdump"
    )


def count(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """Map (arch, mangled name) to the number of instructions of each kind."""
    kernels: dict[tuple[str, str], Counter[str]] = {}
    arch, current = "", Counter()
    for line in lines:
        if found := INSTRUCTION.match(line):
            opcode, suffixes = found.groups()
            current["all"] += 1
            if COUNTED.fullmatch(opcode):
                width = WIDTH.search(suffixes)
                current[opcode + (f".{width[1]}" if width else "")] += 1
        elif found := FUNCTION.match(line):
            current = kernels.setdefault((arch, found[1]), Counter())
        elif found := ARCH.match(line):
            arch = found[1]
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=pathlib.Path)
    parser.add_argument("--match", default="", help="only kernels whose readable name has this")
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{os.path.dirname(cuobjdump)}"  # of nvdisasm
    command = [cuobjdump, "-sass", str(options.library)]
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kernels = count(process.stdout)
    if process.returncode != 0 or not kernels:
        sys.exit(f"{options.library} holds no machine code that cuobjdump can read")
    names = objects.demangle(name for _, name in kernels)
    rows = [
        {"name": names[name], "arch": arch, **dict(sorted(found.items()))}
        for (arch, name), found in sorted(kernels.items())
        if re.search(options.match, names[name])
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
