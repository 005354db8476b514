# SPDX-License-Identifier: Apache-2.0
"""Cases and the tensors they stand for. The lists of cases are in cases.py.

A case is a few words; build() turns it into the operator's arguments, the same ones every time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
COMPRESSED = 2048  # side of the mask that sparse modes 2, 3 and 4 take
FAR = 2147483647


@dataclass(frozen=True)
class Mask:
    """Only for modes 0 and 1; the other modes get the compressed mask by themselves."""

    ndim: int = 4
    batched: bool = False
    pad: int = 0  # rows and columns beyond Sq and Sk; all ones, all zeros would not show a misread
    dtype: torch.dtype = torch.bool
    pattern: str = "random"  # random, causal, empty_rows, left_half, all, none, blocks

    def __str__(self) -> str:
        words = [
            f"mask{self.ndim}d",
            "B" if self.batched else "",
            f"+{self.pad}" if self.pad else "",
        ]
        kind = "" if self.dtype == torch.bool else str(self.dtype).removeprefix("torch.")
        return "".join(words) + kind + self.pattern


@dataclass(frozen=True)
class Pse:
    batched: bool = False
    pad: int = 0  # NaN beyond Sq and Sk
    pattern: str = "normal"  # normal, holes (-inf), empty_rows (-inf), alibi, large, additive_mask

    def __str__(self) -> str:
        return f"pse{'B' if self.batched else ''}{f'+{self.pad}' if self.pad else ''}{self.pattern}"


@dataclass(frozen=True)
class Quant:
    out: str = ""  # "" (not int8), tensor, channel
    offset: bool = False
    scale_dtype: torch.dtype = torch.float32
    shape: str = "H"  # of a per-channel scale: H, 11H, ND, 1N1D, 11ND
    p_scale: float = 127.0
    deq: str = "float32"  # float32, uint64, int64
    sign_s: float = 1.0  # of deq_scale1
    sign_o: float = 1.0  # of deq_scale2

    def __str__(self) -> str:
        default = Quant()
        words = [f"out8{self.out}" if self.out else "", "offset" if self.offset else ""]
        for f in dataclasses.fields(self)[2:]:
            got = getattr(self, f.name)
            if got != getattr(default, f.name):
                words.append(f"{f.name}={str(got).removeprefix('torch.')}")
        return "-".join(w for w in words if w) or "out16"


@dataclass(frozen=True)
class Call:
    """The operator's arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def layout(self) -> str:
        return self.options.get("input_layout", "BSH")

    @property
    def num_heads(self) -> int:
        return self.options.get("num_heads", 1)

    @property
    def dtype_out(self) -> torch.dtype:
        if "quant_scale2" in self.options:
            return torch.int8
        return torch.float16 if self.query.dtype == torch.int8 else self.query.dtype

    def with_(self, **options: Any) -> Call:
        tensors = {n: options.pop(n) for n in ("query", "key", "value") if n in options}
        merged = {k: v for k, v in (self.options | options).items() if v is not None}
        return dataclasses.replace(self, options=merged, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value, **self.options}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}


@dataclass(frozen=True)
class Case:
    dtype: str = "bf16"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0  # 0: as heads
    sq: int = 64
    sk: int = 64
    dim: int = 64
    layout: str = "BNSD"
    mode: int = 0
    mask: Mask | None = None
    pre: int = FAR
    nxt: int = FAR
    q_lens: tuple[int, ...] = ()
    k_lens: tuple[int, ...] = ()
    pse: Pse | None = None
    strides: str = ""  # transposed, sliced, expanded (batch stride 0), last_dim
    values: str = "normal"
    scale: float | None = None  # None: 1 / sqrt(dim)
    quant: Quant | None = None  # given with int8 inputs or an int8 output
    seed: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        words = [self.dtype, f"B{self.batch}", heads, f"Sq{self.sq}-Sk{self.sk}-D{self.dim}"]
        words.append(self.layout if self.layout != "BNSD" else "")
        words.append(f"mode{self.mode}" if self.mode or self.mask else "")
        if (self.pre, self.nxt) != (FAR, FAR):
            words.append(f"pre{_token(self.pre)}next{_token(self.nxt)}")
        words += [str(self.mask or ""), str(self.pse or "")]
        words += [_lens("q", self.q_lens), _lens("k", self.k_lens), self.strides]
        words.append("" if self.values == "normal" else self.values)
        words.append("" if self.scale is None else f"scale{self.scale}")
        words.append(str(self.quant) if self.quant else "")
        return "-".join(w for w in words if w)

    def build(self) -> Call:
        rng = torch.Generator().manual_seed(zlib.crc32(self.id.encode()) + self.seed)
        options: dict[str, Any] = {"num_heads": self.heads, "input_layout": self.layout}
        if self.kv_heads:
            options["num_key_value_heads"] = self.kv_heads
        options["scale_value"] = self.dim**-0.5 if self.scale is None else self.scale
        if self.mode:
            options["sparse_mode"] = self.mode
        options |= {"pre_tokens": self.pre, "next_tokens": self.nxt}
        if self.q_lens:
            options["actual_seq_lengths"] = list(self.q_lens)
        if self.k_lens:
            options["actual_seq_lengths_kv"] = list(self.k_lens)
        if self.mode >= 2:
            options["atten_mask"] = compressed_mask()
        elif self.mask:
            options["atten_mask"] = make_mask(self, rng)
        if self.pse:
            options["pse_shift"] = make_pse(self, rng)
        if self.quant:
            options |= make_quant(self, rng)
        q, k, v = make_qkv(self, rng)
        shape = [restride(to_layout(x, self.layout), self.strides) for x in (q, k, v)]
        return Call(*shape, options)


