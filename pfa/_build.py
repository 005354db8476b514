# SPDX-License-Identifier: Apache-2.0
"""What the library is compiled from and how: read by setup.py and by pfa.jit. No torch, no pfa."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
from typing import NamedTuple

# Every C++ file gets the same flags: code for one instruction set carries its own target pragma,
# so that torch.utils.cpp_extension.load(sources=...) builds the same library.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# USE_CUDA makes torch's headers declare the one CUDA function that csrc/ops calls.
CXX_CUDA_FLAGS = ["-DPFA_WITH_CUDA", "-DUSE_CUDA"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden,-fPIC",
    "-DPFA_WITH_CUDA",
    # cpp_extension takes the operators of half types away
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]
# Machine code for A100 and H100; every other GPU from sm_80 on compiles the PTX when it loads it.
DEFAULT_ARCH_FLAGS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
]
# With compute_90a among the architectures: csrc/cuda/sm90 is compiled, and used there.
WITH_SM90A = "-DPFA_WITH_SM90A"
OLDEST_ARCH = 80
USUAL_CUDA_HOME = "/usr/local/cuda"


def csrc() -> pathlib.Path:
    """Return the folder of the sources: inside an installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


class Selection(NamedTuple):
    """The CUDA kernels to compile; None stands for all."""

    dtypes: tuple[str, ...] | None = None  # of float16, bfloat16, int8
    head_dims: tuple[int, ...] | None = None
    atten_mask: bool = True
    pse_shift: bool = True


ALL = Selection()


def sources(with_cuda: bool, selection: Selection = ALL) -> list[pathlib.Path]:
    """Return the files to compile."""
    found = [*csrc().glob("ops/*.cpp"), *csrc().glob("cpu/*.cpp")]
    if with_cuda:
        found += [*csrc().glob("cuda/*.cpp"), *csrc().glob("cuda/**/*.cu")]
        found = [path for path in found if path not in left_out(selection)]
    return sorted(found)


def left_out(selection: Selection) -> list[pathlib.Path]:
    """Return the files of kernels that a selection does without.

    Of each family and dtype, a head_dim takes the file of the next larger number.
    """
    dims: dict[str, dict[int, pathlib.Path]] = {}
    for path in sorted(csrc().glob("cuda/instantiations/*.cu")):
        if parts := re.fullmatch(r"(\w+)_d(\d+)", path.stem):  # sm80_float16, 128
            dims.setdefault(parts[1], {})[int(parts[2])] = path
    unwanted = []
    for kind, files in dims.items():
        wanted = set(files)
        if selection.dtypes is not None and kind.partition("_")[2] not in selection.dtypes:
            wanted = set()
        elif selection.head_dims is not None:
            fitting = ([d for d in files if d >= dim] for dim in selection.head_dims)
            wanted = {min(found) for found in fitting if found}
        unwanted += [path for dim, path in sorted(files.items()) if dim not in wanted]
    return unwanted


def headers() -> list[pathlib.Path]:
    """Return what the sources include."""
    return sorted(p for p in csrc().rglob("*") if p.suffix in (".h", ".cuh"))


