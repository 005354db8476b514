# SPDX-License-Identifier: Apache-2.0
"""Packs what `make gpu-check` wants on a machine that builds nothing: `gpu_pack.py build/cuda
build/gpu-pack` leaves the library, the harness and a manifest there."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import sys

import build_harness
import objects

from benchmarks.revision import revision

BUDGET = 60 << 20  # what such a machine takes along


def architectures(ninja: str) -> list[str]:
    return sorted(set(re.findall(r"code=((?:sm|compute)_\w+)", ninja)))


def pack(build: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(build / "_C.abi3.so", folder)
    build_harness.build(build, folder / "attention")
    sizes = {name: (folder / name).stat().st_size for name in ("_C.abi3.so", "attention")}
    archs = architectures(objects.ninja_file(build))
    manifest = {**revision(), "architectures": archs, "bytes": sizes}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = sum(sizes.values())
    print(f"{folder}: {total / 2**20:.1f} MiB for {', '.join(archs)}")
    if total > BUDGET:
        sys.exit(f"{folder} may have {BUDGET >> 20} MiB, to be carried along")


if __name__ == "__main__":
    pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
