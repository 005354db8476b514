# SPDX-License-Identifier: Apache-2.0
"""The Python front end: what it adds to the operator, and how it behaves without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pathlib
import shutil
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pfa

ROOT = pathlib.Path(pfa.__file__).parent


def run(code: str, path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)


def test_signature_is_the_schema() -> None:
    parameters = inspect.signature(pfa.prompt_flash_attention).parameters
    schema = torch.ops.pfa.forward.default._schema.arguments
    assert list(parameters) == [x.name for x in schema]
    for argument in schema:
        parameter = parameters[argument.name]
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        if argument.has_default_value():
            assert argument.default_value == parameter.default


def test_overloads_differ_in_the_lengths_only() -> None:
    default = str(torch.ops.pfa.forward.default._schema)
    tensors = str(torch.ops.pfa.forward.tensor_lens._schema)
    assert default.replace("SymInt[]?", "Tensor?") == tensors.replace(".tensor_lens", "")


def test_the_operator_by_position_is_the_operator() -> None:
    for overload in ("default", "tensor_lens"):
        named, by_position = (
            str(getattr(op, overload)._schema).split("(", 1)[1]
            for op in (torch.ops.pfa.forward, torch.ops.pfa._eager)
        )
        assert named.replace("*, ", "").replace("SymInt[]?", "int[]?") == by_position


class Names(TorchDispatchMode):
    """Keeps the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [[3], torch.tensor([3])], ids=["list", "tensor"])
def test_plain_tensors_go_by_position(lengths: Any) -> None:
    plain = torch.randn(1, 4, 8).half()
    options = {"num_heads": 2, "sparse_mode": 3, "actual_seq_lengths_kv": lengths}
    results = []
    for x in (plain, torch.nn.Parameter(plain, requires_grad=False)):
        with Names() as names:
            results.append(pfa.prompt_flash_attention(x, x, x, **options))
        overload = "default" if isinstance(lengths, list) else "tensor_lens"
        name = "_eager" if x is plain else "forward"
        assert [n for n in names.seen if n.startswith("pfa")] == [f"pfa.{name}.{overload}"]
    assert torch.equal(*results)


@pytest.mark.parametrize("module", ["pfa.api", "pfa.quant", "pfa.portable"])
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_compressed_mask_may_be_left_out(mode: int) -> None:
    x = torch.randn(1, 7, 2, 8).half()
    y = torch.randn(1, 9, 2, 8).half()
    upper = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    rest = {"num_heads": 2, "input_layout": "BSND", "sparse_mode": mode, "pre_tokens": 3}
    expected = torch.ops.pfa.forward(x, y, y, atten_mask=upper, **rest)
    assert torch.equal(pfa.prompt_flash_attention(x, y, y, **rest), expected)


def test_lengths_may_be_tensors() -> None:
    x = torch.randn(2, 7, 16).bfloat16()
    lists = pfa.prompt_flash_attention(
        x, x, x, num_heads=2, actual_seq_lengths=(3, 7), actual_seq_lengths_kv=[5]
    )
    lengths = torch.tensor([3, 7], dtype=torch.int32), torch.tensor([5])
    tensors = pfa.prompt_flash_attention(
        x, x, x, num_heads=2, actual_seq_lengths=lengths[0], actual_seq_lengths_kv=lengths[1]
    )
    assert torch.equal(lists, tensors)


def test_lengths_may_not_be_mixed() -> None:
    x = torch.zeros(2, 7, 16).half()
    with pytest.raises(TypeError, match="must both be tensors"):
        pfa.prompt_flash_attention(
            x, x, x, actual_seq_lengths=torch.tensor([1]), actual_seq_lengths_kv=[1]
        )


def test_docstring_names_the_traps() -> None:
    text = " ".join(str(pfa.prompt_flash_attention.__doc__).split())
    for words in ("Nonzero or True means masked out", "Trap: mode 0", "gives exact zeros"):
        assert words in text
    for name in inspect.signature(pfa.prompt_flash_attention).parameters:
        assert name in text


def test_import_is_quiet_and_light() -> None:
    """It imports nothing else than torch has, in at most the 150 ms that are promised: processor
    time, which other processes do not lengthen."""
    code = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import pfa\n"
        "seconds, new = time.process_time() - start, set(sys.modules) - before\n"
        "others = [name for name in new if name.split('.')[0] != 'pfa']\n"
        "sys.exit(f'{seconds} s, {others}' if seconds > 0.15 or others else 0)\n"
    )
    done = run(code, ROOT.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "damaged"])
