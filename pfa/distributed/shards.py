# SPDX-License-Identifier: Apache-2.0
"""From a whole tensor to a rank's rows of it, and back."""

from __future__ import annotations

import torch

from .context_parallel import place
from .exchange import Group, Peers
from .plan import ORDERS, chunks


def shard_sequence(
    x: torch.Tensor, dim: int, *, group: Group = None, order: str = "contiguous"
) -> torch.Tensor:
    """The calling rank's rows of a tensor that every rank has; of positions, its positions.

    Parameters
    ----------
    x : Tensor
    dim : int
        Its dimension of rows. Their number must be a multiple of the number of ranks, of twice it
        with zigzag: pad the sequence, and pass its true length in ``actual_seq_lengths``.
    group, order
        As for :func:`context_parallel_forward`.

    Returns
    -------
    Tensor
        Fresh and contiguous.

    Raises
    ------
    ValueError
        The rows cannot be spread evenly.
    """
    peers = Peers(group)
    _check_order(order)
    parts = peers.size * (2 if order == "zigzag" else 1)
    if x.shape[dim] % parts:
        raise ValueError(
            f"x must have a multiple of {parts} rows in dimension {dim} for {peers.size} ranks and "
            f"order {order}, got {x.shape[dim]}: pad it"
        )
    own = chunks(x.shape[dim], peers.size, peers.rank, order)
    return torch.cat([x.narrow(dim, chunk.start, chunk.size) for chunk in own], dim)


def unshard_sequence(
    x: torch.Tensor, dim: int, *, group: Group = None, order: str = "contiguous"
) -> torch.Tensor:
    """The whole tensor on every rank, from each rank's rows: the reverse of shard_sequence."""
    peers = Peers(group)
    _check_order(order)
    return place(peers.gather(x), dim % x.dim(), order)


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order}")
