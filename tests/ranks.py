# SPDX-License-Identifier: Apache-2.0
"""The ranks that test_distributed.py starts: they run every case of their world size.

    python tests/ranks.py WORLD FOLDER

Rank 0 writes what the ranks computed together, every rank what it saw go wrong, to FOLDER; then
the ranks' exit codes are printed.
"""

from __future__ import annotations

import datetime
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import reference
import torch
import torch.distributed as dist
from inputs import Call, Case, Mask, Pse, Quant
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pfa
from pfa.distributed import (
    StepReport,
    context_parallel_forward,
    exchange,
    shard_sequence,
    unshard_sequence,
)

SECONDS = 2.0  # of the group whose rank is slow

CASES = [
    Case("bf16", 2, 8, 4, sq=64, sk=96, dim=32),
    Case("fp16", 1, 4, sq=160, sk=160, dim=32, mode=2, layout="BSH"),
    Case("bf16", 2, 4, sq=96, sk=160, dim=40, mode=2, q_lens=(96, 50), k_lens=(160, 71)),
    Case("bf16", 2, 8, 4, sq=64, sk=160, dim=32, mode=3, k_lens=(160, 131), layout="BSND"),
    Case("fp16", 3, 4, sq=96, sk=64, dim=32, mode=3, q_lens=(96, 50, 7), k_lens=(30, 64, 0)),
    Case("bf16", 2, 4, sq=112, sk=200, dim=64, mode=4, pre=60, nxt=5, q_lens=(112, 40)),
    Case("fp16", 1, 4, sq=200, sk=304, dim=32, mode=4, pre=-20, nxt=60),
    Case("fp16", 1, 4, sq=320, sk=320, dim=32, mode=4, pre=30, nxt=0),
    Case("bf16", 2, 4, sq=72, sk=144, dim=32, mask=Mask(batched=True), pre=20, nxt=13),
    Case("bf16", 2, 4, sq=72, sk=144, dim=32, mask=Mask(3, pad=5), nxt=30, k_lens=(144, 77)),
    Case("fp16", 1, 4, sq=72, sk=304, dim=32, mask=Mask(2, pattern="empty_rows"), mode=1),
    Case("bf16", 2, 4, sq=72, sk=96, dim=32, pse=Pse(batched=True, pad=4), layout="BSH"),
    Case("fp16", 1, 8, 4, sq=96, sk=96, dim=32, pse=Pse(pattern="alibi"), mode=2),
    Case("fp16", 1, 4, sq=72, sk=192, dim=32, pse=Pse(pattern="empty_rows"), layout="BNSD_BSND"),
    Case("int8", 1, 4, sq=96, sk=160, dim=32, quant=Quant()),
    Case("int8", 2, 4, sq=96, sk=96, dim=64, quant=Quant(sign_s=-1), mode=2, k_lens=(96, 41)),
    Case("int8", 1, 4, sq=96, sk=160, dim=32, quant=Quant(out="channel", offset=True), mode=2),
    Case("bf16", 1, 4, sq=96, sk=160, dim=32, quant=Quant(out="tensor"), mode=3),
    Case("bf16", 1, 4, sq=64, sk=0, dim=32),
]
WAYS = [
    ("ring", "contiguous"),
    ("ring", "zigzag"),
    ("all_gather", "zigzag"),
    ("ulysses", "zigzag"),
]


def runs() -> list[tuple[Case, str, str]]:
    return [(case, *way) for case in CASES for way in WAYS]


def sharded(call: Call, order: str) -> Call:
    """The rank's rows of everything that has rows."""
    axis = 2 if call.layout.startswith("BNSD") else 1
    args = [shard_sequence(x, axis, order=order) for x in call.args]
    options = dict(call.options)
    rows = call.query.shape[axis]
    for name in ("atten_mask", "pse_shift"):
        if name == "pse_shift" or call.options.get("sparse_mode", 0) < 2:
            x = options.get(name)
            if x is not None:
                options[name] = shard_sequence(x[..., :rows, :], x.dim() - 2, order=order)
    return Call(*args, options)


