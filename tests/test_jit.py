# SPDX-License-Identifier: Apache-2.0
"""What pfa.jit compiles, and what it says where it cannot."""

from __future__ import annotations

import logging
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.utils import cpp_extension

import pfa.jit
from pfa import _build, _library

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_error", "PFA_LIBRARY is none")
    for name in ("FORCE_CUDA", "PFA_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "PFA_SIM_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def test_does_not_register_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_error", None)
    with pytest.raises(RuntimeError, match="loaded already, from .*PFA_LIBRARY=none"):
        pfa.jit.load()


def refusal() -> str:
    with pytest.raises(RuntimeError) as caught:
        pfa.jit.load()
    return str(caught.value)


def test_without_a_compiler(not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refusal() == "pfa.jit.load needs a C++ compiler, and there is no no-such-compiler"


def test_without_ninja(not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert refusal() == "pfa.jit.load needs ninja: pip install ninja"


def test_without_nvcc(not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(_build, "find_cuda_home", lambda: None)
    text = refusal()
    assert text.startswith("nvcc was not found: set CUDA_HOME") and "\n" not in text
    assert text.endswith("PFA_SKIP_CUDA=1 builds the CPU kernels without it")
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        pfa.jit.flags()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": [torch.float32]}, "dtypes must be of .* and int8, got torch.float32"),
        ({"head_dims": [64, 513]}, "head_dims must be from 1 to 512, got 513"),
        ({"head_dims": [0]}, "head_dims must be from 1 to 512, got 0"),
    ],
)
def test_wrong_selection(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pfa.jit.load(**options)


def kernels(**options: object) -> set[str]:
    """The files of kernels that a selection compiles."""
    selection = _build.Selection(**options)
    paths = _build.sources(with_cuda=True, selection=selection)
    return {path.stem for path in paths if path.parent.name == "instantiations"}


def test_selection() -> None:
    everything = kernels()
    halves = {x for x in everything if "_float16_" in x}
    assert kernels(dtypes=("float16",)) == halves and 0 < len(halves) < len(everything)
    # The next larger one of each family.
    chosen = kernels(dtypes=("bfloat16",), head_dims=(64, 80))
    assert chosen == {
        *("sm80_bfloat16_d64", "sm80_bfloat16_d96"),
        *("sm90_bfloat16_d64", "sm90_bfloat16_d96"),
    }
    # What is no kernel of one dtype and head_dim is always compiled.
    other = set(_build.sources(with_cuda=True)) - set(_build.left_out(_build.Selection((), ())))
    assert {"dispatch", "combine", "mask_pack"} <= {path.stem for path in other}


def test_selection_of_masks() -> None:
    without = {"-DPFA_WITHOUT_DENSE", "-DPFA_WITHOUT_BIAS"}
    assert not without & set(_build.nvcc_flags())
    selection = _build.Selection(atten_mask=False, pse_shift=False)
    assert without <= set(_build.nvcc_flags(selection=selection))


def test_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pfa"):
        pfa.jit._log_what_is_left_out(_build.ALL)
        assert caplog.messages == []
        dims = (64, 96, 128, 192, 256, 384)
        pfa.jit._log_what_is_left_out(_build.Selection(("int8",), (*dims, 512), pse_shift=False))
    (line,) = caplog.messages
    assert "sm80 float16 of head_dim 64 96 128" in line and line.endswith(", pse_shift")
    assert "sm80 int8" not in line and "atten_mask" not in line


def test_selections_do_not_share_a_folder() -> None:
    folder = pfa.jit._default_directory
    assert folder(_build.ALL).endswith(f"torch-{torch.__version__}")
    some = _build.Selection(("bfloat16",), (64,), atten_mask=False)
    assert folder(some) == f"{folder(_build.ALL)}-bfloat16-64-atten_mask"


USE = """
import torch, pfa
q = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
assert torch.equal(torch.ops.pfa.forward(q, q, q, input_layout="BSND"), q)
"""
BY_PFA = """
import sys, pfa.jit
print(pfa.jit.load(build_directory=sys.argv[1]))
out = pfa.prompt_flash_attention(q, q, q, input_layout="BSND")
assert out.to("meta").shape == torch.ops.pfa.forward(*[q.to("meta")] * 3, input_layout="BSND").shape
"""
BY_TORCH = """
import sys, pfa.jit, torch.utils.cpp_extension
sources, flags = pfa.jit.sources(with_cuda=False), pfa.jit.flags(with_cuda=False)
print(torch.utils.cpp_extension.load("pfa_jit", sources, build_directory=sys.argv[1], **flags))
"""


@pytest.mark.slow  # compiles the CPU kernels
def test_load(tmp_path: pathlib.Path) -> None:
    load, use_front_end = BY_PFA.split("out = ")
    for code in (load + USE + "out = " + use_front_end, BY_TORCH + USE):  # the second is warm
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PFA_LIBRARY": "none", "PFA_SKIP_CUDA": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == str(tmp_path / "pfa_jit.so")
