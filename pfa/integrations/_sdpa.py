# SPDX-License-Identifier: Apache-2.0
"""The convention of torch's scaled_dot_product_attention, translated into the operator's.

That convention, which transformers and diffusers share: q, k and v in BNSD; masks broadcastable to
(B, N, S_q, S_kv), either bool with True = *keep* or float, added to the scaled scores; causal calls
aligned at the top left. Nothing is computed here.
"""

from __future__ import annotations

import torch

from pfa import prompt_flash_attention
from pfa._log import logger

_UNLIMITED = 2**31 - 1
_MAX_HEAD_DIM, _MAX_HEADS, _MAX_GROUP = 512, 256, 64


def log_delegation(library: str, to: str, reason: str) -> None:
    """One debug line for a call that the operator does not take."""
    # A log call would break the graph under torch.compile.
    if not torch.compiler.is_compiling():
        logger.debug("%s: %s takes this call: %s", library, to, reason)


def check_mask(
    name: str, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The mask with four dimensions; an error names it as the caller does."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = keep) or float, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"{name} must be on the device of query {query.device}, got {mask.device}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (B, N, S_q, S_kv) = {full}, "
            f"got shape {tuple(mask.shape)}"
        )
    return mask.view(shape) if mask.dim() < 4 else mask


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: tuple[torch.Tensor | None, ...] = (),
    dropout: float = 0.0,
) -> str | None:
    """The reason why the operator does not take this call, or None."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"mixed dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if query.device.type not in ("cpu", "cuda", "meta"):
        return f"device {query.device}"
    if dropout > 0:
        return f"dropout {dropout}"
    shape_k = key.shape
    batch, heads, rows, head_dim = query.shape
    heads_k = shape_k[1]
    if rows == 1:
        return "one query token"
    if batch != shape_k[0]:
        return f"batch {batch} of query and {shape_k[0]} of key"
    if shape_k != value.shape or head_dim != shape_k[3]:
        return "head dimensions of query, key and value differ"
    if heads > _MAX_HEADS or heads % heads_k or heads > _MAX_GROUP * heads_k:
        return f"{heads} query heads over {heads_k} key heads"
    if head_dim > _MAX_HEAD_DIM:
        return f"head dimension {head_dim}"
    if torch.is_grad_enabled():
        tensors = (query, key, value, *masks)
        if any(t is not None and t.requires_grad for t in tensors):
            return "gradients are asked for"
    return None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: tuple[torch.Tensor | None, ...] = (),
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """(B, S_q, N, D) of BNSD tensors that :func:`why_not` has no objection to.

    Every mask has passed :func:`check_mask`; at most one of them is bool.
    """
    drop, bias = _split(masks, query, key)
    if causal and drop is not None:
        raise ValueError("a causal call takes no bool mask")
    _, heads, _, head_dim = query.shape
    return prompt_flash_attention(
        query,
        key,
        value,
        pse_shift=bias,
        atten_mask=drop,
        num_heads=heads,
        num_key_value_heads=key.shape[1],
        scale_value=head_dim**-0.5 if scale is None else scale,
        input_layout="BNSD_BSND",
        sparse_mode=2 if causal else 0,
        pre_tokens=_UNLIMITED,
        next_tokens=_UNLIMITED,
    )


def _split(
    masks: tuple[torch.Tensor | None, ...], query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(atten_mask, pse_shift): what is dropped, and the sum of what is added."""
    drop, bias = None, None
    for mask in masks:
        if mask is None:
            continue
        if mask.dtype == torch.bool and mask.shape[1] == 1:
            drop = _expand(_invert(mask), 1, query, key)
            continue
        if mask.dtype == torch.bool:  # per head: the operator takes those only as an addend
            zero = torch.zeros((), dtype=query.dtype, device=mask.device)
            mask = torch.where(mask, zero, float("-inf"))
        bias = mask if bias is None else bias + mask
    if bias is None:
        return drop, None
    # The lowest finite value of a wider type becomes -inf here, which masks the position.
    return drop, _expand(bias.to(query.dtype), query.shape[1], query, key)


def _invert(mask: torch.Tensor) -> torch.Tensor:
    """True = keep -> True = drop. A padding mask repeats one row; only that row is inverted."""
    return ~mask[:, :, :1] if mask.stride(2) == 0 else ~mask


def _expand(mask: torch.Tensor, heads: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(1|B, heads, S_q, S_kv) without copying: broadcast axes get stride 0."""
    return mask.expand(mask.shape[0], heads, query.shape[2], key.shape[2])
