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

from benchmarks import process
from benchmarks.gpu_check import (
    __main__,
    environment,
    sanitizer,
    suites,
    summary,
    timing_stage,
)
from benchmarks.plan import Plan


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
    if not parallel:  # it starts in half the time without
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
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


PLAN = Plan("cuda", ("prefill",), quick=True, filter="D128 full")
WORKER = """
import dataclasses, json, sys
from benchmarks import plan, rows
made, path = plan.Plan.from_json(sys.argv[1]), __import__("pathlib").Path(sys.argv[2])
for item in made.items():
    if item.key in rows.read(path):
        continue
    row = {"key": item.key, "status": "ok"}
    if item.kind == "environment":
        row |= {"environment": {"gpu": "G"}, "peers": {"found": {}, "missing": {"fa3": "no"}}}
    elif item.case:
        rows.append(path, {"key": item.key, "began": True})
        BREAK
        about = dataclasses.asdict(item.case) | {"case": str(item.case), "suite": item.suite}
        row["row"] = about | {"status": "ok", "flop": 1, "peers": {}, "targets": []}
    rows.append(path, row)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes a module that does the work, as benchmarks.worker does, and breaks."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(code: str) -> str:
        (tmp_path / "worker_of_timing.py").write_text(WORKER.replace("BREAK", code))
        return "worker_of_timing"

    return make


def test_timing_goes_on_after_a_crash(tmp_path, worker) -> None:
    module = worker("item.case.seqlen == 4096 and item.case.dtype == 'bf16' and sys.exit('gone')")
    result = timing_stage.check(tmp_path, 60, PLAN, module)
    lost = "prefill: bf16 D128 full 4096"
    assert len(result["result"]["rows"]) == sum(x.case is not None for x in PLAN.items()) - 1
    assert [x["item"] for x in result["result"]["problems"]] == [lost]
    assert result["status"] == "failed" and f"{lost}: its process ended" in result["reason"]
    assert "gone" in result["reason"]
    text = "\n".join(summary.timing_lines(result))
    assert "fa3 is missing: no" in text and f"{lost}: its process ended" in text
    assert json.loads((tmp_path / "timing.json").read_text())["schema"] == 2


def test_timing_keeps_its_rows_when_time_is_up(tmp_path, worker) -> None:
    module = worker("item.case.seqlen == 1024 and __import__('time').sleep(60)")
    result = timing_stage.check(tmp_path, 6, PLAN, module)
    assert result["status"] == "ok" and len(result["result"]["rows"]) >= 1
    assert result["reason"].startswith("the time was up")
    assert result["result"]["not_run"]


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
    odd = stage("timing", 9, lambda c, s: {"status": "ok", "result": 5})
    assert run_all([odd], tmp_path, 60)["timing"]["result"] == 5
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
    assert "prefill: fp16 D128 full 4096" in done.stdout
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
