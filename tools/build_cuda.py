# SPDX-License-Identifier: Apache-2.0
"""Builds the library with its CUDA kernels in a folder of its own and says what it cost.

`build_cuda.py build/cuda` leaves build/cuda/_C.abi3.so, the objects under build/cuda/temp and the
compilers' output in build/cuda/build.log. With PFA_SIM_ARCH_LIST set the kernels are PTX only.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter

import objects

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE_BUDGET = 40  # MiB
RSS_BUDGET = 3 << 10  # MiB
KERNEL_BUDGET = 130  # per architecture and family (csrc/cuda/sm80, csrc/cuda/sm90)
SECONDS_BUDGET = 2 * 15 * 60  # a quarter of an hour on two cores


def compile_library(folder: pathlib.Path) -> None:
    build = runpy.run_path(str(ROOT / "pfa" / "_build.py"))
    nvcc = pathlib.Path(build["cuda_home_to_build_with"](True) or sys.exit(build["NVCC_MISSING"]))
    log = folder / "build.log"
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",  # of ninja
        "FORCE_CUDA": "1",
        "PYTORCH_NVCC": f"{sys.executable} {ROOT}/tools/nvcc_log.py {nvcc}/bin/nvcc",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if run.returncode != 0:
        tail = log.read_text().splitlines()[-60:]
        sys.exit("\n".join(tail) + f"\nbuilding {folder} failed; this is the end of {log}")
    # A new file, not new contents: a running process may have mapped the old one.
    shutil.copy2(folder / "lib" / "pfa" / "_C.abi3.so", folder / "_C.abi3.so.part")
    (folder / "_C.abi3.so.part").rename(folder / "_C.abi3.so")


@dataclasses.dataclass
class Figure:
    name: str
    value: float
    budget: float
    unit: str

    def __str__(self) -> str:
        over = "" if self.value <= self.budget else "  OVER BUDGET"
        return f"{self.name}: {self.value:.0f} {self.unit} (budget {self.budget:.0f}){over}"


def figures(folder: pathlib.Path) -> list[Figure]:
    """Return what the build in this folder costs, whether or not all of it was compiled now."""
    built = objects.read(folder)
    kernels = Counter(
        f"{'sm90' if 'sm90' in x.source else 'sm80'}, for {kernel.arch}"
        for x in built
        for kernel in x.kernels
    )
    # PTX that is not compressed is for a simulator: its size says nothing.
    size = (folder / "_C.abi3.so").stat().st_size / 2**20 if kernels else 0
    return [
        Figure("library", size, SIZE_BUDGET, "MiB"),
        Figure("processor time of nvcc", sum(x.seconds for x in built), SECONDS_BUDGET, "s"),
        Figure(
            "largest compiler process", max(x.peak_rss for x in built) / 2**20, RSS_BUDGET, "MiB"
        ),
        *(Figure(f"kernels of {name}", n, KERNEL_BUDGET, "") for name, n in kernels.items()),
    ]


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    started = time.monotonic()
    compile_library(folder)
    print(f"wall time of this build: {time.monotonic() - started:.0f} s")
    for figure in figures(folder):
        print(figure)
    for x in sorted(objects.read(folder), key=lambda x: -x.seconds)[:3]:
        print(f"  {x.source}: {x.seconds:.0f} s, {x.peak_rss / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