def run(case: Case, strategy: str, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the whole sequence."""
    call = case.build()
    own = sharded(call, order)
    out, lse = context_parallel_forward(
        *own.args, strategy=strategy, order=order, return_lse=True, **own.options
    )
    assert out.is_contiguous()
    axis = 2 if call.layout == "BNSD" else 1
    return unshard_sequence(out, axis, order=order), unshard_sequence(lse, 2, order=order)


def causal_rings_have_the_bits_of_one_process() -> None:
    """Merging the shards' parts in the ring's order, in one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    call = Case("bf16", 2, 4, sq=160, sk=160, dim=32, mode=2, layout="BSND").build()
    own = sharded(call, "contiguous")
    got = context_parallel_forward(*own.args, strategy="ring", **own.options)
    rows = 160 // world
    sums: torch.Tensor | None = None
    for source in range(rank, -1, -1):
        keys = slice(source * rows, (source + 1) * rows)
        options = call.options | {"sparse_mode": 2 if source == rank else 0}
        if source != rank:
            options.pop("atten_mask")
        part, part_lse = torch.ops.pfa.forward_lse.default(
            own.query, call.key[:, keys], call.value[:, keys], **options
        )
        if sums is None:
            sums, lse = part.float(), part_lse
        else:
            sums, lse = pfa.merge_states([sums, part], [lse, part_lse], input_layout="BSND")
    assert sums is not None
    assert torch.equal(got, sums.bfloat16())


def ulysses_has_the_bits_of_one_process() -> None:
    call = Case("fp16", 2, 4, sq=160, sk=160, dim=32, mode=3, k_lens=(160, 99)).build()
    own = sharded(call, "zigzag")
    got = context_parallel_forward(*own.args, strategy="ulysses", order="zigzag", **own.options)
    whole = torch.ops.pfa.forward(*call.args, **call.options)
    assert torch.equal(unshard_sequence(got, 2, order="zigzag"), whole)


def lengths_in_tensors_are_lists() -> None:
    call = Case("bf16", 2, 4, sq=96, sk=160, dim=32, mode=3, k_lens=(160, 31)).build()
    own = sharded(call, "contiguous")
    tensors = {"actual_seq_lengths_kv": torch.tensor([999, 31])}
    got = context_parallel_forward(*own.args, **(own.options | tensors))
    assert torch.equal(got, context_parallel_forward(*own.args, **own.options))


def reports_count_what_was_sent() -> None:
    """And that the plan knew it: bytes by the tensors that were sent, products by the mask."""
    from pfa.distributed.plan import Rule, Shape, make_plan

    rank, world = dist.get_rank(), dist.get_world_size()
    call = Case("bf16", 2, 8, 4, sq=160, sk=160, dim=32, mode=2, layout="BSND").build()
    pairs = int(reference.parts(*call.args, **call.options).visible.sum())
    shape, rule = Shape(2, 8, 4, 160, 160, 32), Rule((160, 160), (160, 160), hi=0)
    for strategy, order in WAYS:
        own = sharded(call, order)
        report: list[StepReport] = []
        context_parallel_forward(
            *own.args, strategy=strategy, order=order, report=report, **own.options
        )
        plan = make_plan(shape, rule, world, rank, strategy, order)
        assert [x.flops for x in report] == [x.flops for x in plan]
        assert sum(x.received_bytes for x in report) == sum(x.received_bytes for x in plan)
        flops = torch.tensor(sum(x.flops for x in report))
        most = flops.clone()
        dist.all_reduce(flops)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert flops == 4 * pairs * 32
        if order == "zigzag" and strategy != "ulysses":
            assert most * world <= 1.01 * flops  # all ranks have the same work


def windows_end_the_ring_early() -> None:
    call = Case("bf16", 1, 4, sq=320, sk=320, dim=32, mode=4, pre=30, nxt=0).build()
    own = sharded(call, "contiguous")
    report: list[StepReport] = []
    context_parallel_forward(*own.args, strategy="ring", report=report, **own.options)
    assert len(report) == 2  # of its own keys and of the rank before


def dtensors_equal_one_process() -> None:
    """Sharded along batch, heads and both; what does not fit yet is redistributed."""
    world = dist.get_world_size()
    meshes = {
        "batch": (init_device_mesh("cpu", (world,)), [Shard(0)]),
        "heads": (init_device_mesh("cpu", (world,)), [Shard(-1)]),
        "both": (init_device_mesh("cpu", (world // 2, 2)), [Shard(0), Shard(-1)]),
        "neither": (init_device_mesh("cpu", (world,)), [Replicate()]),
    }
    cases = [
        Case("bf16", 3, 8, 4, sq=24, sk=40, dim=16, mode=3, k_lens=(40, 3, 17), layout="BSND"),
        Case("fp16", 2, 4, sq=24, sk=40, dim=16, mask=Mask(batched=True), pse=Pse(batched=True)),
        Case("fp16", 2, 4, sq=24, sk=40, dim=16, mask=Mask(2), mode=1, pse=Pse(), layout="BSH"),
        Case("bf16", 1, 4, sq=24, sk=40, dim=16, mode=2, quant=Quant(out="channel", offset=True)),
        Case("int8", 4, 4, sq=24, sk=40, dim=16, quant=Quant(), layout="BNSD_BSND", q_lens=(9,)),
    ]
    for case in cases:
        call = case.build()
        heads = 1 if call.layout.startswith("BNSD") else 2
        for mesh, where in meshes.values():
            own = [Shard(heads) if x == Shard(-1) else x for x in where]
            q = distribute_tensor(call.query, mesh, own)
            k, v = (distribute_tensor(x, mesh, [Replicate()] * mesh.ndim) for x in call.args[1:])
            options = dict(call.options)
            if "pse_shift" in options and call.layout == "BSH":
                replicated = [Replicate()] * mesh.ndim
                options["pse_shift"] = distribute_tensor(options["pse_shift"], mesh, replicated)
            out, lse = torch.ops.pfa.forward_lse.default(q, k, v, **options)
            out_heads = 1 if call.layout == "BNSD" else 2
            assert [p.dim for p in out.placements if p.is_shard()] == [
                out_heads if p.dim == heads else 0 for p in own if p.is_shard()
            ]
            want, want_lse = torch.ops.pfa.forward_lse.default(*call.args, **call.options)
            assert torch.equal(out.full_tensor(), want)
            assert torch.equal(lse.full_tensor(), want_lse)
            front = pfa.prompt_flash_attention(q, k, v, **options)
            assert torch.equal(front.to_local(), out.to_local())


def dtensors_compile_and_take_lengths_in_tensors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.randn(4, 8, 4, 16).half(), mesh, [Shard(0)])
    lengths = torch.tensor([1, 2, 3, 8])

    def attend(x: torch.Tensor) -> torch.Tensor:
        options = {"num_heads": 4, "input_layout": "BSND", "actual_seq_lengths_kv": lengths}
        return torch.ops.pfa.forward.tensor_lens(x, x, x, **options)

    whole = attend(x.full_tensor())
    assert torch.equal(attend(x).full_tensor(), whole)
    if dist.get_world_size() == 2:  # compiling takes each rank seconds
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(out.full_tensor(), whole)


def dtensors_that_do_not_fit_are_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.zeros(2, 8, 4, 16).half()
    rows = distribute_tensor(x, mesh, [Shard(1)])
    heads = distribute_tensor(x, mesh, [Shard(2)])
    options = {"num_heads": 4, "input_layout": "BSND"}
    few = options | {"num_key_value_heads": 1}
    for args, given, text in [
        ((rows, rows, rows), options, "sharded along its batch or its heads"),
        ((heads, x, heads), options, "key must be a DTensor"),
        ((heads, heads, heads), few, "num_key_value_heads must be a multiple of"),
    ]:
        try:
            torch.ops.pfa.forward(*args, **given)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError("no error")


def expect(kind: type[Exception], text: str, **changes: object) -> None:
    call = Case("bf16", 1, 4, sq=64, sk=64, dim=32, layout="BSND").build()
    own = sharded(call, "contiguous")
    options = own.options | changes
    args = [options.pop(n, x) for n, x in zip(("query", "key", "value"), own.args, strict=True)]
    try:
        context_parallel_forward(*args, **options)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def bad_arguments_are_refused_on_every_rank() -> None:
    x = torch.zeros(1, 16, 4, 32).bfloat16()
    last = dist.get_rank() == dist.get_world_size() - 1
    world = dist.get_world_size()
    expect(ValueError, "key must have num_key_value_heads = 3 heads", num_key_value_heads=3)
    expect(TypeError, "query must have dtype", query=x.float())
    expect(NotImplementedError, "sparse_mode", sparse_mode=7)
    expect(ValueError, "actual_seq_lengths must lie", actual_seq_lengths=[65])
    expect(ValueError, "strategy must be one of", strategy="tree")
    expect(ValueError, "order must be one of", order="random")
    odd = torch.zeros(1, 7, 4, 32).bfloat16()
    expect(ValueError, "query must have an even number of rows", order="zigzag", query=odd)
    three = torch.zeros(1, 16, 3, 32).bfloat16()
    named = {"query": three, "key": three, "value": three, "num_heads": 3}
    expect(ValueError, f"multiples of the number of ranks {world}", strategy="ulysses", **named)
    expect(RuntimeError, "query requires grad", query=x.clone().requires_grad_())
    text = "scale_value must be the same on all ranks, got 0.5 on rank 0 and 0.25 on rank "
    expect(ValueError, f"{text}{world - 1}", scale_value=0.25 if last else 0.5)
    text = "query must be the same on all ranks, got bfloat16 of shape"
    expect(ValueError, text, query=x[:, : 3 if last else 4])
    if last:
        expect(ValueError, "num_heads must be positive", num_heads=0)
    else:
        expect(RuntimeError, f"rank {world - 1} refused its arguments: pfa.forward: num_heads")


def a_slow_rank_ends_in_errors() -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    last = dist.get_rank() == dist.get_world_size() - 1
    call = sharded(Case("bf16", 1, 4, sq=64, sk=64, dim=32).build(), "contiguous")
    if last:
        time.sleep(SECONDS + 1)
    start = time.monotonic()
    try:
        context_parallel_forward(*call.args, group=group, **call.options)
    except RuntimeError as error:
        assert f"rank {dist.get_rank()} of {dist.get_world_size()} failed while" in str(error)
    else:
        raise AssertionError("no error")
    assert time.monotonic() - start < SECONDS + 1.5


def a_killed_rank_ends_in_errors() -> None:
    """The last rank ends before it sends anything, without a word."""
    last = dist.get_rank() == dist.get_world_size() - 1
    call = sharded(Case("bf16", 1, 4, sq=64, sk=64, dim=32).build(), "contiguous")
    if last:
        exchange.Peers.start_ring = lambda *args: os._exit(9)
    start = time.monotonic()
    try:
        context_parallel_forward(*call.args, strategy="ring", **call.options)
    except RuntimeError as error:
        assert f"rank {dist.get_rank()} of {dist.get_world_size()} failed while" in str(error)
        assert "of the ring" in str(error)
    else:
        raise AssertionError("no error")
    assert time.monotonic() - start < 10


CHECKS: list[Callable[[], None]] = [
    causal_rings_have_the_bits_of_one_process,
    ulysses_has_the_bits_of_one_process,
    lengths_in_tensors_are_lists,
    reports_count_what_was_sent,
    windows_end_the_ring_early,
    dtensors_equal_one_process,
    dtensors_compile_and_take_lengths_in_tensors,
    dtensors_that_do_not_fit_are_refused,
    bad_arguments_are_refused_on_every_rank,
    a_slow_rank_ends_in_errors,
    a_killed_rank_ends_in_errors,  # the last one
]


class Outcome(NamedTuple):
    """Of a run: an error's text or nothing, and on rank 0 output and lse."""

    text: str
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None


def run_rank(rank: int, world: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    wait = datetime.timedelta(seconds=10)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=wait)
    outcomes = []
    for parts in runs():
        try:
            outcome = Outcome("", *run(*parts))
        except Exception as error:
            outcome = Outcome(f"{type(error).__name__}: {error}")
        outcomes.append(tuple(outcome if rank == 0 else outcome[:1]))
    texts: dict[str, str] = {}
    for check in CHECKS:
        torch.save((outcomes, texts), folder / f"{rank}.pt")
        try:
            check()
            texts[check.__name__] = ""
        except Exception as error:
            texts[check.__name__] = f"{type(error).__name__}: {error}"
    torch.save((outcomes, texts), folder / f"{rank}.pt")


def main() -> None:
    world, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    children = []
    for rank in range(world):  # they share what has been imported; no thread has been started
        child = os.fork()
        if child == 0:
            run_rank(rank, world, folder)
            os._exit(0)  # the group of a dead rank cannot be closed
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))  # noqa: T201


if __name__ == "__main__":
    main()
