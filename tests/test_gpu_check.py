# SPDX-License-Identifier: Apache-2.0
"""The control flow of benchmarks/gpu_check, its parsing and its timing, without a GPU."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_pack
import pytest
import torch

from benchmarks.gpu_check import (
    __main__,
    cases,
    environment,
    peers,
    process,
    sanitizer,
    suites,
    summary,
    timing,
    timing_stage,
)
from benchmarks.gpu_check.cases import Case


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_returns_what_a_command_says() -> None:
    done = process.run(python("import os; print(os.environ['X']); exit(3)"), 20, X="here")
    assert (done.returncode, done.output, done.timed_out) == (3, "here\n", False)
    with pytest.raises(FileNotFoundError):
        process.run(["no-such-program"], 1)


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, {handler})
print("begun", flush=True)
subprocess.run(["sleep", "60"]) if {child} else time.sleep(60)
"""


@pytest.mark.parametrize("child", [False, True])
def test_run_kills(tmp_path: pathlib.Path, child: bool) -> None:
    code = STUBBORN.format(handler="signal.SIG_IGN", child=child)
    started = time.monotonic()
    done = process.run(python(code), 1.0, tmp_path / "log", grace=0.5)
    assert time.monotonic() - started < 20
    assert done.timed_out and done.returncode == -9
    assert (tmp_path / "log").read_text() == done.output == "begun\n"


def test_run_lets_a_command_finish_its_report() -> None:
    code = STUBBORN.format(handler="lambda *_: (print('report'), sys.exit(2))", child=False)
    done = process.run(python(code), 1.0, grace=10)
    assert done.timed_out and done.output == "begun\nreport\n"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_gpu" name="test_a[x]" time="1.5"/>
<testcase classname="tests.test_gpu" name="test_b" time="0"><skipped message="no memory"/></testcase>
<testcase classname="tests.test_op" name="test_c" time="0"><failure message="wrong">T</failure></testcase>
<testcase classname="tests.test_op" name="test_d" time="0"><error message="broken"/></testcase>
</testsuite></testsuites>"""  # noqa: E501


def test_junit() -> None:
    tests = suites.parse_junit(JUNIT)
    assert [x["outcome"] for x in tests] == ["passed", "skipped", "failed", "failed"]
    result = suites.summarise(tests, each=True)
    assert result["counts"] == {"passed": 1, "skipped": 1, "failed": 2}
    assert [(x["test"], x["message"]) for x in result["failures"]] == [
        ("test_op::test_c", "wrong"),
        ("test_op::test_d", "broken"),
    ]
    assert result["skipped"] == {"no memory": 1}
    assert result["slowest"][0]["test"] == "test_gpu::test_a[x]"
    assert len(result["tests"]) == 4
    lines = "\n".join(summary.suite_lines(result))
    assert "2 failed, 1 passed, 1 skipped" in lines and "FAILED test_op::test_c: wrong" in lines


def test_log_of_a_killed_run() -> None:
    log = """
