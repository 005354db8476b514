# SPDX-License-Identifier: Apache-2.0
"""Scripts written for ``torch_npu`` run unmodified, on a GPU or the CPU.

    python -m pfa.compat.torch_npu script.py arguments ...

or, in a program, before it imports torch_npu::

    import pfa.compat.torch_npu
    pfa.compat.torch_npu.install()

That gives the process the modules ``torch_npu`` and ``torchair``, ``torch.npu``,
``torch.ops.npu.npu_prompt_flash_attention``, ``.npu()`` and ``device="npu"``. docs/porting.md has
what differs.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import torch

import pfa

from . import _device, _operator, _torchair

_installed: types.ModuleType | None = None


def install(device: str | None = None, graph_backend: str = "inductor") -> None:
    """Put the stand-ins in place, for the rest of the process; again with the same device: nothing.

    Parameters
    ----------
    device : {"cuda", "cpu"}, optional
        What "npu" means. The default is "cuda" where there is a GPU, else "cpu".
    graph_backend : str, default "inductor"
        The backend of ``torch.compile`` that ``torchair.get_npu_backend`` returns.

    Raises
    ------
    ValueError
        If ``device`` is another device, or not the one of an earlier call.
    RuntimeError
        If the real torch_npu is installed.

    Notes
    -----
    ``device="npu"`` is understood in the thread that called this, not in threads that it starts;
    ``.npu()`` is in all of them.

    Examples
    --------
    >>> import pfa.compat.torch_npu
    >>> pfa.compat.torch_npu.install()  # doctest: +SKIP
    """
    global _installed
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, got {device}")
    if _installed is not None:
        if device is not None and device != _device.target():
            raise ValueError(f"device must be {_device.target()}, as installed, got {device}")
        return
    if "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None:
        raise RuntimeError("torch_npu is installed: pfa.compat.torch_npu would hide the real one")
    _operator.define()
    npu = _device.install(wanted)
    _installed = _make_torch_npu(npu)
    modules = {"torch_npu": _installed, "torch_npu.npu": npu, **_torchair.make(graph_backend)}
    for name, module in modules.items():
        # importlib.util.find_spec, which other libraries ask, fails on a module without a spec.
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        sys.modules[name] = module


class _TorchNpu(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        raise AttributeError(
            f"torch_npu.{name} is not in pfa.compat.torch_npu, which has "
            "npu_prompt_flash_attention, npu_trans_quant_param and npu"
        )


def _make_torch_npu(npu: types.ModuleType) -> types.ModuleType:
    module = _TorchNpu("torch_npu", __doc__)
    vars(module).update(
        __version__=pfa.__version__,
        npu=npu,
        npu_prompt_flash_attention=_operator.npu_prompt_flash_attention,
        npu_trans_quant_param=pfa.trans_quant_param,
    )
    return module
