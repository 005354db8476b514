# SPDX-License-Identifier: Apache-2.0
"""Every instruction set in the binary, forced through PFA_CPU_ISA, on the ordinary cases."""

from __future__ import annotations

import pathlib
import platform

import pytest
import torch
from cases import EDGE, SMOKE, as_params
from compare import check_case, prepared

pytestmark = pytest.mark.cpu

_AVX2 = {"avx2", "fma", "f16c"}
_VNNI = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
NEEDS = {
    "amx": _BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _BF16,
    "avx512_vnni": _VNNI,
    "avx2": _AVX2,
    "portable": set(),
}


def processor_flags() -> set[str]:
    if platform.machine() != "x86_64":
        return set()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(set(line.split(":")[1].split()) for line in lines if line.startswith("flags"))


def lacking(isa: str) -> str:
    return " ".join(sorted(NEEDS[isa] - processor_flags()))


HERE = [name for name in NEEDS if not lacking(name)]


@pytest.fixture
def isa(request, monkeypatch) -> None:
    monkeypatch.setenv("PFA_CPU_ISA", request.param)


@pytest.mark.parametrize("name", NEEDS)
def test_runs_where_the_processor_has_it(forward, monkeypatch, name):
    if lacking(name):
        pytest.skip(f"this processor lacks {lacking(name)}")
    monkeypatch.setenv("PFA_CPU_ISA", name)
    check_case(forward, SMOKE[0])


@pytest.mark.parametrize("isa", HERE, indirect=True)
@pytest.mark.parametrize("case", as_params(SMOKE + EDGE))
def test_case(forward, isa, case):
    check_case(forward, case)


@pytest.mark.parametrize("isa", HERE, indirect=True)
@pytest.mark.parametrize("case", as_params(SMOKE))
def test_threads(forward, isa, threads, case):
    call, _ = prepared(case)
    outputs = []
    for count in (1, 2):
        threads(count)
        outputs.append(forward(*call.args, **call.options))
    assert torch.equal(*outputs)


def test_int8_does_not_depend_on_it(forward, monkeypatch):
    """Integer products are exact; what is left is the exponential, far below a rounding of P."""
    case = next(c for c in SMOKE if c.dtype == "int8" and not c.quant.out)
    call, expected = prepared(case)
    outputs = []
    for name in HERE:
        monkeypatch.setenv("PFA_CPU_ISA", name)
        outputs.append(forward(*call.args, **call.options).double())
    step = expected.baseline.max()
    for out in outputs[1:]:
        assert (out - outputs[0]).abs().max() <= 2 * step


def small_call():
    return prepared(SMOKE[0])[0]


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx512 ", "portable,avx2"])
def test_unknown_name(forward, monkeypatch, name):
    call = small_call()
    monkeypatch.setenv("PFA_CPU_ISA", name)
    with pytest.raises(RuntimeError, match="PFA_CPU_ISA must be one of .*portable") as info:
        forward(*call.args, **call.options)
    assert name in str(info.value)


@pytest.mark.parametrize("name", NEEDS)
def test_name_that_the_processor_lacks(forward, monkeypatch, name):
    if not lacking(name):
        pytest.skip(f"this processor has {name}")
    call = small_call()
    monkeypatch.setenv("PFA_CPU_ISA", name)
    with pytest.raises(RuntimeError, match=f"PFA_CPU_ISA.*{name}"):
        forward(*call.args, **call.options)


def test_an_empty_name_is_no_name(forward, monkeypatch):
    call = small_call()
    monkeypatch.delenv("PFA_CPU_ISA", raising=False)
    want = forward(*call.args, **call.options)
    monkeypatch.setenv("PFA_CPU_ISA", "")
    assert torch.equal(forward(*call.args, **call.options), want)


def test_it_is_read_at_every_call(forward, monkeypatch):
    call = small_call()
    want = forward(*call.args, **call.options)
    monkeypatch.setenv("PFA_CPU_ISA", "none")
    with pytest.raises(RuntimeError, match="PFA_CPU_ISA"):
        forward(*call.args, **call.options)
    monkeypatch.delenv("PFA_CPU_ISA")
    assert torch.equal(forward(*call.args, **call.options), want)
