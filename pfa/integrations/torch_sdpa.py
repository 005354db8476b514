# SPDX-License-Identifier: Apache-2.0
"""torch's own ``scaled_dot_product_attention`` with the operator as its flash attention.

    pfa.integrations.torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("PFA")

From then on every call that SDPA would give to its flash kernel comes here, on the CPU and on CUDA.
What the operator does not compute goes back to torch's kernel, with one debug line in the logger
``pfa``. ``torch.nn.attention.restore_flash_attention_impl()`` ends it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ._sdpa import attend, check_mask, log_delegation, why_not

_CPU, _CUDA = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"


def register(name: str = "PFA") -> None:
    """Make ``torch.nn.attention.activate_flash_attention_impl(name)`` possible. Activates nothing.

    Notes
    -----
    The operator has no log-sum-exp, which only a backward pass needs. Calls that ask for gradients
    go to torch's kernel; where compiled code runs the forward pass here all the same, the backward
    pass repeats it with torch's kernel.

    Examples
    --------
    >>> import pfa.integrations.torch_sdpa
    >>> pfa.integrations.torch_sdpa.register()
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty str, got {name!r}")
    torch.nn.attention.register_flash_attention_impl(name, register_fn=_Overrides)


class _Overrides:
    """Takes the place of torch's kernels from its creation to :meth:`remove`."""

    def __init__(self) -> None:
        self._kernels = {
            (name, device): torch.library.get_kernel(f"aten::{name}", device)
            for name, device in self._wanted()
        }
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        ours = {
            _CPU: self._forward_cpu,
            _CUDA: self._forward_cuda,
            f"{_CPU}_backward": self._backward_cpu,
            f"{_CUDA}_backward": self._backward_cuda,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, device in self._kernels:
                library.impl(name, ours[name], device)
        self._library: Any = library  # what it registers lives as long as it does

    @staticmethod
    def _wanted() -> list[tuple[str, str]]:
        wanted = [(_CPU, "CPU"), (f"{_CPU}_backward", "CPU")]
        if torch.version.cuda is not None:
            wanted += [(_CUDA, "CUDA"), (f"{_CUDA}_backward", "CUDA")]
        return wanted

    def remove(self) -> None:
        self._library = None

    def _torchs(self, name: str, device: str, *args: Any, **options: Any) -> Any:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
        return self._kernels[name, device].call_boxed(keys, *args, **options)

    def _forward_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        masks = (check_mask("attn_mask", attn_mask, query, key),)
        reason = why_not(query, key, value, masks, dropout_p)
        if reason is not None:
            log_delegation("torch", "SDPA", reason)
            rest = {"attn_mask": attn_mask, "scale": scale}
            return self._torchs(_CPU, "CPU", query, key, value, dropout_p, is_causal, **rest)
        batch, heads, rows, _ = query.shape
        missing = _missing(query, batch, rows, heads).transpose(1, 2)
        return _like(
            query, attend(query, key, value, masks, causal=is_causal, scale=scale)
        ), missing

    def _backward_cpu(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        *args: Any,
        **options: Any,
    ) -> Any:
        if _is_missing(logsumexp):
            out, logsumexp = self._torchs(_CPU, "CPU", query, key, value, *args, **options)
        inputs = grad_out, query, key, value, out, logsumexp
        return self._torchs(f"{_CPU}_backward", "CPU", *inputs, *args, **options)

    def _forward_cuda(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        reason = why_not(query, key, value, (), dropout_p)
        if return_debug_mask:
            reason = "return_debug_mask"
        if reason is not None:
            log_delegation("torch", "SDPA", reason)
            flags = dropout_p, is_causal, return_debug_mask
            return self._torchs(_CUDA, "CUDA", query, key, value, *flags, scale=scale)
        batch, heads, rows, _ = query.shape
        random = (query.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))
        return (
            _like(query, attend(query, key, value, causal=is_causal, scale=scale)),
            _missing(query, batch, heads, rows),
            None,
            None,
            rows,
            key.shape[2],
            *random,
            query.new_empty(0),
        )

    def _backward_cuda(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *random: torch.Tensor,
        scale: float | None = None,
    ) -> Any:
        saved: tuple[Any, ...] = (out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k)
        if _is_missing(logsumexp):
            inputs = query, key, value, dropout_p, is_causal, False
            saved = self._torchs(_CUDA, "CUDA", *inputs, scale=scale)
            saved, random = saved[:6], saved[6:8]
        inputs = grad_out, query, key, value, *saved, dropout_p, is_causal, *random
        return self._torchs(f"{_CUDA}_backward", "CUDA", *inputs, scale=scale)


def _missing(query: torch.Tensor, *shape: int) -> torch.Tensor:
    """In the place of a log-sum-exp: NaN, which no other finite input gives."""
    return query.new_full(shape, float("nan"), dtype=torch.float32)


def _is_missing(logsumexp: torch.Tensor) -> bool:
    return logsumexp.numel() > 0 and bool(logsumexp.isnan().all())


def _like(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """BSND -> BNSD with the strides of empty_like(query), which compiled code relies on."""
    result = torch.empty_like(query)
    transposed = out.transpose(1, 2)
    return transposed if transposed.stride() == result.stride() else result.copy_(transposed)
