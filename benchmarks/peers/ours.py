# SPDX-License-Identifier: Apache-2.0
"""pfa itself; and in int8 cases pfa on the floats that were quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pfa

from ..cases import WINDOW
from ..inputs import QUANT_STEP, Inputs
from .base import Call, Finder, Peer, only


def arguments(inputs: Inputs) -> dict[str, Any]:
    """The operator's arguments that express the case's pattern."""
    case = inputs.case
    given: dict[str, Any] = {"num_heads": case.heads, "num_key_value_heads": case.heads_k}
    given |= {"scale_value": inputs.scale, "input_layout": "BNSD"}
    if case.pattern == "causal":
        given |= {"sparse_mode": 2}
    elif case.pattern == "causal-end":
        given |= {"sparse_mode": 3}
    elif case.pattern == "band":
        given |= {"sparse_mode": 4, "pre_tokens": WINDOW - 1, "next_tokens": 0}
    elif case.pattern == "padding":
        given |= {"actual_seq_lengths_kv": case.lengths()}
    elif inputs.masked is not None:
        given |= {"sparse_mode": 1, "atten_mask": inputs.masked[None, None]}
    elif inputs.bias is not None:
        given |= {"pse_shift": inputs.bias}
    return given


def make(inputs: Inputs) -> Call:
    given, tensors = arguments(inputs), inputs.qkv
    if inputs.case.dtype.startswith("int8"):
        tensors = inputs.int8()
        given |= {  # on the CPU: read at the call, without a synchronisation
            "deq_scale1": torch.tensor([QUANT_STEP * QUANT_STEP]),
            "quant_scale1": torch.tensor([127.0]),
            "deq_scale2": torch.tensor([QUANT_STEP / 127]),
        }
    run = bind(tensors, given)
    if not inputs.case.dtype.endswith("-int8"):
        return Call(run)
    step = float(run().abs().max()) / 127
    given["quant_scale2"] = torch.tensor([1 / step])
    return Call(run, lambda out: out.float() * step, step=step)


def bind(tensors: list[Tensor], given: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: pfa.prompt_flash_attention(*tensors, **given)


def make_of_floats(inputs: Inputs) -> Call:
    only(inputs.case.dtype.startswith("int8"), "is pfa itself")
    given = arguments(inputs)
    if inputs.bias is not None:
        given["pse_shift"] = inputs.bias.to(inputs.dtype)
    return Call(bind(inputs.qkv, given))


def find(device: str) -> Peer:
    return Peer("pfa", pfa.__version__, make)


FINDERS = (
    Finder("pfa", ("cuda", "cpu"), find),
    Finder("pfa-fp16", ("cuda",), lambda device: Peer("pfa-fp16", "", make_of_floats)),
    Finder("pfa-bf16", ("cpu",), lambda device: Peer("pfa-bf16", "", make_of_floats)),
)
