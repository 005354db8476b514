# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own in the simulator, which reads its settings once, at the start."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from typing import Any

import torch
from backends import simulator_environment
from inputs import Case


def simulate(cases: list[Case], **settings: str) -> list[torch.Tensor]:
    """The outputs of cases under environment variables; any word of the simulator's is an error."""
    return _run(cases, settings)[0]


def simulated_log(cases: list[Case], **settings: str) -> list[str]:
    """The lines that these calls write to stderr."""
    return _run(cases, settings)[1].splitlines()


def simulated_choices(cases: list[Case], **settings: str) -> list[Any]:
    """What these calls take: pfa._library.Choice."""
    return _run(cases, settings, "choice")[0]


def _run(cases: list[Case], settings: dict[str, str], what: str = "output") -> tuple[list, str]:
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "outputs.pt")
        done = subprocess.run(
            [sys.executable, __file__, str(output), what],
            input=pickle.dumps(cases),
            env=os.environ | simulator_environment(**settings),
            capture_output=True,
            check=False,
        )
        text = done.stderr.decode()
        assert done.returncode == 0, text[-3000:]
        assert "cudasim" not in text, text[-3000:]
        return torch.load(output, weights_only=False), text


def main() -> None:
    import pfa

    outputs = []
    for case in pickle.load(sys.stdin.buffer):
        call = case.build()
        function = torch.ops.pfa.forward if sys.argv[2] == "output" else pfa._library.choice
        outputs.append(function(*call.args, **call.options))
    torch.save(outputs, sys.argv[1])


if __name__ == "__main__":
    main()
