# SPDX-License-Identifier: Apache-2.0
"""The peak memory of one long call on the CPU beyond its inputs and output.

``python -m benchmarks.memory DTYPE PATTERN THREADS`` prints it in bytes: a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from .cases import Case

SEQLEN, HEAD_DIM, HEADS = 16384, 128, 8
CASES = (("bf16", "full"), ("bf16", "band"), ("fp16", "band"), ("int8", "band"))
GOAL = 64 << 20


def measure(dtype: str, pattern: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", dtype, pattern, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"case": f"{dtype} D{HEAD_DIM} {pattern} {SEQLEN} B1 N{HEADS}"}
    if done.returncode:
        return row | {"status": "failed", "reason": done.stderr.strip()[-300:]}
    return row | {"status": "ok", "bytes": int(done.stdout), "goal": GOAL}


def _print(dtype: str, pattern: str, threads: str) -> None:
    import torch

    from .inputs import Inputs
    from .peers import ours

    torch.set_num_threads(int(threads))
    # The same call on 256 rows sets up libraries and thread stacks.
    ours.make(Inputs(Case(dtype, HEAD_DIM, pattern, 256, 1, HEADS), "cpu")).run()
    call = ours.make(Inputs(Case(dtype, HEAD_DIM, pattern, SEQLEN, 1, HEADS), "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = _status("VmRSS")
    out = call.run()
    extra = _status("VmHWM") - before - out.numel() * out.element_size()
    sys.stdout.write(f"{extra}\n")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    _print(*sys.argv[1:])
