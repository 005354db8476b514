# SPDX-License-Identifier: Apache-2.0
"""Naive attention in fp64, written from the formulas of docs/semantics.md.

It takes the operator's own arguments, materialises every score and shares nothing with csrc, so
that a mistake has to be made twice to go unseen. test_reference.py checks it against torch and by
hand. Shapes below: B batch, N heads, Sq and Sk rows of query and key, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAR = 1 << 40  # farther than any sequence is long; tokens are clamped to it, so that sums fit int64


def split_heads(x: Tensor, heads: int, layout: str) -> Tensor:
    """Any layout -> (B, N, S, D), a view."""
    if layout == "BSH":
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x.transpose(1, 2) if layout == "BSND" else x


def split_output(x: Tensor, heads: int, layout: str) -> Tensor:
    """The operator's output -> (B, N, Sq, D), a view."""
    return split_heads(x, heads, "BSND" if layout == "BNSD_BSND" else layout)


def join_heads(x: Tensor, layout: str) -> Tensor:
    """(B, N, Sq, D) -> the output of a layout."""
    if layout == "BNSD":
        return x
    return x.transpose(1, 2).flatten(2) if layout == "BSH" else x.transpose(1, 2)


def lengths(values: Any, batch: int, full: int) -> list[int]:
    """Valid length of every batch element."""
    if values is None or len(values) == 0:
        return [full] * batch
    values = [int(v) for v in values]
    return values * batch if len(values) == 1 else values[:batch]


def allowed(i, j, *, mode, masked, pre, nxt, q, kv):
    """May query i see key j? `masked` is None without a mask. Works on ints and on tensors."""
    inside = (i < q) & (j < kv)
    anchor = i + (kv - q)  # the column under the bottom right corner's diagonal
    if mode == 0 and masked is None:
        return inside
    if mode == 0:
        return inside & (i - pre <= j) & (j <= i + nxt) & (masked == 0)
    if mode == 1:
        return inside & (masked == 0)
    if mode == 2:
        return inside & (j <= i)
    if mode == 3:
        return inside & (j <= anchor)
    return inside & (anchor - pre <= j) & (j <= anchor + nxt)


def read_deq_scale(scale: Tensor | None) -> float:
    if scale is None:
        return 1.0
    if scale.dtype in (torch.int64, torch.uint64):
        low = scale.reshape(-1).view(torch.int64) & 0xFFFFFFFF
        low = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
        return low.view(torch.float32).double().item()
    return scale.double().item()


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros((), dtype=x.dtype))


@dataclass
class Parts:
    """A call with layouts, lengths, defaults and GQA resolved. NaN and Inf are replaced by 0."""

    q: Tensor  # (B, N, Sq, D), in the caller's dtype
    k: Tensor  # (B, N, Sk, D)
    v: Tensor  # (B, N, Sk, D)
    bias: Tensor | None  # (B, N, Sq, Sk)
    visible: Tensor  # (B, N, Sq, Sk) bool: takes part in the softmax
    free: Tensor  # (B, N, Sq) bool: sees a NaN or an Inf, the contract does not fix the row
    nan: Tensor  # (B, N, Sq) bool: sees a NaN or +Inf of pse_shift, the row has to be NaN
    scale: float
    descale_s: float
    scale_p: float
    descale_o: float
    scale_out: Tensor | None  # (1, N | 1, 1, D | 1), fp64; None: the output is not int8
    offset_out: Tensor
    band: tuple[int, int, bool]  # lo, hi, anchored at the bottom right; the mask comes on top
    q_lens: list[int]
    k_lens: list[int]

    @property
    def seen(self) -> Tensor:
        """(B, N, Sq, 1) bool: rows that have at least one visible key."""
        return self.visible.any(-1, keepdim=True)

    def scores(self) -> Tensor:
        """(B, N, Sq, Sk) fp64, -inf where not visible."""
        s = (self.q.double() @ self.k.double().mT) * self.descale_s * self.scale
        if self.bias is not None:
            s = s + self.bias.double()
        return s.masked_fill(~self.visible, -torch.inf)

    def requantise(self, o: Tensor) -> Tensor:
        """(B, N, Sq, D) fp64 -> what the output holds, before it is rounded and saturated."""
        if self.scale_out is not None:
            o = o * self.scale_out + self.offset_out
        return torch.where(self.seen, o, 0.0)


def _visible(
    batch: int,
    sq: int,
    sk: int,
    mask: Tensor | None,
    q_lens: list[int],
    k_lens: list[int],
    **rule: Any,
) -> Tensor:
    """(B, Sq, Sk) bool from the table of semantics.md, section 4."""
    masked = [None] * batch
    if rule["mode"] in (0, 1) and mask is not None:
        corner = mask[..., :sq, :sk].reshape(-1, sq, sk).to(torch.int64).expand(batch, -1, -1)
        masked = list(corner)
    i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    out = torch.empty(batch, sq, sk, dtype=torch.bool)
    for b in range(batch):
        out[b] = allowed(i, j, masked=masked[b], q=q_lens[b], kv=k_lens[b], **rule)
    return out


