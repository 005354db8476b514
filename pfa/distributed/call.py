# SPDX-License-Identifier: Apache-2.0
"""One rank's arguments of a call over a sharded sequence: judged as the whole call, and as views
in which every layout is (B, rows, N, D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..api import _COMPRESSED_MODES, _compressed_mask, _typed
from .plan import FAR, ORDERS, STRATEGIES, Rule, Shape

_SEQUENCE_AXIS = {"BSH": 1, "BSND": 1, "BNSD": 2, "BNSD_BSND": 2}
_LENGTHS = ("actual_seq_lengths", "actual_seq_lengths_kv")
_SCALES = ("deq_scale1", "quant_scale1", "deq_scale2")
Options = dict[str, Any]


def signature(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
) -> dict[str, Any]:
    """What has to be the same on every rank, by the caller's names."""
    named = {"query": query, "key": key, "value": value, **options}
    return {name: _describe(x) for name, x in sorted(named.items())}


def _describe(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return tuple(x) if isinstance(x, list) else x
    text = f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    if x.is_cpu and x.numel() == 1 and not x.requires_grad:
        text += f" with {x.reshape(()).item()}"
    return text


def read_lengths(options: Options, query: torch.Tensor, key: torch.Tensor, world: int) -> Options:
    """Lengths as lists. Tensors are clamped, as the operator does; a GPU is waited for."""
    axis = _SEQUENCE_AXIS.get(options.get("input_layout", "BSH"), 1)
    read = dict(options)
    for name, x in zip(_LENGTHS, (query, key), strict=True):
        lengths = options.get(name)
        if isinstance(lengths, torch.Tensor) and x.dim() > axis:
            most = x.shape[axis] * world
            read[name] = [min(max(v, 0), most) for v in lengths.reshape(-1).tolist()]
    return read


class ShardedCall:
    """Raises what the operator raises for the whole call, and what only shards can do wrong."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: Options,
        world: int,
    ) -> None:
        self.world = world
        self.options = {name: x for name, x in options.items() if x is not None}
        self.layout = self.options.get("input_layout", "BSH")
        self.mode = self.options.get("sparse_mode", 0)
        self._judge(query, key, value)
        self._check_tensors({"query": query, "key": key, "value": value})
        heads = self.options.get("num_heads", 1)
        heads_k = self.options.get("num_key_value_heads", 0) or heads
        self.q = self._rows_first(query, heads)
        self.k, self.v = self._rows_first(key, heads_k), self._rows_first(value, heads_k)
        batch, rows, heads, head_dim = self.q.shape
        keys = self.k.shape[1] * world
        itemsize = query.element_size()
        self.shape = Shape(batch, heads, heads_k, rows * world, keys, head_dim, itemsize)
        self.part_dtype = torch.float16 if query.dtype == torch.int8 else query.dtype
        mask = self.options.get("atten_mask") if self.mode in (0, 1) else None
        self.mask = None if mask is None else _rank4(mask)[..., :rows, :keys]
        bias = self.options.get("pse_shift")
        self.bias = None if bias is None else bias[..., :rows, :keys]
        self.rule = self._rule()

    def check_split(self, strategy: str, order: str) -> None:
        """What the number of ranks has to divide."""
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order}")
        if order == "zigzag":
            for name, x in (("query", self.q), ("key", self.k)):
                if x.shape[1] % 2:
                    raise ValueError(
                        f"{name} must have an even number of rows on each rank for order zigzag, "
                        f"got {x.shape[1]}"
                    )
        heads = self.shape.num_heads, self.shape.num_heads_k
        if strategy == "ulysses" and (heads[0] % self.world or heads[1] % self.world):
            raise ValueError(
                "strategy ulysses needs num_heads and num_key_value_heads that are multiples of "
                f"the number of ranks {self.world}, got {heads[0]} and {heads[1]}"
            )

    def _judge(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """By the operator's own checks, on tensors of one element with the shapes of the whole."""
        axis = _SEQUENCE_AXIS.get(self.layout, 1)
        whole = {n: _stand_in(x) for n, x in self.options.items()}
        for name in ("atten_mask", "pse_shift"):
            x = self.options.get(name)
            if x is not None and x.dim() >= 2 and (name == "pse_shift" or self.mode in (0, 1)):
                whole[name] = _stand_in(x, x.dim() - 2, self.world)
        if self.mode in _COMPRESSED_MODES and "atten_mask" not in whole:
            whole["atten_mask"] = _compressed_mask(torch.empty(0))
        tensors = (_stand_in(x, axis, self.world) for x in (query, key, value))
        try:
            torch.ops.pfa._check(*tensors, **whole)
        except RuntimeError as error:
            raise _typed(error) from None

    def _check_tensors(self, tensors: Options) -> None:
        for name, x in (tensors | self.options).items():
            if not isinstance(x, torch.Tensor):
                continue
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError(
                    f"pfa.distributed is inference-only and has no gradient, but {name} requires "
                    "grad: detach it or call under torch.no_grad()"
                )
            scalar = x.is_cpu and x.numel() == 1
            if x.device != tensors["query"].device and not scalar:
                raise ValueError(
                    f"{name} must be on query's device {tensors['query'].device}, got {x.device}"
                )

    def _rule(self) -> Rule:
        """The table of docs/semantics.md, section 4."""
        lengths = []
        for name, full in zip(_LENGTHS, (self.shape.seqlen_q, self.shape.seqlen_k), strict=True):
            given: Sequence[int] = self.options.get(name) or [full]
            spread = list(given) * self.shape.batch if len(given) == 1 else list(given)
            lengths.append(tuple(spread[: self.shape.batch]))
        dense = self.mask is not None
        lo, hi = -FAR, FAR
        if self.mode == 4 or (self.mode == 0 and dense):
            lo = -min(self.options.get("pre_tokens", 2147483647), FAR)
            hi = min(self.options.get("next_tokens", 0), FAR)
            # What no sequence is long enough for is no limit.
            lo = -FAR if lo <= -self.shape.seqlen_q - self.shape.seqlen_k else lo
            hi = FAR if hi >= self.shape.seqlen_q + self.shape.seqlen_k else hi
        elif self.mode in (2, 3):
            hi = 0
        by_column = dense or self.bias is not None
        bottom_right = self.mode in (3, 4)
        return Rule(lengths[0], lengths[1], lo, hi, bottom_right, dense, by_column)

    def part_options(self) -> Options:
        """Of each call that computes a part, beside its mask. Results are 16 bits."""
        options = {name: self.options[name] for name in _SCALES if name in self.options}
        return options | {
            "scale_value": self.options.get("scale_value", 1.0),
            "input_layout": "BSND",
        }

    def _rows_first(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        if self.layout == "BSH":
            return x.view(*x.shape[:2], heads, x.shape[2] // heads)
        return x if self.layout == "BSND" else x.transpose(1, 2)

    def finish(self, sums: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """(B, rows, N, D) in float32 or 16 bits -> the output, in its dtype and layout."""
        if (scale := self.options.get("quant_scale2")) is not None:
            sums = self._quantise(sums.float(), scale.to(sums.device), lse)
        else:
            sums = sums.to(self.part_dtype)
        sums = sums.transpose(1, 2) if self.layout == "BNSD" else sums
        return sums.flatten(2) if self.layout == "BSH" else sums.contiguous()

    def _quantise(self, sums: torch.Tensor, scale: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        def channels(x: torch.Tensor) -> torch.Tensor:
            x = x.float().to(sums.device)
            return x.reshape(()) if x.numel() == 1 else x.reshape(sums.shape[2:])

        sums = sums * channels(scale)
        offset = self.options.get("quant_offset2")
        if offset is not None and offset.numel():
            sums = sums + channels(offset)
        sums = sums.round_().clamp_(-128, 127).nan_to_num_(nan=-128.0)
        has_key = (lse != -torch.inf).transpose(1, 2).unsqueeze(-1)
        return torch.where(has_key, sums, 0.0).to(torch.int8)


def _rank4(mask: torch.Tensor) -> torch.Tensor:
    """(1 or B, 1, rows, keys)"""
    if mask.dim() == 2:
        return mask[None, None]
    return mask[:, None] if mask.dim() == 3 else mask


def _stand_in(x: Any, axis: int = -1, factor: int = 1) -> Any:
    """One element in place of a tensor, its shape multiplied along an axis."""
    if not isinstance(x, torch.Tensor):
        return x
    shape = list(x.shape)
    if 0 <= axis < len(shape):
        shape[axis] *= factor
    return torch.empty(1, dtype=x.dtype).expand(shape) if shape else torch.empty((), dtype=x.dtype)
