# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host, apart from the kernels.

It is CPU time of the calling thread, and the least of many short turns: whatever else the machine
does can only add to it.

Calls with no key (Skv = 0) are judged as any other, and then nothing is computed. Calls with a few
keys follow: on a CPU their kernels are in it; on a GPU, where nothing waits, their launches are.
Beside a call of the operator stands that of an empty one, `pfa::_nothing`: what torch takes to read
the same arguments, to dispatch them and to hand them over. The rest is pfa's, the output included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import benchmark

import pfa

from .timing import summarise

HEADS, HEAD_DIM, ROWS = 2, 64, 4
TARGET_US = 8.0  # of torch.ops.pfa.forward with all optional arguments
TARGET_CASE = "every argument of floats"
TURNS, CALLS = 300, 100
Call = Callable[[], Any]


def calls(device: str) -> dict[str, tuple[Call, Call | None]]:
    """Calls, and those of an empty operator with the same arguments."""
    q = torch.randn(1, HEADS, ROWS, HEAD_DIM, dtype=torch.float16, device=device)
    q8, none = q.to(torch.int8), q[:, :, :0]
    plain: dict[str, Any] = {"num_heads": HEADS, "scale_value": 0.125, "input_layout": "BNSD"}
    floats, real = arguments(device, 0), arguments(device, ROWS)
    done = "launched" if device == "cuda" else "computed"
    return {
        "torch: alias, the least an operator costs": (partial(torch.ops.aten.alias, q), None),
        "torch: empty_like, the output's allocation": (partial(torch.empty_like, q), None),
        "no optional argument": beside_empty(q, none, plain),
        TARGET_CASE: beside_empty(q, none, floats),
        "no optional argument, prompt_flash_attention": front_end(q, none, plain),
        "causal, prompt_flash_attention": front_end(q, none, plain | {"sparse_mode": 2}),
        f"{TARGET_CASE}, prompt_flash_attention": front_end(q, none, floats),
        f"{done}: no optional argument": beside_empty(q, q, plain),
        f"{done}: {TARGET_CASE}": beside_empty(q, q, real),
        f"{done}: every argument of int8": beside_empty(q8, q8, real | int8_scales()),
    }


def beside_empty(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> tuple[Call, Call]:
    ops = torch.ops.pfa
    return partial(ops.forward, q, k, k, **options), partial(ops._nothing, q, k, k, **options)


def front_end(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> tuple[Call, None]:
    return partial(pfa.prompt_flash_attention, q, k, k, **options), None


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
    with torch.inference_mode():
        made = calls(device)
        reasons = {name: reason_against(call) for name, (call, _) in made.items()}
        times = least_times([x for n, pair in made.items() if not reasons[n] for x in pair if x])
    rows: list[dict[str, Any]] = []
    for name, (call, empty) in made.items():
        if reasons[name]:
            rows.append({"case": name, "status": "failed", "reason": reasons[name]})
            continue
        row: dict[str, Any] = {"case": name, "status": "ok"} | times[call]
        if empty is not None:
            row["empty_us"] = times[empty]["us"]
        if name == TARGET_CASE:
            row["target_us"] = TARGET_US
        rows.append(row)
    return rows


def reason_against(call: Call) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)[:300] or "RuntimeError"
    return ""


def least_times(found: list[Call]) -> dict[Call, dict[str, float]]:
    """In turns, so that a machine that is busy for seconds spoils some turns of all."""
    timers = {
        call: benchmark.Timer("call()", timer=time.thread_time, globals={"call": call})
        for call in found
    }
    taken: dict[Call, list[list[float]]] = {call: [] for call in found}
    for _ in range(TURNS):
        for call, timer in timers.items():
            taken[call].append(timer.timeit(CALLS).times)
    return {
        call: summarise(turns) | {"us": 1e6 * min(x for turn in turns for x in turn)}
        for call, turns in taken.items()
    }
