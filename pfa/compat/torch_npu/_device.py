# SPDX-License-Identifier: Apache-2.0
"""What "npu" means in a device: ``.npu()``, ``device="npu"`` and ``torch.npu``."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_target = "cpu"
_mode: TorchFunctionMode | None = None


def target() -> str:
    return _target


def install(device: str) -> types.ModuleType:
    """Teach torch the device; returns the module that becomes ``torch.npu``."""
    global _target, _mode
    _target = device
    _mode = _NpuDevices()
    _mode.__enter__()  # type: ignore[no-untyped-call]
    # torch has no types for attributes that it does not have.
    torch.Tensor.npu = _tensor_npu  # type: ignore[attr-defined]
    torch.nn.Module.npu = _module_npu  # type: ignore[attr-defined]
    torch.serialization.register_package(9, lambda _: None, _restore)
    npu = _Npu("torch.npu")
    torch.npu = npu  # type: ignore[attr-defined]
    return npu


def _translated(x: Any) -> Any:
    """ "npu" and "npu:1" in the target's terms; the CPU has no index. Others stay what they are."""
    if not isinstance(x, str) or not (x == "npu" or x.startswith("npu:")):
        return x
    return _target + x.removeprefix("npu") if _target == "cuda" else _target


class _NpuDevices(TorchFunctionMode):
    """Translates the devices of every call that takes one, torch.device itself included."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(_device_name(*args, **kwargs))
        named = {name: _translated(x) for name, x in kwargs.items()}
        return func(*(_translated(x) for x in args), **named)


def _device_name(device: Any = None, index: int | None = None, type: str | None = None) -> Any:
    device = type if device is None else device
    return _translated(device if index is None else f"{device}:{index}")


def _named(device: torch.device | str | int | None) -> torch.device:
    if isinstance(device, torch.device):
        return device
    index = f":{device}" if isinstance(device, int) else ""
    return torch.device(_translated(device if isinstance(device, str) else f"npu{index}"))


def _tensor_npu(
    self: torch.Tensor,
    device: torch.device | str | int | None = None,
    non_blocking: bool = False,
    **others: Any,
) -> torch.Tensor:
    return self.to(_named(device), non_blocking=non_blocking, **others)


def _module_npu(
    self: torch.nn.Module, device: torch.device | str | int | None = None
) -> torch.nn.Module:
    return self.to(_named(device))


def _restore(storage: Any, location: str) -> Any:
    """For torch.load: checkpoints saved on an NPU, and map_location="npu"."""
    if not location.startswith("npu"):
        return None
    return storage.cuda() if _target == "cuda" else storage


class _Npu(types.ModuleType):
    """``torch.npu``: torch.cuda, or torch.cpu and what that lacks of it."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return torch.cuda.device_count() if _target == "cuda" else 1

    def current_device(self) -> int:
        return torch.cuda.current_device() if _target == "cuda" else 0

    def set_device(self, device: torch.device | str | int) -> None:
        if _target == "cuda":
            torch.cuda.set_device(_named(device))

    def synchronize(self, device: torch.device | str | int | None = None) -> None:
        if _target == "cuda":
            torch.cuda.synchronize(_named(device))

    def __getattr__(self, name: str) -> Any:
        namespace = torch.cuda if _target == "cuda" else torch.cpu
        on_cpu: dict[str, Callable[..., Any]] = {
            "empty_cache": lambda: None,
            "get_device_name": lambda device=None: "cpu",
            "manual_seed": torch.manual_seed,
            "manual_seed_all": torch.manual_seed,
        }
        if _target == "cpu" and name in on_cpu:
            return on_cpu[name]
        if name.startswith("__") or not hasattr(namespace, name):
            raise AttributeError(f"torch.npu.{name} is not in pfa.compat.torch_npu on {_target}")
        return getattr(namespace, name)
