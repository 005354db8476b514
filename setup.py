# SPDX-License-Identifier: Apache-2.0
"""Builds pfa/_C.abi3.so: one library for every Python >= 3.10 and every torch >= 2.10."""

import glob
import os
import runpy

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = os.path.dirname(os.path.abspath(__file__))

# Every file gets the same flags: code for one instruction set carries its own target pragma, so
# that torch.utils.cpp_extension.load(sources=...) builds the same library.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def sources() -> list[str]:
    found = [p for part in ("ops", "cpu") for p in glob.glob(f"csrc/{part}/*.cpp", root_dir=ROOT)]
    return sorted(found)


def extension() -> CppExtension:
    return CppExtension(
        "pfa._C",
        sources(),
        depends=sorted(glob.glob("csrc/**/*.h", root_dir=ROOT, recursive=True)),
        py_limited_api=True,
        extra_compile_args={"cxx": COMPILE_FLAGS},
    )


setup(
    version=runpy.run_path(os.path.join(ROOT, "pfa", "_version.py"))["__version__"],
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
