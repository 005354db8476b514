# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, how busy it is, its GPU's clocks. torch is imported where it is needed:
a GPU that cannot be used must not end whoever asks for the rest."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .process import run

ABOUT_GPU = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu")
SAMPLE_MS = 100
# What may be set and changes a result.
VARIABLES = ("OMP_WAIT_POLICY", "OMP_PROC_BIND", "PFA_CPU_ISA", "PFA_NUM_SPLITS")
# The processor's flags that decide which kernel can run.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def nvidia_smi() -> dict[str, str] | str:
    try:
        done = run(["nvidia-smi", f"--query-gpu={ABOUT_GPU}", "--format=csv,noheader"], 20)
    except FileNotFoundError:
        return "nvidia-smi was not found"
    if done.returncode != 0:
        return f"nvidia-smi ended with {done.returncode}: {done.output.strip()[-300:]}"
    values = done.output.strip().partition("\n")[0].split(", ")
    return dict(zip(ABOUT_GPU.split(","), values, strict=False))


def processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return name[1] if name else platform.machine(), set(flags[1].split()) if flags else set()


def busy(pause: float = 1.0) -> float | None:
    """Share of the processors' time that others take while this process sleeps."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    samples = []
    for wait in (pause, 0.0):
        times = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
        samples.append((sum(times), times[3] + times[4]))  # all, idle and waiting for a disk
        time.sleep(wait)
    (total, idle), (total_after, idle_after) = samples
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def environment(device: str, threads: int) -> dict[str, Any]:
    """What decides a result, for the JSON of a run on `device`."""
    import torch

    import pfa

    model, flags = processor()
    found = {
        "device": device,
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pfa": pfa.__version__,
        "date": now(),
        "busy": busy(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if device == "cpu":
        return found | {"isa": pfa.cpu_isa()}
    about = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
    }


def free_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 1 << 40


def pin(threads: int) -> None:
    """To as many processors as there are threads, which everyone who is measured inherits."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def preemptions() -> int:
    """How often this process was pushed off a processor so far: the trace of a busy machine."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Sampler:
    """Clock, power and temperature of the GPU while something runs."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float]]] = []
        command = ["nvidia-smi", f"--query-gpu={','.join(SAMPLED)}", "-lms", str(SAMPLE_MS)]
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        command += ["--format=csv,noheader,nounits", "-i", first]
        try:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except FileNotFoundError:
            self.process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a field that this card does not have
                self.samples.append((time.monotonic(), [float(x) for x in line.split(",")]))

    def since(self, begin: float) -> dict[str, float] | None:
        values = [x for when, x in self.samples if when >= begin and len(x) == len(SAMPLED)]
        if not values:
            return None
        columns = zip(SAMPLED, zip(*values, strict=True), strict=True)
        return {name: statistics.median(column) for name, column in columns}

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


@contextlib.contextmanager
def sampling(device: str) -> Iterator[Sampler | None]:
    sampler = Sampler() if device == "cuda" else None
    try:
        yield sampler
    finally:
        if sampler is not None:
            sampler.close()
