# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operator; a failure is kept and raised at first use, so importing works.

The environment variable PFA_LIBRARY names another library to load than the packaged one, or is
``none`` to load none: then ``pfa.jit.load()`` can.
"""

import os
import pathlib
from typing import Any, NamedTuple

import torch

_NAMED = os.environ.get("PFA_LIBRARY", "")
path = pathlib.Path(_NAMED) if _NAMED else pathlib.Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    if _NAMED == "none":
        return "PFA_LIBRARY is none"
    if not path.exists():
        if _NAMED:
            return f"{path}, which PFA_LIBRARY names, does not exist"
        return (
            f"{path} does not exist; build it with: python setup.py build_ext --inplace, or call "
            "pfa.jit.load()"
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return str(error)
    return None


load_error = _load()


def require() -> None:
    """Raise ImportError with the reason if the library could not be loaded."""
    if load_error is not None:
        raise ImportError(f"pfa could not load its operator: {load_error}")


def cpu_isa() -> str:
    """Return the instruction set that CPU calls use: best first, amx, avx512, avx512_vnni, avx2
    or portable.

    It is the best that the processor has, or what the environment variable PFA_CPU_ISA names;
    RuntimeError if it names something else than one of these, or one that the processor lacks.
    """
    require()
    return bytes(torch.ops.pfa._cpu_isa().tolist()).decode()


class Contents(NamedTuple):
    """What the library was built with."""

    cpu_isas: dict[str, bool]  # best first, and whether this process can use it
    architectures: list[str]  # of CUDA code: sm_80 is machine code, compute_80 PTX
    cuda_kernels: list[str]  # such as "sm80 float16 D128"


def contents() -> Contents:
    """Return what the library was built with."""
    require()
    isas, archs, kernels = bytes(torch.ops.pfa._contents().tolist()).decode().split("\n")
    pairs = (entry.split() for entry in isas.split(";"))
    return Contents(
        {name: usable == "1" for name, usable in pairs},
        archs.split("+") if archs else [],
        kernels.split(";") if kernels else [],
    )


class Choice(NamedTuple):
    """What a call takes."""

    backend: str  # cpu or cuda
    kernel: str  # an instruction set or a CUDA kernel; "none" where nothing is computed
    block_m: int  # query rows of a block
    block_n: int  # keys of a tile
    num_splits: int  # pieces that the keys of a block are cut into
    cut_blocks: int  # of the last blocks alone that are cut, into equal shares of their tiles
    cut_tiles: int  # such a share: it may begin in one block and end in the next
    why_not_sm90: str  # on a GPU of compute capability 9.0, where sm80 kernels take the call


def choice(*args: Any, **options: Any) -> Choice:
    """Return what torch.ops.pfa.forward would run with these arguments; it raises as that does."""
    require()
    overloads = torch.ops.pfa._choice
    lengths = (options.get(name) for name in ("actual_seq_lengths", "actual_seq_lengths_kv"))
    tensors = any(isinstance(x, torch.Tensor) for x in lengths)
    text = (overloads.tensor_lens if tensors else overloads.default)(*args, **options)
    backend, kernel, *numbers, why = bytes(text.tolist()).decode().split(";")
    block_m, block_n, num_splits, cut_blocks, cut_tiles = map(int, numbers)
    return Choice(
        backend, kernel, block_m, block_n, num_splits, cut_blocks, cut_tiles, why_not_sm90=why
    )
