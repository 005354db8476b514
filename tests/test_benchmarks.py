# SPDX-License-Identifier: Apache-2.0
"""benchmarks: what a row says whatever a peer does, and the files that a run leaves."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import backends
import pytest
import torch
from benchmark_rows import LIMITS, FakeClock, case, make_result, measured, peer, shown

from benchmarks import (
    cases,
    launch,
    limits,
    measure,
    peers,
    plan,
    results,
    timing,
)
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import base, gpu, torch_ops
from benchmarks.peers.base import Call, Peer
from benchmarks.plan import Plan


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.interleave(calls, FakeClock(), 1.0)
    assert order == ["a", "b"] * timing.TURNS
    assert found["a"]["median"] == 3.125 and found["a"]["samples"] == 2 * timing.TURNS
    assert found["a"]["noise"] == (5.125 - 1.125) / 3.125
    assert found["b"]["end_to_end"] == 9.0


def test_cpu_clock() -> None:
    found = timing.CpuClock().turn(lambda: sum(range(1000)), 0.01)
    assert 1e-7 < min(found) < 1e-2


@pytest.mark.usefixtures("forward")  # so that CUDA kernels are compared too
@pytest.mark.parametrize("pattern", cases.PATTERNS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_plain_torch_agrees_in_every_pattern(dtype: str, pattern: str) -> None:
    """So the patterns mean the same to us and to the peers, in all dtypes, on either device."""
    keys = {"seqlen_k": 48} if pattern == "causal-end" else {}
    of = case(dtype, pattern, **keys)
    device = "cuda" if backends.current().name == "cuda" else "cpu"
    found, _ = peers.find(device, ("eager", "sdpa-math"))
    row = measure.measure(of, device, found, FakeClock(), LIMITS, 0.01)
    assert row["status"] == "ok", row
    for name in ("pfa", "eager", "sdpa-math"):
        assert row["peers"][name]["status"] == "ok", (name, row["peers"][name])


def test_int8_is_measured_beside_our_own_floats() -> None:
    ours = next(x for x in peers.ours.FINDERS if x.name == "pfa-bf16").find("cpu")
    assert measured(case("int8"), ours)["peers"]["pfa-bf16"]["status"] == "ok"
    assert measured(case("fp16"), ours)["peers"]["pfa-bf16"]["status"] == "unsupported"


@pytest.mark.parametrize("pattern", cases.PATTERNS)
def test_visible_share_is_what_the_masks_say(pattern: str) -> None:
    of = case(pattern=pattern, seqlen=64, **({"seqlen_k": 96} if "end" in pattern else {}))
    inputs = Inputs(of, "cpu")
    keep = inputs.keep
    if inputs.causal:
        keep = torch.ones(of.seqlen, of.seqlen_k).tril()
    seen = 1.0 if keep is None else float(keep.float().mean())
    assert of.visible_share() == pytest.approx(seen, abs=0.02 if pattern == "random" else 1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("pattern", [p for p in cases.PATTERNS if p != "full"])
def test_flex_means_the_same(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    of = case("bf16", pattern, seqlen=128)
    row = measured(of, peer(torch_ops.make_flex, "flex"))
    assert row["peers"]["flex"]["status"] == "ok", row["peers"]["flex"]
    has_mask = pattern != "bias"
    assert ("preparation" in row["peers"]["flex"]) == has_mask


def raising(error: Exception) -> Peer:
    def make(inputs: Inputs) -> Call:
        raise error

    return peer(make)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (base.Unsupported("no masks"), "unsupported"),
        (base.Unaffordable("needs 9 GiB"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("no kernel"), "failed"),
    ],
)
def test_a_peer_that_fails_is_an_entry(error: Exception, status: str) -> None:
    row = measured(case(), raising(error))
    assert (row["status"], row["peers"]["other"]["status"]) == ("ok", status)
    assert row["peers"]["other"]["reason"] and "median" in row["peers"]["pfa"]
    text = shown({"rows": [row | {"suite": "prefill"}]})
    assert ("other, " + status in text) == (status != "unsupported")


def test_a_wrong_result_is_not_timed() -> None:
    def make(inputs: Inputs) -> Call:
        return Call(lambda: torch.full(inputs.qkv[0].shape, torch.nan))

    row = measured(case(), peer(make))
    assert row["peers"]["other"] == {
        "status": "wrong",
        "reason": "its result differs from ours by nan",
        "difference": "nan",
    }
    result = make_result([row])
    assert results.problems_of(json.loads(json.dumps(result))) == ""


def test_a_case_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(measure, "Inputs", fail)
    row = measured(case())
    assert row["status"] == "out of memory" and "20 GiB" in row["reason"]
    assert "out of memory" in shown({"rows": [row | {"suite": "prefill"}]})


def test_scores_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "free_bytes", lambda device: 1 << 10)
    row = measured(case(), peer(torch_ops.make_eager, "eager"))
    assert row["peers"]["eager"]["status"] == "out of memory"


def test_a_broken_cuda_context_ends_the_process() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        measured(case(), raising(RuntimeError("CUDA error: an illegal memory access")))


def test_rates_and_targets() -> None:
    of = Case("bf16", 64, "full", 512, 1, 8)
    entries = {"pfa": {"median": 2.0}, "sdpa-flash": {"median": 2.9}, "eager": {"status": "wrong"}}
    found = measure.rate(of, "cpu", entries, LIMITS)
    assert entries["sdpa-flash"]["ratio"] == 1.45
    assert entries["pfa"]["gflops"] == pytest.approx(1e-9 * of.nominal_flop / 2)
    assert entries["pfa"]["of_limit"] == pytest.approx(of.nominal_flop / 100e9 / 2)
    verdicts = {x["target"].rpartition(" ")[2]: x["met"] for x in found["targets"]}
    assert verdicts == {"sdpa-flash": False, "vllm-cpu": None}


def test_roofline() -> None:
    of = Case("fp16", 64, "causal", 512, 1, 8)
    found = limits.roofline(of, "cpu", LIMITS)  # of the faster products: bfloat16's here
    assert found == {"bound": "products", "seconds": pytest.approx(
        4 * 8 * 512 * 513 / 2 * 64 / 100e9)}  # fmt: skip
    short = limits.roofline(Case("fp16", 64, "full", 1, 1, 1, 4096), "cpu", LIMITS)
    assert short and short["bound"] == "copy"
    assert limits.roofline(Case("int8", 64, "full", 512), "cuda", LIMITS) is None


def test_limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SIZES, "cpu", (64, 1 << 16))
    monkeypatch.setattr(limits, "best", lambda call, clock: call() is None or 1e-3)
    found = limits.measure("cpu", FakeClock())
    assert set(found) == {"bf16", "fp16", "fp32", "int8", "copy", "exp"}
    assert found["fp32"] == pytest.approx(2e-9 * 64**3 / 1e-3)
    monkeypatch.setattr(limits, "SLOW_SECONDS", 1e-4)
    assert limits.measure("cpu", FakeClock())["fp32"] == pytest.approx(2e-9 * 16**3 / 1e-3)


def test_kernels_by_the_profiler() -> None:
    found = timing.kernels(lambda: torch.mm(torch.ones(9, 9), torch.ones(9, 9)), "cpu")
    assert isinstance(found, dict) and any("mm" in name for name in found)


def test_missing_peers_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PFA_CPU_PEERS", str(tmp_path))
    monkeypatch.setenv("PFA_GPU_PEERS", str(tmp_path))
    _, missing = peers.find("cpu", ("vllm-cpu",))
    assert missing == {"vllm-cpu": f"PFA_CPU_PEERS={tmp_path} holds no _C.abi3.so"}
    (tmp_path / "_C.abi3.so").write_text("no library")
    _, missing = peers.find("cpu", ("vllm-cpu",))
    assert missing["vllm-cpu"].startswith("trying it failed: ")
    assert "_C.abi3.so" in missing["vllm-cpu"]
    _, missing = peers.find("cuda", ("sage", "fa3"))
    assert "sageattention" in missing["sage"] and str(tmp_path) in missing["sage"]
    assert "fa3.so" in missing["fa3"]
    (tmp_path / "fa3.so").write_text("no library")
    _, missing = peers.find("cuda", ("fa3",))
    assert missing["fa3"].startswith("OSError: ")


def test_names_of_peers() -> None:
    for device in ("cpu", "cuda"):
        assert {*plan.PEERS[device], "pfa"} == set(peers.names(device))


class Schema:
    """Stands in for an operator of FlashAttention-3: (out, lse) of what it is given by name."""

    def __init__(self, text: str) -> None:
        self._schema = torch._C.parse_schema(f"fa3::fwd({text}) -> Tensor[]")

    def __call__(self, *values: Any) -> list[torch.Tensor]:
        names = [argument.name for argument in self._schema.arguments]
        given = dict(zip(names, values, strict=True))
        self.given = given
        batch = len(given["cu_seqlens_q"]) - 1
        q, k, v = (given[x].float().unflatten(0, (batch, -1)).transpose(1, 2) for x in "qkv")
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=given["is_causal"], scale=given["softmax_scale"], enable_gqa=True
        )
        return [out.transpose(1, 2).flatten(0, 1).half(), out]


FA3 = (
    "Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int? max_seqlen_q, "
    "int? max_seqlen_k, float softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool is_rotary_interleaved, int num_splits, "
    "bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size"
)


@pytest.mark.parametrize("pattern", ["full", "causal"])
def test_flash_attention_3(pattern: str) -> None:
    operator = Schema(FA3)
    row = measured(case(pattern=pattern), peer(lambda x: gpu.make_fa3(operator, False, x), "fa3"))
    assert row["peers"]["fa3"]["status"] == "ok", row["peers"]["fa3"]
    assert operator.given["k_new"] is None and operator.given["sm_margin"] == 0
    assert operator.given["window_size_left"] == -1 and operator.given["cp_world_size"] == 1
    fp8 = peer(lambda x: gpu.make_fa3(operator, True, x), "fa3-fp8")
    row = measured(case("int8", pattern), fp8)
    assert row["peers"]["fa3-fp8"]["status"] == "ok", row["peers"]["fa3-fp8"]
    assert operator.given["q_descale"].shape == (2, 2)
    row = measured(case(pattern="bias"), peer(lambda x: gpu.make_fa3(operator, False, x), "fa3"))
    assert row["peers"]["fa3"]["status"] == "unsupported"


class Sage:
    def sageattn(self, q, k, v, tensor_layout, is_causal, sm_scale):
        k -= k.mean(dim=2, keepdim=True)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=sm_scale, enable_gqa=True
        )


class FlashInfer:
    def BatchPrefillWithRaggedKVCacheWrapper(self, workspace, layout):  # noqa: N802
        return self

    def plan(self, starts_q, starts_k, heads, heads_k, head_dim, causal, sm_scale, **others):
        self.starts, self.options = starts_q.tolist(), {"is_causal": causal, "scale": sm_scale}

    def run(self, q, k, v):
        split = [x.unflatten(0, (len(self.starts) - 1, -1)).transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *split, **self.options, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("pattern", ["full", "causal"])
def test_calls_of_sage_and_flashinfer(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: real(*s, **o) if s else real(0))
    of = Case("fp16", 64, pattern, 32, 2, 4, heads_k=2)
    row = measured(
        of,
        peer(lambda x: gpu.make_sage(Sage(), x), "sage"),
        peer(lambda x: gpu.make_flashinfer(FlashInfer(), x), "flashinfer"),
        peer(torch_ops.make_eager, "eager"),  # after sage, which changes its key
    )
    for name in ("sage", "flashinfer", "eager"):
        assert row["peers"][name]["status"] == "ok", row["peers"][name]


def test_launch_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr(launch, "TURNS", 3)
    found = launch.measure("cpu")
    assert all(row["status"] == "ok" and row["us"] > 0 for row in found), found
    assert sum("int8" in row["case"] for row in found) == 1
    assert all(row["empty_us"] > 0 for row in found if "target_us" in row)
    assert sum("target_us" in row for row in found) == 1


def test_every_suite_has_its_cases() -> None:
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            for name in cases.SUITES:
                found = cases.suite(name, device, quick)
                assert found and len(set(found)) == len(found)
                assert {x.pattern for x in found} <= set(cases.PATTERNS)
                assert {x.dtype for x in found} <= set(cases.DTYPES)
    first = [x.case for x in Plan("cuda", plan.OF_DEVICE["cuda"]).items() if x.case]
    with_target = [any(t.applies(x, "cuda") for t in cases.TARGETS) for x in first]
    assert with_target == sorted(with_target, reverse=True) and any(with_target)
    for target in cases.TARGETS:
        made = Plan(target.device, plan.OF_DEVICE[target.device])
        assert any(x.case and target.applies(x.case, target.device) for x in made.items()), target


def test_a_peer_that_takes_ages_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(measure, "SLOW_RATIO", 0.0)

    def make(inputs: Inputs) -> Call:
        eager = torch_ops.make_eager(inputs)
        return Call(lambda: (time.sleep(0.06), eager.run())[1])

    entry = measured(case(), peer(make))["peers"]["other"]
    assert (entry["status"], entry["samples"]) == ("ok", 1) and entry["median"] > 0.06


class Event:
    """Of a GPU whose calls take 2 ms each."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = None

    def record(self) -> None:
        self.at = "recorded"

    def elapsed_time(self, end: Event) -> float:
        assert self.at == end.at == "recorded"
        return 2.0


