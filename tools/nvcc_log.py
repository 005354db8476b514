# SPDX-License-Identifier: Apache-2.0
"""Runs nvcc and keeps beside the object what ptxas said, how long it took and its memory.

Stands in for nvcc through PYTORCH_NVCC: `nvcc_log.py NVCC ARGUMENT...`. An incremental build thus
keeps the figures of the objects that it did not compile. Only warnings and errors are shown.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    started = time.monotonic()
    run = subprocess.run(
        [*command, "-Xptxas=-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = time.monotonic() - started
    shown = [x for x in run.stdout.splitlines() if not x.startswith(("ptxas info", "    "))]
    sys.stdout.writelines(f"{line}\n" for line in shown)
    if run.returncode == 0 and "-o" in command:
        record = {
            "seconds": round(seconds, 2),
            "peak_rss": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "log": run.stdout,
        }
        pathlib.Path(command[command.index("-o") + 1] + ".json").write_text(json.dumps(record))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
