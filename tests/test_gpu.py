# SPDX-License-Identifier: Apache-2.0
"""What needs a real GPU: graphs, streams, threads, memory beyond 2^31 elements."""

from __future__ import annotations

import threading

import backends
import pytest
import torch
from cases import SMOKE
from compare import check, prepared
from inputs import FAR, Case, Mask, Pse, Quant

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu(on_cuda):
    if on_cuda.name != "cuda":
        pytest.skip("needs a GPU")
    import pfa  # noqa: F401

    return on_cuda


def on_gpu(case: Case):
    call, expected = prepared(case)
    args, options = backends.to_gpu(call.args, call.options)
    return args, options, call, expected


def test_result_is_on_the_gpu_and_inputs_are_kept(gpu):
    for case in SMOKE:
        args, options, call, expected = on_gpu(case)
        out = torch.ops.pfa.forward(*args, **options)
        assert out.device == args[0].device
        check(out.cpu(), call, expected, gpu)
        named = dict(zip(("query", "key", "value"), args, strict=True), **options)
        for name, x in call.tensors().items():
            assert x.view(torch.uint8).equal(named[name].cpu().view(torch.uint8)), name


@pytest.mark.parametrize("splits", ["1", "3"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_graph_is_replayed_with_other_lengths(gpu, monkeypatch, splits, dtype):
    monkeypatch.setenv("PFA_NUM_SPLITS", splits)
    quant = Quant() if dtype == "int8" else None
    case = Case(dtype, 3, 2, sq=200, sk=300, mode=3, quant=quant, mask=None)
    args, options, call, _ = on_gpu(case)
    names = ("actual_seq_lengths", "actual_seq_lengths_kv")
    lens = {name: torch.tensor([200, 200, 200], device="cuda") for name in names}
    operator = torch.ops.pfa.forward.tensor_lens
    operator(*args, **options, **lens)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(*args, **options, **lens)
    for rows, keys in (([200, 7, 0], [300, 1, 9]), ([1, 199, 64], [64, 65, 300])):
        for name, values in zip(names, (rows, keys), strict=True):
            lens[name].copy_(torch.tensor(values))
        out.fill_(77)
        graph.replay()
        listed = call.with_(actual_seq_lengths=rows, actual_seq_lengths_kv=keys)
        check(out.cpu(), listed, backend=gpu)


def test_graph_with_a_mask_and_host_lengths(gpu):
    """Masks are packed by a kernel of their own, and more than 64 lengths go through memory."""
    case = Case("fp16", 70, 1, sq=30, sk=90, mask=Mask(batched=True), nxt=FAR, q_lens=(30,) * 70,
                k_lens=tuple(range(20, 90)))  # fmt: skip
    args, options, call, expected = on_gpu(case)
    torch.ops.pfa.forward(*args, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.pfa.forward(*args, **options)
    for _ in range(2):
        out.fill_(77)
        graph.replay()
        check(out.cpu(), call, expected, gpu)


def test_another_stream(gpu):
    """Work waits for what its stream did before, and allocates from that stream's memory."""
    args, options, call, expected = on_gpu(SMOKE[0])
    stream = torch.cuda.Stream()
    late = torch.full_like(args[2], torch.nan)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(args[2])
        out = torch.ops.pfa.forward(args[0], args[1], late, **options)
        late.fill_(torch.nan)
    stream.synchronize()
    check(out.cpu(), call, expected, gpu)


def test_threads_with_streams_of_their_own(gpu):
    """All first calls of a process race for the setup of their kernels."""
    work = [on_gpu(case) for case in SMOKE]
    wants = [torch.ops.pfa.forward(*args, **options) for args, options, _, _ in work]
    torch.cuda.synchronize()
    failures = []

    def run(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(40):
                i = (thread + step) % len(work)
                args, options, _, _ = work[i]
                if not torch.equal(torch.ops.pfa.forward(*args, **options), wants[i]):
                    failures.append((thread, step))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_call_does_not_wait(gpu):
    """Nor does it with lengths on the device, a mask, or a scale on the CPU."""
    q = torch.zeros(2, 2, 64, 64, dtype=torch.int8, device="cuda")
    scales = {n: torch.tensor([0.01]) for n in ("deq_scale1", "quant_scale1", "deq_scale2")}
    lens = torch.tensor([5, 6], device="cuda")
    mask = torch.zeros(64, 64, dtype=torch.bool, device="cuda")
    options = {"num_heads": 2, "input_layout": "BNSD", "atten_mask": mask, **scales}

    def call() -> torch.Tensor:
        return torch.ops.pfa.forward.tensor_lens(q, q, q, actual_seq_lengths=lens, **options)

    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    done = torch.cuda.Event()
    call()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_devices_may_not_be_mixed(gpu):
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float16, device="cuda")
    options = {"input_layout": "BNSD"}
    for name, tensor in {
        "key": q.cpu(),
        "value": q.cpu(),
        "atten_mask": torch.zeros(8, 8, dtype=torch.bool),
        "pse_shift": torch.zeros(1, 1, 8, 8, dtype=torch.float16),
        "quant_scale2": torch.ones(16),
        "query": q.cpu(),
    }.items():
        tensors = {"query": q, "key": q, "value": q, **options, name: tensor}
        wrong = "key" if name == "query" else name
        with pytest.raises(RuntimeError, match=f"{wrong} must be on the device of query"):
            torch.ops.pfa.forward(**tensors)
    lens = torch.tensor([8])
    with pytest.raises(RuntimeError, match="actual_seq_lengths must be on the device of query"):
        torch.ops.pfa.forward.tensor_lens(q, q, q, actual_seq_lengths=lens, **options)


def test_errors_leave_the_device_usable(gpu):
    args, options, call, expected = on_gpu(SMOKE[0])
    for _ in range(3):
        with pytest.raises(RuntimeError, match="num_heads"):
            torch.ops.pfa.forward(*args, **(options | {"num_heads": 7}))
        check(torch.ops.pfa.forward(*args, **options).cpu(), call, expected, gpu)


def need(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("kind", ["mask", "pse"])
def test_more_than_2_31_elements(gpu, kind):
    """The last rows of a mask or a bias whose index does not fit 31 bits."""
    need(24)
    batch, sq, sk, rows = 2, 47000, 47000, 96  # 4.4e9 pairs
    rng = torch.Generator("cuda").manual_seed(0)
    make = lambda s: torch.randn(batch, 1, s, 64, generator=rng, device="cuda").bfloat16()  # noqa: E731
    q, k, v = make(sq), make(sk), make(sk)
    options = {"input_layout": "BNSD", "scale_value": 0.125}
    if kind == "mask":
        wide = torch.empty(batch, sq, sk, dtype=torch.bool, device="cuda")
        wide.random_(0, 2, generator=rng)
        options |= {"atten_mask": wide, "sparse_mode": 1}
    else:
        wide = torch.empty(batch, 1, sq, sk, dtype=torch.bfloat16, device="cuda")
        wide.normal_(generator=rng)
        options |= {"pse_shift": wide}
    out = torch.ops.pfa.forward(q, k, v, **options)
    last = q[:, :, -rows:].contiguous()
    name = "atten_mask" if kind == "mask" else "pse_shift"
    part = options | {name: wide[..., -rows:, :].contiguous()}
    got = torch.ops.pfa.forward(last, k, v, **part)
    torch.testing.assert_close(out[:, :, -rows:], got, rtol=2e-2, atol=2e-3)


def test_long_sequences_of_keys(gpu):
    """K and V of more than 2^31 elements, seen through a band at their end."""
    need(20)
    sk, heads = 2**18 + 5, 72
    rng = torch.Generator("cuda").manual_seed(0)
    k = torch.randn(1, heads, sk, 128, generator=rng, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, heads, 100, 128, generator=rng, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    mask = torch.zeros(1, dtype=torch.uint8, device="cuda").expand(2048, 2048)
    options = {"num_heads": heads, "input_layout": "BNSD", "scale_value": 0.1}
    band = {"atten_mask": mask, "sparse_mode": 4, "pre_tokens": 200, "next_tokens": 0}
    out = torch.ops.pfa.forward(q, k, k, **options, **band)
    tail = k[:, :, -400:].contiguous()
    want = torch.ops.pfa.forward(q, tail, tail, **options, **band)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-3)


def test_bias_of_pse_for_every_head(gpu):
    """A grid of many blocks: batch, heads and rows all at once."""
    case = Case("fp16", 4, 16, 4, sq=500, sk=520, dim=64, pse=Pse(batched=True), mode=2)
    args, options, call, expected = on_gpu(case)
    check(torch.ops.pfa.forward(*args, **options).cpu(), call, expected, gpu)
