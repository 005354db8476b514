# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own in the simulator, which reads its settings once, at the start."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import torch
from backends import simulator_environment
from inputs import Case


def simulate(cases: list[Case], **settings: str) -> list[torch.Tensor]:
    """The outputs of cases under environment variables; any word of the simulator's is an error."""
    return _run(cases, settings)[0]


def simulated_log(cases: list[Case], **settings: str) -> list[str]:
    """The lines that these calls write to stderr."""
    return _run(cases, settings)[1].splitlines()


def _run(cases: list[Case], settings: dict[str, str]) -> tuple[list[torch.Tensor], str]:
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "outputs.pt")
        done = subprocess.run(
            [sys.executable, __file__, str(output)],
            input=pickle.dumps(cases),
            env=os.environ | simulator_environment(**settings),
            capture_output=True,
            check=False,
        )
        text = done.stderr.decode()
        assert done.returncode == 0, text[-3000:]
        assert "cudasim" not in text, text[-3000:]
        return torch.load(output), text


def main() -> None:
    import pfa  # noqa: F401

    outputs = []
    for case in pickle.load(sys.stdin.buffer):
        call = case.build()
        outputs.append(torch.ops.pfa.forward(*call.args, **call.options))
    torch.save(outputs, sys.argv[1])


if __name__ == "__main__":
    main()
