# SPDX-License-Identifier: Apache-2.0
"""One causal prompt spread over several processes, in every way there is, beside one process.

Started plainly it starts its ranks itself; or torchrun --nproc-per-node 4 context_parallel.py. With
GPUs each rank takes one and they talk through NCCL, else through gloo.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun

import pfa
from pfa.distributed import context_parallel_forward, shard_sequence, unshard_sequence

HEADS, HEADS_K, HEAD_DIM = 8, 4, 64
OPTIONS = {
    "num_heads": HEADS,
    "num_key_value_heads": HEADS_K,
    "input_layout": "BSND",
    "scale_value": HEAD_DIM**-0.5,
    "sparse_mode": 3,  # causal
}
WAYS = [
    ("all_gather", "contiguous"),
    ("all_gather", "zigzag"),
    ("ring", "zigzag"),
    ("ulysses", "zigzag"),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="to start, if torchrun has not")
    parser.add_argument("--tokens", type=int, default=2048)
    return parser.parse_args()


def attend(tokens: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)  # every rank makes the whole prompt, to compare with
    heads = (HEADS, HEADS_K, HEADS_K)
    whole = [torch.randn(1, tokens, n, HEAD_DIM).bfloat16().to(device) for n in heads]
    expected = pfa.prompt_flash_attention(*whole, **OPTIONS).float()
    for strategy, order in WAYS:
        own = [shard_sequence(x, 1, order=order) for x in whole]
        report = []
        out = context_parallel_forward(
            *own, strategy=strategy, order=order, report=report, **OPTIONS
        )
        error = (unshard_sequence(out, 1, order=order).float() - expected).abs().max()
        flops = torch.tensor([sum(step.flops for step in report)], device=device)
        shares = [torch.empty_like(flops) for _ in range(world)]
        dist.all_gather(shares, flops)
        balance = max(shares).item() / (sum(shares).item() / world)
        if rank == 0:
            received = sum(step.received_bytes for step in report) / 2**20
            print(
                f"{strategy:10} {order:10} error {error:.1e}, {received:5.2f} MiB received by rank "
                f"0, the busiest rank has {balance:.2f} times its share of the work"
            )
        if not error < 2**-6:
            raise RuntimeError(f"rank {rank}: {strategy} differs from one process by {error}")


def main() -> None:
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        torchrun(["--standalone", f"--nproc-per-node={arguments.ranks}", *sys.argv])
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    attend(arguments.tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
