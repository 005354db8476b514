# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call, in a process of its own: O(S * D), never a matrix of scores."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.cpu

LIMIT = 64 << 20  # bytes beyond inputs and output

MEASURE = """
import json, sys
sys.path.insert(0, {tests!r})
import pfa, torch
from inputs import Case, Quant

def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024

def measure(case):
    call = case.build()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
    out = torch.ops.pfa.forward(*call.args, **call.options)
    return status("VmHWM") - before - out.nbytes

dtype, sq, heads, more = json.loads(sys.argv[1])
more["quant"] = Quant() if dtype == "int8" else None
small = Case(dtype, 1, 1, sq=256, sk=256, dim=128, **more)
measure(small)  # libraries, thread pool
print(measure(Case(dtype, 1, heads, sq=sq, sk=sq, dim=128, **more)))
"""


def peak(dtype: str, seqlen: int, heads: int, **more) -> int:
    script = MEASURE.format(tests=str(pathlib.Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([dtype, seqlen, heads, more])],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def test_the_measurement_sees_what_a_call_allocates():
    """The same script around torch's attention with a bias, which makes every score."""
    unfused = MEASURE.replace(
        "torch.ops.pfa.forward(*call.args, **call.options)",
        "torch.softmax(call.query @ call.key.mT, -1) @ call.value",
    ).replace("import pfa, torch", "import torch")
    script = unfused.format(tests=str(pathlib.Path(__file__).parent))
    command = [sys.executable, "-c", script, json.dumps(["bf16", 4096, 2, {}])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) > 2 * 2 * 4096 * 4096


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_narrow_band(dtype):
    """Every row of S = 16384 and all 8 heads, at the cost of a band."""
    assert peak(dtype, 16384, 8, mode=4, pre=128, nxt=0) <= LIMIT


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_full(dtype):
    assert peak(dtype, 6144, 2) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(
    "more", [{}, {"mode": 2}, {"mode": 3}, {"mode": 4, "pre": 4096, "nxt": 1024}], ids=str
)
def test_full_size(dtype, more):
    assert peak(dtype, 16384, 8, **more) <= LIMIT


def test_memory_is_returned(forward):
    """A hundred calls keep no more than one does."""
    x = torch.randn(1, 4, 512, 64).bfloat16()

    def resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    def calls(count: int) -> int:
        for _ in range(count):
            forward(x, x, x, num_heads=4, input_layout="BNSD")
        return resident()

    calls(20)
    assert calls(100) - calls(1) < 4 << 20