def test_load_failure_is_raised_at_first_use(tmp_path: pathlib.Path, broken: bool) -> None:
    shutil.copytree(ROOT, tmp_path / "pfa", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (tmp_path / "pfa" / "_C.abi3.so").write_bytes(b"not a library")
    done = run("import pfa; print(pfa.__version__)", tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, pfa.__version__, "")
    use = "import pfa, torch; x = torch.zeros(1, 1, 8).half(); pfa.prompt_flash_attention(x, x, x)"
    done = run(use, tmp_path)
    assert done.returncode == 1
    assert "ImportError: pfa could not load its operator" in done.stderr
    assert ("_C.abi3.so" in done.stderr) and (("build" in done.stderr) != broken)


def test_trans_quant_param_bits() -> None:
    values = [1.0, 0.1, -3.3, 1e-30, 65504.0]
    words = pfa.trans_quant_param(torch.tensor(values))
    assert words.dtype == torch.int64
    for value, word in zip(values, words.tolist(), strict=True):
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        assert word == (bits & 0xFFFFE000) | 1 << 46


def test_trans_quant_param_offset() -> None:
    scale = torch.tensor([[1.0], [2.0]])
    words = pfa.trans_quant_param(scale, torch.tensor([-1.0]))
    assert words.shape == scale.shape
    assert (words >> 37 & 0x1FF).tolist() == [[511], [511]]
    with pytest.raises(TypeError, match="scale must have dtype float32"):
        pfa.trans_quant_param(scale.half())
    with pytest.raises(TypeError, match="offset must have dtype float32"):
        pfa.trans_quant_param(scale, torch.tensor([1]))
    with pytest.raises(ValueError, match="offset must have one element or the shape"):
        pfa.trans_quant_param(scale, torch.zeros(3))
    with pytest.raises(ValueError, match="between -256 and 255"):
        pfa.trans_quant_param(scale, torch.tensor([256.0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_packed_scales_are_read_as_float32(dtype: torch.dtype) -> None:
    x = (torch.arange(2 * 5 * 16) % 17 - 8).to(torch.int8).view(2, 5, 16)
    scale = torch.tensor([0.0625])  # a power of two survives the coding exactly
    fixed = {"num_heads": 2, "quant_scale1": torch.tensor([127.0])}
    packed = pfa.trans_quant_param(scale, torch.tensor([5.0])).view(dtype)
    plain = pfa.prompt_flash_attention(x, x, x, deq_scale1=scale, deq_scale2=scale, **fixed)
    coded = pfa.prompt_flash_attention(x, x, x, deq_scale1=packed, deq_scale2=packed, **fixed)
    assert torch.equal(plain, coded)
    assert plain.any()


X = torch.zeros(1, 16, 2 * 64, dtype=torch.float16)
WIDE = torch.zeros(1, dtype=torch.float16).expand(129, 16, 2 * 24)
PORTABLE = {
    "fine": ({}, "atlas_a3", []),
    "dtype": ({"query": X.bfloat16()}, "atlas_inference", ["query must have dtype float16, got"]),
    "float32": (
        {"query": X.float()},
        "atlas_a2",
        ["query must have dtype float16, bfloat16, int8"],
    ),
    "sequence": (
        {"key": torch.zeros(1, dtype=torch.float16).expand(1, 65536, 128)},
        "atlas_inference",
        ["sequence lengths must be at most 65535, got 65536", "key must be contiguous"],
    ),
    "unaligned": (
        {"query": WIDE},
        "atlas_a2",
        ["multiple of 16, got 24", "at most 128 when", "query must be contiguous"],
    ),
    "batch": (
        {"query": WIDE},
        "atlas_inference",
        ["batch size must be at most 128", "16", "query"],
    ),
    "width": ({"query": torch.zeros(1, 1, 65536).half(), "num_heads": 128}, "atlas_a2", ["65535"]),
    "heads": (
        {"query": torch.zeros(1, 1, 257 * 16).half(), "num_heads": 257},
        "atlas_a2",
        ["num_heads must be at most 256, got 257"],
    ),
    "head_dim": (
        {"num_heads": 1, "query": X.repeat(1, 1, 8)},
        "atlas_a2",
        ["at most 512, got 1024"],
    ),
    "lengths": ({"actual_seq_lengths": torch.ones(1).int()}, "atlas_a2", ["must be a list of int"]),
    "per channel": (
        {"query": X[..., :80].contiguous(), "quant_scale2": torch.ones(80)},
        "atlas_a2",
        ["multiple of 16, got 40", "quant_scale2 must have one element"],
    ),
    "only None": (
        {"pse_shift": torch.zeros(1, 2, 16, 16).half(), "actual_seq_lengths_kv": [3]},
        "atlas_inference",
        ["pse_shift must be None", "actual_seq_lengths_kv must be None"],
    ),
    "only defaults": (
        {"pre_tokens": 5, "next_tokens": 1, "num_key_value_heads": 2, "sparse_mode": 2},
        "atlas_inference",
        ["pre_tokens", "next_tokens", "num_key_value_heads", "sparse_mode"],
    ),
}


@pytest.mark.parametrize(("changes", "product", "expected"), PORTABLE.values(), ids=PORTABLE.keys())
def test_check_portable(changes: dict[str, object], product: str, expected: list[str]) -> None:
    args = {"query": X, "key": X, "value": X, "num_heads": 2} | changes
    broken = pfa.check_portable(product=product, **args)  # type: ignore[arg-type]
    assert len(broken) == len(expected), broken
    for words, text in zip(expected, broken, strict=True):
        assert words in text


def test_check_portable_takes_the_call_as_it_is() -> None:
    front = set(inspect.signature(pfa.prompt_flash_attention).parameters) - {"padding_mask"}
    assert front == set(inspect.signature(pfa.check_portable).parameters) - {"product"}
    with pytest.raises(ValueError, match="product must be one of atlas_a2"):
        pfa.check_portable(X, X, X, product="atlas")
    with pytest.raises(ValueError, match="input_layout must be"):
        pfa.check_portable(X, X, X, product="atlas_a2", input_layout="TND")
    with pytest.raises(ValueError, match="query must have 4 dimensions"):
        pfa.check_portable(X, X, X, product="atlas_a2", input_layout="BNSD")
