# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels have: every one of them, the simulator's stricter modes, lengths on
the device, and what a refused call leaves behind. test_gpu.py has what needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import backends
import pytest
import torch
from cases import SMOKE, as_params
from compare import check, prepared
from inputs import FAR, Case, Mask, Pse, Quant, guarded_copy
from simulate import simulate

BUCKETS = (64, 96, 128, 192, 256, 384, 512)
SM90_BUCKETS = (64, 128, 256)  # of 16-bit calls on compute capability 9.0; above, those of sm80
KINDS = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


def kernel_case(dtype: str, bucket: int, dense: bool, bias: bool, **more) -> Case:
    """Just over a tile in both directions; fp16 leaves columns of the bucket unused."""
    sq, sk = (150, 200) if bucket <= 256 else (70, 80)
    more.setdefault("quant", Quant() if dtype == "int8" else None)
    if dense:
        more |= {"mask": Mask(3, pattern="empty_rows"), "nxt": 100}
    else:
        more |= {"mode": 3}
    return Case(
        dtype,
        heads=1,
        sq=sq,
        sk=sk,
        dim=bucket - 8 if dtype == "fp16" else bucket,
        pse=Pse(pattern="holes") if bias else None,
        **more,
    )


KERNELS = [
    pytest.param(
        dtype, bucket, dense, bias, id=f"{dtype}-D{bucket}{'-dense' * dense}{'-bias' * bias}"
    )
    for dtype in KINDS
    for bucket in BUCKETS
    for dense in (False, True)
    for bias in (False, True)
]


@pytest.mark.usefixtures("one_split")
@pytest.mark.parametrize(("dtype", "bucket", "dense", "bias"), KERNELS)
def test_every_kernel(on_cuda, dtype, bucket, dense, bias):
    call, expected = prepared(kernel_case(dtype, bucket, dense, bias))
    words = on_cuda.choice(call).kernel.split()
    family, taken = "sm80", bucket
    if on_cuda.compute_capability() == "90" and dtype != "int8" and bucket <= SM90_BUCKETS[-1]:
        family, taken = "sm90", next(x for x in SM90_BUCKETS if bucket <= x)
    want = {family, KINDS[dtype], f"D{taken}", "dense" if dense else "band"}
    assert want <= set(words)
    assert bias == ("bias" in words)
    check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


# A kernel or two of each tile shape. The band and the dense mask share all code but the mask's.
FEW = [
    kernel_case("bf16", 64, False, False),
    kernel_case("fp16", 128, True, True),
    kernel_case("int8", 64, True, False),
    kernel_case("int8", 192, False, True),
    kernel_case("bf16", 192, True, False),
    kernel_case("fp16", 256, False, True),
    kernel_case("int8", 384, True, False),
    kernel_case("bf16", 512, True, True),
    kernel_case("fp16", 512, False, False, quant=Quant(out="channel")),
]
MODES = {
    "lazy": {"CUDASIM_ASYNC": "lazy", "CUDASIM_SEED": "2"},
    "war": {"CUDASIM_ASYNC": "war"},
    "random-1": {"CUDASIM_ASYNC": "random", "CUDASIM_SEED": "1"},
    "random-2": {"CUDASIM_ASYNC": "random", "CUDASIM_SEED": "2"},
    "random-3": {"CUDASIM_ASYNC": "random", "CUDASIM_SEED": "3"},
}


@pytest.fixture(scope="module")
def sim(on_cuda):
    if on_cuda.name != "sim":
        pytest.skip("needs the simulator: --backend sim")


@pytest.fixture(scope="module")
def few_outputs(sim):
    return simulate(FEW)


@pytest.mark.parametrize("mode", MODES)
def test_any_order_gives_the_same_bits(few_outputs, mode):
    """Asynchronous copies done late, early and at random, and other orders of warps and blocks."""
    for case, want, got in zip(FEW, few_outputs, simulate(FEW, **MODES[mode]), strict=True):
        assert torch.equal(want, got), case.id


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_no_races(sim, dtype, bucket):
    """The simulator's race checker, over one case per kernel."""
    small = {"PFA_NUM_SPLITS": "2", "CUDASIM_RACE": "1"}
    cases = [kernel_case(dtype, bucket, dense, bias) for dense in (0, 1) for bias in (0, 1)]
    outputs = simulate(cases, **small)
    assert all(out.isfinite().all() for out in outputs)


# Copies of whole 16 bytes and of fewer, for each input; the last rows and keys are no whole tile.
GUARDED = [
    *FEW,
    kernel_case("int8", 96, True, True, batch=2, k_lens=(200, 77)),
    Case("bf16", sq=33, sk=72, dim=64, pse=Pse(), mask=Mask(2), mode=1),
    Case("fp16", sq=33, sk=71, dim=72, pse=Pse(), mask=Mask(4, pad=1), mode=1),
    Case("int8", sq=17, sk=65, dim=65, layout="BSH", quant=Quant(out="channel", offset=True)),
    Case("bf16", sq=5, sk=9, dim=500, batch=3, q_lens=(5, 1, 0), k_lens=(9, 3, 0)),
]


@pytest.mark.parametrize("case", as_params(GUARDED))
def test_guard_pages(sim, forward, case):
    """No read behind a tensor. (On a GPU nothing tells.)"""
    call, expected = prepared(case)
    guarded = call.with_(**{n: guarded_copy(x) for n, x in call.tensors().items()})
    check(forward(*guarded.args, **guarded.options), call, expected)


COMPACT = [
    kernel_case(dtype, bucket, dense, bias)
    for dtype in ("bf16", "fp16")
    for bucket in (384, 512)
    for dense in (False, True)
    for bias in (False, True)
]


