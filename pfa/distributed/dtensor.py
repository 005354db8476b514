# SPDX-License-Identifier: Apache-2.0
"""The operators on DTensors whose batch or heads are sharded: every rank computes its own.

Rules of DTensor's own kind cannot serve here: a rank with a part of the heads has to be called with
its number of them. Importing pfa.distributed registers this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

_HEADS_AXIS = {"BSH": 2, "BSND": 2, "BNSD": 1, "BNSD_BSND": 1}
_LENGTHS = ("actual_seq_lengths", "actual_seq_lengths_kv")
_PER_CHANNEL = ("quant_scale2", "quant_offset2")
_OPERATORS = ("forward", "forward.tensor_lens", "forward_lse", "forward_lse.tensor_lens")


class _Sharding:
    """What each dimension of the mesh does to query: "batch", "heads" or "" (the same on all)."""

    def __init__(self, query: DTensor, options: dict[str, Any]) -> None:
        self.mesh: DeviceMesh = query.device_mesh
        self.layout = options.get("input_layout", "BSH")
        self.batch = query.shape[0]
        self.heads_axis = _HEADS_AXIS.get(self.layout, 1)
        self.kinds = [self._kind(placement) for placement in query.placements]
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise RuntimeError("pfa: this rank is not part of query's mesh")
        self.coordinate: Sequence[int] = coordinate

    def _kind(self, placement: Placement) -> str:
        if placement.is_replicate() or isinstance(placement, Partial):
            return ""
        if type(placement) is Shard and placement.dim == 0:
            return "batch"
        if type(placement) is Shard and placement.dim == self.heads_axis:
            return "heads"
        raise ValueError(
            "pfa.forward: query must be a DTensor sharded along its batch or its heads (dimension "
            f"0 or {self.heads_axis} for input_layout {self.layout}), got {placement}: "
            "redistribute it, or, for a sharded sequence, use "
            "pfa.distributed.context_parallel_forward"
        )

    def placements(self, *, batch: int | None, heads: int | None) -> list[Placement]:
        """Of a tensor that has these dimensions of batch and of heads."""
        dims = {"batch": batch, "heads": heads, "": None}
        found = [dims[kind] for kind in self.kinds]
        return [Replicate() if dim is None else Shard(dim) for dim in found]

    def part(self, kind: str, count: int) -> slice:
        """Those of `count` that are this rank's. Shards are chunks, the last may be shorter."""
        first, last = 0, count
        for i, own in enumerate(self.kinds):
            if own == kind:
                size = -(-(last - first) // self.mesh.size(i))
                first = min(first + self.coordinate[i] * size, last)
                last = min(first + size, last)
        return slice(first, last)

    @property
    def head_parts(self) -> int:
        return math.prod(self.mesh.size(i) for i, kind in enumerate(self.kinds) if kind == "heads")


def _forward(
    cls: Any,
    operator: Any,
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
    options = {name: x for name, x in given.items() if name not in ("query", "key", "value")}
    for name in ("query", "key", "value"):
        if not isinstance(given.get(name), DTensor):
            raise ValueError(
                f"pfa.forward: {name} must be a DTensor when another argument is one, got "
                f"{type(given.get(name)).__name__}"
            )
    sharding = _Sharding(given["query"], options)
    local = [
        _to_local(name, given[name], sharding, sharding.placements(batch=0, heads=axis))
        for name, axis in dict.fromkeys(("query", "key", "value"), sharding.heads_axis).items()
    ]
    result = operator(*local, **_local_options(options, sharding))
    axis = 1 if sharding.layout == "BNSD" else 2
    shape = list(given["query"].shape)
    if sharding.layout == "BNSD_BSND":
        shape[1], shape[2] = shape[2], shape[1]
    out = result[0] if isinstance(result, tuple) else result
    whole = _from_local(out, sharding, shape, sharding.placements(batch=0, heads=axis))
    if not isinstance(result, tuple):
        return whole
    lse_shape = [shape[0], options.get("num_heads", 1), shape[2 if axis == 1 else 1]]
    lse = _from_local(result[1], sharding, lse_shape, sharding.placements(batch=0, heads=1))
    return whole, lse


def _from_local(
    x: torch.Tensor, sharding: _Sharding, shape: list[int], placements: list[Placement]
) -> DTensor:
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        x,
        sharding.mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def _local_options(options: dict[str, Any], sharding: _Sharding) -> dict[str, Any]:
    local = dict(options)
    parts = sharding.head_parts
    for name in ("num_heads", "num_key_value_heads"):
        count = options.get(name, 1 if name == "num_heads" else 0)
        if count % parts:
            raise ValueError(
                f"pfa.forward: {name} must be a multiple of {parts}, by which query's heads are "
                f"sharded, got {count}"
            )
        local[name] = count // parts
    for name, x in options.items():
        if name in _LENGTHS:
            local[name] = _lengths(name, x, sharding)
        elif isinstance(x, torch.Tensor):
            local[name] = _local_tensor(name, x, options.get("num_heads", 1), sharding)
    return local


def _lengths(name: str, x: Any, sharding: _Sharding) -> Any:
    if isinstance(x, DTensor):
        x = _to_local(name, x, sharding, sharding.placements(batch=None, heads=None))
    if x is None or len(x) <= 1:
        return x
    return x[: sharding.batch][sharding.part("batch", sharding.batch)]


def _local_tensor(name: str, x: torch.Tensor, heads: int, sharding: _Sharding) -> torch.Tensor:
    """Tensors that are no DTensors are the same on all ranks."""
    if name in _PER_CHANNEL and x.numel() > 1:
        x = _to_local(name, x, sharding, sharding.placements(batch=None, heads=None))
        return x.reshape(heads, -1)[sharding.part("heads", heads)].reshape(-1)
    batched = x.dim() > 2 and x.shape[0] > 1  # a mask or a bias of its own for each element
    by_head = 1 if name == "pse_shift" and x.dim() == 4 else None
    if isinstance(x, DTensor):
        placements = sharding.placements(batch=0 if batched else None, heads=by_head)
        return _to_local(name, x, sharding, placements)
    if batched:
        x = x[sharding.part("batch", x.shape[0])]
    return x if by_head is None else x[:, sharding.part("heads", x.shape[1])]


def _to_local(
    name: str, x: torch.Tensor, sharding: _Sharding, placements: list[Placement]
) -> torch.Tensor:
    if not isinstance(x, DTensor):
        return x
    if x.device_mesh != sharding.mesh:
        raise ValueError(
            f"pfa.forward: {name} must be on query's mesh {sharding.mesh}, got {x.device_mesh}"
        )
    return x.redistribute(placements=placements).to_local()


for _operator in _OPERATORS:
    torch.library.register_torch_dispatch(f"pfa::{_operator}", DTensor, _forward)
