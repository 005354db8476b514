# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operator; a failure is kept and raised at first use, so importing works."""

import pathlib

import torch

_PATH = pathlib.Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    if not _PATH.exists():
        return f"{_PATH} does not exist; build it with: python setup.py build_ext --inplace"
    try:
        torch.ops.load_library(str(_PATH))  # type: ignore[no-untyped-call]
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