def test_devices_with_little_shared_memory(sim):
    """sm_86 has 99 KiB where sm_80 has 163: other tiles for 16 bits above head_dim 256."""
    settings = {"CUDASIM_CC": "86", "PFA_NUM_SPLITS": "1"}
    for case, out in zip(COMPACT, simulate(COMPACT, **settings), strict=True):
        call, expected = prepared(case)
        check(out, call, expected)


@pytest.fixture(scope="module")
def sm80_outputs(sim):
    return simulate(FEW, CUDASIM_CC="80")


@pytest.mark.parametrize("cc", ["86", "89", "90"])
def test_other_devices(sm80_outputs, cc):
    """The same code runs on all of them, but tiles differ above head_dim 256, and compute
    capability 9.0 has other kernels for 16 bits."""
    for case, want, got in zip(FEW, sm80_outputs, simulate(FEW, CUDASIM_CC=cc), strict=True):
        if case.dtype == "int8" or (cc != "90" and case.dim <= 256):
            assert torch.equal(want, got), case.id
        else:
            check(got, *prepared(case))


# Twice to four times what two roundings of the output, of P and of what plain sums lose give.
NMSE = {"bf16": 2.0**-16, "fp16": 2.0**-22, "int8": 2.0**-12}


@pytest.mark.parametrize("case", as_params(SMOKE))
def test_agrees_with_the_cpu(on_cuda, case):
    call, _ = prepared(case)
    want = backends.cpu_forward(call).double()
    got = on_cuda.operator()(*call.args, **call.options).double()
    rounding = 2.0**-15 if call.dtype_out == torch.int8 else 0.0
    assert (got - want).square().sum() <= want.square().sum() * (NMSE[case.dtype] + rounding)


def lengths(batch: int, most: int, seed: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, (batch,), generator=rng).tolist()


@pytest.mark.parametrize("batch", [64, 65, 129, 300])
def test_many_host_lengths(on_cuda, batch):
    """Up to 64 travel in the launch, more do not fit; a tensor of lengths says the same."""
    q_lens, k_lens = lengths(batch, 5, 0), lengths(batch, 9, 1)
    case = Case("bf16", batch, 1, sq=5, sk=9, dim=16, mode=3)
    forward, call = on_cuda.operator(), prepared(case)[0]
    listed = call.with_(actual_seq_lengths=q_lens, actual_seq_lengths_kv=k_lens)
    out = forward(*listed.args, **listed.options)
    check(out, listed, backend=on_cuda)
    for dtype in (torch.int32, torch.int64):
        tensors = call.with_(
            actual_seq_lengths=torch.tensor(q_lens, dtype=dtype),
            actual_seq_lengths_kv=torch.tensor(k_lens, dtype=dtype),
        )
        assert torch.equal(forward.tensor_lens(*tensors.args, **tensors.options), out)


@pytest.mark.parametrize("which", ["actual_seq_lengths", "actual_seq_lengths_kv"])
def test_one_side_has_lengths(on_cuda, which):
    forward, call = on_cuda.operator(), prepared(Case("fp16", 3, 2, sq=70, sk=90, mode=3))[0]
    listed, tensor = ({which: [7, 70, 0]}, {which: torch.tensor([7, 70, 0])})
    want = forward(*call.args, **call.options, **listed)
    got = forward.tensor_lens(*call.args, **call.options, **tensor)
    assert torch.equal(got, want)


@pytest.mark.parametrize("deq", [torch.float32, torch.int64])
def test_single_scales_may_be_on_the_cpu(on_cuda, deq):
    """By value or from the device's memory: in the simulator the rank decides, see validate.cpp."""
    quant = Quant(out="tensor", offset=True, deq=str(deq).removeprefix("torch."))
    call, _ = prepared(Case("int8", 1, 2, sq=40, sk=100, dim=64, quant=quant))
    names = [n for n in call.options if n.startswith(("deq_", "quant_"))]
    want = on_cuda.operator()(*call.args, **call.options)
    scalars = {n: call.options[n].reshape(()) for n in names}
    if on_cuda.name == "sim":
        got = on_cuda.operator()(*call.args, **(call.options | scalars))
    else:
        rest = {n: x for n, x in call.options.items() if n not in names}
        args, options = backends.to_gpu(call.args, rest)
        got = torch.ops.pfa.forward(*args, **options, **scalars).cpu()
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "2 "])
def test_bad_number_of_splits(on_cuda, monkeypatch, value):
    call, _ = prepared(SMOKE[0])
    monkeypatch.setenv("PFA_NUM_SPLITS", value)
    with pytest.raises(RuntimeError, match="PFA_NUM_SPLITS must be"):
        on_cuda.operator()(*call.args, **call.options)


def test_a_call_after_an_error(on_cuda):
    call, expected = prepared(SMOKE[0])
    bad = call.with_(next_tokens=-FAR)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="next_tokens"):
            on_cuda.operator()(*bad.args, **bad.options)
        check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


def test_refused_calls_launch_nothing(sim, tmp_path):
    """Every row of test_validation.py through the CUDA backend: a launch would leave statistics."""
    stats = tmp_path / "stats"
    target = str(backends.ROOT / "tests" / "test_validation.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", target, "-k", "refuses"],
        env=os.environ | backends.simulator_environment(CUDASIM_STATS=str(stats)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert not stats.exists() or "kernel" not in stats.read_text()
    simulate(SMOKE[:1], CUDASIM_STATS=str(stats))
    assert "kernel" in stats.read_text()
