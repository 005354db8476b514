# SPDX-License-Identifier: Apache-2.0
"""Rules of the source tree that no compiler checks."""

from __future__ import annotations

import ast
import pathlib
import re
import shutil
import subprocess

import pytest

import pfa

ROOT = pathlib.Path(__file__).parent.parent
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
PYTHON = sorted([*(ROOT / "pfa").rglob("*.py"), *(ROOT / "tests").glob("*.py"), ROOT / "setup.py"])
LIBRARY = pathlib.Path(pfa.__file__).with_name("_C.abi3.so")
FILE_LINES, HOST_FUNCTION_LINES, KERNEL_FUNCTION_LINES = 400, 60, 150


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CPP + PYTHON, ids=name)
def test_files_are_short_and_licensed(path: pathlib.Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES
    assert not lines or lines[0].endswith("SPDX-License-Identifier: Apache-2.0")


@pytest.mark.parametrize("path", CPP, ids=name)
def test_only_ops_includes_torch(path: pathlib.Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.MULTILINE)
    torch = [x for x in included if re.match(r"(torch|ATen|c10|caffe2|pybind11|Python\.h)", x)]
    if "ops" in path.parts:
        assert all(x.startswith(("torch/csrc/stable/", "torch/headeronly/")) for x in torch)
    else:
        assert torch == []


def test_sources_have_names_of_their_own() -> None:
    # torch.utils.cpp_extension.load puts all objects into one folder.
    stems = [p.stem for p in CPP if p.suffix == ".cpp"]
    assert len(stems) == len(set(stems))


@pytest.mark.parametrize("path", CPP, ids=name)
def test_strings_are_not_boxed_by_torch(path: pathlib.Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    assert "TORCH_BOX" not in code  # leaks every string argument with headers before 2.14


@pytest.mark.parametrize("path", CPP, ids=name)
def test_functions_are_short(path: pathlib.Path) -> None:
    ceiling = HOST_FUNCTION_LINES if "ops" in path.parts else KERNEL_FUNCTION_LINES
    start = None
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        opens = line.endswith("{") and not line.startswith((" ", "}", "/", "#"))
        if opens and not re.match(r"(namespace|struct|class|enum|extern)\b", line):
            start = number
        elif line.startswith("}") and start is not None:
            assert number - start < ceiling, f"{name(path)}:{start}"
            start = None


@pytest.mark.parametrize("path", [p for p in PYTHON if "tests" not in p.parts], ids=name)
def test_python_functions_are_short(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno - docstring.count("\n")
            assert length <= HOST_FUNCTION_LINES, f"{name(path)}:{node.lineno}"


def test_version_is_written_once() -> None:
    written = [p for p in PYTHON if f'"{pfa.__version__}"' in p.read_text()]
    assert [name(p) for p in written] == ["pfa/_version.py"]
    assert not re.search(r"^version\b", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_uses_the_stable_abi_only() -> None:
    command = ["nm", "-D", "--undefined-only", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(x.startswith("aoti_torch_") for x in symbols)
    unstable = [x for x in symbols if re.match(r"_Z\w*?\d(at|c10|torch|caffe2|pybind11)\d", x)]
    assert unstable == []
    assert [x for x in symbols if x.startswith(("Py", "_Py"))] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_exports_nothing_of_its_own() -> None:
    command = ["nm", "-D", "--defined-only", "-C", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in listing.splitlines() if " pfa::" in line] == []
