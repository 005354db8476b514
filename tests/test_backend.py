# SPDX-License-Identifier: Apache-2.0
"""Which backend a call goes to, and what is said where that one cannot serve it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from backends import environment

import pfa  # noqa: F401

OVERLOADS = ["pfa::forward", "pfa::forward.tensor_lens"]


def call(**options: object) -> torch.Tensor:
    x = torch.zeros(1, 4, 8, dtype=torch.float16)
    return torch.ops.pfa.forward(x, x, x, **options)


@pytest.mark.parametrize("name", OVERLOADS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_registered_in_every_build(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("value", ["", "cpu"])
def test_cpu_tensors_go_to_the_cpu(value: str) -> None:
    with environment(PFA_FORCE_BACKEND=value):
        assert call().device.type == "cpu"


@pytest.mark.parametrize("value", ["gpu", "CPU", "cuda:0", " "])
def test_unknown_backend(value: str) -> None:
    with environment(PFA_FORCE_BACKEND=value):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"PFA_FORCE_BACKEND must be cpu or cuda, got {value}"
    call()  # read at every call


def test_cuda_needs_memory_that_it_can_read() -> None:
    """Only in the simulator and on a few machines is the CPU's such memory."""
    with environment(PFA_FORCE_BACKEND="cuda"):
        try:
            call()
        except RuntimeError as error:
            assert "built without CUDA kernels" in str(error) or "needs tensors on a GPU" in str(
                error
            )
        else:
            assert torch.cuda.is_available()


def test_choice_takes_what_forward_takes() -> None:
    forward, choice = torch.ops.pfa.forward, torch.ops.pfa._choice
    for overload in ("default", "tensor_lens"):
        schemas = [str(getattr(op, overload)._schema) for op in (forward, choice)]
        assert schemas[0].split("(", 1)[1] == schemas[1].split("(", 1)[1]


CALL = """
import torch, pfa
x = torch.zeros(1, 4, 8, dtype=torch.float16)
for _ in range(3):
    torch.ops.pfa.forward(x, x, x)
"""


@pytest.mark.parametrize(
    ("level", "written"), [("", ""), ("debug", "pfa: cpu portable\n"), ("info", "PFA_LOG must be")]
)
def test_log(level: str, written: str) -> None:
    """A line for what is distinct, not for every call."""
    settings = {"PFA_LOG": level, "PFA_CPU_ISA": "portable", "PFA_FORCE_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == (level == "info")
    assert written in done.stderr if level == "info" else written == done.stderr
