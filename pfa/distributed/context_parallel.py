# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence whose rows are spread over the ranks of a group."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .. import _library
from ..api import _compressed_mask
from ..merge import merge_states
from . import call as calls
from .exchange import Group, Peers
from .plan import Step, Work, chunks, key_heads, make_plan


@dataclass
class StepReport:
    """What a step did, by the clock of the host: on a GPU only the counts say something."""

    flops: int  # of both products, for the pairs that the band leaves
    received_bytes: int = 0
    compute_seconds: float = 0.0
    waiting_seconds: float = 0.0  # for other ranks


def context_parallel_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: Group = None,
    strategy: str = "all_gather",
    order: str = "contiguous",
    return_lse: bool = False,
    report: list[StepReport] | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence that the ranks of a group hold in equal shards.

    Every rank passes its rows of ``query``, ``key`` and ``value`` and gets its rows of what
    :func:`pfa.prompt_flash_attention` would return for the whole tensors. All ranks of the group
    have to call it, with the same arguments but for the tensors' contents; that is compared before
    any of them is sent.

    Parameters
    ----------
    query, key, value : Tensor
        As for ``prompt_flash_attention``, with 1 / world of the rows: see :func:`shard_sequence`.
    group : ProcessGroup or DeviceMesh of one dimension, optional
        The default group if None.
    strategy : {"all_gather", "ring", "ulysses"}
        all_gather: keys and values of some heads come from all ranks while others are computed.
        ring: they pass from rank to rank while those that a rank has are used; it holds two shards
        of them, and merges partial results. ulysses: each rank computes a part of the heads for
        all rows; the number of ranks must divide both numbers of heads.
    order : {"contiguous", "zigzag"}
        Which rows a rank holds: the rank-th part, or of 2 * world parts the rank-th from either
        end, which gives all ranks the same work under a causal mask.
    return_lse : bool
        Return also the log of the softmax's sums, (B, N, rows) float32.
    report : list, optional
        Gets a :class:`StepReport` for each step.
    **options
        The other arguments of ``prompt_flash_attention``, for the whole sequence: lengths, tokens
        and modes count rows of all ranks. ``pse_shift`` and a mask of modes 0 and 1 have the rank's
        own rows, and the columns of all ranks in the order of the sequence. Lengths in tensors are
        read, which waits for a GPU.

    Returns
    -------
    Tensor, or (Tensor, Tensor) with ``return_lse``
        The rank's rows, fresh and contiguous.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As ``prompt_flash_attention``, judged for the whole call; on every rank, the others name
        the rank that refused (RuntimeError) or the argument that differs (ValueError).
    RuntimeError
        Another rank failed, or was slower than the group's timeout.
    """
    _library.require()
    peers = Peers(group)
    settings = {"strategy": strategy, "order": order}
    error: Exception | None = None
    try:
        options = calls.read_lengths(options, query, key, peers.size)
        call = calls.ShardedCall(query, key, value, options, peers.size)
        call.check_split(strategy, order)
    except Exception as caught:  # of whatever kind, the other ranks have to hear of it
        error = caught
    peers.agree(calls.signature(query, key, value, options | settings), error)
    runner = _Runner(call, peers, order, report)
    with torch.no_grad():
        out, lse = runner.run(strategy)
    return (out, lse) if return_lse else out


class _Runner:
    def __init__(
        self, call: calls.ShardedCall, peers: Peers, order: str, report: list[StepReport] | None
    ) -> None:
        self._call, self._peers, self._order = call, peers, order
        self._report: list[StepReport] = [] if report is None else report
        self._mask, self._bias = call.mask, call.bias

    def run(self, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
        call, shape = self._call, self._call.shape
        rows = call.q.shape[1]
        if call.q.numel() == 0 or shape.seqlen_k == 0:
            sums, lse = self._new_sums(rows, shape.num_heads, call.part_dtype)
            return call.finish(sums, lse), lse
        plan = make_plan(
            shape, call.rule, self._peers.size, self._peers.rank, strategy, self._order
        )
        merges = any(work.merges for step in plan for work in step.works)
        dtype = torch.float32 if merges else call.part_dtype
        heads = shape.num_heads // (self._peers.size if strategy == "ulysses" else 1)
        own = rows if strategy != "ulysses" else shape.seqlen_q
        sums, lse = self._new_sums(own, heads, dtype)
        sums, lse = getattr(self, "_" + strategy)(plan, sums, lse)
        return call.finish(sums, lse), lse

    def _new_sums(
        self, rows: int, heads: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = self._call.q
        sums = q.new_zeros((q.shape[0], rows, heads, q.shape[3]), dtype=dtype)
        lse = q.new_full((q.shape[0], heads, rows), -torch.inf, dtype=torch.float32)
        return sums, lse

    def _ring(
        self, plan: tuple[Step, ...], sums: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call, peers = self._call, self._peers
        if len(plan) == 1:
            self._compute(plan[0], call.q, (call.k, call.v), sums, lse)
            return sums, lse
        here = torch.stack((call.k, call.v))
        coming = torch.empty_like(here)
        for t, step in enumerate(plan):
            more = t + 1 < len(plan)
            under_way = peers.start_ring(here, coming) if more else []
            done = self._compute(step, call.q, (here[0], here[1]), sums, lse)
            if more:
                what = f"passing keys and values on in step {t} of {len(plan)} of the ring"
                self._finish(under_way, what, done, coming.nbytes)
            here, coming = coming, here
        return sums, lse

    def _all_gather(
        self, plan: tuple[Step, ...], sums: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call, peers = self._call, self._peers
        if peers.size == 1:
            for step in plan:
                first, last = key_heads(call.shape, step.heads)
                self._compute(
                    step, call.q, (call.k[:, :, first:last], call.v[:, :, first:last]), sums, lse
                )
            return sums, lse

        def start(step: Step) -> tuple[list[Any], torch.Tensor]:
            first, last = key_heads(call.shape, step.heads)
            own = torch.stack((call.k[:, :, first:last], call.v[:, :, first:last]))
            everything = own.new_empty((peers.size, *own.shape))
            return peers.start_gather(own, everything), everything

        under_way, came = start(plan[0])
        for i, step in enumerate(plan):
            done = StepReport(0)
            what = f"gathering keys and values of heads {step.heads[0]} to {step.heads[1] - 1}"
            self._finish(under_way, what, done, came.nbytes - came[0].nbytes)
            k, v = place(came, 2, self._order)
            del came  # two steps' keys in memory, not three
            if i + 1 < len(plan):
                under_way, came = start(plan[i + 1])
            self._compute(step, call.q, (k, v), sums, lse, done)
        return sums, lse

    def _ulysses(
        self, plan: tuple[Step, ...], sums: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sums and lse: of the rank's heads and all rows."""
        call, world = self._call, self._peers.size
        done = StepReport(0)

        def by_heads(x: torch.Tensor, axis: int) -> torch.Tensor:
            return torch.stack(x.chunk(world, axis))

        parts = [by_heads(x, 2) for x in (call.q, call.k, call.v)]
        came = self._trade(torch.cat([x.flatten(1) for x in parts], 1), done)
        pieces = torch.split(came, [x[0].numel() for x in parts], 1)
        q, k, v = (
            place(piece.reshape(x.shape), 1, self._order)
            for piece, x in zip(pieces, parts, strict=True)
        )
        if call.mask is not None:
            self._mask = place(self._peers.gather(call.mask), 2, self._order)
            done.received_bytes += self._mask.nbytes - call.mask.nbytes
        if call.bias is not None:
            self._bias = place(self._trade(by_heads(call.bias, 1), done), 2, self._order)
        self._compute(plan[0], q, (k, v), sums, lse, done)
        sums = self._trade(cut(sums, 1, world, self._order), done)
        lse = self._trade(cut(lse, 2, world, self._order), done)
        return sums.movedim(0, 2).flatten(2, 3), lse.movedim(0, 1).flatten(1, 2).contiguous()

    def _trade(self, parts: torch.Tensor, done: StepReport) -> torch.Tensor:
        start = time.perf_counter()
        came = self._peers.trade(parts)
        done.waiting_seconds += time.perf_counter() - start
        done.received_bytes += parts.nbytes - parts[0].nbytes
        return came

    def _finish(self, under_way: list[Any], what: str, done: StepReport, nbytes: int) -> None:
        start = time.perf_counter()
        self._peers.finish(under_way, what)
        done.waiting_seconds += time.perf_counter() - start
        done.received_bytes += nbytes

    def _compute(
        self,
        step: Step,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        sums: torch.Tensor,
        lse: torch.Tensor,
        done: StepReport | None = None,
    ) -> StepReport:
        """Adds a step's calls to sums. kv: the heads of the step alone; q and sums: all of them,
        or in ulysses the rank's."""
        done = done or StepReport(0)
        self._report.append(done)
        start = time.perf_counter()
        first = step.heads[0] if q.shape[2] == self._call.shape.num_heads else 0
        heads = slice(first, first + step.heads[1] - step.heads[0])
        for work in step.works:
            batch, rows = slice(*work.batch), slice(*work.rows)
            own = q[batch, rows, heads]
            part, part_lse = torch.ops.pfa.forward_lse.default(
                own,
                *(x[batch, slice(*work.keys)] for x in kv),
                num_heads=own.shape[2],
                num_key_value_heads=kv[0].shape[2],
                **self._masks(work, heads),
                **self._call.part_options(),
            )
            whole, whole_lse = sums[batch, rows, heads], lse[batch, heads, rows]
            if work.merges:
                _, merged = merge_states(
                    [whole, part], [whole_lse, part_lse], input_layout="BSND", out=whole
                )
                whole_lse.copy_(merged)
            else:
                whole.copy_(part)
                whole_lse.copy_(part_lse)
            done.flops += 4 * work.pairs * own.shape[2] * own.shape[3]
        done.compute_seconds += time.perf_counter() - start
        return done

    def _masks(self, work: Work, heads: slice) -> dict[str, Any]:
        """The call's mask, bias and lengths, as arguments of the operator."""
        options: dict[str, Any] = {
            "sparse_mode": work.sparse_mode,
            "pre_tokens": work.pre_tokens,
            "next_tokens": work.next_tokens,
            "actual_seq_lengths": work.q_lens,
            "actual_seq_lengths_kv": work.k_lens,
        }
        columns = slice(work.column, work.column + work.keys[1] - work.keys[0])
        rows = slice(*work.rows)

        def batch(x: torch.Tensor) -> slice:
            return slice(*work.batch) if x.shape[0] > 1 else slice(None)

        if work.sparse_mode in (2, 4):
            options["atten_mask"] = _compressed_mask(self._call.q)
        elif self._mask is not None:
            options["atten_mask"] = self._mask[batch(self._mask), :, rows, columns]
        if self._bias is not None:
            options["pse_shift"] = self._bias[batch(self._bias), heads, rows, columns]
        return options


def place(parts: torch.Tensor, axis: int, order: str) -> torch.Tensor:
    """Shards of all ranks (world, ...) -> the whole, in the order of the sequence along an axis
    of what comes after the first."""
    world, rows = parts.shape[0], parts.shape[1 + axis]
    shape = list(parts.shape[1:])
    shape[axis] *= world
    whole = parts.new_empty(shape)
    for rank in range(world):
        for chunk in chunks(rows * world, world, rank, order):
            to = whole.narrow(axis, chunk.start, chunk.size)
            to.copy_(parts[rank].narrow(axis, chunk.local, chunk.size))
    return whole


def cut(whole: torch.Tensor, axis: int, world: int, order: str) -> torch.Tensor:
    """The reverse of place: (world, ...)."""
    shape = list(whole.shape)
    shape[axis] //= world
    parts = whole.new_empty((world, *shape))
    for rank in range(world):
        for chunk in chunks(whole.shape[axis], world, rank, order):
            to = parts[rank].narrow(axis, chunk.local, chunk.size)
            to.copy_(whole.narrow(axis, chunk.start, chunk.size))
    return parts
