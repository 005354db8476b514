# SPDX-License-Identifier: Apache-2.0
"""Shape and dtype of the operator's result, for torch.compile, torch.export and meta tensors.

Every other rule is judged by the operator itself when it runs. Sizes are never compared here, so
that one graph serves all sizes.
"""

from typing import Any

import torch

_RANKS = {"BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4}


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    quant_scale2: torch.Tensor | None = None,
    input_layout: str = "BSH",
    **others: Any,
) -> torch.Tensor:
    _check_inference(query=query, key=key, value=value, quant_scale2=quant_scale2, **others)
    if input_layout not in _RANKS:
        raise RuntimeError(
            f"pfa.forward: input_layout must be BSH, BSND, BNSD or BNSD_BSND, got {input_layout}"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != _RANKS[input_layout]:
            raise RuntimeError(
                f"pfa.forward: {name} must have {_RANKS[input_layout]} dimensions for "
                f"input_layout {input_layout}, got shape {tuple(tensor.shape)}"
            )
    shape = list(query.shape)
    if input_layout == "BNSD_BSND":
        shape[1], shape[2] = shape[2], shape[1]
    dtype = torch.float16 if query.dtype == torch.int8 else query.dtype
    return query.new_empty(shape, dtype=dtype if quant_scale2 is None else torch.int8)


def _forward_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_heads: int = 1,
    input_layout: str = "BSH",
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _forward(query, key, value, input_layout=input_layout, **others)
    rows_first = input_layout in ("BSH", "BSND")
    heads = num_heads if input_layout == "BSH" else query.shape[2 if rows_first else 1]
    rows = query.shape[1 if rows_first else 2]
    return out, query.new_empty((query.shape[0], heads, rows), dtype=torch.float32)


def _eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **named: Any
) -> torch.Tensor:
    names = [x.name for x in torch.ops.pfa.forward.default._schema.arguments]
    return _forward(query, key, value, **dict(zip(names[3:], others, strict=False)), **named)


def _check_inference(**arguments: Any) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"pfa.forward is inference-only and has no gradient, but {name} requires grad: "
                "detach it or call under torch.no_grad()"
            )


torch.library.register_fake("pfa::forward", _forward)
torch.library.register_fake("pfa::forward.tensor_lens", _forward)
torch.library.register_fake("pfa::_eager", _eager)
torch.library.register_fake("pfa::_eager.tensor_lens", _eager)
torch.library.register_fake("pfa::forward_lse", _forward_lse)
torch.library.register_fake("pfa::forward_lse.tensor_lens", _forward_lse)
