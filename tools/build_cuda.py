# SPDX-License-Identifier: Apache-2.0
"""Builds the library with its CUDA kernels in a folder of its own and says what it cost.

`build_cuda.py build/cuda` leaves build/cuda/_C.abi3.so, the objects under build/cuda/temp and the
compilers' output in build/cuda/build.log. With PFA_SIM_ARCH_LIST set the kernels are PTX only.
"""

from __future__ import annotations

import os
import pathlib
import resource
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter

import objects

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE_BUDGET = 40 << 20  # bytes of the library
RSS_BUDGET = 3 << 30  # bytes of one compiler process
KERNEL_BUDGET = 130  # per architecture
SECONDS_BUDGET = 15 * 60


def compile_library(folder: pathlib.Path) -> pathlib.Path:
    build = runpy.run_path(str(ROOT / "pfa" / "_build.py"))
    nvcc = pathlib.Path(build["cuda_home_to_build_with"](True) or sys.exit(build["NVCC_MISSING"]))
    log = folder / "build.log"
    environment = {
        **os.environ,
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
    return (folder / "_C.abi3.so.part").rename(folder / "_C.abi3.so")


def report(folder: pathlib.Path, library: pathlib.Path, seconds: float) -> list[str]:
    """Print the figures and return those that exceed their budget."""
    built = objects.read(folder)
    kernels = Counter(kernel.arch for x in built for kernel in x.kernels)
    size = library.stat().st_size
    peak = max(
        [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]
        + [x.peak_rss for x in built]
    )
    total = sum(x.seconds for x in built)
    print(f"{library}: {size / 2**20:.1f} MiB (budget {SIZE_BUDGET >> 20})")
    print(
        f"wall time: {seconds:.0f} s; all {len(built)} .cu files: {total:.0f} s of nvcc "
        f"(budget {SECONDS_BUDGET})"
    )
    for x in sorted(built, key=lambda x: -x.seconds)[:3]:
        print(f"  {x.source}: {x.seconds:.0f} s, {x.peak_rss / 2**20:.0f} MiB")
    print(f"largest compiler process: {peak / 2**20:.0f} MiB (budget {RSS_BUDGET >> 20})")
    for arch, count in sorted(kernels.items()):
        print(f"{arch}: {count} kernels (budget {KERNEL_BUDGET})")
    exceeded = {
        "library size": size > SIZE_BUDGET,
        "wall time": seconds > SECONDS_BUDGET,
        "compiler memory": peak > RSS_BUDGET,
        "number of kernels": max(kernels.values(), default=0) > KERNEL_BUDGET,
    }
    return [name for name, over in exceeded.items() if over]


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    started = time.monotonic()
    library = compile_library(folder)
    exceeded = report(folder, library, time.monotonic() - started)
    if exceeded:
        sys.exit(f"over budget: {', '.join(exceeded)}")


if __name__ == "__main__":
    main()
