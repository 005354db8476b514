# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.npu.npu_prompt_flash_attention`` and the function that calls it."""

from __future__ import annotations

from typing import Any

import torch

_NAME = "npu_prompt_flash_attention"
_HIGH_PRECISION = range(
    10, 15
)  # sparse_mode 0 to 4 in higher precision, which is the only one here
_library: torch.library.Library | None = None  # what it defines lives as long as it does


def define() -> None:
    """Define the operator, with the schema of ``torch.ops.pfa.forward``."""
    global _library
    schema = str(torch.ops.pfa.forward.default._schema)
    library: Any = torch.library.Library("npu", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema.replace("pfa::forward", _NAME))
    # It decomposes into pfa.forward, which has the kernels and the shape rule.
    library.impl(_NAME, _forward, "CompositeImplicitAutograd")
    _library = library


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sparse_mode: int = 0,
    **others: Any,
) -> torch.Tensor:
    if sparse_mode in _HIGH_PRECISION:
        sparse_mode -= _HIGH_PRECISION.start
    out: torch.Tensor = torch.ops.pfa.forward(query, key, value, sparse_mode=sparse_mode, **others)
    return out


def npu_prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
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
    actual_seq_lengths_kv: list[int] | None = None,
    sparse_mode: int = 0,
) -> torch.Tensor:
    """``torch_npu.npu_prompt_flash_attention``: :func:`pfa.prompt_flash_attention` in its terms.

    ``sparse_mode`` also takes 10 to 14, which mean 0 to 4; modes 2 to 4 want the compressed mask;
    lengths are lists. Errors are RuntimeError.
    """
    out: torch.Tensor = torch.ops.npu.npu_prompt_flash_attention(
        query,
        key,
        value,
        pse_shift=pse_shift,
        padding_mask=padding_mask,
        atten_mask=atten_mask,
        actual_seq_lengths=actual_seq_lengths,
        deq_scale1=deq_scale1,
        quant_scale1=quant_scale1,
        deq_scale2=deq_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        num_heads=num_heads,
        scale_value=scale_value,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        actual_seq_lengths_kv=actual_seq_lengths_kv,
        sparse_mode=sparse_mode,
    )
    return out