def _channels(x: Tensor | None, heads: int, empty: float) -> Tensor:
    """A per-tensor or per-channel scale -> broadcastable to (B, N, Sq, D); channels are (n, d)."""
    if x is None or x.numel() == 0:
        return torch.tensor(empty, dtype=torch.float64)
    x = x.double().reshape(-1)
    return x.reshape(()) if x.numel() == 1 else x.reshape(1, heads, 1, -1)


def parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Any = None,
    deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Any = None,
    sparse_mode: int = 0,
) -> Parts:
    heads_k = num_key_value_heads or num_heads
    q = split_heads(query, num_heads, input_layout)
    k, v = (
        split_heads(x, heads_k, input_layout).repeat_interleave(num_heads // heads_k, dim=1)
        for x in (key, value)
    )
    batch, _, sq, _ = q.shape
    sk = k.shape[2]
    rule = {
        "mode": sparse_mode,
        "pre": max(-FAR, min(pre_tokens, FAR)),
        "nxt": max(-FAR, min(next_tokens, FAR)),
    }
    q_lens = lengths(actual_seq_lengths, batch, sq)
    k_lens = lengths(actual_seq_lengths_kv, batch, sk)
    visible = _visible(batch, sq, sk, atten_mask, q_lens, k_lens, **rule)
    visible = visible[:, None].expand(-1, num_heads, -1, -1)
    nan = torch.zeros(batch, num_heads, sq, dtype=torch.bool)
    bias = None
    if pse_shift is not None:
        bias = pse_shift[..., :sq, :sk].expand(batch, -1, -1, -1)
        visible = visible & (bias != -torch.inf)
        nan = (visible & ~bias.isfinite()).any(-1)
        bias = finite(bias)
    bad = [~x.double().isfinite().all(-1) for x in (q, k, v)]  # (B, N, S)
    sees_bad_key = (visible & (bad[1] | bad[2])[:, :, None, :]).any(-1)
    free = nan | sees_bad_key | (bad[0] & visible.any(-1))
    return Parts(
        q=finite(q),
        k=finite(k),
        v=finite(v),
        bias=bias,
        visible=visible,
        free=free,
        nan=nan,
        scale=scale_value,
        descale_s=read_deq_scale(deq_scale1),
        scale_p=1.0 if quant_scale1 is None else quant_scale1.double().item(),
        descale_o=read_deq_scale(deq_scale2),
        scale_out=None if quant_scale2 is None else _channels(quant_scale2, num_heads, 1.0),
        offset_out=_channels(quant_offset2, num_heads, 0.0),
        band=_band(has_mask=atten_mask is not None, **rule),
        q_lens=q_lens,
        k_lens=k_lens,
    )


def _band(*, mode: int, pre: int, nxt: int, has_mask: bool) -> tuple[int, int, bool]:
    if mode == 4 or (mode == 0 and has_mask):
        return -pre, nxt, mode == 4
    return -FAR, 0 if mode in (2, 3) else FAR, mode == 3


def exact(p: Parts) -> Tensor:
    """(B, N, Sq, D) fp64, P not quantised (of int8 inputs as of all others), before requantise."""
    weights = softmax(p.scores())
    return (weights @ p.v.double()) * (p.scale_p * p.descale_o)


def lse(p: Parts) -> Tensor:
    """(B, N, Sq) fp64: log of the sum of exp(score), -inf for a row without a key."""
    return torch.logsumexp(p.scores(), -1)


def softmax(s: Tensor) -> Tensor:
    """Rows without a finite score are zeros."""
    if s.shape[-1] == 0:
        return s
    peak = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(peak == -torch.inf, 0.0, peak))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


@dataclass(frozen=True)
class Plan:
    """How a backend cuts the keys of a row; it decides which roundings an int8 P sees."""

    block_m: int  # rows that share their tiles
    block_n: int  # keys of a tile; tiles start at multiples of it
    num_splits: int = 1  # runs of tiles that have a running maximum each
    cut_blocks: int = 0  # of the last blocks alone, whose tiles are dealt out in equal shares
    cut_tiles: int = 0  # such a share
    batch_innermost: bool = (
        False  # blocks are numbered (head, rows, batch), not (batch, head, rows)
    )
    whole_sums: bool = False  # sums of P V are integers, rounded where a maximum grows


def tiled(p: Parts, plan: Plan | None = None, p_error: float = 0.0) -> tuple[Tensor, Tensor]:
    """The int8 chain of semantics.md, section 7, tile by tile.

    None is one tile: the reference. Returns (o, slack), both (B, N, Sq, D) fp64 and before
    requantise. slack bounds how far o moves when every exp is off by up to a relative `p_error`:
    only a P that lies that close to a rounding boundary can land on the other integer. With
    whole_sums, o may also be half a unit off for each maximum that grew.
    """
    keys = p.k.shape[2]
    plan = plan or Plan(max(p.q.shape[2], 1), max(keys, 1))
    borders = cuts(p, plan)
    scores = p.scores()
    runs = []
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        j = torch.arange(keys)
        inside = (first[..., None] <= j) & (j < last[..., None])
        s = scores.masked_fill(~inside, -torch.inf)
        runs.append(_run(p, s, plan, p_error))
    peak = torch.stack([run[0] for run in runs]).amax(0)
    total, o, slack = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for run_peak, run_total, run_o, run_slack in runs:
        weight = torch.exp(run_peak - torch.where(peak == -torch.inf, 0.0, peak))
        total, o, slack = total + weight * run_total, o + weight * run_o, slack + weight * run_slack
    total = torch.where(total == 0, 1.0, total)
    return (o / total).expand(p.q.shape), (slack / total).expand(p.q.shape)


