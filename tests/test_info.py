# SPDX-License-Identifier: Apache-2.0
"""python -m pfa.info: what is there, what a call takes and why nothing else."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from backends import environment

import pfa.info

ROOT = pathlib.Path(__file__).parent.parent


def report(capsys: pytest.CaptureFixture, *words: str, status: int = 0) -> dict:
    assert pfa.info.main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_report(capsys: pytest.CaptureFixture) -> None:
    with environment(PFA_CPU_ISA="portable"):
        found = report(capsys)
    assert found["pfa"] == pfa.__version__ and found["torch"] == torch.__version__
    assert found["cpu"]["isa"] == "portable" and found["cpu"]["isas"]["portable"]
    assert list(found["cpu"]["isas"]) == ["amx", "avx512", "avx512_vnni", "avx2", "portable"]
    assert found["environment"]["PFA_CPU_ISA"] == "portable"
    cuda = found["cuda"]
    assert bool(cuda["architectures"]) == bool(cuda["kernels"])
    assert torch.cuda.is_available() or cuda["off"] is not None


def test_report_as_text(capsys: pytest.CaptureFixture) -> None:
    assert pfa.info.main([]) == 0
    text = capsys.readouterr().out
    assert f"pfa: {pfa.__version__}\n" in text and "\n    portable: yes\n" in text


def test_wrong_isa_is_reported() -> None:
    with environment(PFA_CPU_ISA="sse2"):
        assert "PFA_CPU_ISA must be one of" in pfa.info.report()["cpu"]["isa"]


@pytest.mark.parametrize(
    "options",
    ["--sparse-mode 3", "--atten-mask", "--pse-shift --int8-output", "--dtype int8"],
)
def test_call_of_the_command_line(capsys: pytest.CaptureFixture, options: str) -> None:
    shapes = ["--query", "2,4096,32,128", "--key", "2,5000,8,128", "--layout", "BSND"]
    with environment(PFA_FORCE_BACKEND="cpu"):
        call = report(capsys, *shapes, "--device", "cpu", *options.split())["call"]
    assert (call["backend"], call["block_m"], call["block_n"]) == ("cpu", 96, 256)


def test_wrong_call_of_the_command_line(capsys: pytest.CaptureFixture) -> None:
    shapes = ["--query", "1,8,16,64", "--key", "1,7,16,64", "--device", "cpu"]
    call = report(capsys, *shapes, status=1)["call"]
    assert "num_key_value_heads must divide num_heads, got 7 and 8" in call["error"]


def test_explain_on_the_cpu() -> None:
    x = torch.zeros(1, 16, 300, dtype=torch.bfloat16)
    with environment(PFA_FORCE_BACKEND="cpu", PFA_CPU_ISA=""):
        call = pfa.info.explain(x, x, x)
        assert call["kernel"] == pfa.cpu_isa()
        assert call["block_n"] == 64  # keys in whole panels: 16 of them
        isas = pfa._library.contents().cpu_isas
        assert set(call["refused"]) == {"cuda", *isas} - {call["kernel"]}
        for name, usable in isas.items():
            if not usable:
                assert "lacks it" in call["refused"][name]
        assert call["refused"]["cuda"].startswith("query is on the CPU")
    with environment(PFA_FORCE_BACKEND="cpu", PFA_CPU_ISA="portable"):
        call = pfa.info.explain(query=x, key=x, value=x)
        assert call["kernel"] == "portable"
        best = next(name for name, usable in isas.items() if usable)
        assert best == "portable" or call["refused"][best] == "PFA_CPU_ISA is portable"


def test_explain_where_nothing_is_computed() -> None:
    x = torch.zeros(1, 0, 64, dtype=torch.bfloat16)
    with environment(PFA_FORCE_BACKEND="cpu"):
        call = pfa.info.explain(x, x, x)
    assert (call["kernel"], call["refused"]) == ("none", {})


def test_explain_on_cuda(on_cuda) -> None:
    device = "cuda" if on_cuda.name == "cuda" else "cpu"
    x = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16, device=device)
    call = pfa.info.explain(x, x, x, num_heads=2, input_layout="BSND")
    family = call["kernel"].split()[0]
    assert call["backend"] == "cuda" and family in ("sm80", "sm90")
    assert set(call["refused"]) == {"sm80", "sm90", "cpu"} - {family}
    assert all(call["refused"].values())
    kernels = pfa._library.contents().cuda_kernels
    assert f"{family} bfloat16 D64" in kernels and "sm80 int8 D512" in kernels
    assert len(kernels) == len(set(kernels))


def test_report_without_a_library(tmp_path: pathlib.Path) -> None:
    """It tells the reason that the first use tells. Python's logger writes where the library
    would."""
    library = tmp_path / "broken.so"
    library.write_text("no library")
    code = (
        "import sys, pfa._log, pfa.info\n"
        "pfa._log.logger.debug('a line')\n"
        "sys.exit(pfa.info.main(['--query', '1,2,3,4']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PFA_LIBRARY": str(library), "PFA_LOG": "debug"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "pfa: a line\n")
    lines = done.stdout.splitlines()
    assert lines[0] == f"pfa: {pfa.__version__}"
    (off,) = (x for x in lines if x.startswith("  off: the library is not loaded: "))
    assert str(library) in off
    assert lines[-1].startswith("  error: pfa could not load its operator: ")
