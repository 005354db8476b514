# SPDX-License-Identifier: Apache-2.0
"""Inductor, torch.export and AOTInductor, with and without Python; both overloads in one graph."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from backends import Backend
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import pfa
from pfa import _library

N, WIDTH = 4, 32
SIZES = ((2, 6), (3, 11), (4, 5))  # batch and rows


class Layer(torch.nn.Module):
    """Causal attention over all but the last key, then attention over lengths in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        keys = [x.shape[1] - 1]
        first = pfa.prompt_flash_attention(
            self.linear(x), x, x, num_heads=N, sparse_mode=3, actual_seq_lengths_kv=keys
        )
        return pfa.prompt_flash_attention(first, x, x, num_heads=N, actual_seq_lengths_kv=lengths)


def inputs(batch: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As tests/aoti/run_package.cpp makes them."""
    x = (torch.arange(batch * rows * WIDTH).float() * 0.37).sin()
    return x.bfloat16().view(batch, rows, WIDTH), torch.arange(1, batch + 1)


def expected(batch: int, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return Layer()(*inputs(batch, rows))


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    sizes = ({0: dynamic, 1: dynamic}, {0: dynamic})
    with torch.no_grad():
        return torch.export.export(Layer().eval(), inputs(*SIZES[0]), dynamic_shapes=sizes)


@pytest.fixture(scope="module")
def package(
    program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    path = tmp_path_factory.mktemp("aoti") / "layer.pt2"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_exported_program(program: torch.export.ExportedProgram, batch: int, rows: int) -> None:
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.pfa.forward.default, torch.ops.pfa.forward.tensor_lens} <= called
    with torch.no_grad():
        assert torch.equal(program.module()(*inputs(batch, rows)), expected(batch, rows))


@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_aot_inductor(package: pathlib.Path, batch: int, rows: int) -> None:
    loaded = torch._inductor.aoti_load_package(str(package))
    torch.testing.assert_close(loaded(*inputs(batch, rows)), expected(batch, rows))


WITHOUT_PFA = """
    import sys
    import torch
    sys.modules["pfa"] = None  # importing it fails
    torch.ops.load_library(sys.argv[1])
    loaded = torch._inductor.aoti_load_package(sys.argv[2])
    torch.save(loaded(*torch.load(sys.argv[3])), sys.argv[4])
"""


def test_package_in_python_without_pfa(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    torch.save(inputs(*SIZES[1]), tmp_path / "in.pt")
    files = _library.path, package, tmp_path / "in.pt", tmp_path / "out.pt"
    run(sys.executable, "-c", textwrap.dedent(WITHOUT_PFA), *files)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected(*SIZES[1]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_package_in_cpp(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    torch_path = pathlib.Path(torch.__file__).parent
    include, lib = torch_path / "include", torch_path / "lib"
    source = pathlib.Path(__file__).parent / "aoti" / "run_package.cpp"
    program = tmp_path / "run_package"
    # --no-as-needed: nothing of the program itself needs libtorch_cpu, the loaded files do.
    link = f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"
    run("g++", "-std=c++20", "-O0", f"-I{include}", source, "-o", program, *link, "-ldl")
    batch, rows = SIZES[2]
    run(program, _library.path, package, batch, rows, WIDTH, tmp_path / "out")
    out = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.bfloat16)
    torch.testing.assert_close(out.view(batch, rows, WIDTH), expected(batch, rows))


def run(*command: object) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def causal(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return pfa.prompt_flash_attention(
        x, x, x, num_heads=N, sparse_mode=2, actual_seq_lengths_kv=lengths
    )


def test_default_compile_settles(fresh_dynamo: None) -> None:
    """The automatic mode compiles once more when lengths change, and once when sizes do."""
    counter = CompileCounter()
    compiled = torch.compile(causal, fullgraph=True, backend=counter)
    for rows in (7, 16, 33):
        x = torch.randn(2, rows, WIDTH).half()
        for lengths in ([rows, 2], [3, 5], [4, rows - 1]):
            assert torch.equal(compiled(x, lengths), causal(x, lengths))
    assert counter.frame_count == 3


def test_inductor(fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(compiled(*inputs(*size)), expected(*size))
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]  # 2: AOTAutograd starts over once for the float argument


def test_unsupported_calls_fail_when_compiled_as_they_do_eagerly(fresh_dynamo: None) -> None:
    compiled = torch.compile(causal, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 7, WIDTH).half()
    compiled(x, [3, 4])
    for run_it in (compiled, causal):
        with pytest.raises((RuntimeError, ValueError), match="actual_seq_lengths_kv"):
            run_it(x, [3, 8])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_of_compiled_code(on_cuda: Backend, fresh_dynamo: None, mode: str) -> None:
    """Replayed with lengths that only the device knows."""
    if on_cuda.name != "cuda":
        pytest.skip("needs a GPU")
    layer = Layer().cuda().eval()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x, _ = (t.cuda() for t in inputs(*SIZES[1]))
    with torch.no_grad():
        for lengths in ([1, 2, 3], [11, 1, 5], [0, 4, 11], [6, 6, 6]):
            given = torch.tensor(lengths, device="cuda")
            out = compiled(x, given).clone()
            torch.testing.assert_close(out, layer(x, given), rtol=2e-2, atol=2e-2)
