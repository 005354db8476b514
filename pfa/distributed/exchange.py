# SPDX-License-Identifier: Apache-2.0
"""All communication: agreeing on a call before it starts, and moving tensors between ranks.

A rank that fails stops the others: what waits for it ends with its process, or at the latest when
the group's timeout has passed, in an error that says which rank waited for what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup | DeviceMesh | None


def process_group(group: Group) -> dist.ProcessGroup:
    """The group itself; of a mesh the one of its only dimension; the default one for None."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "pfa.distributed needs a process group: call torch.distributed.init_process_group and "
            "start the processes with torchrun"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a process group or a mesh of 1 dimension, got {group.ndim}: take "
                'one of them, as mesh["name"]'
            )
        return group.get_group()
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup):
        raise ValueError("group must be one that this rank belongs to")
    return found


class Peers:
    """A rank's connection to the others of its group."""

    def __init__(self, group: Group) -> None:
        self.group = process_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"pfa.distributed: rank {self.rank} of {self.size} failed while {what}; another "
                f"rank has failed, or is slower than the group's timeout: {error}"
            ) from error

    def agree(self, arguments: dict[str, Any], error: Exception | None) -> None:
        """Raises on every rank if a rank has an error, or arguments unlike those of rank 0."""
        mine = (arguments, None if error is None else str(error))
        found: list[Any] = [mine]
        if self.size > 1:
            found = [None] * self.size
            with self.waiting("comparing arguments"):
                dist.all_gather_object(found, mine, group=self.group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise RuntimeError(f"pfa.distributed: rank {rank} refused its arguments: {text}")
        for rank, (theirs, _) in enumerate(found):
            for name, value in found[0][0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"pfa.distributed: {name} must be the same on all ranks, got {value} on "
                        f"rank 0 and {theirs[name]} on rank {rank}"
                    )

    def start_ring(self, send: torch.Tensor, receive: torch.Tensor) -> list[dist.Work]:
        """Sends to the next rank and receives from the one before, until finish()."""
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            dist.P2POp(dist.isend, _bytes(send), group=self.group, group_peer=following),
            dist.P2POp(dist.irecv, _bytes(receive), group=self.group, group_peer=before),
        ]
        with self.waiting("starting to exchange keys and values"):
            return dist.batch_isend_irecv(operations)

    def start_gather(self, send: torch.Tensor, receive: torch.Tensor) -> list[dist.Work]:
        """receive: (world, *send.shape), contiguous."""
        with self.waiting("starting to gather keys and values"):
            work = _all_gather(_bytes(receive), _bytes(send), group=self.group, async_op=True)
        return [work] if work is not None else []

    def finish(self, works: list[dist.Work], what: str) -> None:
        with self.waiting(what):
            for work in works:
                work.wait()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(world, *x.shape)"""
        everything = x.new_empty((self.size, *x.shape))
        if self.size == 1:
            return everything.copy_(x[None])
        self.finish(self.start_gather(x.contiguous(), everything), "gathering shards")
        return everything

    def trade(self, parts: torch.Tensor) -> torch.Tensor:
        """Part i of (world, ...) goes to rank i; returns what came, in the order of the ranks."""
        if self.size == 1:
            return parts
        came = torch.empty_like(parts)
        with self.waiting("trading heads for rows"):
            dist.all_to_all_single(_bytes(came), _bytes(parts), group=self.group)
        return came


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """For backends that do not know every dtype. x is contiguous."""
    return x.view(-1).view(torch.uint8)
