# SPDX-License-Identifier: Apache-2.0
"""Runs a script that was written for torch_npu."""

from __future__ import annotations

import argparse
import pathlib
import runpy
import sys

from . import install


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pfa.compat.torch_npu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="what npu means (a GPU, if any)")
    parser.add_argument("--graph-backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT is a module's name")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.module and not pathlib.Path(options.script).exists():
        parser.error(f"script must be an existing file, got {options.script}")
    try:
        install(options.device, options.graph_backend)
    except RuntimeError as error:
        parser.error(str(error))
    sys.argv = [options.script, *options.arguments]
    if options.module:
        sys.path.insert(0, str(pathlib.Path.cwd()))
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(pathlib.Path(options.script).resolve().parent))
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
