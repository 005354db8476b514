# SPDX-License-Identifier: Apache-2.0
"""Links benchmarks/cuda/attention.cu with the CUDA objects of a build: `build_harness.py
build/sim build/predict/attention`.

The harness has host code alone, so no nvcc is needed. CUDA's runtime is linked statically, but for
a build in PTX (PFA_SIM_ARCH_LIST): a simulator takes the place of a shared one.
"""

from __future__ import annotations

import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import objects

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "cuda" / "attention.cu"


def cuda_objects(ninja: str) -> list[str]:
    """The objects of csrc/cuda, without those that a deleted source left behind."""
    return re.findall(r"^build (\S+/csrc/cuda/\S+\.o): ", ninja, re.MULTILINE)


def command(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    home = runpy.run_path(str(ROOT / "pfa" / "_build.py"))["find_cuda_home"]()
    if home is None:
        sys.exit("the harness needs CUDA's headers and runtime: no CUDA toolkit was found")
    ninja = objects.ninja_file(folder)
    libraries = [f"-L{x}" for x in pathlib.Path(home).glob("lib*") if x.is_dir()]
    if "code=sm_" in ninja:
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    else:
        libraries += ["-lcudart"]
    compiled = ["-x", "c++", str(SOURCE), "-x", "none", *cuda_objects(ninja)]
    flags = ["-std=c++17", "-O2", f"-I{home}/include"]
    return ["g++", *flags, *compiled, *libraries, "-o", str(out)]


def build(folder: pathlib.Path, out: pathlib.Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    words = command(folder, out)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(words)}\n{done.stderr[-3000:]}\nlinking {out} failed")


if __name__ == "__main__":
    build(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
