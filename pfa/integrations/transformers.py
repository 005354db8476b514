# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="pfa"`` for Hugging Face transformers.

Calls that the operator does not compute (float32, training, decoding one token, ...) go to
transformers' own SDPA function and leave one debug line in the logger ``pfa``. A call that SDPA
would get wrong too is an error.
"""

import logging
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pfa import prompt_flash_attention

_logger = logging.getLogger("pfa")
_UNLIMITED = 2**31 - 1
_MAX_HEAD_DIM, _MAX_HEADS, _MAX_GROUP = 512, 256, 64


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
    float16 and bfloat16 prefill without gradients runs on ``torch.ops.pfa.forward``. A query row
    that sees no key gives zeros, where SDPA averages V or gives NaN; such rows are padding.

    Examples
    --------
    >>> import pfa.integrations.transformers
    >>> pfa.integrations.transformers.register()
    """
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
    attention_mask : Tensor, (1|B, 1|N, S_q, S_kv), optional
        bool with True = *keep*, or float to add to the scores.
    scaling : float, optional
        Factor of the scores; 1 / sqrt(D) where absent.
    position_bias : Tensor, broadcastable to (1|B, N, S_q, S_kv), optional
        Added to the scaled scores, on top of the mask.

    Returns
    -------
    tuple of Tensor, (B, S_q, N, D), and None
        The attention weights are never materialised.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            "s_aux (attention sinks) must be None for attn_implementation='pfa', got a tensor; "
            "use attn_implementation='eager' for this model"
        )
    reason = _why_not(query, key, value, attention_mask, dropout, position_bias, kwargs)
    if reason is not None:
        # A log call would break the graph under torch.compile.
        if not torch.compiler.is_compiling():
            _logger.debug("transformers: SDPA takes this call: %s", reason)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return output, None

    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    drop, bias = _split_mask(attention_mask, position_bias, query, key)
    # transformers aligns a causal call without a mask at the top left: keys beyond S_q are the
    # unused tail of a static cache. Any mask it passes already contains the causal rule.
    causal = is_causal and attention_mask is None
    output = prompt_flash_attention(
        query,
        key,
        value,
        pse_shift=bias,
        atten_mask=drop,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale_value=query.shape[-1] ** -0.5 if scaling is None else scaling,
        input_layout="BNSD_BSND",
        sparse_mode=2 if causal else 0,
        pre_tokens=_UNLIMITED,
        next_tokens=_UNLIMITED,
    )
    return output, None


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    position_bias: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """The reason why the operator does not take this call, or None."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"mixed dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if dropout > 0:
        return f"dropout {dropout}"
    if kwargs.get("softcap") is not None:
        return "softcap"
    if kwargs.get("cache") is not None:
        return "paged cache"
    if query.shape[2] == 1:
        return "one query token"
    if query.shape[0] != key.shape[0]:
        return f"batch {query.shape[0]} of query and {key.shape[0]} of key"
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return "head dimensions of query, key and value differ"
    heads, heads_k, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    if heads > _MAX_HEADS or heads % heads_k or heads > _MAX_GROUP * heads_k:
        return f"{heads} query heads over {heads_k} key heads"
    if head_dim > _MAX_HEAD_DIM:
        return f"head dimension {head_dim}"
    added = [tensor for tensor in (attention_mask, position_bias) if tensor is not None]
    if not all(t.dim() == 4 and (t.dtype == torch.bool or t.is_floating_point()) for t in added):
        return "a mask or bias of unusual rank or dtype"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *added)):
        return "gradients are asked for"
    return None


def _split_mask(
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(atten_mask, pse_shift) of a mask and a bias in transformers' polarity."""
    drop = None
    if mask is not None and mask.dtype == torch.bool:
        if mask.shape[1] == 1:
            drop = _expand(_invert(mask), 1, query, key)
        else:  # per head: the operator takes those only as an addend
            zero = torch.zeros((), dtype=query.dtype, device=mask.device)
            mask = torch.where(mask, zero, float("-inf"))
    addends = [t for t in (mask, position_bias) if t is not None and t.dtype != torch.bool]
    if not addends:
        return drop, None
    # The lowest finite value of a wider type becomes -inf here, which masks the position.
    bias = (addends[0] + addends[1] if len(addends) == 2 else addends[0]).to(query.dtype)
    return drop, _expand(bias, query.shape[1], query, key)


def _invert(mask: torch.Tensor) -> torch.Tensor:
    """True = keep -> True = drop. A padding mask repeats one row; only that row is inverted."""
    return ~mask[:, :, :1] if mask.stride(2) == 0 else ~mask


def _expand(mask: torch.Tensor, heads: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(1|B, heads, S_q', S_kv') without copying: broadcast axes get stride 0."""
    rows = query.shape[2] if mask.shape[2] == 1 else mask.shape[2]
    keys = key.shape[2] if mask.shape[3] == 1 else mask.shape[3]
    return mask.expand(mask.shape[0], heads, rows, keys)
