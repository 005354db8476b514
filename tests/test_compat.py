# SPDX-License-Identifier: Apache-2.0
"""Scripts for torch_npu, run in processes of their own: the stand-ins change the whole process."""

from __future__ import annotations

import inspect
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from backends import Backend

import pfa
from pfa.compat.torch_npu import _operator

ROOT = pathlib.Path(pfa.__file__).parent.parent
# The seed document's two examples; the result goes to the file that the last argument names.
INPUTS = """
    import math
    import sys
    import torch
    import torch_npu

    torch.manual_seed(3)
    q = torch.randn(1, 8, 164, 128, dtype=torch.float16).npu()
    k = torch.randn(1, 8, 1024, 128, dtype=torch.float16).npu()
    v = torch.randn(1, 8, 1024, 128, dtype=torch.float16).npu()
    scale = 1 / math.sqrt(128.0)
"""
SINGLE_OP = f"""{INPUTS}
    out = torch_npu.npu_prompt_flash_attention(
        q, k, v, actual_seq_lengths=[164], actual_seq_lengths_kv=[1024], num_heads=8,
        input_layout="BNSD", scale_value=scale, pre_tokens=65535, next_tokens=65535)
    torch.save((q.cpu(), k.cpu(), v.cpu(), out.cpu()), sys.argv[-1])
"""
GRAPH = f"""{INPUTS}
    import logging
    import torch._dynamo
    import torchair
    from torchair.configs.compiler_config import CompilerConfig
    from torchair.core.utils import logger

    logger.setLevel(logging.DEBUG)
    config = CompilerConfig()
    config.debug.graph_dump.type = "pbtxt"
    npu_backend = torchair.get_npu_backend(compiler_config=config)

    class Model(torch.nn.Module):
        def forward(self):
            return torch_npu.npu_prompt_flash_attention(
                q, k, v, num_heads=8, input_layout="BNSD", scale_value=scale,
                pre_tokens=65535, next_tokens=65535)

    with torch.no_grad():
        model = torch.compile(Model(), backend=npu_backend, dynamic=False, fullgraph=True)
        out = model()
    torch.save((q.cpu(), k.cpu(), v.cpu(), out.cpu()), sys.argv[-1])
"""