def _token(value: int) -> str:
    names = {FAR: "Max", 2**63 - 1: "Max64"}
    return names.get(value, str(value))


def _lens(name: str, values: tuple[int, ...]) -> str:
    return f"{name}{','.join(map(str, values))}" if values else ""


def compressed_mask() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu_(1)


def to_layout(x: Tensor, layout: str) -> Tensor:
    """(B, N, S, D) -> a contiguous input of the layout."""
    if layout == "BSH":
        return x.transpose(1, 2).flatten(2).contiguous()
    return x.transpose(1, 2).contiguous() if layout == "BSND" else x.contiguous()


def restride(x: Tensor, how: str) -> Tensor:
    """The same values at other strides."""
    if how == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if how == "sliced":
        wide = torch.full([n + 3 for n in x.shape], 3, dtype=x.dtype)
        view = wide[tuple(slice(1, 1 + n) for n in x.shape)]
        return view.copy_(x)
    if how == "expanded":
        return x[:1].expand(x.shape)
    if how == "last_dim":
        return x.mT.contiguous().mT
    assert how == "", how
    return x


def make_qkv(case: Case, rng: torch.Generator) -> list[Tensor]:
    """(B, N, Sq, D), (B, Nkv, Sk, D) twice."""
    kv = (case.batch, case.kv_heads or case.heads, case.sk, case.dim)
    shapes = [(case.batch, case.heads, case.sq, case.dim), kv, kv]
    if case.dtype == "int8":
        return [torch.randint(-127, 128, s, generator=rng, dtype=torch.int8) for s in shapes]
    q, k, v = (torch.randn(s, generator=rng) for s in shapes)
    if case.values == "outlier_channel":  # huges in single channels of q and k meet zeros
        q[..., 0], k[..., 0] = q[..., 0] * 1e4, 0
        q[..., -1], k[..., -1] = 0, k[..., -1] * 1e4
    elif case.values == "outlier_in_v":  # at a key that next to nobody looks at
        q = q.abs() + 0.5
        k[:, :, 3] = -k[:, :, 3].abs() - 0.5
        v[:, :, 3, ::4] = 60000
    elif case.values == "outlier_in_v_seen":  # at a key that has its normal share
        v[:, :, 3, ::4] = 60000
    elif case.values == "wide_v":  # every row of V and so many rows of the output at its own scale
        v *= torch.logspace(-4, 4, case.sk)[:, None]
    elif case.values == "wide_v_columns":
        v *= torch.logspace(-4, 4, case.dim)
    elif case.values == "wide_qk":  # rows of q from 1e-4 to 1e4 against k of 1e-2
        q *= torch.logspace(-4, 4, case.sq)[:, None]
        k *= 1e-2
    elif case.values == "denormal":  # below 6.1e-5 fp16 has no normal numbers
        q, v = q * 2e-6, v * 2e-6
        k *= 1e4
    elif case.values == "large_logits":  # |s| about 100: nearly one-hot rows
        q, k = q * 6, k * 6
    elif case.values == "constant_v":
        v = torch.ones_like(v)
    elif case.values == "diagonal":  # each row picks one key; outputs span V's range
        v *= torch.logspace(-4, 4, case.sk)[:, None]
        k = torch.zeros_like(k)
        k[..., torch.arange(case.sk), torch.arange(case.sk) % case.dim] = 8
        q = torch.zeros_like(q)
        q[..., torch.arange(case.sq), torch.arange(case.sq) % case.dim] = 8
    else:
        assert case.values == "normal", case.values
    return [x.clamp(-65504, 65504).to(DTYPES[case.dtype]) for x in (q, k, v)]


