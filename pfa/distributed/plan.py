# SPDX-License-Identifier: Apache-2.0
"""Which rows attend to which keys on which rank in which step, and what that costs.

Nothing here communicates or touches a tensor: context_parallel.py carries a plan out, the model of
scaling (benchmarks/scaling.py) adds up plans of machines that are not there.

Rows and keys have two numbers: in the whole sequence, and in the shard of a rank.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

STRATEGIES = ("ring", "all_gather", "ulysses")
ORDERS = ("contiguous", "zigzag")
FAR = 2**62  # farther than any sequence is long, with room to add two of them in 64 bits
# Steps of all_gather, of which only the first waits for its keys. More of them need less memory, as
# long as each has this many rows of queries, all heads together: 8 blocks for each of a GPU's SMs.
LEAST_STEPS = 8
ROWS_PER_STEP = 2**17


@dataclass(frozen=True)
class Shape:
    """Of the whole call."""

    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    itemsize: int = 2  # bytes of an element of q, k and v


@dataclass(frozen=True)
class Rule:
    """Row i sees key j if lo <= j - i - anchor <= hi and, with `dense`, if the mask lets it.

    anchor is 0, or with `bottom_right` k_lens[b] - q_lens[b].
    """

    q_lens: tuple[int, ...]  # (batch)
    k_lens: tuple[int, ...]
    lo: int = -FAR
    hi: int = FAR
    bottom_right: bool = False
    dense: bool = False
    by_column: bool = False  # a mask or a bias, whose columns are in the order of the sequence


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the sequence that lie consecutively in a shard."""

    local: int
    start: int  # in the sequence
    size: int


def chunks(seqlen: int, world: int, rank: int, order: str) -> tuple[Chunk, ...]:
    """The chunks of a rank's shard: one, or with zigzag of 2 * world the rank-th and its mirror."""
    rows = seqlen // world
    if order == "contiguous":
        return (Chunk(0, rank * rows, rows),)
    half = rows // 2
    mirror = (2 * world - 1 - rank) * half
    return Chunk(0, rank * half, half), Chunk(half, mirror, half)


@dataclass(frozen=True)
class Work:
    """One call of the operator: ranges of a shard's batch, rows and keys, and its mask."""

    batch: tuple[int, int]
    rows: tuple[int, int]
    keys: tuple[int, int]
    column: int  # of its first key in masks and biases
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    q_lens: tuple[int, ...] | None
    k_lens: tuple[int, ...] | None
    pairs: int  # (row, key) pairs that the band leaves, of all of batch, for each head
    merges: bool = False  # some of its rows have seen keys in a call before


@dataclass(frozen=True)
class Step:
    """What a rank does before it waits for others again; bytes are its own."""

    works: tuple[Work, ...]
    heads: tuple[int, int]  # of query
    flops: int = 0
    received_bytes: int = 0  # as many are sent
    hidden_bytes: int = 0  # of them, those that arrive while the step before is computed
    copied_bytes: int = 0  # read or written in memory to pack, reorder and merge


def key_heads(shape: Shape, heads: tuple[int, int]) -> tuple[int, int]:
    group = shape.num_heads // shape.num_heads_k
    return heads[0] // group, heads[1] // group


def make_works(
    rule: Rule, q_chunks: tuple[Chunk, ...], k_chunks: tuple[Chunk, ...]
) -> tuple[Work, ...]:
    """The fewest calls that cover what the rows of q_chunks see of k_chunks."""
    works = [w for k in k_chunks for q in q_chunks for w in _works_of(rule, q, k)]
    works = _join(works, "rows", "keys")
    if not rule.by_column:
        works = _join(works, "keys", "rows")
    return tuple(works)


def _works_of(rule: Rule, q: Chunk, k: Chunk) -> list[Work]:
    """A call for each run of batch elements that one mask serves."""
    parts = [_part(rule, q, k, b) for b in range(len(rule.q_lens))]
    runs: list[list[int]] = []
    mask = None
    for b, part in enumerate(parts):
        if runs and (part is None or mask is None or part[0] == mask):
            runs[-1].append(b)
        else:
            runs.append([b])
            mask = None
        mask = part[0] if part is not None else mask
    works = []
    for run in runs:
        seen = [part for b in run if (part := parts[b]) is not None]
        if not seen:
            continue
        lens = [(0, 0) if (part := parts[b]) is None else part[1] for b in run]
        whole = all(x == (q.size, k.size) for x in lens)
        works.append(
            Work(
                (run[0], run[-1] + 1),
                (q.local, q.local + q.size),
                (k.local, k.local + k.size),
                k.start,
                *seen[0][0],
                None if whole else tuple(x for x, _ in lens),
                None if whole else tuple(x for _, x in lens),
                sum(part[2] for part in seen),
            )
        )
    return works


