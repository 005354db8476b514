# SPDX-License-Identifier: Apache-2.0
"""Runs nvcc and keeps beside the object what ptxas said, what it cost in time and memory.

Stands in for nvcc through PYTORCH_NVCC: `nvcc_log.py NVCC ARGUMENT...`. An incremental build thus
keeps the figures of the objects that it did not compile. Only warnings and errors are shown.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys


def main(command: list[str]) -> int:
    run = subprocess.run(
        [*command, "-Xptxas=-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = [x for x in run.stdout.splitlines() if not x.startswith(("ptxas info", "    "))]
    sys.stdout.writelines(f"{line}\n" for line in shown)
    if run.returncode == 0 and "-o" in command:
        record = {
            "seconds": round(usage.ru_utime + usage.ru_stime, 2),  # wall time would tell of others
            "peak_rss": usage.ru_maxrss * 1024,
            "log": run.stdout,
        }
        pathlib.Path(command[command.index("-o") + 1] + ".json").write_text(json.dumps(record))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
