# SPDX-License-Identifier: Apache-2.0
"""What a peer is: how it is found, and how it becomes a callable over the tensors of a case."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from ..inputs import Inputs

# Largest relative difference, as a Frobenius norm, between a peer and pfa.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "int8": 5e-2, "int8-int8": 5e-2, "fp16-int8": 2e-3}


class Missing(Exception):
    """The peer is not on this machine; the text says why."""


class Unsupported(Exception):
    """The peer cannot do this case; the text says what it lacks."""


class Unaffordable(Exception):
    """The case needs more memory than there is; the text says how much."""


@dataclasses.dataclass
class Call:
    """One case, ready to be run again and again."""

    run: Callable[[], Any]
    result: Callable[[Any], Tensor] = lambda out: out  # of run -> (B, N, S, D)
    note: str = ""  # what its numbers have to be read with
    step: float = 0.0  # of the output's quantisation
    preparation: float | None = None  # seconds that building a mask took, once per mask
    tolerance: float = 0.0  # where more than the dtype's is to be expected


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    version: str
    make: Callable[[Inputs], Call]


@dataclasses.dataclass(frozen=True)
class Finder:
    """A peer that may be on this machine. `find` raises Missing."""

    name: str
    devices: tuple[str, ...]
    find: Callable[[str], Peer]  # of the device


def only(condition: bool, lacks: str) -> None:
    if not condition:
        raise Unsupported(lacks)


def rows_first(x: Tensor) -> Tensor:
    """(B, N, S, D) -> contiguous (B, S, N, D), and back."""
    return x.transpose(1, 2).contiguous()


def difference(
    case: Case, ours: Tensor, theirs: Tensor, step: float, tolerance: float = 0.0
) -> tuple[float, bool]:
    """Relative, as a Frobenius norm; and whether it is small enough to compare speeds.

    step: of our output's quantisation, whose rounding the peer does not have.
    """
    a, b = ours.float(), theirs.float()
    size = float(b.norm())
    distance = float((a - b).norm())
    rounding = 1.2 * step * math.sqrt(a.numel() / 12)
    limit = max(tolerance, TOLERANCE[case.dtype]) * size + rounding
    relative = distance / size if size else distance
    return relative, distance <= limit
