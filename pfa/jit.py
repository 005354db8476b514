# SPDX-License-Identifier: Apache-2.0
"""Compiles the operator on this machine, for this machine, where no built library came along."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import cpp_extension

from . import _build, _library
from ._log import logger
from ._version import __version__

__all__ = ["flags", "load", "sources"]

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_MAX_HEAD_DIM = 512


def sources(*, with_cuda: bool = True) -> list[str]:
    """Return the paths of the files to compile.

    Parameters
    ----------
    with_cuda : bool
        All of them, or those of the CPU kernels and the operator alone.
    """
    return [str(path) for path in _build.sources(with_cuda)]


def flags(*, with_cuda: bool = True) -> dict[str, Any]:
    """Return the arguments of ``torch.utils.cpp_extension.load`` that the files need.

    With CUDA kernels that function also needs a torch with CUDA and finds nvcc by CUDA_HOME;
    ``load`` wants neither.

    Parameters
    ----------
    with_cuda : bool
        As for ``sources``.

    Raises
    ------
    RuntimeError
        If ``with_cuda`` finds no nvcc.

    Examples
    --------
    >>> import pfa.jit, torch.utils.cpp_extension  # with PFA_LIBRARY=none in the environment
    >>> torch.utils.cpp_extension.load(  # doctest: +SKIP
    ...     "my_pfa", pfa.jit.sources(with_cuda=False), **pfa.jit.flags(with_cuda=False)
    ... )
    """
    if not with_cuda:
        return {"extra_cflags": list(_build.CXX_FLAGS), "is_python_module": False}
    cuda_home = _build.find_cuda_home()
    if cuda_home is None:
        raise RuntimeError(_build.NVCC_MISSING)
    return _flags(cuda_home, _build.ALL)


def load(
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    head_dims: Sequence[int] | None = None,
    atten_mask: bool = True,
    pse_shift: bool = True,
    build_directory: str | None = None,
    verbose: bool = False,
) -> str:
    """Compile the operator and load it where the packaged library could not be loaded.

    The CPU kernels are compiled always, and whole. The CUDA kernels are compiled for the GPUs that
    torch sees, or with FORCE_CUDA=1 for what TORCH_CUDA_ARCH_LIST names; all of them take a
    quarter of an hour on two cores, so name what you need. What is left out is logged (logger
    ``pfa``, level INFO), ``python -m pfa.info`` shows what is inside, and a call that needs
    something else raises and says so. Objects are kept: a second call, in another process,
    compiles only what has changed.

    Parameters
    ----------
    dtypes : sequence of torch.dtype, optional
        Types of query that the CUDA kernels take: float16, bfloat16, int8. All by default.
    head_dims : sequence of int, optional
        Head dimensions that they take, each from 1 to 512, and some below. All by default.
    atten_mask : bool
        Whether they take the mask tensor of modes 0 and 1; modes 2 to 4 need none.
    pse_shift : bool
        Whether they take a bias.
    build_directory : str, optional
        Where objects and library go. By default a folder for this version of pfa and torch and for
        what was chosen, in torch's folder for extensions (``TORCH_EXTENSIONS_DIR``).
    verbose : bool
        Show what the compilers say.

    Returns
    -------
    str
        The path of the library.

    Raises
    ------
    ValueError
        If ``dtypes`` or ``head_dims`` has an entry of another kind.
    RuntimeError
        If the operator is loaded already, a tool is missing, or the compiler fails.

    Examples
    --------
    >>> import pfa.jit  # with PFA_LIBRARY=none in the environment, or in a checkout without build
    >>> pfa.jit.load(dtypes=[torch.bfloat16], head_dims=[128])  # doctest: +SKIP
    '/home/me/.cache/torch_extensions/pfa-0.1.0-torch-2.11.0+cu130-bfloat16-128/pfa_jit.so'
    """
    selection = _selection(dtypes, head_dims, atten_mask, pse_shift)
    if _library.load_error is None:
        raise RuntimeError(
            f"torch.ops.pfa is loaded already, from {_library.path}; set PFA_LIBRARY=none before "
            "Python starts to have pfa.jit.load() replace it"
        )
    with _tools_on_path():
        cuda_home = _check_tools()
        if cuda_home is None:
            selection = _build.ALL
        path = _compile(
            cuda_home, selection, build_directory or _default_directory(selection), verbose
        )
    _library.path, _library.load_error = path, None
    from . import _fake  # noqa: F401  (registers the operator's shape rule)

    return str(path)


def _selection(
    dtypes: Sequence[torch.dtype] | None,
    head_dims: Sequence[int] | None,
    atten_mask: bool,
    pse_shift: bool,
) -> _build.Selection:
    for dtype in dtypes or ():
        if dtype not in _DTYPES:
            raise ValueError(f"dtypes must be of float16, bfloat16 and int8, got {dtype}")
    for dim in head_dims or ():
        if not 1 <= dim <= _MAX_HEAD_DIM:
            raise ValueError(f"head_dims must be from 1 to {_MAX_HEAD_DIM}, got {dim}")
    return _build.Selection(
        None if dtypes is None else tuple(sorted({_DTYPES[dtype] for dtype in dtypes})),
        None if head_dims is None else tuple(sorted(set(head_dims))),
        atten_mask,
        pse_shift,
    )


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
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("PFA_SKIP_CUDA") == "1" or not (forced or torch.cuda.is_available()):
        return None
    cuda_home = _build.find_cuda_home()
    if cuda_home is None:
        raise RuntimeError(
            f"{_build.NVCC_MISSING}; PFA_SKIP_CUDA=1 builds the CPU kernels without it"
        )
    return cuda_home


def _default_directory(selection: _build.Selection) -> str:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = root or cpp_extension.get_default_build_root()
    chosen = [*(selection.dtypes or ()), *map(str, selection.head_dims or ())]
    chosen += [name for name in ("atten_mask", "pse_shift") if not getattr(selection, name)]
    return os.path.join(root, "-".join(["pfa", __version__, "torch", torch.__version__, *chosen]))


def _flags(cuda_home: str, selection: _build.Selection) -> dict[str, Any]:
    return {
        "extra_cflags": _build.CXX_FLAGS + _build.CXX_CUDA_FLAGS,
        "extra_cuda_cflags": _build.nvcc_flags(_archs_present(), selection),
        "extra_ldflags": _build.cuda_link_flags(cuda_home),
        "extra_include_paths": [f"{cuda_home}/include"],
        "is_python_module": False,
    }


def _compile(
    cuda_home: str | None, selection: _build.Selection, build_directory: str, verbose: bool
) -> pathlib.Path:
    os.makedirs(build_directory, exist_ok=True)
    options = flags(with_cuda=False)
    if cuda_home is not None:
        cpp_extension.CUDA_HOME = cuda_home
        options = _flags(cuda_home, selection)
        options["extra_ldflags"] += [f"-L{build_directory}"]
        _write_stubs(build_directory)
        _log_what_is_left_out(selection)
    path = cpp_extension.load(
        "pfa_jit",
        [str(source) for source in _build.sources(cuda_home is not None, selection)],
        build_directory=build_directory,
        verbose=verbose,
        **options,
    )
    return pathlib.Path(path)


def _write_stubs(build_directory: str) -> None:
    """cpp_extension asks for a shared runtime as well, which pip's toolkit does not have under this
    name, and for libraries that a torch without CUDA lacks. Nothing needs them (the static runtime
    comes first), so that empty linker scripts will do."""
    names = ["cudart"] if torch.version.cuda else ["cudart", "c10_cuda", "torch_cuda"]
    for name in names:
        pathlib.Path(build_directory, f"lib{name}.so").write_text("/* empty */\n")


def _log_what_is_left_out(selection: _build.Selection) -> None:
    kinds: dict[str, list[str]] = {}
    for path in _build.left_out(selection):
        kind, _, dim = path.stem.rpartition("_d")
        kinds.setdefault(kind.replace("_", " "), []).append(dim)
    names = [f"{kind} of head_dim {' '.join(dims)}" for kind, dims in kinds.items()]
    names += [name for name in ("atten_mask", "pse_shift") if not getattr(selection, name)]
    if names:
        logger.info("pfa.jit.load leaves out CUDA kernels for %s", ", ".join(names))


def _archs_present() -> str | None:
    """Machine code for every GPU at hand, and PTX for later ones, which 9.0a's is not."""
    count = torch.cuda.device_count()
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    names = ["9.0a" if x == (9, 0) else f"{x[0]}.{x[1]}" for x in capabilities]
    return ";".join(name if name == "9.0a" else f"{name}+PTX" for name in names) or None