[gw0] [  1%] PASSED tests/test_op.py::test_a[b c]
[gw1] [  1%] FAILED tests/test_op.py::test_b
tests/test_op.py::test_c SKIPPED (no)    [ 50%]
tests/test_op.py::test_d
"""
    found = [(x["test"], x["outcome"]) for x in suites.parse_log(log)]
    names = [f"test_op::test_{x}" for x in ("a[b c]", "b", "c")]
    assert found == list(zip(names, ("passed", "failed", "skipped"), strict=True))


@pytest.mark.parametrize("parallel", [[], pytest.param(["-n", "1"], marks=pytest.mark.slow)])
def test_interrupted_tests_are_counted(tmp_path, monkeypatch, parallel) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "pytest", "-v", f"--rootdir={tmp_path}", "-c", "/dev/null"]
    words += ["-p", "no:cacheprovider", f"--junitxml={tmp_path}/matrix.xml", *parallel]
    monkeypatch.setattr(suites, "command", lambda kind, out: [*words, str(tmp_path)])
    result = suites.check("matrix", tmp_path, 8.0 if parallel else 5.0)
    assert result["status"] == "failed" and "not finished after" in result["reason"]
    assert result["counts"]["passed"] == 1


def test_no_test_is_no_success(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suites, "command", lambda *_: python("print('usage'); exit(4)"))
    result = suites.check("gpu", tmp_path, 20)
    assert (result["status"], result["reason"]) == ("failed", "no test passed: usage")


def outcome(text: str, returncode: int = 0, timed_out: bool = False) -> process.Outcome:
    return process.Outcome(returncode, text, 1.0, timed_out)


@pytest.mark.parametrize(
    ("done", "result"),
    [
        (outcome("========= ERROR SUMMARY: 0 errors"), "clean"),
        (outcome("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)"), "clean"),
        (outcome("========= Invalid read\n========= ERROR SUMMARY: 2 errors", 86), "errors"),
        (outcome("========= RACECHECK SUMMARY: 1 hazard displayed (1 warning)"), "errors"),
        (outcome("========= Error: Device not supported. Please refer", 1), "refused"),
        (outcome("Device not supported\n========= ERROR SUMMARY: 1 error", 86), "refused"),
        (outcome("begun", -2, timed_out=True), "timed out"),
        (outcome("attention: failed to load", 1), "failed"),
        (outcome("", 0), "failed"),
    ],
)  # fmt: skip
def test_judgement_of_the_sanitizer(done: process.Outcome, result: str) -> None:
    assert sanitizer.judge("memcheck", "--dtype fp16", done)["result"] == result


SANITIZER = """#!/bin/sh
case "$*" in
  *racecheck*bf16*) echo "========= Race reported"; echo "========= RACECHECK SUMMARY: 1 hazard"; exit 86;;
  *) echo "========= {text}"; exit {code};;
esac
"""  # noqa: E501


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes a compute-sanitizer and returns a harness."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    harness = tmp_path / "attention"
    harness.write_text("#!/bin/sh\n")
    harness.chmod(0o755)

    def make(text: str, code: int = 0) -> pathlib.Path:
        program = tmp_path / "compute-sanitizer"
        program.write_text(SANITIZER.format(text=text, code=code))
        program.chmod(0o755)
        return harness

    return make


def test_sanitizer(tools, tmp_path) -> None:
    harness = tools("ERROR SUMMARY: 0 errors")
    result = sanitizer.check(harness, tmp_path / "log", 60)
    of_bf16 = sum("bf16" in case for case in sanitizer.CASES)
    number = len(sanitizer.CASES)
    assert result["counts"]["memcheck"] == {"clean": number}
    assert result["counts"]["racecheck"] == {"clean": number - of_bf16, "errors": of_bf16}
    assert result["status"] == "failed" and "Race reported" in result["reason"]
    assert "ERRORS racecheck" in "\n".join(summary.sanitizer_lines(result))
    assert "Race reported" in (tmp_path / "log").read_text()


def test_sanitizer_is_skipped_with_the_reason(tools, tmp_path, monkeypatch) -> None:
    log = tmp_path / "log"
    result = sanitizer.check(tools("Device not supported", 1), log, 60)
    assert result["status"] == "skipped" and "Device not supported" in result["reason"]
    assert "gpu-pack" in sanitizer.check(None, log, 60)["reason"]
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: None)
    assert sanitizer.check(None, log, 60)["reason"] == "compute-sanitizer was not found"


def test_sanitizer_without_time(tools, tmp_path) -> None:
    result = sanitizer.check(tools("ERROR SUMMARY: 0 errors"), tmp_path / "log", 4)
    assert result["counts"]["initcheck"] == {"not run": len(sanitizer.CASES)}
    assert result["status"] == "ok"


class FakeClock:
    """Each call takes one second longer than the one before, in the order of the calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def start(self, call):
        call()
        self.now += 1.0
        return self.now

    def seconds(self, started):
        return started


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleave(calls, FakeClock(), seconds=0.0)
    least = timing.ROUNDS[0]
    assert order == ["a", "b"] * (2 + least)  # to warm up, and to see how long they take
    assert times["a"]["rounds"] == least
    assert times["b"]["median"] - times["a"]["median"] == 1.0
    assert timing.interleave(calls, FakeClock(), seconds=1e9)["a"]["rounds"] == timing.ROUNDS[1]