def make_mask(case: Case, rng: torch.Generator) -> Tensor:
    spec = case.mask
    batch = case.batch if spec.batched else 1
    rows, keys = torch.arange(case.sq)[:, None], torch.arange(case.sk)
    random = torch.rand(batch, case.sq, case.sk, generator=rng) < 0.4
    inner = {
        "random": random,
        "causal": (keys > rows).expand(batch, -1, -1),
        "empty_rows": random | (rows % 3 == 1),
        "left_half": (keys < case.sk // 2).expand(batch, case.sq, -1),
        "blocks": (keys // 100 != rows // 100).expand(batch, -1, -1),
        "all": torch.ones_like(random),
        "none": torch.zeros_like(random),
    }[spec.pattern]
    full = torch.ones(batch, case.sq + spec.pad, case.sk + 2 * spec.pad, dtype=torch.bool)
    full[:, : case.sq, : case.sk] = inner
    if spec.dtype != torch.bool:  # any nonzero value masks
        some = torch.randint(1, 256, full.shape, generator=rng, dtype=torch.uint8)
        full = torch.where(full, some, 0).to(torch.uint8).view(spec.dtype)
    return full[0] if spec.ndim == 2 else full[:, None] if spec.ndim == 4 else full


def make_pse(case: Case, rng: torch.Generator) -> Tensor:
    spec = case.pse
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float16
    shape = (case.batch if spec.batched else 1, case.heads, case.sq, case.sk)
    rows, keys = torch.arange(case.sq)[:, None], torch.arange(case.sk)
    inner = torch.randn(shape, generator=rng)
    if spec.pattern == "holes":
        inner[torch.rand(shape, generator=rng) < 0.4] = -torch.inf
    elif spec.pattern == "empty_rows":
        inner = inner.masked_fill((rows % 3 == 1), -torch.inf)
    elif spec.pattern == "alibi":
        inner = -torch.logspace(-1, -4, case.heads)[:, None, None] * (rows - keys).abs()
        inner = inner.expand(shape)
    elif spec.pattern == "large":
        inner = inner * 50
    elif spec.pattern == "additive_mask":  # as transformers writes one
        lowest = torch.finfo(dtype).min
        inner = torch.where(keys > rows, lowest, 0.0).expand(shape)
    full = torch.full((*shape[:2], case.sq + spec.pad, case.sk + 2 * spec.pad), torch.nan)
    full[:, :, : case.sq, : case.sk] = inner
    return full.to(dtype)


def pack(scale: float, dtype: torch.dtype) -> Tensor:
    """A float's bits in the low half of a 64-bit word; the high half is noise that nobody reads."""
    low = struct.unpack("<I", struct.pack("<f", scale))[0]
    word = (1 << 46) | (0x155 << 33) | low
    return torch.tensor([word], dtype=torch.int64).view(dtype)


def make_quant(case: Case, rng: torch.Generator) -> dict[str, Tensor]:
    spec = case.quant
    options: dict[str, Tensor] = {}
    magnitude = 1.0  # of the output before quant_scale2
    if case.dtype == "int8":
        scale = case.dim**-0.5 if case.scale is None else case.scale
        # randint(-127, 128) has a deviation of 73; this makes the scores' deviation about 2
        descale_s = spec.sign_s * 2 / (73**2 * case.dim**0.5 * max(abs(scale), 1e-3))
        descale_o = spec.sign_o / 73 / max(spec.p_scale, 1)
        options["quant_scale1"] = torch.tensor([spec.p_scale])
        for name, real in (("deq_scale1", descale_s), ("deq_scale2", descale_o)):
            packed = spec.deq != "float32"
            options[name] = pack(real, getattr(torch, spec.deq)) if packed else torch.tensor([real])
        magnitude = max(min(case.sk, 16), 1) ** -0.5
    if spec.out:
        n = 1 if spec.out == "tensor" else case.heads * case.dim
        scale_out = (torch.rand(n, generator=rng) + 0.5) * 60 / magnitude
        options["quant_scale2"] = _shaped(scale_out, case).to(spec.scale_dtype)
        if spec.offset:
            offset = torch.rand(n, generator=rng) * 20 - 10
            options["quant_offset2"] = _shaped(offset, case).to(spec.scale_dtype)
    return options


def _shaped(x: Tensor, case: Case) -> Tensor:
    if x.numel() == 1:
        return x
    n, d = case.heads, case.dim
    shapes = {
        "H": (n * d,),
        "11H": (1, 1, n * d),
        "ND": (n, d),
        "1N1D": (1, n, 1, d),
        "11ND": (1, 1, n, d),
    }
    return x.reshape(shapes[case.quant.shape])


def guarded_copy(x: Tensor) -> Tensor:
    """A copy whose last byte is the last one of its mapping; the pages around it are closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    inner = -(-size // page) * page
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, inner + 2 * page, 0, private, -1, 0)
    assert libc.mprotect(base + page, inner, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    start = base + page + inner - size
    memory = (ctypes.c_byte * size).from_address(start)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape)
    return copy.copy_(x)