def _part(
    rule: Rule, q: Chunk, k: Chunk, b: int
) -> tuple[tuple[int, int, int], tuple[int, int], int] | None:
    """Mask (sparse_mode, pre_tokens, next_tokens), lengths and pairs; None if nothing is seen."""
    rows = min(max(rule.q_lens[b] - q.start, 0), q.size)
    keys = min(max(rule.k_lens[b] - k.start, 0), k.size)
    shift = q.start - k.start + (rule.k_lens[b] - rule.q_lens[b] if rule.bottom_right else 0)
    lo, hi = rule.lo + shift, rule.hi + shift
    if not rows or not keys or hi < 1 - rows or lo > keys - 1:
        return None
    lo = -FAR if lo <= 1 - rows else lo
    hi = FAR if hi >= keys - 1 else hi
    anchor = keys - rows  # of mode 4
    if rule.dense:
        whole = (lo, hi) == (-FAR, FAR)
        mask = (1, FAR, FAR) if whole else (0, -lo, hi)
    elif (lo, hi) == (-FAR, FAR):
        mask = (0, FAR, FAR)
    elif (lo, hi) == (-FAR, 0):
        mask = (2, FAR, FAR)
    else:
        mask = (4, -lo if lo == -FAR else anchor - lo, hi if hi == FAR else hi - anchor)
    return mask, (rows, keys), _pairs(lo, hi, rows, keys)


def _pairs(lo: int, hi: int, rows: int, keys: int) -> int:
    def below(x: int) -> int:  # sum over y < x of y clamped to [0, keys]
        x = max(x, 0)
        return x * (x - 1) // 2 if x <= keys else keys * (keys - 1) // 2 + (x - keys) * keys

    def clamped(shift: int) -> int:  # sum over the rows i of i + shift clamped to [0, keys]
        return below(shift + rows) - below(shift)

    return clamped(hi + 1) - clamped(lo)


def _join(works: list[Work], axis: str, other: str) -> list[Work]:
    """Makes one call of two that see all of neighbouring ranges of an axis."""
    joined: list[Work] = []
    for work in works:
        near = [
            i
            for i, before in enumerate(joined)
            if _sees_all(before)
            and _sees_all(work)
            and (before.batch, before.sparse_mode) == (work.batch, work.sparse_mode)
            and getattr(before, other) == getattr(work, other)
            and getattr(before, axis)[1] == getattr(work, axis)[0]
        ]
        if not near:
            joined.append(work)
            continue
        before = joined[near[0]]
        both: dict[str, Any] = {axis: (getattr(before, axis)[0], getattr(work, axis)[1])}
        joined[near[0]] = dataclasses.replace(before, pairs=before.pairs + work.pairs, **both)
    return joined


def _sees_all(work: Work) -> bool:
    """But for what a dense mask drops."""
    unlimited = work.sparse_mode in (0, 1) and (work.pre_tokens, work.next_tokens) == (FAR, FAR)
    return work.q_lens is None and unlimited


@functools.lru_cache(maxsize=256)
def make_plan(
    shape: Shape, rule: Rule, world: int, rank: int, strategy: str, order: str
) -> tuple[Step, ...]:
    """The steps of one rank. All ranks have as many."""
    steps = {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}[strategy](
        shape, rule, world, rank, order
    )
    return tuple(_count(step, shape, world) for step in _mark_merges(steps))


