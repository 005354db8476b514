# SPDX-License-Identifier: Apache-2.0
"""What is compiled, for which GPUs, and what a library with CUDA kernels needs and shows."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import build_cuda
import objects
import ptxas
import pytest
import sass

import pfa.jit
from pfa import _build

ROOT = pathlib.Path(__file__).parent.parent
CUDA_LIBRARY = ROOT / "build" / "cuda" / "_C.abi3.so"
needs_cuda_library = pytest.mark.skipif(
    not CUDA_LIBRARY.exists() or shutil.which("nm") is None,
    reason=f"needs binutils and {CUDA_LIBRARY.relative_to(ROOT)}: make cuda",
)
SETTINGS = ("FORCE_CUDA", "PFA_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "PFA_SIM_ARCH_LIST")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SETTINGS, "PFA_LINEINFO", "PFA_NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)


def gencodes(flags: list[str]) -> list[str]:
    return [flag.removeprefix("-gencode=arch=compute_") for flag in flags if "gencode" in flag]


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0", ["80,code=sm_80"]),
        ("8.0;9.0+PTX", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("7.5 8.6, 12.0", ["86,code=sm_86", "120,code=sm_120"]),  # no kernel runs on 7.5
        ("9.0a", ["90a,code=sm_90a"]),
    ],
)
def test_arch_list(arch_list: str, expected: list[str]) -> None:
    assert gencodes(_build.arch_flags(arch_list)) == expected


@pytest.mark.parametrize("arch_list", ["7.5", "Ampere", "8", "8.0;x"])
def test_arch_list_is_checked(arch_list: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        _build.arch_flags(arch_list)


def test_hopper_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of csrc/cuda/sm90 are in every library but those for other architectures alone."""
    assert _build.WITH_SM90A in _build.nvcc_flags()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert _build.WITH_SM90A not in _build.nvcc_flags()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert _build.WITH_SM90A in _build.nvcc_flags()


def test_default_archs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code_and_ptx = ["80,code=sm_80", "80,code=compute_80", "90a,code=sm_90a"]
    assert gencodes(_build.nvcc_flags()) == machine_code_and_ptx
    assert gencodes(_build.nvcc_flags("8.6")) == ["86,code=sm_86"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert gencodes(_build.nvcc_flags("8.6")) == ["89,code=sm_89"]
    monkeypatch.setenv("PFA_SIM_ARCH_LIST", "8.0 9.0a")
    assert gencodes(_build.nvcc_flags()) == ["80,code=compute_80", "90a,code=compute_90a"]
    assert "--no-compress" in _build.nvcc_flags()


def test_optional_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-lineinfo" not in _build.nvcc_flags()
    monkeypatch.setenv("PFA_LINEINFO", "1")
    monkeypatch.setenv("PFA_NVCC_THREADS", "2")
    assert {"-lineinfo", "--threads=2"} <= set(_build.nvcc_flags())


@pytest.mark.parametrize(
    ("environment", "torch_has_cuda", "expected"),
    [
        ({}, False, None),
        ({}, True, "toolkit"),
        ({"FORCE_CUDA": "1"}, False, "toolkit"),
        ({"PFA_SKIP_CUDA": "1"}, True, None),
        ({"PFA_SKIP_CUDA": "1", "FORCE_CUDA": "1"}, True, None),
    ],
)
def test_when_cuda_is_built(
    environment: dict[str, str],
    torch_has_cuda: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_build, "find_cuda_home", lambda: "toolkit")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _build.cuda_home_to_build_with(torch_has_cuda) == expected


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_cuda_home", lambda: None)
    assert _build.cuda_home_to_build_with(True) is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match="FORCE_CUDA=1, but nvcc was not found: set CUDA_HOME"):
        _build.cuda_home_to_build_with(False)


def test_cuda_home_comes_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.find_cuda_home() == str(tmp_path)
    (tmp_path / "include/cuda_runtime.h").unlink()
    assert _build.find_cuda_home() != str(tmp_path)


