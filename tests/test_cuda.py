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
from simulate import simulate, simulated_log

KINDS = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
# Head dimensions that a family has kernels for. It takes a call whose head_dim is not above its
# largest; the sm80 family takes the rest.
BUCKETS = {
    "sm90": {
        **dict.fromkeys(("bf16", "fp16"), (64, 96, 128, 192, 256, 384, 512)),
        "int8": (64, 128, 256, 384, 512),
    },
    "sm80": dict.fromkeys(KINDS, (64, 96, 128, 192, 256, 384, 512)),
}
DIMS = BUCKETS["sm80"]["bf16"]


def expected_kernel(cc: str, dtype: str, dim: int) -> tuple[str, int]:
    """Family and bucket."""
    families = ("sm90", "sm80") if cc == "90" else ("sm80",)
    return next(
        (family, bucket)
        for family in families
        for bucket in BUCKETS[family].get(dtype, ())
        if dim <= bucket
    )


def kernel_case(dtype: str, bucket: int, dense: bool, bias: bool = False, **more) -> Case:
    """Just over a tile in both directions; fp16 leaves columns of the bucket unused."""
    sq, sk = (150, 200) if bucket <= 256 else (70, 80)
    fields = {"heads": 1, "sq": sq, "sk": sk, "quant": Quant() if dtype == "int8" else None}
    if dense:
        fields |= {"mask": Mask(3, pattern="empty_rows"), "nxt": 100}
    else:
        fields |= {"mode": 3}
    return Case(
        dtype,
        dim=bucket - 8 if dtype == "fp16" else bucket,
        pse=Pse(pattern="holes") if bias else None,
        **(fields | more),
    )


KERNELS = [
    pytest.param(
        dtype, bucket, dense, bias, id=f"{dtype}-D{bucket}{'-dense' * dense}{'-bias' * bias}"
    )
    for dtype in KINDS
    for bucket in DIMS
    for dense in (False, True)
    for bias in (False, True)
]


@pytest.mark.usefixtures("one_split")
@pytest.mark.parametrize(("dtype", "bucket", "dense", "bias"), KERNELS)
def test_every_kernel(on_cuda, dtype, bucket, dense, bias):
    case = kernel_case(dtype, bucket, dense, bias)
    call, expected = prepared(case)
    family, head_dim = expected_kernel(on_cuda.compute_capability(), dtype, case.dim)
    words = [family, KINDS[dtype], f"D{head_dim}", "dense" if dense else "band"]
    name = " ".join(words + ["bias"] * bias)
    assert on_cuda.choice(call).kernel.removesuffix(" compact") == name
    check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


