# SPDX-License-Identifier: Apache-2.0
"""The typed front end: one call of the operator, and Python's exception types."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _library

_COMPRESSED_MODES = (2, 3, 4)
_COMPRESSED_SIZE = 2048


def prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: Sequence[int] | torch.Tensor | None = None,
    deq_scale1: torch.Tensor | None = None,
    quant_scale1: torch.Tensor | None = None,
    deq_scale2: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    quant_offset2: torch.Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | torch.Tensor | None = None,
    sparse_mode: int = 0,
) -> torch.Tensor:
    """Attention of ``query`` over ``key`` and ``value`` without materialising the score matrix.

    ``softmax(scale_value * query @ key.T + pse_shift) @ value`` per batch element and head, with
    the positions that ``sparse_mode``, ``atten_mask`` and the lengths exclude left out. Statistics
    and sums are float32. A query row that may see no key gives exact zeros, never NaN.

    Parameters
    ----------
    query : Tensor of float16, bfloat16 or int8
        (B, Sq, N * D) in layout BSH, (B, Sq, N, D) in BSND, (B, N, Sq, D) in BNSD and BNSD_BSND.
        B <= 65536, N <= 256, D from 1 to 512. Any strides; a tensor whose last dimension is not
        contiguous is copied.
    key, value : Tensor of query's dtype
        As ``query`` with Skv for Sq and ``num_key_value_heads`` for N.
    pse_shift : Tensor, (1 or B, N, >= Sq, >= Skv), optional
        Added to the scaled scores: float16 for float16 and int8 queries, bfloat16 for bfloat16
        ones. An entry of -inf masks its position.
    padding_mask : None
        Reserved by the seed API.
    atten_mask : Tensor of bool, int8 or uint8, optional
        **Nonzero or True means masked out**, the opposite of the bool mask of
        ``torch.nn.functional.scaled_dot_product_attention``. In modes 0 and 1 (>= Sq, >= Skv),
        (1 or B, >= Sq, >= Skv) or (1 or B, 1, >= Sq, >= Skv), of which the upper left corner
        is used. In modes 2 to 4 the compressed (2048, 2048) upper triangle, whose content is not
        read; None stands for it.
    actual_seq_lengths, actual_seq_lengths_kv : sequence of int or Tensor, optional
        Number of valid rows of query, and of key and value, per batch element (not cumulative).
        One entry serves all; None or empty means full. Query rows beyond give zeros, keys beyond
        are never read. Tensors of int32 or int64 on query's device, (1,) or (>= B,), are clamped
        to 0 ... S instead of checked, and stay on the device; both lengths are tensors then, or
        None.
    deq_scale1, deq_scale2 : Tensor of float32, int64 or uint64, one element
        int8 query only: int32 scores to real scores, and int32 products of probabilities and
        values to real output (the scale of value divided by ``quant_scale1``). Integers hold a
        float32's bits in the lower half, see ``pfa.trans_quant_param``.
    quant_scale1 : Tensor of float32, one element
        int8 query only: int8 steps per unit of probability, usually 127.
    quant_scale2, quant_offset2 : Tensor of float32, one element or N * D in (n, d) order, optional
        Make the output int8: ``round(output * quant_scale2 + quant_offset2)``, saturated. Also
        bfloat16 for a bfloat16 query. The offset has the scale's dtype and size. Any scale or
        offset of one element may be on the CPU, wherever query is.
    num_heads : int
        N.
    scale_value : float
        Factor of the scores. **The default is 1.0**, not 1 / sqrt(D).
    pre_tokens, next_tokens : int
        Keys before and after the diagonal that a query may see, in mode 0 with a mask (diagonal
        from the upper left corner) and in mode 4 (through the lower right corner of the valid
        lengths). Ignored elsewhere.
    input_layout : {"BSH", "BSND", "BNSD", "BNSD_BSND"}
        The last one reads BNSD and writes BSND.
    num_key_value_heads : int
        Heads of key and value; must divide ``num_heads``. 0 means ``num_heads``.
    sparse_mode : int
        0: all keys, or with ``atten_mask`` the unmasked keys between pre_tokens and next_tokens;
        1: ``atten_mask`` alone; 2: causal from the upper left corner; 3: causal from the lower
        right corner of the valid lengths; 4: the band of pre_tokens and next_tokens.

    Returns
    -------
    Tensor
        Fresh and contiguous, query's shape; (B, Sq, N, D) for BNSD_BSND. int8 with
        ``quant_scale2``, else float16 for an int8 query, else query's dtype.

    Raises
    ------
    ValueError
        A shape, value or combination the operator does not take; the text names the argument.
    TypeError
        A tensor of the wrong dtype.
    NotImplementedError
        ``sparse_mode`` 5 to 8.
    RuntimeError
        An input requires grad while grad mode is on: the operator is inference-only.

    Notes
    -----
    Trap: mode 0 **with** a mask and the default ``next_tokens=0`` also cuts everything right of
    the diagonal. Pass ``next_tokens=2147483647`` or ``sparse_mode=1`` for the mask alone.

    Examples
    --------
    >>> import torch, pfa
    >>> query = torch.ones(1, 3, 4, dtype=torch.float16)  # B=1, S=3, H=2*2
    >>> value = torch.arange(12, dtype=torch.float16).view(1, 3, 4)
    >>> pfa.prompt_flash_attention(query, query, value, num_heads=2, sparse_mode=2)[0, :, 0]
    tensor([0., 2., 4.], dtype=torch.float16)
    """
    arguments = (
        query,
        key,
        value,
        pse_shift,
        padding_mask,
        atten_mask,
        actual_seq_lengths,
        deq_scale1,
        quant_scale1,
        deq_scale2,
        quant_scale2,
        quant_offset2,
        num_heads,
        scale_value,
        pre_tokens,
        next_tokens,
        input_layout,
        num_key_value_heads,
        actual_seq_lengths_kv,
        sparse_mode,
    )
    overload = _overload(actual_seq_lengths, actual_seq_lengths_kv)
    plain = type(query) is type(key) is type(value) is torch.Tensor
    if torch.compiler.is_compiling() or not plain or _tracked(arguments):
        return _by_name(overload, arguments)
    try:
        out: torch.Tensor = _by_position(overload)(*arguments)
    except RuntimeError as error:
        raise _typed(error) from None
    return out


_NAMES = tuple(inspect.signature(prompt_flash_attention).parameters)
_NUMBERS = _NAMES.index("num_heads")  # all tensors that can require grad stand before it


def _overload(lengths: object, lengths_kv: object) -> str:
    tensors = isinstance(lengths, torch.Tensor) + isinstance(lengths_kv, torch.Tensor)
    if tensors == 0:
        return "default"
    if tensors == 1 and lengths is not None and lengths_kv is not None:
        raise TypeError(
            "pfa.forward: actual_seq_lengths and actual_seq_lengths_kv must both be tensors when "
            "one of them is"
        )
    return "tensor_lens"


def _tracked(arguments: tuple[object, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in arguments[:_NUMBERS]:  # noqa: SIM110  (a generator takes twice the time)
        if x is not None and getattr(x, "requires_grad", False):
            return True
    return False


@functools.cache
def _by_position(overload: str) -> Callable[..., torch.Tensor]:
    """The operator for plain tensors that require no grad; torch reads its arguments faster, since
    they have no names."""
    _library.require()
    found: Callable[..., torch.Tensor] = getattr(torch.ops.pfa._eager, overload)
    return found


def _by_name(overload: str, arguments: tuple[Any, ...]) -> torch.Tensor:
    _library.require()
    query, key, value, *_ = arguments
    others = dict(zip(_NAMES[3:], arguments[3:], strict=True))
    if others["atten_mask"] is None and others["sparse_mode"] in _COMPRESSED_MODES:
        others["atten_mask"] = _compressed_mask(query)
    try:
        out: torch.Tensor = getattr(torch.ops.pfa.forward, overload)(query, key, value, **others)
    except RuntimeError as error:
        raise _typed(error) from None
    return out


def _compressed_mask(query: torch.Tensor) -> torch.Tensor:
    # The content is not read, so one byte of any value stands for all of it.
    return query.new_empty((1,), dtype=torch.uint8).expand(_COMPRESSED_SIZE, _COMPRESSED_SIZE)


def _typed(error: RuntimeError) -> Exception:
    """The operator knows only RuntimeError; its wording decides (csrc/ops/check.h)."""
    text = str(error)
    if not text.startswith("pfa.forward: "):
        return error
    if "must have dtype" in text:
        return TypeError(text)
    return NotImplementedError(text) if "is not implemented" in text else ValueError(text)
