# SPDX-License-Identifier: Apache-2.0
"""Merges attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_HEADS_AXIS = {"BSH": 2, "BSND": 2, "BNSD": 1, "BNSD_BSND": 2}


def merge_states(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    *,
    input_layout: str = "BSH",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys, from that over each set.

    What ``torch.ops.pfa.forward_lse`` returns for the same queries and each set is weighted by
    its share of the softmax's sum. This is exact; what remains is the rounding of each of ``outs``
    to its dtype. The sums are float32 and go through the parts in their order, so that the same
    parts give the same bits.

    Parameters
    ----------
    outs : sequence of Tensor of float16, bfloat16 or float32
        Outputs in ``input_layout``, of one shape.
    lses : sequence of Tensor of float32, (B, N, Sq)
        The ``softmax_lse`` of each; -inf where a row saw no key of that part.
    input_layout : {"BSH", "BSND", "BNSD", "BNSD_BSND"}
        That of the calls which gave ``outs``: outputs of BNSD_BSND are (B, Sq, N, D).
    out : Tensor, optional
        Of ``outs``' shape, to write to; may be ``outs[0]``. A new tensor of ``outs[0]``'s dtype
        otherwise.

    Returns
    -------
    (Tensor, Tensor)
        Output and softmax_lse of the union. A row that saw no key in any part is zeros and -inf.

    Raises
    ------
    ValueError, TypeError
        Shapes or dtypes that do not fit; the text names the argument.

    Examples
    --------
    >>> import torch, pfa
    >>> q, k = torch.ones(1, 1, 2).half(), torch.tensor([[[0.0, 0], [0, 0], [9, 9]]]).half()
    >>> parts = [torch.ops.pfa.forward_lse(q, x, x) for x in (k[:, :1], k[:, 1:])]
    >>> pfa.merge_states(*zip(*parts))[0]
    tensor([[[9., 9.]]], dtype=torch.float16)
    """
    _check(outs, lses, input_layout, out)
    peak = lses[0]
    for lse in lses[1:]:
        peak = torch.maximum(peak, lse)
    base = torch.where(peak == -torch.inf, 0.0, peak)  # -inf minus itself would be NaN
    weights = [torch.exp(lse - base) for lse in lses]
    total = torch.stack(weights).sum(0)
    divisor = torch.where(total == 0, 1.0, total)
    shares = [_beside_channels(weight / divisor, input_layout) for weight in weights]
    sums = out if out is not None and out.dtype == torch.float32 else None
    heads = [_split_heads(x, lses[0].shape[1], input_layout) for x in outs]
    into = None if sums is None else _split_heads(sums, lses[0].shape[1], input_layout)
    merged = torch.mul(heads[0], shares[0], out=into) if into is not None else heads[0] * shares[0]
    for part, share in zip(heads[1:], shares[1:], strict=True):
        merged.addcmul_(part, share)
    lse = base + torch.log(total)
    if sums is not None:
        return sums, lse
    merged = merged.reshape(outs[0].shape)
    return (merged.to(outs[0].dtype) if out is None else out.copy_(merged)), lse


def _beside_channels(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(B, N, Sq) -> what broadcasts over an output whose heads are split."""
    return (x if layout == "BNSD" else x.transpose(1, 2)).unsqueeze(-1)


def _split_heads(x: torch.Tensor, heads: int, layout: str) -> torch.Tensor:
    return x.view(*x.shape[:-1], heads, -1) if layout == "BSH" else x


def _check(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    layout: str,
    out: torch.Tensor | None,
) -> None:
    if layout not in _HEADS_AXIS:
        raise ValueError(f"input_layout must be BSH, BSND, BNSD or BNSD_BSND, got {layout}")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, at least 1: {len(outs)}, {len(lses)}")
    shape = outs[0].shape
    if len(shape) != (3 if layout == "BSH" else 4):
        raise ValueError(f"outs must have the rank of layout {layout}, got shape {tuple(shape)}")
    heads = lses[0].shape[1] if lses[0].dim() == 3 else 0
    rows = shape[2] if layout == "BNSD" else shape[1]
    fits = heads > 0 and (
        shape[2] % heads == 0 if layout == "BSH" else shape[_HEADS_AXIS[layout]] == heads
    )
    if not fits or lses[0].shape != (shape[0], heads, rows):
        raise ValueError(
            f"lses must have shape (B, N, Sq) for outs of shape {tuple(shape)} in layout {layout}, "
            f"got {tuple(lses[0].shape)}"
        )
    for i, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        if part.shape != shape or lse.shape != lses[0].shape:
            raise ValueError(
                f"outs[{i}] and lses[{i}] must have the shapes of the first, {tuple(shape)} and "
                f"{tuple(lses[0].shape)}, got {tuple(part.shape)} and {tuple(lse.shape)}"
            )
        if part.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"outs[{i}] must have dtype float16, bfloat16 or float32, got {part.dtype}"
            )
        if lse.dtype != torch.float32:
            raise TypeError(f"lses[{i}] must have dtype float32, got {lse.dtype}")
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")
