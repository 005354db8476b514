# SPDX-License-Identifier: Apache-2.0
"""The rules by which an output is judged.

The yardstick is the error that plain torch makes in the inputs' dtype: ours may be at most twice
that plus one rounding of the output. There is no tolerance per case. All tensors here are
(B, N, Sq, D) in fp64 unless they say otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import reference
import torch
from backends import Backend, current
from inputs import Call, Case
from torch import Tensor

FACTOR = 2.0
FEW = 256  # elements; among fewer, plain torch can be exact by luck
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.int8: 2.0**-11}
TYPICAL = 32  # elements of a row or column from which its largest error says something
# By how much a P may be off before it is rounded to int8, relative: 1/500 of the smallest step.
P_ERROR = 2.0**-16


class Expected:
    """What the contract fixes of a call's output."""

    def __init__(self, call: Call) -> None:
        p = self.parts = reference.parts(*call.args, **call.options)
        self.int8 = p.q.dtype == torch.int8
        self.seen = p.seen.expand(p.q.shape)
        self.free = p.free[..., None].expand(p.q.shape)
        self.nan = p.nan[..., None].expand(p.q.shape)
        self.exact = reference.exact(p)
        plain = reference.tiled(p)[0] if self.int8 else reference.plain_torch(p).double()
        assert plain.isfinite().all(), "plain torch overflows here: it cannot be the yardstick"
        self.baseline = (plain - self.exact).abs()
        if self.exact.numel() < FEW:
            weights = reference.softmax(p.scores())
            terms = (weights @ p.v.double().abs()).amax() * abs(p.scale_p * p.descale_o)
            self.baseline = self.baseline + terms * ROUNDOFF[p.q.dtype]

    @property
    def bounded(self) -> bool:
        """Does rounding P to int8 have a bounded error? It saturates at 127; near 0 it is all."""
        return not self.int8 or 16 <= self.parts.scale_p <= 127


@functools.lru_cache(maxsize=512)
def prepared(case: Case) -> tuple[Call, Expected]:
    """Shared by all tests that run the case: nobody may write to it."""
    call = case.build()
    return call, Expected(call)


def check_case(forward: Callable[..., Tensor], case: Case) -> None:
    call, expected = prepared(case)
    check(forward(*call.args, **call.options), call, expected)


def check(
    out: Tensor, call: Call, expected: Expected | None = None, backend: Backend | None = None
) -> None:
    """backend, by default the one under test, is where out comes from."""
    expected = expected or Expected(call)
    o = check_form(out, call)
    check_special(o, expected)
    if expected.bounded:
        check_error(o, expected)
    if expected.int8:
        check_tiles(o, expected, (backend or current()).plan(call))


def check_form(out: Tensor, call: Call) -> Tensor:
    """Dtype, shape, contiguity; returns what the other checks take."""
    shape = list(call.query.shape)
    if call.layout == "BNSD_BSND":
        shape[1], shape[2] = shape[2], shape[1]
    assert out.dtype == call.dtype_out
    assert list(out.shape) == shape
    assert out.is_contiguous()
    return reference.split_output(out, call.num_heads, call.layout).double()


def check_special(o: Tensor, expected: Expected) -> None:
    """Exact zeros without a key, NaN where it is due, finite elsewhere."""
    wrong = (o != 0) & ~expected.seen
    assert not wrong.any(), f"not 0 at (b, n, row, d) {_first(wrong)}"
    wrong = ~o.isfinite() & ~expected.free
    assert not wrong.any(), f"not finite at (b, n, row, d) {_first(wrong)}"
    if expected.parts.scale_out is None:
        wrong = ~o.isnan() & expected.nan
        assert not wrong.any(), f"NaN expected at (b, n, row, d) {_first(wrong)}"


def check_error(o: Tensor, expected: Expected) -> None:
    """The 2x rule, over each head and over the rows and the columns that are long enough."""
    p = expected.parts
    want, bound, rounding = _rounded(expected.exact, FACTOR * expected.baseline, p)
    live = expected.seen & ~expected.free
    error, bound, rounding = (
        torch.where(live, x, 0.0) for x in ((o - want).abs(), bound, rounding)
    )
    whole = (2, 3) if o[0, 0].numel() >= FEW else (0, 1, 2, 3)
    for name, dims, least in (
        ("head", whole, 0),
        ("column", (2,), TYPICAL),
        ("row", (3,), TYPICAL),
    ):
        most = bound.amax(dims, keepdim=True) + rounding.amax(dims, keepdim=True)
        wrong = (error > most) & (live.sum(dims, keepdim=True) >= least)
        assert not wrong.any(), _report(f"2x rule by {name}", wrong, o, want, most)


def check_tiles(o: Tensor, expected: Expected, plan: reference.Plan) -> None:
    """int8 inputs: as if P were rounded tile by tile. Only roundings near a half may differ."""
    p = expected.parts
    tiled, slack = reference.tiled(p, plan, P_ERROR)
    size = (p.v.double().abs().amax() * p.scale_p * p.descale_o).abs()
    want, bound, rounding = _rounded(tiled, slack + size * P_ERROR, p)
    wrong = ((o - want).abs() > bound + rounding) & expected.seen & ~expected.free
    assert not wrong.any(), _report("tile by tile", wrong, o, want, bound + rounding)


def _rounded(o: Tensor, bound: Tensor, p: reference.Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Before requantise -> (what the output should hold, its bound, one rounding of the output)."""
    if p.scale_out is not None:
        scale = p.scale_out.abs()
        rounding = torch.full_like(o, 0.5 + 2.0**-12)
        if p.q.dtype != torch.int8:  # plain torch rounds o to the inputs' dtype on its way
            rounding = rounding + o.abs() * ROUNDOFF[p.q.dtype] * scale
        return p.requantise(o).clamp(-128, 127), bound * scale, rounding
    dtype = torch.float16 if p.q.dtype == torch.int8 else p.q.dtype
    finest = torch.finfo(dtype).smallest_normal * ROUNDOFF[dtype]
    return o, bound, (o.abs() * ROUNDOFF[dtype]).clamp_min(finest)


def _first(wrong: Tensor) -> list[list[int]]:
    return wrong.nonzero()[:6].tolist()


def _report(rule: str, wrong: Tensor, o: Tensor, want: Tensor, bound: Tensor) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    bound = bound.expand(o.shape)
    return (
        f"{rule}: {wrong.sum()} of {wrong.numel()} elements are off, the first at (b, n, row, d) "
        f"{at}: got {o[at]:.6g}, want {want[at]:.6g} +- {bound[at]:.3g}"
    )
