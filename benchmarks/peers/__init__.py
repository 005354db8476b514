# SPDX-License-Identifier: Apache-2.0
"""Who is measured. A peer is found at run time; one that is not there is named with the reason."""

from __future__ import annotations

from . import cpu, gpu, ours, torch_ops, vllm_cpu
from .base import Finder, Missing, Peer

OURS = "pfa"
FINDERS: tuple[Finder, ...] = (
    *ours.FINDERS,
    *torch_ops.FINDERS,
    vllm_cpu.FINDER,
    *cpu.FINDERS,
    *gpu.FINDERS,
)


def names(device: str) -> list[str]:
    return [finder.name for finder in FINDERS if device in finder.devices]


def find(device: str, wanted: tuple[str, ...] = ()) -> tuple[list[Peer], dict[str, str]]:
    """Those that are here, ours first, and why the others are not. `wanted`: these beside ours."""
    found, missing = [], {}
    for finder in FINDERS:
        if device not in finder.devices or wanted and finder.name not in (OURS, *wanted):
            continue
        try:
            found.append(finder.find(device))
        except Missing as error:
            missing[finder.name] = str(error)
        except Exception as error:  # a broken installation costs that peer alone
            missing[finder.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return found, missing
