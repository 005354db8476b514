# SPDX-License-Identifier: Apache-2.0
"""The attention backend "pfa" of diffusers.

Calls that the operator does not compute (float32, training, context parallelism, ...) go to
diffusers' own "native" backend, which is SDPA, and leave one debug line in the logger ``pfa``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ._sdpa import attend, check_mask, log_delegation, why_not


def register(name: str = "pfa") -> None:
    """Make the attention backend ``name`` known to diffusers.

    Parameters
    ----------
    name : str, default "pfa"
        What is asked for afterwards: ``model.set_attention_backend(name)``, or
        ``with diffusers.models.attention_dispatch.attention_backend(name):``. Lower case.

    Notes
    -----
    diffusers calls its backends experimental and keeps their names in an enumeration, to which
    this adds a member.

    Examples
    --------
    >>> import pfa.integrations.diffusers
    >>> pfa.integrations.diffusers.register()
    """
    if not isinstance(name, str) or not name or name != name.lower():
        raise ValueError(f"name must be a non-empty str in lower case, got {name!r}")
    taken = AttentionBackendName._value2member_map_.get(name)
    if taken is not None and _AttentionBackendRegistry._backends.get(taken) is not pfa_attention:
        raise ValueError(f"name must not be that of another backend, got {name!r}")
    member: Any = _member(name) if taken is None else taken
    _AttentionBackendRegistry.register(member)(pfa_attention)


def _member(name: str) -> Any:
    """A further member of the enumeration, which has no public way to get one."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[name] = member
    AttentionBackendName._member_names_.append(member._name_)
    return member


def pfa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """One attention call of a diffusers model.

    Parameters
    ----------
    query : Tensor, (B, S_q, N, D)
    key, value : Tensor, (B, S_kv, N_kv, D)
    attn_mask : Tensor, (B, S_kv) or broadcastable to (B, N, S_q, S_kv), optional
        bool with True = *keep*, or float to add to the scores.
    is_causal : bool
        Aligned at the top left; not together with a mask.
    scale : float, optional
        Factor of the scores; 1 / sqrt(D) where absent.

    Returns
    -------
    Tensor, (B, S_q, N, D)

    Raises
    ------
    ValueError, TypeError
        A wrong mask, or what no backend without log-sum-exp can do; the text names the argument.
    """
    if return_lse:
        raise ValueError("return_lse must be False for the attention backend pfa, got True")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal must be False where attn_mask is given, got True")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.shape == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None]  # per key, as diffusers' own backends read this shape
    masks = (check_mask("attn_mask", mask, q, k),)
    reason = why_not(q, k, v, masks, dropout_p)
    if reason is None and not enable_gqa and query.shape[2] != key.shape[2]:
        reason = f"{query.shape[2]} query heads over {key.shape[2]} key heads without enable_gqa"
    if _parallel_config is not None:
        reason = "context parallelism"
    if reason is None:
        return attend(q, k, v, masks, causal=is_causal, scale=scale)
    log_delegation("diffusers", "SDPA", reason)
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    out: torch.Tensor = native(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, enable_gqa=enable_gqa, _parallel_config=_parallel_config,
    )  # fmt: skip
    return out