def test_cuda_home_of_pip(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "nvidia" / "cu13"  # as cuda-toolkit[nvcc,cudart] leaves it in site-packages
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_build, "USUAL_CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert _build.find_cuda_home() == str(home)


def test_every_source_is_compiled() -> None:
    written = {str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert set(pfa.jit.sources()) == written
    assert set(_build.sources(with_cuda=False)) <= set(_build.sources(with_cuda=True))
    stems = [pathlib.Path(path).stem for path in written]
    assert len(stems) == len(set(stems))  # torch.utils.cpp_extension.load has one folder for all


def run_python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_named_library_must_exist() -> None:
    out = run_python("import pfa; print(pfa._library.load_error)", PFA_LIBRARY="/no/such.so")
    assert out == "/no/such.so, which PFA_LIBRARY names, does not exist"


USE = """
import torch, pfa
q = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
out = pfa.prompt_flash_attention(q, q, q, input_layout="BSND", num_heads=1)
assert torch.equal(out, q) and torch._C._dispatch_has_kernel_for_dispatch_key(
    "pfa::forward", "Meta")
print(pfa._library.path)
"""


def listing(*command: str) -> list[str]:
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@needs_cuda_library
def test_cuda_library_loads_in_any_torch() -> None:
    assert run_python(USE, PFA_LIBRARY=str(CUDA_LIBRARY)) == str(CUDA_LIBRARY)


@needs_cuda_library
def test_cuda_library_needs_no_cuda_library() -> None:
    dynamic = "\n".join(listing("readelf", "-d", str(CUDA_LIBRARY)))
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    assert "libtorch.so" in needed  # leads to libtorch_cuda.so where there is one
    assert [name for name in needed if "cuda" in name] == []


@needs_cuda_library
def test_cuda_library_undefined_symbols() -> None:
    lines = listing("nm", "-D", "--undefined-only", str(CUDA_LIBRARY))
    kinds = {line.split()[-1]: line.split()[-2] for line in lines}
    assert kinds.pop("aoti_torch_get_current_cuda_stream") == "w"
    assert [x for x in kinds if x.startswith(("cuda", "__cuda", "cu", "torch_c10_cuda"))] == []


@needs_cuda_library
def test_cuda_library_exports_no_runtime() -> None:
    lines = listing("nm", "-D", "--defined-only", "-C", str(CUDA_LIBRARY))
    names = [line.split(maxsplit=2)[-1] for line in lines]
    assert [x for x in names if re.search(r"cuda|pfa::|forward_kernel", x)] == []


@needs_cuda_library
def test_cuda_build_is_within_budget() -> None:
    figures = build_cuda.figures(CUDA_LIBRARY.parent)
    assert [str(x) for x in figures if x.value > x.budget] == []


LOG = """
ptxas info    : Compiling entry function '_ZN3pfa4cuda1fI1TEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN3pfa4cuda5innerEv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _ZN3pfa4cuda1fI1TEEvv
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
"""


def test_ptxas_log_is_understood() -> None:
    (kernel,) = objects.parse(LOG)
    assert kernel == objects.Kernel("_ZN3pfa4cuda1fI1TEEvv", "sm_80", 255, 16, 20, 24, 512)
    assert objects.WARNING.search("ptxas info : (C7510) Potential Performance Loss: wgmma")


def test_local_memory_is_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptxas, "ALLOWED", [("Float16, 256", 64, "because")])
    assert ptxas.allowed_bytes("sm80::f<Traits<BFloat16, 256>>") == 64
    assert ptxas.allowed_bytes("sm80::f<Traits<BFloat16, 128>>") == 0


def test_names_are_shortened() -> None:
    signature = "void pfa::cuda::sm80::f<pfa::cuda::T<(int)64, true>, (bool)0>(pfa::cuda::P)"
    assert objects.shorten(signature) == "sm80::f<T<64, true>, 0>"


def test_instructions_are_counted() -> None:
    text = """
        code for sm_80
        Function : f
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;  /* 0x1 */
        /*0010*/              @!P0 LDL.64 R4, [R1+0x8] ;             /* 0x2 */
        /*0020*/                   EXIT ;                            /* 0x3 */
    """
    assert sass.count(text.splitlines()) == {
        ("sm_80", "f"): {"HMMA.16816": 1, "LDL.64": 1, "all": 3}
    }


def test_lock_file() -> None:
    text = (ROOT / "third_party" / "cutlass.lock").read_text()
    assert re.search(r"^nvidia-cutlass==4\.2\.0\.0 \\\n +--hash=sha256:[0-9a-f]{64}$", text, re.M)
    assert "BSD-3-Clause" in text
