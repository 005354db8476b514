# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="pfa"`` for Hugging Face transformers.

Calls that the operator does not compute (float32, training, decoding one token, ...) go to
transformers' own SDPA function; what SDPA lacks (attention sinks, a soft cap of the scores) is
computed with plain torch operators. Each leaves one debug line in the logger ``pfa``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ._sdpa import attend, check_mask, log_delegation, why_not

_LIBRARY = "transformers"


def register(name: str = "pfa") -> None:
    """Make ``attn_implementation=name`` known to transformers.

    Registers the attention function and the mask function. Without the second, transformers
    would hand over no mask at all and padded batches would be silently wrong.

    Parameters
    ----------
    name : str, default "pfa"
        What models are asked for: ``AutoModel.from_pretrained(..., attn_implementation=name)`` or
        ``model.set_attn_implementation(name)``.

    Notes
    -----
    float16 and bfloat16 prefill without gradients runs on ``torch.ops.pfa.forward``. A float32
    model keeps its precision: all its calls go to SDPA, so load it in 16 bits to use the operator.
    A query row that sees no key gives zeros, where SDPA averages V or gives NaN; such rows are
    padding.

    Examples
    --------
    >>> import pfa.integrations.transformers
    >>> pfa.integrations.transformers.register()
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty str, got {name!r}")
    AttentionInterface.register(name, pfa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def pfa_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One attention call of a transformers model.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; its ``is_causal`` counts where the argument is None.
    query : Tensor, (B, N, S_q, D)
    key, value : Tensor, (B, N_kv, S_kv, D)
    attention_mask : Tensor, broadcastable to (B, N, S_q, S_kv), optional
        bool with True = *keep*, or float to add to the scores.
    scaling : float, optional
        Factor of the scores; 1 / sqrt(D) where absent.
    position_bias : Tensor, broadcastable to (B, N, S_q, S_kv), optional
        Added to the scaled scores, on top of the mask.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)`` before the mask.
    s_aux : Tensor, (N,), optional
        Attention sinks: the score of one more key per head, whose value is zero.

    Returns
    -------
    tuple of Tensor, (B, S_q, N, D), and None
        The attention weights are never returned.

    Raises
    ------
    ValueError, TypeError
        A mask or bias of a wrong shape, dtype or device; the text names the argument.
    NotImplementedError
        Attention sinks with the paged cache of continuous batching.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    paged = kwargs.get("cache") is not None
    if paged and sinks is not None:
        raise NotImplementedError("s_aux (attention sinks) must be None with a paged cache")
    masks: tuple[torch.Tensor | None, ...] = ()
    if not paged:  # the masks of a paged cache are for keys that only SDPA's function fetches
        masks = (
            check_mask("attention_mask", attention_mask, query, key),
            check_mask("position_bias", position_bias, query, key),
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # transformers aligns a causal call without a mask at the top left: keys beyond S_q are the
    # unused tail of a static cache. Any mask it passes already contains the causal rule.
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    if not paged and (softcap is not None or sinks is not None):
        lacks = "attention sinks" if softcap is None else "soft cap of the scores"
        log_delegation(_LIBRARY, "plain torch", f"{lacks}, which SDPA lacks")
        scores = _scores(query, key, masks, causal=causal, scaling=scaling, softcap=softcap)
        return _weighted_sum(scores, value, sinks, dropout), None

    reason = "paged cache" if paged else why_not(query, key, value, masks, dropout)
    if reason is None:
        return attend(query, key, value, masks, causal=causal, scale=scaling), None
    log_delegation(_LIBRARY, "SDPA", reason)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
        is_causal=is_causal, position_bias=position_bias, **kwargs,
    )  # fmt: skip
    return output, None


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    masks: tuple[torch.Tensor | None, ...],
    *,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, N, S_q, S_kv) with masks applied, in query's dtype as the models' eager functions."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (
        query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Not -inf: a row without keys would become NaN, and 0 * NaN in the rows of the next layer.
    lowest = torch.finfo(scores.dtype).min
    for mask in masks:
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
            )
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, lowest)
    return scores


def _weighted_sum(
    scores: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """(B, S_q, N, D)"""
    batch, heads, rows, keys = scores.shape
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys].to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2).contiguous()