def small(dtype: str, pattern: str) -> Case:
    return Case(dtype, 16, pattern, 32, tokens=64, width=32)


@pytest.mark.parametrize("pattern", ["full", "causal", "random", "bias"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_measure_on_the_cpu(dtype: str, pattern: str) -> None:
    """With the CPU's kernels; torch has no others than FLASH there."""
    row = timing.measure(small(dtype, pattern), "cpu", FakeClock())
    assert set(row["times"]) == {"pfa", "flash"} | ({"pfa-fp16"} if dtype == "int8" else set())
    assert set(row["missing"]) == {"efficient", "cudnn"}
    assert row["ratios"]["flash"] > 0 and row["targets"] == []
    assert max(row["differences"].values()) > 0
    assert "is missing" in "\n".join(summary.timing_lines({"rows": [row]}))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("pattern", ["full", "causal", "random", "bias"])
def test_flex(monkeypatch, pattern: str) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = Case("bf16", 16, pattern, 128, tokens=256, width=32)
    row = timing.measure(case, "cpu", FakeClock(), with_flex=True)
    assert set(row["times"]) == {"pfa", "flex"}, row["missing"]


def test_wrong_results_are_not_timed(monkeypatch) -> None:
    make = peers.make

    def wrong(inputs, with_flex):
        calls = make(inputs, with_flex)
        return calls | {"flash": lambda: calls["pfa"]() + torch.nan}

    monkeypatch.setattr(peers, "make", wrong)
    row = timing.measure(small("fp16", "full"), "cpu", FakeClock())
    assert set(row["times"]) == {"pfa"}
    assert row["missing"]["flash"] == "its result differs from ours by nan"


def times(**medians: float) -> dict[str, dict[str, float]]:
    return {name: {"median": x, "p20": x, "p80": 1.1 * x} for name, x in medians.items()}


def test_targets() -> None:
    row = timing.rate(Case("fp16", 128, "full", 4096), times(pfa=1.0, flash=0.94))
    assert row["ratios"] == {"flash": 0.94}
    assert [x["met"] for x in row["targets"]] == [False]
    row = timing.rate(Case("fp16", 128, "bias", 4096), times(pfa=1.0, flash=9.0))
    assert [(x["ratio"], x["met"]) for x in row["targets"]] == [(None, None)]
    row = timing.rate(Case("int8", 128, "full", 4096), times(pfa=1.0, flash=1.4))
    assert [x["met"] for x in row["targets"]] == [True]
    matched = [t for t in cases.TARGETS if any(t.applies(c) for c in cases.timed_cases()[:10])]
    assert matched == list(cases.TARGETS)  # what has a target comes first


WORKER = """
import json, sys
path, first = sys.argv[1], int(sys.argv[2])
def row(i): open(path, "a").write(json.dumps({"case": str(i)}) + "\\n")
if first == 0: row(0); row(1); sys.exit("CUDA error: gone")
if first == 2: open(path, "a").write('{"case'); sys.exit(1)
if first == 3: row(3)
"""


def test_timing_goes_on_after_a_crash(tmp_path, monkeypatch) -> None:
    (tmp_path / "worker_of_timing.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = timing_stage.check(tmp_path / "rows", 60, module="worker_of_timing")
    assert [row["case"] for row in result["rows"]] == ["0", "1", str(cases.work()[2][0]), "3"]
    assert "error" in result["rows"][2]
    assert result["status"] == "failed" and result["reason"] == "1 of 4 cases failed."


def test_timing_keeps_its_rows_when_time_is_up(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_of_timing.py").write_text(
        "import sys, time; print('{}', file=open(sys.argv[1], 'a'), flush=True); time.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = timing_stage.check(tmp_path / "rows", 2, module="slow_of_timing")
    assert result["status"] == "ok" and len(result["rows"]) == 1
    assert result["reason"].startswith("the time was up")


def stage(name: str, seconds: float, run, needs_gpu: bool = True) -> __main__.Stage:
    return __main__.Stage(name, seconds, lambda c: [], run, needs_gpu)


def run_all(stages, tmp_path, total: float):
    console = __main__.Console(file=io.StringIO())
    return __main__.run_all(stages, __main__.Context(tmp_path, None), total, console)["stages"]


def test_a_stage_that_fails_does_not_end_the_others(tmp_path) -> None:
    def read(context, seconds):  # what was written before this stage
        kept = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
        return {"status": "ok", "kept": list(kept)}

    found = run_all(
        [stage("broken", 10, lambda c, s: 1 / 0), stage("next", 10, read)], tmp_path, 60
    )
    assert found["broken"]["status"] == "failed"
    assert "ZeroDivisionError" in found["broken"]["reason"]
    assert found["next"]["kept"] == ["broken"]
    assert "cannot be shown" not in (tmp_path / "summary.txt").read_text()
    assert "broken: failed" in (tmp_path / "summary.txt").read_text()
    assert summary.NOT_RUN_YET in (tmp_path / "summary.txt").read_text()


def test_time_that_is_left_goes_to_the_next_stage(tmp_path) -> None:
    keep = lambda c, s: {"status": "ok"}  # noqa: E731
    found = run_all([stage("a", 10, keep), stage("b", 20, keep)], tmp_path, 60)
    assert found["a"]["seconds_allowed"] == pytest.approx(40, abs=1)
    assert found["b"]["seconds_allowed"] == pytest.approx(60, abs=1)
    found = run_all([stage("a", 3, keep)], tmp_path, 3)
    assert found["a"] == {"status": "not run", "reason": "no time left"}


def test_without_a_gpu_nothing_else_runs(tmp_path) -> None:
    blind = stage("environment", 9, lambda c, s: {"status": "ok", "available": False}, False)
    found = run_all([blind, stage("tests", 9, lambda c, s: {"status": "ok"})], tmp_path, 60)
    assert found["tests"] == {"status": "not run", "reason": "torch sees no GPU"}


def test_a_summary_that_fails_says_so(tmp_path) -> None:
    odd = stage("timing", 9, lambda c, s: {"status": "ok", "rows": 5})
    assert run_all([odd], tmp_path, 60)["timing"]["rows"] == 5
    assert "cannot be shown: TypeError" in (tmp_path / "summary.txt").read_text()


def test_stages_fit_eight_minutes() -> None:
    assert sum(s.seconds for s in __main__.STAGES) <= __main__.TOTAL_SECONDS <= 480


def test_dry_run_names_every_command(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=__main__.ROOT, capture_output=True, text=True, check=True)
    for s in __main__.STAGES:
        assert f"{s.name} (" in done.stdout
    assert "--backend cuda" in done.stdout and "tests/test_gpu.py" in done.stdout
    assert done.stdout.count("--tool racecheck") == len(sanitizer.CASES)
    assert "fp16 D128 full 4096" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_environment_here(tmp_path) -> None:
    (tmp_path / "manifest.json").write_text('{"sha": "x", "dirty": false, "architectures": []}')
    found = environment.collect(tmp_path, 60)
    assert found["pack"]["sha"] == "x" and found["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert (found["status"], found["reason"]) == ("failed", "torch sees no GPU")


def test_pack_uses_the_packed_library(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PFA_LIBRARY", raising=False)
    assert __main__.use_pack(tmp_path / "none") is None
    (tmp_path / "_C.abi3.so").touch()
    assert __main__.use_pack(tmp_path) == tmp_path
    assert os.environ.pop("PFA_LIBRARY") == str(tmp_path / "_C.abi3.so")


def test_architectures_of_the_pack() -> None:
    ninja = "flags = -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80"
    assert gpu_pack.architectures(ninja) == ["compute_80", "sm_80"]