def test_cuda_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counting; events and the flush itself need a GPU."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 4)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, device, **o: real(*s, **o))
    clock = timing.CudaClock()
    assert clock.turn(lambda: log.append("call"), 0.02) == [0.002] * 10
    assert log == ["call", "call", "synchronize"] + ["call"] * 10 + ["synchronize"]
    log.clear()
    assert clock.end_to_end(lambda: log.append("call")) >= 0
    assert log == ["synchronize", "call", "synchronize"]
    assert len(clock.turn(lambda: None, 0.0)) == timing.CALLS[0]


class AsOnGpu(Inputs):
    """On the CPU, and taken for tensors of a GPU."""

    def __init__(self, of: Case, device: str) -> None:
        super().__init__(of, "cpu")
        self.device = device


@pytest.mark.parametrize("pattern", ["full", "causal", "random", "bias", "padding"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_rows_of_a_gpu(dtype: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Inputs", AsOnGpu)
    monkeypatch.setattr(timing, "kernels", lambda run, device: {"forward_kernel": 1e-6})
    monkeypatch.setattr(torch_ops, "free_bytes", lambda device: 1 << 40)
    found, missing = peers.find("cuda", ("pfa-fp16", "eager", "sdpa-math", "sdpa-cudnn", "sage"))
    row = measure.measure(case(dtype, pattern), "cuda", found, FakeClock(), LIMITS, 0.01)
    entries = row["peers"]
    assert row["status"] == "ok" and set(entries) == {x.name for x in found}
    assert {"kernels", "end_to_end", "median"} <= set(entries["pfa"])
    assert entries["pfa-fp16"]["status"] == ("ok" if dtype == "int8" else "unsupported")
    assert entries["sdpa-math"]["status"] == entries["eager"]["status"] == "ok", entries
    assert entries["sdpa-cudnn"]["status"] == "failed"
    assert "sage" in missing