@pytest.mark.parametrize("bucket", DIMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_int8_output_of_16_bits(on_cuda, dtype, bucket):
    """From the same kernels; fp16 writes single bytes and leaves columns of the bucket unused."""
    quant = Quant(out="channel", offset=True)
    call, expected = prepared(kernel_case(dtype, bucket, dense=bucket % 128 == 0, quant=quant))
    family, head_dim = expected_kernel(on_cuda.compute_capability(), dtype, bucket)
    words = on_cuda.choice(call).kernel.split()
    assert words[:3] == [family, KINDS[dtype], f"D{head_dim}"]
    check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


# A kernel or two of each tile shape. The band and the dense mask share all code but the mask's.
FEW_SM80 = [
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
# All kernels, for asynchronous copies and products are the family's substance; rings of buffers go
# round, and a block of threads has several blocks of work.
FEW_SM90 = [
    kernel_case(dtype, bucket, dense, bias, heads=2, sk=600)
    for dtype, buckets in BUCKETS["sm90"].items()
    for bucket in buckets
    for dense in (False, True)
    for bias in (False, True)
]
FEW_SETTINGS = {"CUDASIM_SMS": "2", "PFA_NUM_SPLITS": "1"}
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
def few(sim, on_cuda):
    """Cases for the family that is the device's own."""
    return FEW_SM90 if on_cuda.compute_capability() == "90" else FEW_SM80


@pytest.fixture(scope="module")
def few_outputs(few):
    return simulate(few, **FEW_SETTINGS)


@pytest.mark.parametrize("mode", MODES)
def test_any_order_gives_the_same_bits(few, few_outputs, mode):
    """Asynchronous copies done late, early and at random, and other orders of warps and blocks."""
    outputs = simulate(few, **FEW_SETTINGS, **MODES[mode])
    for case, want, got in zip(few, few_outputs, outputs, strict=True):
        assert torch.equal(want, got), case.id


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bucket", DIMS)
def test_no_races(on_cuda, sim, dtype, bucket):
    """The simulator's race checker, over one case per kernel."""
    if expected_kernel(on_cuda.compute_capability(), dtype, bucket)[1] != bucket:
        pytest.skip("runs the kernels of a larger head_dim")
    small = {"PFA_NUM_SPLITS": "2", "CUDASIM_RACE": "1"}
    cases = [kernel_case(dtype, bucket, dense, bias) for dense in (0, 1) for bias in (0, 1)]
    outputs = simulate(cases, **small)
    assert all(out.isfinite().all() for out in outputs)


# Copies of whole 16 bytes and of fewer, for each input; the last rows and keys are no whole tile.
GUARDED = [
    *FEW_SM80,
    kernel_case("int8", 96, True, True, batch=2, k_lens=(200, 77)),
    Case("bf16", sq=33, sk=72, dim=64, pse=Pse(), mask=Mask(2), mode=1),
    Case("fp16", sq=33, sk=71, dim=72, pse=Pse(), mask=Mask(4, pad=1), mode=1),
    Case("bf16", batch=2, sq=33, sk=77, dim=64, pse=Pse()),
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
def outputs_of_80(sim):
    return simulate(FEW_SM80, CUDASIM_CC="80")


@pytest.mark.parametrize("cc", ["86", "89", "90"])
def test_other_devices(on_cuda, outputs_of_80, cc):
    """The same code runs on all of them, but what 9.0 has of its own; above head_dim 256 tiles
    differ where shared memory is scarce."""
    got = simulate(FEW_SM80, CUDASIM_CC=cc)
    for case, want, out in zip(FEW_SM80, outputs_of_80, got, strict=True):
        is_compact = cc != "90" and case.dim > 256 and case.dtype != "int8"
        if is_compact or expected_kernel(cc, case.dtype, case.dim)[0] != "sm80":
            if case.dtype != "int8" or on_cuda.compute_capability() == cc:  # its tiles are known
                check(out, *prepared(case))
        else:
            assert torch.equal(want, out), case.id


H100 = {"CUDASIM_CC": "90", "PFA_NUM_SPLITS": "1"}
FALLBACKS = {
    "": Case("fp16", sq=20, sk=24, dim=64),
    "head_dim 24 is not a multiple of 16": Case("int8", sq=20, sk=24, dim=24, quant=Quant()),
    "head_dim 20 is not a multiple of 8": Case("bf16", sq=20, sk=24, dim=20),
    "query's address is not a multiple of 16": Case(
        "fp16", 2, 2, sq=20, sk=24, dim=64, layout="BSND", strides="sliced"
    ),
}


def test_what_hopper_does_not_take(sim):
    """PFA_LOG names the kernel of each distinct call, once, and why it is not the device's own."""
    cases = list(FALLBACKS.values())
    lines = simulated_log([*cases, *cases], PFA_LOG="debug", **H100)
    assert len(lines) == len(cases)
    for line, (why, case) in zip(lines, FALLBACKS.items(), strict=True):
        family = "sm80" if why else "sm90"
        assert line.startswith(f"pfa: {family} {KINDS[case.dtype]} D"), line
        assert line.partition(", 1 split")[2] == (f", not sm90: {why}" if why else ""), line
    assert simulated_log(cases[:1], **H100) == []


def test_reason_is_part_of_the_choice(on_cuda):
    why, case = list(FALLBACKS.items())[1]
    choice = on_cuda.choice(case.build())
    has_sm90 = on_cuda.compute_capability() == "90"
    assert choice.why_not_sm90 == (why if has_sm90 else "")
    assert choice.kernel.startswith("sm80")


# Rows of an odd number of bias values, shared by batch elements or not.
COPIED = [
    kernel_case("fp16", 64, False, True, sk=77),
    kernel_case("bf16", 128, True, True, batch=2, sk=257),
    kernel_case("bf16", 512, False, True, batch=2, sk=83),
]


@pytest.mark.parametrize("case", as_params(COPIED))
def test_bias_that_tma_cannot_read(on_cuda, case):
    """Hopper's kernels get a copy with other strides."""
    call, expected = prepared(case)
    is_hopper = on_cuda.compute_capability() == "90"
    assert on_cuda.choice(call).kernel.startswith("sm90" if is_hopper else "sm80")
    check(on_cuda.operator()(*call.args, **call.options), call, expected, on_cuda)


@pytest.mark.parametrize("batches", [1, 2])
def test_bias_of_one_row(on_cuda, batches):
    """A padding mask as a bias: broadcast over rows and heads, copied for the rows of a block."""
    call, _ = prepared(Case("fp16", 2, 2, sq=150, sk=80, dim=64))
    row = torch.randn(batches, 1, 1, 80, generator=torch.Generator().manual_seed(0)).half()
    call = call.with_(pse_shift=row.expand(batches, 2, 150, 80))
    is_hopper = on_cuda.compute_capability() == "90"
    assert on_cuda.choice(call).kernel.startswith("sm90" if is_hopper else "sm80")
    check(on_cuda.operator()(*call.args, **call.options), call, backend=on_cuda)


def test_a_copy_is_logged(sim):
    (line,) = simulated_log(COPIED[:1], PFA_LOG="debug", **H100)
    assert line.endswith(", 1 split, copies pse_shift")


@pytest.mark.parametrize("first", [0, 1])
def test_mask_in_words_or_bytes(on_cuda, first):
    """Rows that start at multiples of 16 bytes are read in other words; the bits are the same."""
    call, _ = prepared(Case("fp16", sq=100, sk=600, dim=64))
    values = torch.tensor([0, 0, 0, 1, 128, 255], dtype=torch.uint8)
    picks = torch.randint(0, 6, (2, 100, 640), generator=torch.Generator().manual_seed(1))
    mask = values[picks]
    mask[1, :, 1:601] = mask[0, :, :600]
    call = call.with_(atten_mask=mask[first, :, first : first + 600])
    check(on_cuda.operator()(*call.args, **call.options), call, backend=on_cuda)


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
