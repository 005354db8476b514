# SPDX-License-Identifier: Apache-2.0
"""The operator as a citizen of PyTorch: opcheck, fakes, graphs, strides, autograd, memory."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import pfa

B, N, SQ, SK, D = 2, 4, 6, 9, 8
LAYOUTS = ["BSH", "BSND", "BNSD", "BNSD_BSND"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
Arguments = dict[str, Any]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    if dtype == torch.int8:
        return torch.randint(-100, 100, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def shape_of(layout: str, rows: int) -> tuple[int, ...]:
    return {"BSH": (B, rows, N * D), "BSND": (B, rows, N, D)}.get(layout, (B, N, rows, D))


def arguments(layout: str = "BNSD", dtype: torch.dtype = torch.float16, **more: Any) -> Arguments:
    args: Arguments = {
        "query": random(dtype, *shape_of(layout, SQ)),
        "key": random(dtype, *shape_of(layout, SK)),
        "value": random(dtype, *shape_of(layout, SK)),
        "num_heads": N,
        "input_layout": layout,
        "scale_value": 0.3,
    }
    if dtype == torch.int8:
        scale = torch.tensor([1e-3])
        args |= {"deq_scale1": scale, "quant_scale1": torch.tensor([127.0]), "deq_scale2": scale}
    return args | more


def call(function: Callable[..., torch.Tensor], args: Arguments) -> torch.Tensor:
    others = {k: v for k, v in args.items() if k not in ("query", "key", "value")}
    return function(args["query"], args["key"], args["value"], **others)


def everything(layout: str = "BNSD") -> Arguments:
    """bfloat16 to int8 with a mask, a bias, lengths and per-channel scales."""
    generator = torch.Generator().manual_seed(3)
    return arguments(
        layout,
        torch.bfloat16,
        pse_shift=random(torch.bfloat16, B, N, SQ + 1, SK + 2),
        atten_mask=torch.rand(B, 1, SQ + 1, SK + 3, generator=generator) < 0.3,
        quant_scale2=torch.rand(N * D, generator=generator) * 20,
        quant_offset2=torch.rand(N * D, generator=generator),
        actual_seq_lengths=[SQ, SQ - 2],
        actual_seq_lengths_kv=[SK - 4, SK],
        next_tokens=SK,
    )


FEATURES: dict[str, Arguments] = {
    "plain": {},
    "mask": {"atten_mask": torch.eye(SQ, SK, dtype=torch.bool), "next_tokens": 99},
    "causal": {"sparse_mode": 3, "atten_mask": torch.zeros(1, dtype=torch.int8).expand(2048, 2048)},
    "lengths": {"actual_seq_lengths": [3, 5], "actual_seq_lengths_kv": [0, 4]},
    "int8 output": {"quant_scale2": torch.tensor([20.0])},
}


@pytest.mark.parametrize("feature", [*FEATURES, "pse"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_opcheck(dtype: torch.dtype, layout: str, feature: str) -> None:
    pse = random(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16, B, N, SQ, SK)
    args = arguments(
        layout, dtype, **({"pse_shift": pse} if feature == "pse" else FEATURES[feature])
    )
    opcheck_all(torch.ops.pfa.forward.default, args)


def opcheck_all(op: Any, args: Arguments) -> None:
    others = {k: v for k, v in args.items() if k not in ("query", "key", "value")}
    opcheck(op, (args["query"], args["key"], args["value"]), others)


def test_opcheck_by_position() -> None:
    args = arguments("BSND", sparse_mode=2)
    names = [x.name for x in torch.ops.pfa._eager.default._schema.arguments]
    defaults = [x.default_value for x in torch.ops.pfa._eager.default._schema.arguments]
    by_position = tuple(args.get(n, d) for n, d in zip(names, defaults, strict=True))
    opcheck(torch.ops.pfa._eager.default, by_position)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def spaced(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7)
    wide[..., ::2] = x
    return wide[..., ::2]


def padded(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full([n + 3 for n in x.shape], 7)
    view = wide[tuple(slice(1, 1 + n) for n in x.shape)]
    view.copy_(x)
    return view


def permuted(x: torch.Tensor) -> torch.Tensor:
    order = [*range(x.dim() - 1, -1, -1)]
    return x.permute(order).contiguous().permute(order)


STRIDES = {f.__name__: f for f in (transposed, spaced, padded, permuted)}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str, change: Callable[..., torch.Tensor]) -> None:
    args = everything(layout)
    expected = call(torch.ops.pfa.forward.default, args)
    strided = {
        k: change(v) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in args.items()
    }
    strided["quant_scale2"] = spaced(args["quant_scale2"])
    strided["quant_offset2"] = args["quant_offset2"].view(1, N, 1, D)
    out = call(torch.ops.pfa.forward.default, strided)
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    if layout in ("BSH", "BNSD_BSND"):
        opcheck_all(torch.ops.pfa.forward.default, strided)


def test_broadcast_dimensions_do_not_matter() -> None:
    args = arguments(
        key=random(torch.float16, 1, 1, SK, 1).expand(B, N, SK, D),
        value=random(torch.float16, 1, N, 1, D).expand(B, N, SK, D),
        pse_shift=random(torch.float16, 1, 1, 1, SK).expand(1, N, SQ, SK),
        atten_mask=torch.eye(SQ, 1, dtype=torch.uint8).expand(B, 1, SQ, SK),
        sparse_mode=1,
    )
    dense = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    out = call(torch.ops.pfa.forward.default, args)
    assert torch.equal(out, call(torch.ops.pfa.forward.default, dense))


def test_inputs_are_not_modified() -> None:
    args = everything()
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    out = call(torch.ops.pfa.forward.default, args)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(args[name], value), name
            assert args[name].untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_tensor_lengths_equal_lists(dtype: torch.dtype) -> None:
    args = everything()
    expected = call(torch.ops.pfa.forward.default, args)
    lengths = ("actual_seq_lengths", "actual_seq_lengths_kv")
    tensors = {name: torch.tensor([*args[name], 99]).to(dtype) for name in lengths}
    op = torch.ops.pfa.forward.tensor_lens
    assert torch.equal(call(op, args | tensors), expected)
    strided = {name: torch.stack([x, x + 1], dim=1)[:, 0] for name, x in tensors.items()}
    assert torch.equal(call(op, args | strided), expected)
    opcheck_all(op, args | tensors)


def test_tensor_lengths_are_clamped() -> None:
    args = arguments()
    beyond = {
        "actual_seq_lengths": torch.tensor([99, -1]),
        "actual_seq_lengths_kv": torch.tensor([4]),
    }
    lists = {"actual_seq_lengths": [SQ, 0], "actual_seq_lengths_kv": [4]}
    out = call(torch.ops.pfa.forward.tensor_lens, args | beyond)
    assert torch.equal(out, call(torch.ops.pfa.forward.default, args | lists))
    assert not out[1].any()


EMPTY = {
    "no rows": {"query": random(torch.float16, B, N, 0, D)},
    "no keys": {
        "key": random(torch.float16, B, N, 0, D),
        "value": random(torch.float16, B, N, 0, D),
    },
    "no batch": {name: random(torch.float16, 0, N, 3, D) for name in ("query", "key", "value")},
}


@pytest.mark.parametrize("changes", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("layout", ["BNSD", "BNSD_BSND"])
def test_opcheck_empty(layout: str, changes: Arguments) -> None:
    args = arguments(layout) | changes
    opcheck_all(torch.ops.pfa.forward.default, args)
    assert not call(torch.ops.pfa.forward.default, args).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("to_int8", [False, True])
def test_meta_matches_cpu(layout: str, dtype: torch.dtype, to_int8: bool) -> None:
    args = arguments(layout, dtype)
    if to_int8:
        args["quant_scale2"] = torch.tensor([1.0])
    out = call(torch.ops.pfa.forward.default, args)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    fake = call(torch.ops.pfa.forward.default, meta)
    assert (fake.shape, fake.dtype, fake.stride()) == (out.shape, out.dtype, out.stride())


FAKE_REFUSES: list[Arguments] = [{"input_layout": "SBH"}, {"input_layout": "BSH"}]


@pytest.mark.parametrize("changes", FAKE_REFUSES, ids=["layout", "rank"])
def test_fake_refuses_in_the_same_words(changes: Arguments) -> None:
    args = arguments() | changes
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    texts = []
    for given in (args, meta):
        with pytest.raises(RuntimeError) as caught:
            call(torch.ops.pfa.forward.default, given)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def causal(x: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
    return pfa.prompt_flash_attention(
        x, x, x, num_heads=N, sparse_mode=2, actual_seq_lengths_kv=lengths
    )


def test_one_graph_for_all_sizes_and_lengths() -> None:
    counter = CompileCounter()
    compiled = torch.compile(causal, fullgraph=True, dynamic=True, backend=counter)
    for rows in (7, 16, 33):
        x = random(torch.float16, B, rows, N * D)
        for lengths in ([rows, 2], [1, 5], [3, 3]):
            assert torch.equal(compiled(x, lengths), causal(x, lengths))
    assert counter.frame_count == 1


def test_one_graph_for_tensor_lengths() -> None:
    def attend(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return pfa.prompt_flash_attention(x, x, x, num_heads=N, actual_seq_lengths=lengths)

    counter = CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for rows in (7, 16, 33):
        x = random(torch.float16, B, rows, N * D)
        lengths = torch.tensor([rows // 2, rows])
        assert torch.equal(compiled(x, lengths), attend(x, lengths))
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(N * D, N * D, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return pfa.prompt_flash_attention(
            self.linear(x),
            memory,
            memory,
            num_heads=N,
            scale_value=D**-0.5,
            sparse_mode=3,
            actual_seq_lengths_kv=[memory.shape[1] - 1],
        )


def test_gradients_are_refused() -> None:
    args = everything()
    for name in ("query", "key", "value", "pse_shift", "quant_scale2"):
        tracked = args | {name: args[name].clone().requires_grad_()}
        derived = args | {name: tracked[name] * 1}
        for op in (torch.ops.pfa.forward.default, pfa.prompt_flash_attention):
            for given in (tracked, derived):
                with pytest.raises(RuntimeError, match=f"inference-only.* {name} requires grad"):
                    call(op, given)
        expected = call(torch.ops.pfa.forward.default, args)
        with torch.no_grad():
            assert torch.equal(call(torch.ops.pfa.forward.default, tracked), expected)
        with torch.inference_mode():
            assert torch.equal(call(torch.ops.pfa.forward.default, tracked), expected)


def test_gradients_are_refused_when_compiled() -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = random(torch.bfloat16, B, SQ, N * D), random(torch.bfloat16, B, SK, N * D)
    with pytest.raises(Exception, match="inference-only"):
        compiled(*inputs)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), layer(*inputs))


def test_gradients_pass_beside_the_operator() -> None:
    weight = torch.nn.Parameter(random(torch.float16, B, SQ, N * D))

    def attend(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            fixed = causal(weight, None)
        return (x * weight + fixed).float().sum()

    x = random(torch.float16, B, SQ, N * D)
    torch.compile(attend, backend="aot_eager", fullgraph=True)(x).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, x)


def test_output_that_does_not_fit() -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"^pfa.forward could not allocate an output .* \(1, 1,"):
        torch.ops.pfa.forward(x.expand(1, 1, 2**58, 1), x, x, input_layout="BNSD")


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def use_lists_and_strings() -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    torch.ops.pfa.forward.default(
        x,
        x,
        x,
        input_layout="BNSD_BSND",
        actual_seq_lengths=[1],
        actual_seq_lengths_kv=[1, 1, 1],
        pse_shift=x,
    )


def use_tensors() -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    torch.ops.pfa.forward.tensor_lens(x, x, x, input_layout="BNSD", actual_seq_lengths=ONE)


ONE = torch.ones(1, dtype=torch.int64)


def use_error() -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError):
        torch.ops.pfa.forward.default(x, x, x, input_layout="a layout", actual_seq_lengths=[1])


def use_isa() -> None:
    assert pfa.cpu_isa() in ("amx", "avx512", "avx512_vnni", "avx2", "portable")


@pytest.mark.parametrize(
    ("use", "calls"),
    [
        (use_lists_and_strings, 100_000),
        (use_tensors, 50_000),
        (use_error, 30_000),
        (use_isa, 50_000),
    ],
)
def test_no_leak(use: Callable[[], None], calls: int) -> None:
    for _ in range(5_000):
        use()
    # TORCH_BOX's leak of a string is 48 bytes a call; allocators may grow once, a leak every time.
    grown = []
    for _ in range(3):
        before = resident_bytes()
        for _ in range(calls // 3):
            use()
        grown.append(resident_bytes() - before)
    assert min(grown) < calls // 3 * 8, grown