def _ring(shape: Shape, rule: Rule, world: int, rank: int, order: str) -> list[Step]:
    """In step t a rank has the keys of the rank t before it, while it receives the next ones."""

    def works_of(rank: int, t: int) -> tuple[Work, ...]:
        q = chunks(shape.seqlen_q, world, rank, order)
        return make_works(rule, q, chunks(shape.seqlen_k, world, (rank - t) % world, order))

    last = world - 1
    if rule.lo != -FAR:  # keys far behind are of no use to anyone
        useful = [t for t in range(world) if any(works_of(r, t) for r in range(world))]
        last = useful[-1] if useful else 0
    shard = 2 * shape.batch * shape.num_heads_k * (shape.seqlen_k // world) * _row_bytes(shape)
    heads = (0, shape.num_heads)
    steps = []
    for t in range(last + 1):
        came = shard if t > 0 else 0
        packed = 2 * shard if t == 0 and last > 0 else 0
        steps.append(
            Step(
                works_of(rank, t),
                heads,
                received_bytes=came,
                hidden_bytes=came,
                copied_bytes=packed,
            )
        )
    return steps


def head_groups(shape: Shape, world: int) -> list[tuple[int, int]]:
    """Query heads of the steps of all_gather: whole groups that share their keys."""
    rows = shape.batch * shape.num_heads * (shape.seqlen_q // world)
    count = min(max(LEAST_STEPS, rows // ROWS_PER_STEP), shape.num_heads_k)
    group = shape.num_heads // shape.num_heads_k
    bounds = [shape.num_heads_k * i // count * group for i in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _all_gather(shape: Shape, rule: Rule, world: int, rank: int, order: str) -> list[Step]:
    """In each step some heads, for whose keys and values of all ranks it has waited."""
    everything = (Chunk(0, 0, shape.seqlen_k),)
    works = make_works(rule, chunks(shape.seqlen_q, world, rank, order), everything)
    steps = []
    for i, heads in enumerate(head_groups(shape, world)):
        first, last = key_heads(shape, heads)
        whole = 2 * shape.batch * (last - first) * shape.seqlen_k * _row_bytes(shape)
        came = whole // world * (world - 1)
        # The own shard is packed, and what was gathered brought into the order of the sequence.
        copied = 2 * (whole // world + whole) if world > 1 else 0
        steps.append(
            Step(
                works,
                heads,
                received_bytes=came,
                hidden_bytes=came if i > 0 else 0,
                copied_bytes=copied,
            )
        )
    return steps


def _ulysses(shape: Shape, rule: Rule, world: int, rank: int, order: str) -> list[Step]:
    """Some heads of all rows: each rank trades its rows of the others' heads for theirs of its."""
    per_rank = shape.num_heads // world
    heads = (rank * per_rank, (rank + 1) * per_rank)
    whole = (Chunk(0, 0, shape.seqlen_q),), (Chunk(0, 0, shape.seqlen_k),)
    works = make_works(rule, *whole)
    rows = shape.batch * shape.num_heads * (shape.seqlen_q // world)
    keys = 2 * shape.batch * shape.num_heads_k * (shape.seqlen_k // world)
    inputs = (rows + keys) * _row_bytes(shape)
    output = rows * (2 * shape.head_dim + 4)  # 16 bits, and its lse
    traded = (inputs + output) // world * (world - 1)
    copied = 4 * (inputs + output) if world > 1 else 0  # packed and brought into order again
    return [Step(works, heads, received_bytes=traded, copied_bytes=copied)]


def _row_bytes(shape: Shape) -> int:
    return shape.head_dim * shape.itemsize


def _mark_merges(steps: list[Step]) -> list[Step]:
    """Tells the calls whose rows have sums already: those of a step before with the same heads."""

    def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] < b[1] and b[0] < a[1]

    marked: list[Step] = []
    seen: list[tuple[tuple[int, int], Work]] = []
    for step in steps:
        works = []
        for work in step.works:
            merges = any(
                heads == step.heads
                and overlap(before.batch, work.batch)
                and overlap(before.rows, work.rows)
                for heads, before in seen
            )
            works.append(dataclasses.replace(work, merges=merges))
            seen.append((step.heads, work))
        marked.append(dataclasses.replace(step, works=tuple(works)))
    return marked


def _count(step: Step, shape: Shape, world: int) -> Step:
    """Adds the products of the step's calls, and the memory that putting them together takes."""
    heads = step.heads[1] - step.heads[0]
    pairs = sum(work.pairs for work in step.works)
    copied = step.copied_bytes + sum(merge_bytes(work, heads, shape) for work in step.works)
    return dataclasses.replace(step, flops=4 * pairs * heads * shape.head_dim, copied_bytes=copied)


def merge_bytes(work: Work, heads: int, shape: Shape) -> int:
    """Of sums in float32: 8 to scale them and 10 to add 16 bits to them, or 6 to begin them."""
    size = (work.batch[1] - work.batch[0]) * (work.rows[1] - work.rows[0]) * heads
    return size * shape.head_dim * (18 if work.merges else 6)