def cuts(p: Parts, plan: Plan) -> list[Tensor]:
    """Tensors (B, N or 1, Sq): the keys at which each row's runs begin and end.

    The tiles that the row's block may see by band and length, cut into nearly equal runs.
    """
    if plan.cut_blocks:
        return _cuts_of_last_blocks(p, plan)
    sq = p.q.shape[2]
    lo, hi, bottom_right = p.band
    begin = torch.arange(sq) // plan.block_m * plan.block_m
    first, count = [], []
    for rows, keys in zip(p.q_lens, p.k_lens, strict=True):
        anchor = keys - rows if bottom_right else 0
        last_row = (begin + plan.block_m).clamp(max=rows) - 1
        low = (begin + anchor + lo).clamp(0, keys)
        high = (last_row + anchor + hi + 1).clamp(0, keys)
        high = torch.where(last_row < begin, low, torch.maximum(low, high))
        tiles = (high + plan.block_n - 1) // plan.block_n - low // plan.block_n
        first.append(low // plan.block_n)
        count.append(torch.where(high > low, tiles, 0))
    start, tiles = torch.stack(first), torch.stack(count)
    return [
        (start + tiles * split // plan.num_splits)[:, None] * plan.block_n
        for split in range(plan.num_splits + 1)
    ]


def _cuts_of_last_blocks(p: Parts, plan: Plan) -> list[Tensor]:
    """All blocks see all keys, and all but the last ones are one run."""
    batch, heads, sq, _ = p.q.shape
    tiles, blocks = -(-p.k.shape[2] // plan.block_n), -(-sq // plan.block_m)
    number = torch.arange(batch * heads * blocks)
    if plan.batch_innermost:
        number = number.view(heads, blocks, batch).permute(2, 0, 1)
    number = number.reshape(batch, heads, blocks)[..., torch.arange(sq) // plan.block_m]
    cut = number - (batch * heads * blocks - plan.cut_blocks)
    first = cut * tiles  # tile of the block, counted from the first cut block's on
    most_runs = -(-(tiles - 1) // plan.cut_tiles) + 1
    borders = []
    for run in range(most_runs + 1):
        end = ((first // plan.cut_tiles + run) * plan.cut_tiles - first).clamp(0, tiles)
        borders.append(torch.where(cut < 0, tiles * min(run, 1), end) * plan.block_n)
    return borders


def _run(p: Parts, s: Tensor, plan: Plan, p_error: float) -> tuple[Tensor, ...]:
    """One running maximum over all tiles: (peak, total, o, slack), o and slack not normalised."""
    v, width = p.v.double(), plan.block_n
    keys = s.shape[-1]
    peak = torch.full((*s.shape[:-1], 1), -torch.inf, dtype=torch.float64)
    total, o, slack = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for start in range(0, keys, width):
        part = slice(start, start + width)
        new_peak = torch.maximum(peak, s[..., part].amax(-1, keepdim=True))
        shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        rescale = torch.exp(peak - shift)
        e = torch.exp(s[..., part] - shift)
        p8 = torch.round(e * p.scale_p).clamp(-128, 127)  # torch.round is half to even
        low, high = (torch.round(e * p.scale_p * (1 + d)) for d in (-p_error, p_error))
        flips = (high.clamp(-128, 127) - low.clamp(-128, 127)).abs()
        total = total * rescale + e.sum(-1, keepdim=True)
        o = o * rescale + (p8 @ v[..., part, :]) * p.descale_o
        slack = slack * rescale + (flips @ v[..., part, :].abs()) * abs(p.descale_o)
        if plan.whole_sums:
            slack = slack + ((rescale > 0) & (rescale < 1)) * (0.5 * abs(p.descale_o))
        peak = new_peak
    return peak, total, o, slack


def plain_scores(p: Parts) -> Tensor:
    """(B, N, Sq, Sk) as a user would write them in torch: 16 bits, or float32 of int8 inputs."""
    exact = p.q.dtype == torch.int8
    s = (p.q.float() @ p.k.float().mT) * p.descale_s if exact else p.q @ p.k.mT
    s = s * p.scale
    if p.bias is not None:
        s = s + p.bias
    return s.masked_fill(~p.visible, -torch.inf)


def plain_torch(p: Parts) -> Tensor:
    """What a user would write in torch in the inputs' dtype; (B, N, Sq, D) before requantise.

    Its error against `exact` is the yardstick for the operator's.
    """
    weights = torch.softmax(plain_scores(p), -1)
    return torch.where(p.seen, weights, 0.0) @ p.v
