# SPDX-License-Identifier: Apache-2.0
"""Prints what ptxas said of every kernel of a build, as JSON, and fails on spills and warnings.

`ptxas.py build/cuda` reads the records that nvcc_log.py left there; it compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

import objects

# Local memory (spill stores + loads, or the stack of an indexed array) that kernels may use: a
# pattern of the name as printed, bytes, reason. Others may use none.
ALLOWED: list[tuple[str, int, str]] = [
    (
        r"sm80::Traits<.*Int8, (256|512)",
        1350,
        "O takes 128 of 255 registers, and ptxas delays adding a tile's products to it: about a "
        "quarter of O spends a part of the loop in local memory; the smaller tile without it is "
        "predicted to be a fifth slower at D = 256",
    ),
    (
        r"sm80::Traits<.*Float16, 128, .*, true, false>",
        480,
        "32 rows per warp: O and S take 192 of 255 registers",
    ),
    *(
        (
            rf"sm90::Traits<.*Int8, {head_dim}, ",
            2 * head_dim + 8 + words * 4,
            "sums that are carried over 2^16 keys, which rows so long alone touch, words of the "
            "producer, which has 24 registers, and of where a block of work ends",
        )
        for head_dim, words in ((64, 8), (128, 19), (256, 129))
    ),
    (
        r"sm90::Traits<.*Int8, 384, ",
        432,
        "392 bytes of the same, of half of the channels, and ten words",
    ),
    (
        r"sm90::Traits<.*Int8, 512, ",
        576,
        "520 bytes of the same, and up to fourteen words around the loop: sums of P V take 128 of "
        "240 registers",
    ),
    (r"sm80::Traits<", 200, "a few values that live across the loop, beside it"),
]


def allowed_bytes(name: str) -> int:
    return max((size for pattern, size, _ in ALLOWED if re.search(pattern, name)), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    built = objects.read(parser.parse_args().folder)
    kernels = [(kernel, x) for x in built for kernel in x.kernels]
    names = objects.demangle(kernel.name for kernel, _ in kernels)
    rows, failures = [], []
    for kernel, x in kernels:
        name = names[kernel.name]
        rows.append({**vars(kernel), "name": name, "source": x.source})
        local = max(kernel.spill_stores + kernel.spill_loads, kernel.stack)
        if local > allowed_bytes(name):
            failures.append(f"{kernel.arch} {name}: {local} bytes of local memory")
    failures += [f"{x.source}: {warning.strip()}" for x in built for warning in x.warnings]
    rows.sort(key=lambda row: (row["arch"], row["source"], row["name"]))
    print(json.dumps(rows, indent=1))
    print(f"{len(rows)} kernels, {len(failures)} complaints", file=sys.stderr)
    if failures or not rows:
        sys.exit("\n".join(failures) or "no kernel was compiled to machine code")


if __name__ == "__main__":
    main()
