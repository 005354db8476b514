# SPDX-License-Identifier: Apache-2.0
"""Builds pfa/_C.abi3.so: one library for every Python >= 3.10 and every torch >= 2.10.

pfa/_build.py says what goes in. The CUDA kernels do if nvcc is found, for a torch with CUDA or with
FORCE_CUDA=1: a torch without CUDA is enough to compile and to load them. Environment: FORCE_CUDA,
PFA_SKIP_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, PFA_NVCC_THREADS, PFA_LINEINFO.
"""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parent
build = runpy.run_path(str(ROOT / "pfa" / "_build.py"))


def relative(paths: list[pathlib.Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def teach_build_extension(cuda_home: str) -> None:
    """BuildExtension knows no CUDA when torch has none: tell it where nvcc is, and its version,
    without which nvcc would not be asked for the headers that an object depends on."""
    cpp_extension.CUDA_HOME = cuda_home
    if torch.version.cuda is None:
        nvcc = [f"{cuda_home}/bin/nvcc", "--version"]
        text = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
        torch.version.cuda = re.search(r"release (\d+\.\d+)", text)[1]


def extension() -> cpp_extension.CppExtension:
    cuda_home = build["cuda_home_to_build_with"](torch.version.cuda is not None)
    if cuda_home is None and torch.version.cuda is not None:
        print("pfa: building the CPU kernels only (PFA_SKIP_CUDA, or no nvcc)", file=sys.stderr)
    flags = {"cxx": list(build["CXX_FLAGS"])}
    link_flags, include_dirs = [], []
    if cuda_home is not None:
        teach_build_extension(cuda_home)
        flags["cxx"] += build["CXX_CUDA_FLAGS"]
        flags["nvcc"] = build["nvcc_flags"]()
        link_flags = build["cuda_link_flags"](cuda_home)
        include_dirs.append(f"{cuda_home}/include")
    return cpp_extension.CppExtension(
        "pfa._C",
        relative(build["sources"](cuda_home is not None)),
        depends=relative(build["headers"]()),
        py_limited_api=True,
        include_dirs=include_dirs,
        extra_compile_args=flags,
        extra_link_args=link_flags,
    )


os.chdir(ROOT)
setup(
    version=runpy.run_path("pfa/_version.py")["__version__"],
    # The sources go along, for pfa.jit.
    packages=[*find_packages(include=["pfa*"]), "pfa.csrc"],
    package_dir={"pfa.csrc": "csrc"},
    package_data={"pfa": ["py.typed"], "pfa.csrc": ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"]},
    include_package_data=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
