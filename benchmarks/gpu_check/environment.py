# SPDX-License-Identifier: Apache-2.0
"""Which machine, which software, which library. A child process asks torch: a GPU that cannot be
used must not end the whole check."""

import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ..machine import ABOUT_GPU, now, nvidia_smi
from ..process import run
from ..revision import revision

ABOUT_TORCH = """
import json, torch
found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
found["available"] = torch.cuda.is_available()
try:
    import pfa
    found["library"], found["load_error"] = str(pfa._library.path), pfa._library.load_error
    if found["available"]:
        x = torch.ones(1, 1, 1, dtype=torch.float16, device="cuda")
        found["kernel"] = pfa._library.choice(x, x, x).kernel
except Exception as error:
    found["load_error"] = f"{type(error).__name__}: {error}"
if found["available"]:
    about = torch.cuda.get_device_properties(0)
    found["gpu"] = {"name": about.name, "capability": [about.major, about.minor],
                    "multiprocessors": about.multi_processor_count,
                    "memory_gib": round(about.total_memory / 2**30, 1)}
    found["cudnn"] = torch.backends.cudnn.version()
print("FOUND " + json.dumps(found))
"""


def plan() -> list[str]:
    return [
        f"nvidia-smi --query-gpu={ABOUT_GPU}",
        "torch, the GPU, the library and its architectures",
    ]


def collect(pack: Path | None, seconds: float) -> dict[str, Any]:
    found = {
        "status": "ok",
        "date": now(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        **source(pack),
        "nvidia_smi": nvidia_smi(),
        **about_torch(seconds),
        "compute_sanitizer": find_tool("compute-sanitizer"),
    }
    packed = (found["pack"] or {}).get("architectures")
    return found | {"architectures": architectures(found.get("library")) or packed}


def source(pack: Path | None) -> dict[str, Any]:
    """The revision of the tree here, or of the pack where the tree came without its history."""
    manifest = read_manifest(pack)
    found = revision()
    if found["sha"] == "unknown" and manifest:
        found = {"sha": manifest["sha"], "dirty": manifest["dirty"]}
    return found | {"pack": manifest}


def read_manifest(pack: Path | None) -> dict[str, Any] | None:
    path = pack and pack / "manifest.json"
    return json.loads(path.read_text()) if path and path.exists() else None


def about_torch(seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-c", ABOUT_TORCH]
    done = run(command, seconds)
    found = re.search(r"^FOUND (.*)$", done.output, re.MULTILINE)
    if found is None:
        return {"status": "failed", "reason": f"torch: {done.output.strip()[-500:]}"}
    about = json.loads(found[1])
    if not about["available"]:
        return about | {"status": "failed", "reason": "torch sees no GPU"}
    if about["load_error"]:
        return about | {"status": "failed", "reason": about["load_error"]}
    return about


def architectures(library: str | None) -> list[str] | None:
    """Of the machine code in the library, where there is a cuobjdump to ask."""
    program = find_tool("cuobjdump")
    if program is None or library is None:
        return None
    listing = run([program, "--list-elf", library], 30).output
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listing)))


def find_tool(name: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which(name, path=path)
