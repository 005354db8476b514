# SPDX-License-Identifier: Apache-2.0
"""What runs the operator under test, chosen by pytest's --backend: see conftest.py.

cpu: the CPU kernels. cuda: the CUDA kernels on a GPU. sim: the CUDA kernels in a simulator that
takes the place of libcudart and executes their PTX, on the CPU and in host memory; the environment
variable CUDASIM names the folder of its libcudart.so.13.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import reference
import torch
from inputs import Call
from torch import Tensor

ROOT = pathlib.Path(__file__).parent.parent
SIM_LIBRARY = ROOT / "build" / "sim" / "_C.abi3.so"
NAMES = ("cpu", "sim", "cuda")


class Backend:
    """The CPU kernels; the others override what they do otherwise."""

    name = "cpu"

    def operator(self) -> Callable[..., Tensor]:
        """torch.ops.pfa.forward, or what can be called in its place, with CPU tensors."""
        import pfa  # noqa: F401  (here, so that the tests of the reference run without it)

        return torch.ops.pfa.forward

    def operator_lse(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The same of torch.ops.pfa.forward_lse."""
        import pfa  # noqa: F401

        return torch.ops.pfa.forward_lse

    def plan(self, call: Call) -> reference.Plan:
        """How the kernels cut the keys of this call into tiles and runs."""
        head_dim = call.query.shape[-1] // (call.num_heads if call.layout == "BSH" else 1)
        return reference.Plan(block_m=96, block_n=256 if head_dim <= 256 else 128)

    def kernel(self, call: Call) -> str:
        """The name of the kernel that it takes."""
        return "cpu"


def plan_of(choice: Any, call: Call) -> reference.Plan:
    """What pfa._library.Choice means for the keys of the call."""
    bias = call.options.get("pse_shift")
    batch = call.query.shape[0]
    return reference.Plan(
        choice.block_m,
        choice.block_n,
        choice.num_splits,
        choice.cut_blocks,
        choice.cut_tiles,
        batch_innermost=bias is not None and batch > 1 and bias.shape[0] == 1,
        whole_sums=choice.kernel.startswith("sm90 int8"),  # int8_sums.cuh
    )


class Simulator(Backend):
    """CPU tensors; PFA_FORCE_BACKEND sends them to the CUDA kernels."""

    name = "sim"

    def choice(self, call: Call) -> Any:
        """What the library says it runs: pfa._library.Choice."""
        import pfa

        return pfa._library.choice(*call.args, **call.options)

    def compute_capability(self) -> str:
        return os.environ["CUDASIM_CC"]

    def kernel(self, call: Call) -> str:
        return self.choice(call).kernel

    def plan(self, call: Call) -> reference.Plan:
        return plan_of(self.choice(call), call)


class Gpu(Simulator):
    """Arguments go to the GPU as they are, the result comes back."""

    name = "cuda"

    def operator(self) -> Callable[..., Tensor]:
        return OnGpu(super().operator())

    def operator_lse(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return OnGpu(super().operator_lse())

    def choice(self, call: Call) -> Any:
        args, options = to_gpu(call.args, call.options)
        tensors = dict(zip(("query", "key", "value"), args, strict=True))
        return super().choice(call.with_(**tensors, **options))

    def compute_capability(self) -> str:
        return "".join(map(str, torch.cuda.get_device_capability()))

    def has_kernels(self) -> bool:
        import pfa

        x = torch.ones(1, 1, 1, dtype=torch.float16, device="cuda")
        try:
            pfa._library.choice(x, x, x)
        except RuntimeError as error:
            if "built without CUDA" in str(error):
                return False
            raise
        return True


class OnGpu:
    """An operator that takes and returns CPU tensors, and its overloads as attributes."""

    def __init__(self, operator: Callable[..., Any]) -> None:
        self._operator = operator

    def __call__(self, *args: Tensor, **options: Any) -> Any:
        args, options = to_gpu(args, options)
        out = self._operator(*args, **options)
        return out.cpu() if isinstance(out, Tensor) else tuple(x.cpu() for x in out)

    def __getattr__(self, overload: str) -> OnGpu:
        return OnGpu(getattr(self._operator, overload))


def to_gpu(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Tensors at the same strides and offsets, those that share memory sharing it again."""
    storages: dict[int, Tensor] = {}

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = host.cuda()
        memory = storages[storage.data_ptr()].untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device="cuda")
        return empty.set_(memory, x.storage_offset(), x.size(), x.stride())

    return tuple(map(move, args)), {name: move(x) for name, x in options.items()}


_BACKENDS = {backend.name: backend for backend in (Backend(), Simulator(), Gpu())}
_current = _BACKENDS["cpu"]


def current() -> Backend:
    return _current


def with_cuda() -> Backend | None:
    """The current backend if it has CUDA kernels, else the GPU if it and its kernels are there."""
    if _current.name != "cpu":
        return _current
    gpu = _BACKENDS["cuda"]
    return gpu if torch.cuda.is_available() and gpu.has_kernels() else None


def select(name: str) -> None:
    """Makes a backend the current one. The simulator has to come before pfa is imported."""
    global _current
    _current = _BACKENDS[name]
    if name == "sim":
        os.environ.update(simulator_environment())
        # The loader knows a library by its name: pfa's then finds this one.
        ctypes.CDLL(str(simulator() / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)


def cpu_forward(call: Call) -> Tensor:
    """The CPU kernels of the same library, whatever the backend under test."""
    import pfa  # noqa: F401

    with environment(PFA_FORCE_BACKEND="cpu"):
        return torch.ops.pfa.forward(*call.args, **call.options)


def simulator() -> pathlib.Path:
    folder = os.environ.get("CUDASIM", "")
    for path in (pathlib.Path(folder), pathlib.Path(folder, "build")):
        if folder and (path / "libcudart.so.13").exists():
            return path
    raise FileNotFoundError(f"CUDASIM must name a folder with libcudart.so.13, got {folder!r}")


def simulator_environment(**more: str) -> dict[str, str]:
    """What a process needs to run this library in the simulator."""
    return {
        "LD_LIBRARY_PATH": f"{simulator()}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PFA_LIBRARY": os.environ.get("PFA_LIBRARY") or str(SIM_LIBRARY),
        "PFA_FORCE_BACKEND": "cuda",
        "CUDASIM_CC": os.environ.get("CUDASIM_CC", "80"),
        **more,
    }


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for the while of a block; the operator reads them at every call."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
