# SPDX-License-Identifier: Apache-2.0
"""The repository's own tests on the GPU, and what their reports say."""

import importlib.util
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from ..process import run

LISTED = 40  # failures that are written down
GPU_ONLY = "tests/test_gpu.py"
WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
LINE = re.compile(rf"({WORDS}) (\S+::.+)|(\S+::.+?) ({WORDS})")
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def command(kind: str, out: Path) -> list[str]:
    """`matrix`: the numeric tests of all files, in parallel. `gpu`: graphs, streams, threads and
    big tensors, one after the other."""
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--backend", "cuda"]
    words += ["--color=no", f"--junitxml={out / f'{kind}.xml'}"]
    if kind == "gpu":
        return [*words, "-rs", GPU_ONLY]
    if importlib.util.find_spec("xdist") is not None:
        # Half the cores: each test has a reference to compute on the CPU, with threads of its own.
        words += ["-n", str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))]
    return [*words, "tests", f"--ignore={GPU_ONLY}"]


def check(kind: str, out: Path, seconds: float) -> dict[str, Any]:
    log, report = out / f"{kind}.log", out / f"{kind}.xml"
    done = run(command(kind, out), seconds, log, grace=15.0, OMP_NUM_THREADS="2")
    tests = logged = parse_log(done.output)
    if report.exists():
        tests = parse_junit(report.read_text())
    if done.timed_out:  # the report has the test that was interrupted as passed
        passed = {test["test"] for test in logged if test["outcome"] == "passed"}
        tests = [x for x in tests if x["outcome"] != "passed" or x["test"] in passed]
    result = summarise(tests, each=kind == "gpu")
    result |= {"returncode": done.returncode, "timed_out": done.timed_out}
    if done.timed_out:
        return result | {"status": "failed", "reason": f"not finished after {seconds:.0f} s"}
    if result["counts"].get("passed", 0) == 0:
        tail = " ".join(done.output.split()[-60:])
        return result | {"status": "failed", "reason": f"no test passed: {tail}"}
    if done.returncode != 0:
        return result | {"status": "failed", "reason": f"pytest ended with {done.returncode}"}
    return result | {"status": "ok"}


def parse_junit(text: str) -> list[dict[str, Any]]:
    tests = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in OUTCOMES:
                outcome, message = OUTCOMES[child.tag], child.get("message", "")
        file = case.get("classname", "").rsplit(".", 1)[-1]
        name = f"{file}::{case.get('name')}"
        seconds = float(case.get("time", 0))
        tests.append({"test": name, "outcome": outcome, "seconds": seconds, "message": message})
    return tests


def parse_log(text: str) -> list[dict[str, Any]]:
    """The lines of `pytest -v`: tests that ended, of a run that may have been killed."""
    tests = []
    for line in text.splitlines():
        found = LINE.search(line)
        if found is None:
            continue
        outcome, name = found[1] or found[4], found[2] or found[3]
        outcome = {"PASSED": "passed", "SKIPPED": "skipped"}.get(outcome, "failed")
        file, test = name.strip().split("::", 1)
        name = f"{Path(file).stem}::{test}"
        tests.append({"test": name, "outcome": outcome, "seconds": 0.0, "message": ""})
    return tests


def summarise(tests: list[dict[str, Any]], each: bool) -> dict[str, Any]:
    failed = [test for test in tests if test["outcome"] == "failed"]
    skipped = Counter(test["message"] for test in tests if test["outcome"] == "skipped")
    result: dict[str, Any] = {
        "counts": dict(Counter(test["outcome"] for test in tests)),
        "failures": [_short(test) for test in failed[:LISTED]],
        "skipped": dict(skipped),
        "slowest": [_short(x) for x in sorted(tests, key=lambda x: -x["seconds"])[:5]],
    }
    if each:
        result["tests"] = [_short(test) for test in tests]
    return result


def _short(test: dict[str, Any]) -> dict[str, Any]:
    return test | {"message": test["message"][:400]}
