# SPDX-License-Identifier: Apache-2.0
"""One case becomes one row: every peer checked against ours, then all that are right timed in
turns. Whatever a peer does, the row says so, and the others are measured."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from . import timing
from .cases import TARGETS, Case
from .inputs import Inputs
from .limits import roofline
from .peers import OURS
from .peers.base import Call, Peer, Unaffordable, Unsupported, difference
from .timing import Clock

# On a CPU a peer's first call is its only one where it takes so long, and so much longer than ours.
SLOW_SECONDS, SLOW_RATIO = 0.2, 8.0
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")


def is_fatal(error: BaseException) -> bool:
    """Does the process's CUDA context not survive it?"""
    return "CUDA error" in str(error)


def failure(error: BaseException) -> dict[str, Any]:
    """A peer's entry, or a row's status, for what was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, Unsupported):
        return {"status": "unsupported", "reason": str(error)}
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError | Unaffordable)
    if memory or any(word in text for word in OUT_OF_MEMORY):
        reason = str(error) if isinstance(error, Unaffordable) else text
        return {"status": "out of memory", "reason": reason}
    return {"status": "failed", "reason": text}


def measure(
    case: Case,
    device: str,
    peers: list[Peer],
    clock: Clock,
    limits: dict[str, float | None],
    seconds: float,
) -> dict[str, Any]:
    """Raises what makes the process useless; anything else becomes part of the row."""
    row = describe(case)
    try:
        row |= measure_peers(case, device, peers, clock, seconds)
    except Exception as error:
        if is_fatal(error):
            raise
        row |= failure(error)
    return row | rate(case, device, row["peers"], limits)


def describe(case: Case) -> dict[str, Any]:
    return {
        "case": str(case),
        **dataclasses.asdict(case),
        "visible": case.visible_share(),
        "flop": case.nominal_flop,
        "status": "ok",
        "peers": {},
    }


def measure_peers(
    case: Case, device: str, peers: list[Peer], clock: Clock, seconds: float
) -> dict[str, Any]:
    inputs = Inputs(case, device)
    by_name = {peer.name: peer for peer in peers}
    ours = by_name[OURS].make(inputs)
    ours.run()
    out, ours_seconds = timed(ours)
    expected = ours.result(out)
    entries: dict[str, dict[str, Any]] = {OURS: {"status": "ok"}}
    calls = {OURS: ours}
    for name, peer in by_name.items():
        if name == OURS:
            continue
        call, entries[name], first = check(case, peer, inputs, expected, ours.step)
        if call is None:
            continue
        if device == "cpu" and first > max(SLOW_SECONDS, SLOW_RATIO * ours_seconds):
            entries[name] |= timing.summarise([[first]]) | {"note": "slow: timed once"}
        else:
            calls[name] = call
    del out, expected
    times = timing.interleave({name: call.run for name, call in calls.items()}, clock, seconds)
    for name, summary in times.items():
        entries[name] |= summary
    if device == "cuda":
        entries[OURS]["kernels"] = timing.kernels(ours.run, device)
    return {"peers": entries}


def timed(call: Call) -> tuple[Any, float]:
    start = time.perf_counter()
    out = call.run()
    return out, time.perf_counter() - start


def check(
    case: Case, peer: Peer, inputs: Inputs, expected: torch.Tensor, step: float
) -> tuple[Call | None, dict[str, Any], float]:
    """The call, unless it is of no use; its entry; the seconds of its first run."""
    try:
        call = peer.make(inputs)
        out, first = timed(call)
        relative, close = difference(case, expected, call.result(out), step, call.tolerance)
    except Exception as error:
        if is_fatal(error):
            raise
        entry = failure(error)
        if entry["status"] == "out of memory" and inputs.device == "cuda":
            torch.cuda.empty_cache()
        return None, entry, 0.0
    if not close:
        reason = f"its result differs from ours by {relative:.1e}"
        return None, {"status": "wrong", "reason": reason, "difference": str(relative)}, 0.0
    entry = {"status": "ok", "difference": relative}
    if call.note:
        entry["note"] = call.note
    if call.preparation is not None:
        entry["preparation"] = call.preparation
    return call, entry, first


def rate(
    case: Case, device: str, entries: dict[str, dict[str, Any]], limits: dict[str, float | None]
) -> dict[str, Any]:
    """GFLOP/s by the nominal count, shares of the limit, our speed over each peer's, targets."""
    limit = roofline(case, device, limits)
    found = {name: x for name, x in entries.items() if "median" in x}
    for entry in found.values():
        entry["gflops"] = 1e-9 * case.nominal_flop / entry["median"]
        if limit is not None:
            entry["of_limit"] = limit["seconds"] / entry["median"]
        if OURS in found:
            entry["ratio"] = entry["median"] / found[OURS]["median"]
    targets = [
        {
            "target": str(t),
            "ratio": found[t.peer]["ratio"] if t.peer in found and OURS in found else None,
        }
        for t in TARGETS
        if t.applies(case, device)
    ]
    wanted = {str(t): t.ratio for t in TARGETS}
    for x in targets:
        x["met"] = None if x["ratio"] is None else x["ratio"] >= wanted[x["target"]]
    return {"limit": limit, "targets": targets}
