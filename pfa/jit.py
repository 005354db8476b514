# SPDX-License-Identifier: Apache-2.0
"""Compiles the operator on this machine, for this machine, where no built library came along."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import cpp_extension

from . import _build, _library
from ._version import __version__

__all__ = ["load", "sources"]


def sources() -> list[str]:
    """Return the paths of all files to compile.

    Returns
    -------
    list of str
        Every C++ and CUDA source that ``load`` would compile with a CUDA torch and a GPU.
    """
    return [str(path) for path in _build.sources(with_cuda=True)]


def load(*, build_directory: str | None = None, verbose: bool = False) -> str:
    """Compile the operator and load it where the packaged library could not be loaded.

    The CUDA kernels are compiled for the GPUs that torch sees, the CPU kernels always. Objects are
    kept, so that a second call, in another process, compiles only what has changed.

    Parameters
    ----------
    build_directory : str, optional
        Where objects and library go. By default a folder for this version of pfa and torch, in
        torch's folder for extensions (``TORCH_EXTENSIONS_DIR``).
    verbose : bool
        Show what the compilers say.

    Returns
    -------
    str
        The path of the library.

    Raises
    ------
    RuntimeError
        If the operator is loaded already, a tool is missing, or the compiler fails.

    Examples
    --------
    >>> import pfa.jit  # with PFA_LIBRARY=none in the environment, or in a checkout without build
    >>> pfa.jit.load()  # doctest: +SKIP
    '/home/me/.cache/torch_extensions/pfa-0.1.0-torch-2.11.0+cu130/pfa_jit.so'
    """
    if _library.load_error is None:
        raise RuntimeError(
            f"torch.ops.pfa is loaded already, from {_library.path}; set PFA_LIBRARY=none before "
            "Python starts to have pfa.jit.load() replace it"
        )
    with _tools_on_path():
        cuda_home = _check_tools()
        path = _compile(cuda_home, build_directory or _default_directory(), verbose)
    _library.path, _library.load_error = path, None
    from . import _fake  # noqa: F401  (registers the operator's shape rule)

    return str(path)


@contextmanager
def _tools_on_path() -> Iterator[None]:
    """Find the ninja of a virtual environment whose bin is not on PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, os.path.dirname(sys.executable)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _check_tools() -> str | None:
    """Return the CUDA toolkit to build with, None for the CPU kernels alone."""
    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"pfa.jit.load needs a C++ compiler, and there is no {compiler}")
    if not cpp_extension.is_ninja_available():
        raise RuntimeError("pfa.jit.load needs ninja: pip install ninja")
    if not torch.cuda.is_available() or os.environ.get("PFA_SKIP_CUDA") == "1":
        return None
    cuda_home = _build.find_cuda_home()
    if cuda_home is None:
        raise RuntimeError(
            f"{_build.NVCC_MISSING}; PFA_SKIP_CUDA=1 builds the CPU kernels without it"
        )
    return cuda_home


def _default_directory() -> str:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = root or cpp_extension.get_default_build_root()
    return os.path.join(root, f"pfa-{__version__}-torch-{torch.__version__}")


def _compile(cuda_home: str | None, build_directory: str, verbose: bool) -> pathlib.Path:
    os.makedirs(build_directory, exist_ok=True)
    cxx_flags, nvcc_flags, link_flags = list(_build.CXX_FLAGS), [], []
    include_paths = []
    if cuda_home is not None:
        cpp_extension.CUDA_HOME = cuda_home
        cxx_flags += _build.CXX_CUDA_FLAGS
        nvcc_flags = _build.nvcc_flags(_archs_present())
        link_flags = _build.cuda_link_flags(cuda_home) + [f"-L{build_directory}"]
        include_paths = [f"{cuda_home}/include"]
        # cpp_extension asks for a shared runtime as well, which pip's toolkit does not have under
        # this name. An empty linker script will do: the static one comes first.
        pathlib.Path(build_directory, "libcudart.so").write_text("/* empty */\n")
    path = cpp_extension.load(
        "pfa_jit",
        [str(source) for source in _build.sources(cuda_home is not None)],
        extra_cflags=cxx_flags,
        extra_cuda_cflags=nvcc_flags,
        extra_ldflags=link_flags,
        extra_include_paths=include_paths,
        build_directory=build_directory,
        verbose=verbose,
        is_python_module=False,
    )
    return pathlib.Path(path)


def _archs_present() -> str:
    """Machine code for every GPU at hand, and PTX for later ones, which 9.0a's is not."""
    count = torch.cuda.device_count()
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    names = ["9.0a" if x == (9, 0) else f"{x[0]}.{x[1]}" for x in capabilities]
    return ";".join(name if name == "9.0a" else f"{name}+PTX" for name in names)