def find_cuda_home() -> str | None:
    """Return the first CUDA toolkit with a compiler: CUDA_HOME, CUDA_PATH, the one of the nvcc on
    PATH, /usr/local/cuda, the one that pip installed."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        candidates.append(str(pathlib.Path(on_path).resolve().parent.parent))
    candidates.append(USUAL_CUDA_HOME)
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or []:
        candidates += sorted(str(p.parent.parent) for p in pathlib.Path(folder).glob("*/bin/nvcc"))
    for home in candidates:
        # An nvcc in /usr/local/bin may be a script that starts the one of a toolkit elsewhere.
        wanted = ("bin/nvcc", "include/cuda_runtime.h")
        if home and all(pathlib.Path(home, x).is_file() for x in wanted):
            return home
    return None


# The meta-package pins parts that fit each other; nvidia-cuda-nvcc alone takes the latest of some.
NVCC_MISSING = (
    "nvcc was not found: set CUDA_HOME, put nvcc on PATH, or pip install "
    '"cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"'
)


def cuda_home_to_build_with(torch_has_cuda: bool) -> str | None:
    """Return the toolkit to build the CUDA kernels with, or None to build without them.

    They are built for a torch with CUDA or with FORCE_CUDA=1, if there is an nvcc, unless
    PFA_SKIP_CUDA=1. RuntimeError if FORCE_CUDA=1 finds no nvcc.
    """
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("PFA_SKIP_CUDA") == "1" or not (forced or torch_has_cuda):
        return None
    home = find_cuda_home()
    if home is None and forced:
        raise RuntimeError(f"FORCE_CUDA=1, but {NVCC_MISSING}")
    return home


def arch_flags(arch_list: str) -> list[str]:
    """Translate TORCH_CUDA_ARCH_LIST, such as "8.0 8.6;9.0+PTX"; what the kernels can't run on is
    left out. ValueError for anything else."""
    flags = []
    for entry in re.split(r"[;, ]+", arch_list.strip("; ,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got "{entry}"')
        major, minor, suffix, ptx = parts.groups()
        if int(major + minor) < OLDEST_ARCH:
            continue
        arch = f"{major}{minor}{suffix}"
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if not flags:
        raise ValueError(f'the kernels need 8.0 or newer, TORCH_CUDA_ARCH_LIST is "{arch_list}"')
    return flags


def nvcc_flags(present: str | None = None, selection: Selection = ALL) -> list[str]:
    """Return all flags of nvcc. TORCH_CUDA_ARCH_LIST overrides `present`, what the GPUs at hand
    need, which overrides the default; PFA_SIM_ARCH_LIST, such as "8.0", overrides all of them and
    asks for PTX that a simulator reads."""
    simulated = os.environ.get("PFA_SIM_ARCH_LIST")
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or present
    if simulated:
        archs = arch_flags(simulated)
        flags = [re.sub(r"code=sm_", "code=compute_", flag) for flag in archs] + ["--no-compress"]
    else:
        flags = arch_flags(arch_list) if arch_list else list(DEFAULT_ARCH_FLAGS)
        flags.append("-Xfatbin=-compress-all")  # 0.5 instead of 1.7 MB for head_dim 64 of one type
    code = re.findall(r"code=((?:sm|compute)_\w+)", " ".join(flags))
    flags.append(f"-DPFA_CUDA_ARCHS={'+'.join(code)}")
    if any("compute_90a" in flag for flag in flags):
        flags.append(WITH_SM90A)
    if not selection.atten_mask:
        flags.append("-DPFA_WITHOUT_DENSE")
    if not selection.pse_shift:
        flags.append("-DPFA_WITHOUT_BIAS")
    if os.environ.get("PFA_LINEINFO") == "1":
        flags.append("-lineinfo")
    threads = os.environ.get("PFA_NVCC_THREADS")
    if threads:
        flags.append(f"--threads={threads}")
    return NVCC_FLAGS + flags


def cuda_link_flags(cuda_home: str) -> list[str]:
    """Return how a library with CUDA kernels is linked.

    CUDA's runtime is linked statically and not exported, so that torch's own may be any version; a
    simulator takes the place of a shared one. The CUDA function of torch lives in libtorch_cuda.so,
    which on any torch libtorch.so leads to: the linker must not drop that as not needed.
    """
    folders = [pathlib.Path(cuda_home, x) for x in ("lib64", "lib", "targets/x86_64-linux/lib")]
    flags = ["-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    flags += [f"-L{folder}" for folder in folders if folder.is_dir()]
    if os.environ.get("PFA_SIM_ARCH_LIST"):
        return [*flags, "-lcudart"]
    return [*flags, "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
