# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host, apart from the kernels.

It is CPU time of the calling thread, which other processes disturb less than the time that passes.

Calls with no key (Skv = 0) are judged as any other, and then nothing is computed. Calls with a few
keys follow: on a CPU their kernels are in it; on a GPU, where nothing waits, their launches are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import benchmark

import pfa

from .timing import summarise

HEADS, HEAD_DIM, ROWS = 2, 64, 4
TARGET_US = 8.0  # with all optional arguments
TURNS, CALLS = 9, 2000


def calls(device: str) -> dict[str, Callable[[], Any]]:
    q = torch.randn(1, HEADS, ROWS, HEAD_DIM, dtype=torch.float16, device=device)
    none = q[:, :, :0]
    op, front_end = torch.ops.pfa.forward, pfa.prompt_flash_attention
    plain: dict[str, Any] = {"num_heads": HEADS, "scale_value": 0.125, "input_layout": "BNSD"}
    floats = arguments(device, 0)
    q8 = q.to(torch.int8)
    found = {
        "torch: alias (a view, the least an operator costs)": lambda: torch.ops.aten.alias(q),
        "torch: empty_like (the output's allocation)": lambda: torch.empty_like(q),
        "no optional argument": lambda: op(q, none, none, **plain),
        "every argument of floats": lambda: op(q, none, none, **floats),
        "every argument, prompt_flash_attention": lambda: front_end(q, none, none, **floats),
    }
    real, int8 = arguments(device, ROWS), arguments(device, ROWS) | int8_scales()
    done = "launched" if device == "cuda" else "computed"
    return found | {
        f"{done}: no optional argument": lambda: op(q, q, q, **plain),
        f"{done}: every argument of floats": lambda: op(q, q, q, **real),
        f"{done}: every argument of int8": lambda: op(q8, q8, q8, **int8),
    }


def arguments(device: str, keys: int) -> dict[str, Any]:
    """Every optional argument that goes with a float query."""
    scale = torch.ones(HEADS * HEAD_DIM, device=device)
    return {
        "pse_shift": torch.zeros(1, HEADS, ROWS, keys, dtype=torch.float16, device=device),
        "atten_mask": torch.zeros(1, 1, ROWS, keys, dtype=torch.bool, device=device),
        "actual_seq_lengths": [ROWS],
        "actual_seq_lengths_kv": [keys],
        "quant_scale2": scale,
        "quant_offset2": torch.zeros_like(scale),
        "num_heads": HEADS,
        "num_key_value_heads": HEADS,
        "scale_value": 0.125,
        "pre_tokens": 65535,
        "next_tokens": 65535,
        "input_layout": "BNSD",
        "sparse_mode": 1,
    }


def int8_scales() -> dict[str, Any]:
    return {x: torch.ones(1) for x in ("deq_scale1", "quant_scale1", "deq_scale2")}


def measure(device: str) -> list[dict[str, Any]]:
    """Microseconds per call."""
    rows = []
    with torch.inference_mode():
        for name, call in calls(device).items():
            try:
                call()
            except RuntimeError as error:
                rows.append({"case": name, "status": "failed", "reason": str(error)[:300]})
                continue
            timer = benchmark.Timer("call()", timer=time.thread_time, globals={"call": call})
            turns = [timer.timeit(CALLS).times for _ in range(TURNS)]
            summary = summarise(turns)
            rows.append({"case": name, "status": "ok"} | summary | {"us": 1e6 * summary["median"]})
    return rows
