# SPDX-License-Identifier: Apache-2.0
"""Causal attention over a prompt of a million tokens, in chunks, with memory that does not grow.

Keys and values go to a file as they come. Each chunk of queries attends to that file block by
block; pfa.merge_states puts the blocks together. Run it again after an interruption and it goes on
with the first chunk that is missing. At the end some rows are compared with float64.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import Progress

import pfa

HEADS, HEADS_K, HEAD_DIM = 2, 1, 16
SCALE = HEAD_DIM**-0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--chunk", type=int, default=2**13, help="queries at a time")
    parser.add_argument("--block", type=int, default=2**16, help="keys at a time")
    parser.add_argument("--folder", type=Path, help="of the files (a new one, removed at the end)")
    parser.add_argument("--stop-after", type=int, help="chunks, to go on in another run")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.chunk, arguments.block) < 1:
        parser.error("--tokens, --chunk and --block must be positive")
    return arguments


class Files:
    """Keys, values and output of the whole prompt as mapped files, and how far they are written."""

    def __init__(self, folder: Path, tokens: int, chunk: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._progress = folder / "progress.json"
        self._settings = {"tokens": tokens, "chunk": chunk}
        self.done = 0  # chunks
        if self._progress.exists():
            found = json.loads(self._progress.read_text())
            self.done = found.pop("done")
            if found != self._settings:
                sys.exit(f"--folder holds a run with {found}, not with {self._settings}")
        self.k, self.v = (self._map(folder / name, tokens, HEADS_K) for name in ("k", "v"))
        self.out = self._map(folder / "out", tokens, HEADS)

    @staticmethod
    def _map(path: Path, tokens: int, heads: int) -> torch.Tensor:
        size = tokens * heads * HEAD_DIM
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
        return mapped.view(1, tokens, heads, HEAD_DIM)

    def finish_chunk(self) -> None:
        """A chunk counts when this file says so: it is replaced as a whole or not at all."""
        self.done += 1
        part = self._progress.with_suffix(".part")
        part.write_text(json.dumps(self._settings | {"done": self.done}))
        os.replace(part, self._progress)


def project(first: int, last: int) -> list[torch.Tensor]:
    """q, k and v of some tokens, (1, rows, heads, HEAD_DIM): what a model's layer would make."""
    rng = torch.Generator().manual_seed(first)
    shapes = [(1, last - first, heads, HEAD_DIM) for heads in (HEADS, HEADS_K, HEADS_K)]
    return [torch.randn(shape, generator=rng).bfloat16() for shape in shapes]


def attend(q: torch.Tensor, files: Files, first: int, block: int) -> torch.Tensor:
    """q: rows from `first` on, over all keys up to their own."""
    options = {
        "num_heads": HEADS,
        "num_key_value_heads": HEADS_K,
        "input_layout": "BSND",
        "scale_value": SCALE,
    }
    sums, lse = None, None
    for start in range(0, first + q.shape[1], block):
        end = min(start + block, first + q.shape[1])
        k, v = files.k[:, start:end], files.v[:, start:end]
        if end > first:  # some keys come after some rows
            mask = q.new_empty(1, dtype=torch.bool).expand(2048, 2048)  # its content is not read
            band = {"sparse_mode": 4, "pre_tokens": 2**40, "atten_mask": mask}
            # Row i of the chunk sees keys up to first + i; the band counts from the last of both.
            band["next_tokens"] = first + q.shape[1] - end
            options |= band
        part, part_lse = torch.ops.pfa.forward_lse(q, k, v, **options)
        if sums is None:
            sums, lse = part.float(), part_lse
        else:
            sums, lse = pfa.merge_states(
                [sums, part], [lse, part_lse], input_layout="BSND", out=sums
            )
    return sums.bfloat16()


def largest_error(files: Files, tokens: int, chunk: int) -> float:
    """Of rows spread over the prompt, against float64."""
    worst = 0.0
    for row in {0, 1, tokens // 3, tokens // 2, tokens - 1} & set(range(tokens)):
        first = row // chunk * chunk
        q = project(first, min(first + chunk, tokens))[0][0, row - first].double()
        k, v = (x[0, : row + 1].double() for x in (files.k, files.v))
        weights = torch.softmax(SCALE * (q @ k[:, 0].T), dim=-1)
        worst = max(worst, float((files.out[0, row].double() - weights @ v[:, 0]).abs().max()))
    return worst


def resident_mib() -> float:
    """The most this process has had, its mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(arguments: argparse.Namespace, folder: Path) -> None:
    tokens, chunk = arguments.tokens, arguments.chunk
    files = Files(folder, tokens, chunk)
    chunks = -(-tokens // chunk)
    stop = min(chunks, files.done + (arguments.stop_after or chunks))
    if files.done:
        print(f"going on at chunk {files.done + 1} of {chunks}")

    def pairs(done: int) -> int:  # of a query and a key, which is what takes time
        last = min(done * chunk, tokens)
        return last * (last + 1) // 2

    with Progress() as progress:
        bar = progress.add_task("prefill", total=pairs(chunks), completed=pairs(files.done))
        while files.done < stop:
            first = files.done * chunk
            last = min(first + chunk, tokens)
            q, files.k[:, first:last], files.v[:, first:last] = project(first, last)
            files.out[:, first:last] = attend(q, files, first, arguments.block)
            files.finish_chunk()
            progress.update(bar, completed=pairs(files.done))
    if files.done < chunks:
        print(f"stopped after chunk {files.done} of {chunks}, {resident_mib():.0f} MiB resident")
        return
    size = sum(x.nbytes for x in (files.k, files.v, files.out)) / 2**20
    error = largest_error(files, tokens, chunk)
    print(f"{tokens} tokens, {size:.0f} MiB in files, {resident_mib():.0f} MiB resident at most")
    print(f"largest error against float64: {error:.2e}")
    if not error < 2**-7:  # half of a step of bfloat16 between 2 and 4, where row 0 can be
        sys.exit("the error is too large")


def main() -> None:
    arguments = parse_arguments()
    if arguments.folder:
        run(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))


if __name__ == "__main__":
    main()
