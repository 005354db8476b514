# SPDX-License-Identifier: Apache-2.0
"""How pfa.distributed scales: counted and measured on two processes of this machine, then modelled
for H100s that are not there. `python -m benchmarks.scaling` writes results/scaling.json and .png.

A rank's products and bytes of each step come from the plan that the code carries out
(pfa/distributed/plan.py). The run on two gloo processes checks them: products against the masks'
pairs, bytes against what the system says the process wrote to its sockets, the processor's seconds
against half of what one process takes for all. The model adds a kernel's *predicted* rate and
stated speeds of links.
"""

import argparse
import dataclasses
import datetime
import functools
import heapq
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from pfa.distributed import StepReport, context_parallel_forward, shard_sequence
from pfa.distributed.plan import Rule, Shape, Step, Work, make_plan

from .machine import environment
from .revision import revision

FOLDER = Path(__file__).with_name("results")
NUM_HEADS, HEAD_DIM = 32, 128
SEQLENS = [2**17, 2**18, 2**19, 2**20, 2**22, 20 * 2**20]
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
HEADS_K = [8, 32]
STRATEGIES = ["all_gather", "ring", "ulysses"]
MEMORY = 80e9


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bytes and seconds; speeds are what a collective reaches, of 450, 50 and 3350 GB/s."""

    gpus_per_node: int = 8
    nvlink: float = 360e9  # each way, of a GPU
    network: float = 45e9  # each way, of a GPU: 400 Gbit/s
    memory: float = 2.8e12
    message: float = 20e-6  # to start a collective or a message
    launch: float = 3e-6  # of a kernel
    multiprocessors: int = 132
    communicating: int = 8  # multiprocessors that a collective takes while it runs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "scaling.json")
    parser.add_argument("--rows", type=int, default=4096, help="of the sequence that is measured")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A block of 128 rows takes (keys + overhead) * seconds_per_key on one multiprocessor."""

    seconds_per_key: float
    overhead: float  # keys

    @classmethod
    def predicted(cls, gpu: Machine) -> "Kernel":
        """Through the predicted rates of 512 and 16384 keys, full, fp16, D = 128: what it makes of
        the five between is within 1 %."""
        rows = json.loads((FOLDER / "predicted-sm90.json").read_text())["predicted_rows"]
        seconds = {}
        for row in rows:
            words = row["case"].split()
            if words[:3] == ["fp16", f"D{HEAD_DIM}", "full"]:
                keys = int(words[3])
                flops = 4 * HEAD_DIM * keys * 16384 * (2048 // HEAD_DIM)  # benchmarks/cuda's cases
                blocks = 16384 // 128 * (2048 // HEAD_DIM)
                waves = -(-blocks // gpu.multiprocessors)
                seconds[keys] = flops / (row["predicted_tflops"] * 1e12) / waves
        few, many = min(seconds), max(seconds)
        per_key = (seconds[many] - seconds[few]) / (many - few)
        return cls(per_key, seconds[few] / per_key - few)

    def seconds(self, work: Work, heads: int, gpu: Machine) -> float:
        rows, keys = work.rows[1] - work.rows[0], work.keys[1] - work.keys[0]
        blocks = -(-rows // 128)
        load = block_load(rows, keys, work.sparse_mode, work.next_tokens, self.overhead)
        if blocks * heads < 0.8 * gpu.multiprocessors:  # keys are split; waves are 85 % full
            return sum(load) * heads / gpu.multiprocessors / 0.85 * self.seconds_per_key
        if blocks * heads > 32 * gpu.multiprocessors:
            return sum(load) * heads / gpu.multiprocessors * self.seconds_per_key
        busy = [0.0] * gpu.multiprocessors
        for block in load:  # the longest first, on whichever is free
            for _ in range(heads):
                heapq.heapreplace(busy, busy[0] + block)
        return max(busy) * self.seconds_per_key


@functools.lru_cache(maxsize=4096)
def block_load(rows: int, keys: int, mode: int, next_tokens: int, overhead: float) -> list[float]:
    """Keys of each block of 128 rows in whole tiles of 128, the longest first."""
    ends = range(min(128, rows), rows + 127, 128)
    shift = {0: keys, 2: 0, 4: keys - rows + next_tokens}[mode]
    seen = [min(max(min(end, rows) + shift, 0), keys) for end in ends]
    return sorted((-(-x // 128) * 128 + overhead for x in seen), reverse=True)


def compute_seconds(step: Step, shape: Shape, kernel: Kernel, gpu: Machine) -> float:
    """Of the step's calls, their launches, and those of some small operators around each."""
    heads = (step.heads[1] - step.heads[0]) * shape.batch
    seconds = sum(kernel.seconds(work, heads, gpu) for work in step.works)
    return seconds + 7 * gpu.launch * len(step.works)


def transfer_seconds(step: Step, strategy: str, world: int, gpu: Machine) -> float:
    """Of what the step receives, by the slowest link that it crosses."""
    if step.received_bytes == 0:
        return 0.0
    nodes = world // gpu.gpus_per_node
    bytes_ = step.received_bytes
    if nodes <= 1:
        return gpu.message + bytes_ / gpu.nvlink
    if strategy == "ring":  # one GPU of a node passes its shard to the next node alone
        return gpu.message + bytes_ / gpu.network
    if strategy == "all_gather":  # all GPUs of a node share what comes from other nodes
        outside = bytes_ * (1 - 1 / nodes) / (gpu.gpus_per_node * gpu.network)
        return 2 * gpu.message + max(outside, bytes_ / gpu.nvlink)
    outside = bytes_ * (world - gpu.gpus_per_node) / (world - 1)
    return gpu.message + outside / gpu.network + (bytes_ - outside) / gpu.nvlink


def rank_seconds(
    plan: tuple[Step, ...],
    shape: Shape,
    strategy: str,
    world: int,
    kernel: Kernel,
    gpu: Machine,
) -> dict[str, float]:
    """What arrives during a step is hidden behind it, but for the multiprocessors it takes."""
    computing = [
        compute_seconds(step, shape, kernel, gpu) + step.copied_bytes / gpu.memory for step in plan
    ]
    moving = [transfer_seconds(step, strategy, world, gpu) for step in plan]
    waiting = sum(t for t, step in zip(moving, plan, strict=True) if not step.hidden_bytes)
    slowed = 0.0
    for i, step in enumerate(plan):
        if step.hidden_bytes:
            behind = min(moving[i], computing[i - 1])
            waiting += moving[i] - behind
            slowed += behind * gpu.communicating / gpu.multiprocessors
    copying = sum(step.copied_bytes for step in plan) / gpu.memory
    total = sum(computing) + waiting + slowed
    return {
        "seconds": total,
        "kernel_seconds": sum(computing) - copying,
        "copying_seconds": copying,
        "waiting_seconds": waiting,
        "slowed_seconds": slowed,
    }


def memory_bytes(shape: Shape, strategy: str, world: int, plan: tuple[Step, ...]) -> int:
    """Inputs, output, sums and keys of other ranks, at the worst moment."""
    rows = shape.batch * shape.num_heads * (shape.seqlen_q // world) * shape.head_dim
    keys = 2 * shape.batch * shape.num_heads_k * (shape.seqlen_k // world) * shape.head_dim
    own = 2 * (2 * rows + keys)
    if strategy == "ring":
        return own + 4 * rows + 2 * (2 * keys)
    if strategy == "ulysses":
        return own + 2 * (2 * (rows + keys) + rows)
    group = max(step.received_bytes for step in plan) * world // (world - 1)
    return own + 2 * group


def model(kernel: Kernel, gpu: Machine) -> list[dict[str, Any]]:
    rows = []
    for heads_k in HEADS_K:
        for seqlen in SEQLENS:
            shape = Shape(1, NUM_HEADS, heads_k, seqlen, seqlen, HEAD_DIM)
            rule = Rule((seqlen,), (seqlen,), hi=0)
            (whole,) = make_plan(shape, rule, 1, 0, "ulysses", "contiguous")
            alone = compute_seconds(whole, shape, kernel, gpu)
            for world in GPUS:
                for strategy in STRATEGIES:
                    if strategy == "ulysses" and heads_k % world:
                        continue
                    rows.append(model_row(shape, rule, strategy, world, alone, kernel, gpu))
    return rows


def model_row(
    shape: Shape,
    rule: Rule,
    strategy: str,
    world: int,
    alone: float,
    kernel: Kernel,
    gpu: Machine,
) -> dict[str, Any]:
    plan = make_plan(shape, rule, world, world - 1, strategy, "zigzag")
    seconds = rank_seconds(plan, shape, strategy, world, kernel, gpu)
    memory = memory_bytes(shape, strategy, world, plan)
    return {
        "seqlen": shape.seqlen_q,
        "num_heads_k": shape.num_heads_k,
        "gpus": world,
        "strategy": strategy,
        **{f"modelled_{name}": value for name, value in seconds.items()},
        "modelled_efficiency": alone / world / seconds["seconds"],
        "received_bytes": sum(step.received_bytes for step in plan),
        "copied_bytes": sum(step.copied_bytes for step in plan),
        "flops": sum(step.flops for step in plan),
        "memory_bytes": memory,
        "fits": memory <= MEMORY,
    }


# The run on two processes.


def written_bytes() -> int:
    """By this process, sockets included, as the kernel counts them."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("wchar:")[1].split()[0])


def run_rank(rank: int, folder: str, rows: int, repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    found = {}
    for strategy in STRATEGIES:
        q, k, v = (shard_sequence(x, 1, order="zigzag") for x in tensors(rows))
        samples = []
        for _ in range(repeats + 1):
            report: list[StepReport] = []
            dist.barrier()
            written, start, busy = written_bytes(), time.perf_counter(), time.process_time()
            context_parallel_forward(
                q, k, v, strategy=strategy, order="zigzag", report=report, **OPTIONS
            )
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            samples.append((busy, seconds, written_bytes() - written, report))
        busy, seconds, written, report = min(samples[1:], key=lambda x: x[0])
        found[strategy] = {
            "processor_seconds": busy,
            "seconds": seconds,
            "written_bytes": written,
            "steps": [dataclasses.asdict(step) for step in report],
        }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


OPTIONS = {
    "num_heads": 8,
    "num_key_value_heads": 2,
    "input_layout": "BSND",
    "scale_value": HEAD_DIM**-0.5,
    "sparse_mode": 2,
}


def tensors(rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (OPTIONS["num_heads"], OPTIONS["num_key_value_heads"], OPTIONS["num_key_value_heads"])
    return [torch.randn(1, rows, n, HEAD_DIM).bfloat16() for n in heads]


def alone_seconds(rows: int, repeats: int) -> float:
    """Of a processor, for the whole sequence in one process with one thread."""
    torch.set_num_threads(1)
    q, k, v = tensors(rows)
    mask = torch.zeros(1, dtype=torch.bool).expand(2048, 2048)
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        torch.ops.pfa.forward(q, k, v, atten_mask=mask, **OPTIONS)
        times.append(time.process_time() - start)
    return min(times[1:])


def measure(rows: int, repeats: int) -> list[dict[str, Any]]:
    shape = Shape(1, OPTIONS["num_heads"], OPTIONS["num_key_value_heads"], rows, rows, HEAD_DIM)
    rule = Rule((rows,), (rows,), hi=0)
    pairs = rows * (rows + 1) // 2
    alone = alone_seconds(rows, repeats)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, rows, repeats)
        torch.multiprocessing.spawn(run_rank, args=arguments, nprocs=2)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    found = []
    for strategy in STRATEGIES:
        plans = [make_plan(shape, rule, 2, rank, strategy, "zigzag") for rank in range(2)]
        for rank, plan in enumerate(plans):
            ran = ranks[rank][strategy]
            counted = sum(step["received_bytes"] for step in ran["steps"])
            found.append(
                {
                    "strategy": strategy,
                    "rank": rank,
                    "planned_flops": sum(step.flops for step in plan),
                    "run_flops": sum(step["flops"] for step in ran["steps"]),
                    "share_of_all_pairs": sum(step.flops for step in plan)
                    / (4 * shape.num_heads * HEAD_DIM * pairs),
                    "planned_bytes": sum(step.received_bytes for step in plan),
                    "run_bytes": counted,
                    "written_bytes": ran["written_bytes"],
                    "expected_processor_seconds": alone / 2,
                    "processor_seconds": ran["processor_seconds"],
                    "seconds": ran["seconds"],
                    "compute_seconds": sum(step["compute_seconds"] for step in ran["steps"]),
                    "waiting_seconds": sum(step["waiting_seconds"] for step in ran["steps"]),
                }
            )
    return found


def size_text(seqlen: int) -> str:
    return f"{seqlen >> 20}M" if seqlen >= 2**20 else f"{seqlen >> 10}k"


def draw(result: dict[str, Any], out: Path) -> None:
    matplotlib.use("Agg")
    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = pyplot.subplots(
        len(HEADS_K), len(SEQLENS), figsize=(13, 5), sharex=True, sharey=True, layout="constrained"
    )
    colours = {"all_gather": "#1f6f8b", "ring": "#c98b3b", "ulysses": "#8a9a5b"}
    for axes_row, heads_k in zip(grid, HEADS_K, strict=True):
        for axes, seqlen in zip(axes_row, SEQLENS, strict=True):
            for strategy in STRATEGIES:
                rows = [
                    row
                    for row in result["rows"]
                    if (row["seqlen"], row["num_heads_k"], row["strategy"])
                    == (seqlen, heads_k, strategy)
                ]
                x = [row["gpus"] for row in rows]
                y = [100 * row["modelled_efficiency"] for row in rows]
                axes.plot(x, y, color=colours[strategy], label=strategy, marker=".")
                crosses = [(a, b) for a, b, row in zip(x, y, rows, strict=True) if not row["fits"]]
                if crosses:
                    axes.plot(*zip(*crosses, strict=True), "x", color="black", label="over 80 GB")
            axes.set_xscale("log", base=2)
            axes.set_xticks(GPUS[::2], [str(world) for world in GPUS[::2]])
            axes.set_ylim(0, 102)
            axes.axhline(90, color="#cccccc", linewidth=0.6, zorder=0)
            axes.set_title(f"S = {size_text(seqlen)}, {heads_k} kv heads")
    grid[0][0].set_ylabel("modelled efficiency, %")
    grid[1][0].set_ylabel("modelled efficiency, %")
    for axes in grid[-1]:
        axes.set_xlabel("H100s")
    handles, labels = [], []
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Modelled, not measured: causal, 32 heads of 128 channels, zigzag shards, 8 GPUs a node"
    )
    figure.savefig(out, dpi=110)


def print_tables(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="two gloo processes of this machine", title_justify="left")
    columns = ("strategy", "rank", "planned_bytes", "written_bytes", "expected", "took")
    for column in columns:
        table.add_column(column)
    for row in result["measured"]:
        seconds = (row["expected_processor_seconds"], row["processor_seconds"])
        table.add_row(*(str(row[c]) for c in columns[:4]), *(f"{x:.3f} s" for x in seconds))
    console.print(table)
    best = Table(title="modelled: the best strategy that fits", title_justify="left")
    best.add_column("S, kv heads")
    for world in GPUS:
        best.add_column(str(world))
    for heads_k in HEADS_K:
        for seqlen in SEQLENS:
            cells = []
            for world in GPUS:
                rows = [
                    row
                    for row in result["rows"]
                    if (row["seqlen"], row["num_heads_k"], row["gpus"]) == (seqlen, heads_k, world)
                    and row["fits"]
                ]
                row = max(rows, key=lambda row: row["modelled_efficiency"], default=None)
                cells.append(
                    "-" if row is None else f"{row['strategy']} {row['modelled_efficiency']:.0%}"
                )
            best.add_row(f"{size_text(seqlen)}, {heads_k}", *cells)
    console.print(best)


def main() -> None:
    arguments = parse_arguments()
    gpu = Machine()
    kernel = Kernel.predicted(gpu)
    result = {
        "note": "rows are modelled from counted work, predicted kernel rates and stated links; "
        "only 'measured' was measured, on the processor named",
        "environment": environment("cpu", 1) | revision() | {"cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stated": dataclasses.asdict(gpu) | {"memory_bytes": MEMORY},
        "predicted_kernel": dataclasses.asdict(kernel),
        "measured": measure(arguments.rows, arguments.repeats),
        "rows": model(kernel, gpu),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out.with_suffix(".png"))
    print_tables(result)


if __name__ == "__main__":
    main()
