# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3, FlashInfer and SageAttention, installed or brought along: PFA_GPU_PEERS names a
folder with fa3.so (or fa3.so.xz) of vllm and the wheels of the others.

These calls were written without a GPU: their arguments are tested with stand-ins.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cases import WINDOW
from ..inputs import Inputs
from .base import Call, Finder, Missing, Peer, only, rows_first

VARIABLE = "PFA_GPU_PEERS"
FP8 = torch.float8_e4m3fn
UNSET = {"int": 0, "bool": False, "float": 0.0, "num_splits": 0, "cp_world_size": 1}


def brought() -> Path | None:
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder and Path(folder).is_dir() else None


def unpacked(path: Path) -> Path:
    """The library, or a wheel's folder: beside others in a cache that later runs find."""
    stamp = hashlib.sha256(f"{path.resolve()} {path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    target = Path(tempfile.gettempdir(), "pfa-gpu-peers", f"{path.stem}-{stamp}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        if path.suffix == ".xz":
            with lzma.open(path) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file)
        else:
            zipfile.ZipFile(path).extractall(part)
        part.rename(target)
    return target


def module(name: str, wheel: str) -> Any:
    """An installed module, or out of the wheels that were brought along."""
    folder = brought()
    for path in sorted(folder.glob("*.whl")) if folder else []:
        site = str(unpacked(path))
        if site not in sys.path:
            sys.path.append(site)  # what is installed goes first
    try:
        return importlib.import_module(name)
    except ImportError as error:
        where = f"{VARIABLE}={folder} has no {wheel}" if folder else f"{VARIABLE} is not set"
        raise Missing(f"{error}; {where}") from error


@functools.cache
def fa3_operator() -> Any:
    """fwd of the library that was brought along, or of an installed FlashAttention-3."""
    folder = brought()
    libraries = [*folder.glob("fa3.so"), *folder.glob("fa3.so.xz")] if folder else []
    if libraries:
        path = libraries[0]
        torch.ops.load_library(str(unpacked(path) if path.suffix == ".xz" else path))
        return torch.ops._vllm_fa3_C.fwd.default
    try:
        importlib.import_module("flash_attn_interface")
    except ImportError as error:
        raise Missing(f"{error}; {VARIABLE} names no folder with fa3.so") from error
    return torch.ops.flash_attn_3.fwd.default


def fill(operator: Any, given: dict[str, Any]) -> list[Any]:
    """All arguments of its schema in order, those not given with their neutral values: the schema
    has grown from version to version."""
    values = []
    for argument in operator._schema.arguments:
        if argument.name in given:
            values.append(given[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
        elif str(argument.type).startswith("Optional"):
            values.append(None)
        else:
            values.append(UNSET.get(argument.name, UNSET.get(str(argument.type))))
    return values


def starts(inputs: Inputs, rows: int) -> Tensor:
    device = inputs.qkv[0].device
    return torch.arange(inputs.case.batch + 1, dtype=torch.int32, device=device) * rows


def from_ragged(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    case = inputs.case
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    return lambda out: out.view(shape).transpose(1, 2)


def make_fa3(operator: Any, fp8: bool, inputs: Inputs) -> Call:
    """Over ragged rows, never split: vllm's library refuses others, of 8 bits at least."""
    case = inputs.case
    only(fp8 == case.dtype.startswith("int8"), "measured beside int8 only" if fp8 else "no int8")
    only(not case.dtype.endswith("-int8"), "no int8 output")
    only(case.pattern in ("full", "causal", "causal-end", "band"), "no such mask, no bias")
    only(case.seqlen == case.seqlen_k or case.pattern != "causal", "causal at the bottom right")
    q, k, v = (rows_first(x).flatten(0, 1) for x in inputs.qkv)
    given: dict[str, Any] = {"softmax_scale": inputs.scale, "num_splits": 1}
    given |= {"cu_seqlens_q": starts(inputs, case.seqlen), "max_seqlen_q": case.seqlen}
    given |= {"cu_seqlens_k": starts(inputs, case.seqlen_k), "max_seqlen_k": case.seqlen_k}
    given |= {"is_causal": case.pattern.startswith("causal")}
    given |= {"window_size_left": WINDOW - 1 if case.pattern == "band" else -1}
    given |= {"window_size_right": 0 if case.pattern == "band" else -1}
    if fp8:
        q, k, v = (x.to(FP8) for x in (q, k, v))
        one = torch.ones(case.batch, case.heads_k, device=q.device)
        given |= {"q_descale": one, "k_descale": one, "v_descale": one}
    values = fill(operator, given | {"q": q, "k": k, "v": v})
    tolerance = 0.15 if fp8 else 0.0  # 3 bits of mantissa
    return Call(lambda: operator(*values)[0], from_ragged(inputs), tolerance=tolerance)


def make_flashinfer(flashinfer: Any, inputs: Inputs) -> Call:
    """The batched call over ragged rows, planned beforehand as a server does once per step."""
    case = inputs.case
    only(case.dtype in ("fp16", "bf16"), "no int8")
    only(case.pattern in ("full", "causal", "causal-end", "band"), "no such mask, no bias")
    only(case.seqlen == case.seqlen_k or case.pattern != "causal", "causal at the bottom right")
    q, k, v = (rows_first(x).flatten(0, 1) for x in inputs.qkv)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts(inputs, case.seqlen),
        starts(inputs, case.seqlen_k),
        case.heads,
        case.heads_k,
        case.head_dim,
        causal=case.pattern != "full",
        window_left=WINDOW - 1 if case.pattern == "band" else -1,
        sm_scale=inputs.scale,
        q_data_type=inputs.dtype,
    )
    return Call(lambda: wrapper.run(q, k, v), from_ragged(inputs))


def make_sage(sageattention: Any, inputs: Inputs) -> Call:
    """int8 Q K^T; quantises inside the call."""
    case = inputs.case
    only(case.pattern in ("full", "causal"), "no such mask, no bias")
    only(case.seqlen == case.seqlen_k or not inputs.causal, "causal for equal lengths only")
    only(not case.dtype.endswith("-int8"), "no int8 output")
    only(case.head_dim in (64, 96, 128), "head_dim 64, 96 and 128 only")
    q, k, v = (x.clone() for x in inputs.qkv)  # it subtracts k's mean in place
    return Call(
        lambda: sageattention.sageattn(
            q, k, v, tensor_layout="HND", is_causal=inputs.causal, sm_scale=inputs.scale
        ),
        note="int8 Q K^T",
        tolerance=5e-2,
    )


def find_fa3(device: str, fp8: bool = False) -> Peer:
    make = functools.partial(make_fa3, fa3_operator(), fp8)
    return Peer("fa3-fp8" if fp8 else "fa3", "", make)


def find_flashinfer(device: str) -> Peer:
    found = module("flashinfer", "flashinfer_python wheel")
    version = getattr(found, "__version__", "")
    return Peer("flashinfer", version, functools.partial(make_flashinfer, found))


def find_sage(device: str) -> Peer:
    found = module("sageattention", "sageattention wheel")
    return Peer("sage", getattr(found, "__version__", ""), functools.partial(make_sage, found))


FINDERS = (
    Finder("fa3", ("cuda",), find_fa3),
    Finder("fa3-fp8", ("cuda",), functools.partial(find_fa3, fp8=True)),
    Finder("flashinfer", ("cuda",), find_flashinfer),
    Finder("sage", ("cuda",), find_sage),
)