def run(*command: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def runner(script: str, path: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = path / "script.py"
    file.write_text(textwrap.dedent(script))
    return run("-m", "pfa.compat.torch_npu", "--device", "cpu", str(file), *arguments)


@pytest.mark.parametrize("script", [SINGLE_OP, GRAPH], ids=["single op", "graph"])
def test_the_seeds_examples_run_unmodified(script: str, tmp_path: pathlib.Path) -> None:
    done = runner(script, tmp_path, str(tmp_path / "out.pt"))
    assert done.returncode == 0, done.stderr
    q, k, v, out = torch.load(tmp_path / "out.pt")
    assert out.shape == (1, 8, 164, 128) and out.dtype == torch.float16
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-4)


EVERYWHERE = """
    import io, sys
    import torch
    import torch_npu
    assert sys.argv[1:] == ["--flag", "x"], sys.argv
    assert __name__ == "__main__"

    devices = [
        torch.device("npu"), torch.device("npu", 1), torch.device(type="npu", index=0),
        torch.ones(1, device="npu:1").device, torch.tensor([1], device="npu").device,
        torch.ones(1).to("npu:0").device, torch.ones(1).to(device="npu").device,
        torch.ones(1).npu(0).device, torch.ones(1).npu("npu:0", non_blocking=True).device,
        torch.nn.Linear(1, 1, device="npu").weight.device,
        torch.nn.Linear(1, 1).to("npu").weight.device,
        torch.nn.Linear(1, 1).npu().weight.device,
    ]
    with torch.device("npu"):
        devices.append(torch.ones(1).device)
    assert {d.type for d in devices} == {"cpu"}, devices
    assert torch.ones(1, device=torch.device("npu:1")).device.type == "cpu"

    file = io.BytesIO()
    torch.save(torch.ones(3), file)
    file.seek(0)
    assert torch.load(file, map_location="npu:0").sum() == 3

    for npu in (torch.npu, torch_npu.npu):
        assert npu.is_available() and npu.device_count() == 1 and npu.current_device() == 0
        npu.set_device("npu:0")
        npu.synchronize()
        npu.manual_seed_all(1)
        npu.empty_cache()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return torch.zeros(3, device="npu") + x.to("npu")
    assert compiled(torch.ones(3)).sum() == 3

    for module, name in ((torch_npu, "npu_fusion_attention"), (torch.npu, "memory_allocated")):
        try:
            getattr(module, name)
        except AttributeError as error:
            assert name in str(error) and "pfa.compat.torch_npu" in str(error)
        else:
            raise AssertionError(name)
"""


def test_npu_is_a_device_everywhere(tmp_path: pathlib.Path) -> None:
    done = runner(EVERYWHERE, tmp_path, "--flag", "x")
    assert done.returncode == 0, done.stderr


OPERATOR = """
    import torch
    import torch_npu

    x = torch.randn(2, 7, 2, 16).half()
    rest = dict(num_heads=2, input_layout="BSND", scale_value=0.25)
    ones = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    calls = torch_npu.npu_prompt_flash_attention, torch.ops.npu.npu_prompt_flash_attention
    for mode in range(5):
        given = {0: mask, 1: mask}.get(mode, ones)
        want = torch.ops.pfa.forward(x, x, x, atten_mask=given, sparse_mode=mode, **rest)
        for call in calls:
            for number in (mode, mode + 10):
                out = call(view, view, view, atten_mask=given, sparse_mode=number, **rest)
                assert torch.equal(out, want), (mode, number)

    def fails(text, **arguments):
        for call in calls:
            try:
                call(x, x, x, **rest | arguments)
            except RuntimeError as error:
                assert text in str(error), error
            else:
                raise AssertionError(text)
    fails("query must have num_heads = 3 heads", num_heads=3)
    fails("sparse_mode", sparse_mode=15)
    fails("sparse_mode", sparse_mode=9)
    fails("atten_mask", sparse_mode=3)
    fails("padding_mask", padding_mask=mask)

    words = torch_npu.npu_trans_quant_param(torch.tensor([0.5]))
    assert words.dtype == torch.int64

    def lengths(x, n):
        return torch_npu.npu_prompt_flash_attention(
            x, x, x, actual_seq_lengths=[n, 3], num_heads=2, input_layout="BSND")
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lengths, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for n in (2, 5, 6):
        assert torch.equal(compiled(x, n), lengths(x, n))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts
"""


def test_operator_is_pfa_in_the_seeds_terms(tmp_path: pathlib.Path) -> None:
    done = runner(OPERATOR, tmp_path)
    assert done.returncode == 0, done.stderr


INSTALL = """
    import importlib.util
    import pfa.compat.torch_npu as compat

    for bad in ("npu", "meta"):
        try:
            compat.install(bad)
        except ValueError as error:
            assert str(error) == f"device must be cuda or cpu, got {bad}"
        else:
            raise AssertionError(bad)
    compat.install("cpu")
    compat.install()
    compat.install("cpu")
    try:
        compat.install("cuda")
    except ValueError as error:
        assert str(error) == "device must be cpu, as installed, got cuda"
    else:
        raise AssertionError
    import torch_npu
    assert importlib.util.find_spec("torch_npu") is not None
"""


def test_install_once(tmp_path: pathlib.Path) -> None:
    done = run("-c", textwrap.dedent(INSTALL))
    assert done.returncode == 0, done.stderr


def test_import_pfa_installs_nothing() -> None:
    code = "import pfa, sys, torch; sys.exit('torch_npu' in sys.modules or hasattr(torch, 'npu'))"
    assert run("-c", code).returncode == 0


def test_the_real_one_is_not_hidden(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch_npu.py").write_text("")
    code = "import pfa.compat.torch_npu as c, sys; sys.path.append('.'); c.install()"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: torch_npu is installed" in done.stderr


def test_runner_takes_modules_and_refuses_what_is_not_there(tmp_path: pathlib.Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text("import sys, torch_npu; print(__name__, *sys.argv[1:])")
    done = run("-m", "pfa.compat.torch_npu", "-m", "package.main", "-v", "2", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "__main__ -v 2"), done.stderr
    done = run("-m", "pfa.compat.torch_npu", "nothing.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "script must be an existing file, got nothing.py" in done.stderr


def test_signature_is_the_operators() -> None:
    ours = inspect.signature(_operator.npu_prompt_flash_attention).parameters
    front = inspect.signature(pfa.prompt_flash_attention).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in front.values()
    ]


@pytest.mark.gpu
def test_npu_is_the_gpu_where_there_is_one(on_cuda: Backend, tmp_path: pathlib.Path) -> None:
    if on_cuda.name != "cuda":
        pytest.skip("needs a GPU")
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SINGLE_OP))
    done = run("-m", "pfa.compat.torch_npu", str(file), str(tmp_path / "out.pt"))
    assert done.returncode == 0, done.stderr
    code = "import pfa.compat.torch_npu as c, torch; c.install(); print(torch.ones(1).npu().device)"
    assert run("-c", code).stdout.strip() == "cuda:0"
