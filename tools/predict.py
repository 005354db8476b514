# SPDX-License-Identifier: Apache-2.0
"""Predicts the speed of the CUDA kernels with the timing model of a simulator. Nothing is measured.

`predict.py --simulator build/cudasim --harness build/predict/attention` runs the harness of
benchmarks/cuda in the simulator, a few blocks of each launch, and writes
benchmarks/results/predicted-<machine>.json. predictions.py has the cases and their targets; the
simulator's README says how far to believe its model: differences below 5 % mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from predict_report import show
from predictions import DENSE, MACHINES, ROUNDS, SLICE, Machine, Target
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import Case
from benchmarks.revision import ROOT, revision

ENTRY = re.compile(rb"\.entry (\w+)\(.*?\)\s*((?:\.\w+[ \d,]*\s*)*)\{", re.S)
BUDGETED = re.compile(rb"\.minnctapersm (\d+)")
SET_FOR_EACH_RUN = ("ctas", "occupancy", "sample", "whatif", "miss")  # among the model's constants
ATTENTION = "forward_kernel"  # part of the name of the kernels that are not passes around them


class Failure(Exception):
    """The harness failed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Runs the harness; every call is a process of one thread."""

    simulator: pathlib.Path  # folder of libcudart.so.13
    harness: pathlib.Path
    machine: Machine
    rounds: int = ROUNDS

    def run(self, arguments: tuple[str, ...], **settings: str) -> tuple[dict, list[dict]]:
        """What the harness prints, and the timing model's report of each launch."""
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder, "report")
            environment = {
                **os.environ,
                "LD_LIBRARY_PATH": f"{self.simulator}:{os.environ.get('LD_LIBRARY_PATH', '')}",
                "CUDASIM_CC": str(self.machine.cc),
                "CUDASIM_THREADS": "1",
                "CUDASIM_TIMING": str(report),
                **settings,
            }
            command = [str(self.harness), *arguments]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0 or not report.exists():
                raise Failure(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
            return json.loads(done.stdout), parse_report(report.read_text())

    @functools.cache  # noqa: B019  (one runner a process)
    def blocks_per_sm(self, dtype: str, head_dim: int, pattern: str) -> int:
        """Those that the kernel's registers are budgeted for, of the kernel that a small call of
        this kind takes."""
        launches = self.small_call(dtype, head_dim, pattern)[1]
        return budgets(self.harness)[attention(launches)["kernel"]]

    @functools.cache  # noqa: B019  (one runner a process)
    def small_call(self, dtype: str, head_dim: int, pattern: str) -> tuple[dict, list[dict]]:
        arguments = self.arguments(Case(dtype, head_dim, pattern, 64), batch=1, heads=1)
        return self.run(arguments, PFA_NUM_SPLITS="1", CUDASIM_TIMING_CTAS="1")

    def first_reads(self, case: Case) -> dict[str, str]:
        """The part of what is read that comes from the device's memory, where the machine's peer
        was predicted with it: Q, K and V once. The model itself takes the output for read too."""
        if not self.machine.counts_first_reads or case.pattern not in ("full", "causal"):
            return {}
        tile = self.small_call(case.dtype, case.head_dim, case.pattern)[0]
        share = share_of_first_reads(case, tile["block_m"], tile["block_n"])
        return {"CUDASIM_TIMING_MISS": f"{share:.4f}"}

    def sampled(self, case: Case, **settings: str) -> tuple[dict, list[dict]]:
        """The whole problem, of which only the replayed blocks run."""
        return self.timed(self.arguments(case), case, CUDASIM_TIMING_SAMPLE="1", **settings)

    def timed(self, arguments, case: Case, **settings: str) -> tuple[dict, list[dict]]:
        blocks = self.blocks_per_sm(case.dtype, case.head_dim, case.pattern)
        replayed = {
            "CUDASIM_TIMING_OCCUPANCY": str(blocks),
            "CUDASIM_TIMING_CTAS": str(self.rounds * blocks),
            **self.first_reads(case),
        }
        return self.run(arguments, **(replayed | settings))

    @staticmethod
    def arguments(case: Case, batch: int = 0, heads: int = 0) -> tuple[str, ...]:
        options = {
            "dtype": case.dtype,
            "batch": batch or case.batch,
            "heads": heads or case.heads,
            "seqlen": case.seqlen,
            "head-dim": case.head_dim,
            "pattern": case.pattern,
        }
        return tuple(word for name, x in options.items() for word in (f"--{name}", str(x)))


def share_of_first_reads(case: Case, block_m: int, block_n: int) -> float:
    blocks = -(-case.seqlen // block_m)
    seen = (
        min(case.seqlen, (i + 1) * block_m) if case.pattern == "causal" else case.seqlen
        for i in range(blocks)
    )
    loaded = sum(block_m + 2 * -(-keys // block_n) * block_n for keys in seen)
    return min(1.0, (blocks * block_m + 2 * case.seqlen) / loaded)


def parse_report(text: str) -> list[dict]:
    return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("JSON ")]


def attention(launches: list[dict]) -> dict:
    """The launch of the attention kernel."""
    (launch,) = (x for x in launches if ATTENTION in x["kernel"])
    return launch


@functools.cache
def budgets(harness: pathlib.Path) -> dict[str, int]:
    """Blocks per SM of each kernel, by its readable name: ptxas gives a thread no more registers
    than that leaves."""
    entries = ENTRY.findall(harness.read_bytes())
    named = {name.decode(): BUDGETED.search(limits) for name, limits in entries}
    names = sorted(name for name, found in named.items() if found)
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return {
        readable: int(named[name][1])
        for name, readable in zip(names, run.stdout.splitlines(), strict=True)
    }


def predict(runner: Runner, case: Case) -> dict[str, Any]:
    if case.pattern in DENSE:
        return predict_dense(runner, case)
    printed, launches = runner.sampled(case)
    row = describe(case, printed, launches)
    if case.pattern == "bias":
        row["predicted_ratio_to_no_mask"] = row["predicted_us"] / full_us(runner, case)
    return row


def describe(case: Case, printed: dict, launches: list[dict]) -> dict[str, Any]:
    kernel = attention(launches)
    us = sum(x["us"] for x in launches)
    return {
        "case": str(case),
        "kernel": printed["kernel"],
        "block_m": printed["block_m"],
        "block_n": printed["block_n"],
        "num_splits": printed["num_splits"],
        "blocks_per_sm": kernel["occupancy"],
        "predicted_us": round(us, 2),
        "predicted_tflops": round(case.nominal_flop / us * 1e-6, 1),
        "predicted_clocks_per_iteration": kernel["iteration_clk"],
        "predicted_use": kernel["use"],
        "predicted_bound": kernel["bound"],
    }


def full_us(runner: Runner, case: Case) -> float:
    return sampled_us(runner, dataclasses.replace(case, pattern="full"))


def sampled_us(runner: Runner, case: Case) -> float:
    return sum(x["us"] for x in runner.sampled(case)[1])


def predict_dense(runner: Runner, case: Case) -> dict[str, Any]:
    """The kernel's ratio to one without a dense mask from a slice of the machine whose blocks all
    run, the pre-pass from the whole problem. The sum counts the overhead of both launches."""
    machine = runner.machine
    sms = machine.sms // SLICE
    sliced = {
        "CUDASIM_SMS": str(sms),
        "CUDASIM_TIMING_SMS": str(sms),
        "CUDASIM_TIMING_HBM_TBS": str(machine.hbm_tbs * sms / machine.sms),
        "PFA_NUM_SPLITS": "1",
    }
    heads = case.batch * case.heads // SLICE
    printed, dense = runner.timed(runner.arguments(case, 1, heads), case, **sliced)
    other = dataclasses.replace(case, pattern=DENSE[case.pattern])
    arguments = runner.arguments(other, 1, heads)
    _, base = runner.timed(arguments, other, CUDASIM_TIMING_SAMPLE="1", **sliced)
    launches = runner.sampled(case, CUDASIM_TIMING_OCCUPANCY="0")[1]
    pre_pass = sum(x["us"] for x in launches if ATTENTION not in x["kernel"])
    ratio = attention(dense)["clk"] / attention(base)["clk"]
    us = ratio * sampled_us(runner, other)
    full = full_us(runner, case)
    row = describe(case, printed, dense)
    return row | {
        "predicted_us": round(us + pre_pass, 2),
        "predicted_tflops": None,  # what counts as work is a matter of taste
        "predicted_kernel_ratio_to_no_mask": round(us / full, 4),
        "predicted_pre_pass_us": round(pre_pass, 2),
        "predicted_ratio_to_no_mask": round((us + pre_pass) / full, 4),
    }


def cost(case: Case) -> float:
    """About seconds, alone on a core: what is replayed, or all blocks of a slice."""
    share = {"causal": 0.5, "causal-mask": 0.55, "blocks": 0.2}.get(case.pattern, 1.0)
    if case.pattern in DENSE:
        return 3.0 + 14.0 * share
    return 0.4 + share * case.seqlen * (64 + case.head_dim) * 2.5e-6


def constants(simulator: pathlib.Path, cc: int) -> dict[str, Any]:
    """Those of the model that its sources set, and those that the environment overrides."""
    header = (simulator / "src" / "timing_model.h").read_text()
    source = (simulator / "src" / "timing_model.cpp").read_text()
    body = re.search(r"struct Params \{(.*?)\n\};", header, re.S)
    values = re.findall(r"\b(\w+) = (-?[\d.]+)", body[1] if body else "")
    of_device = re.search(rf"if \(cc == {cc}\) \{{(.*?)\n  \}}", source, re.S)
    values += re.findall(r"g_params\.(\w+) = ([\d.]+)", of_device[1] if of_device else "")
    prefix = "CUDASIM_TIMING_"
    values += [(k[len(prefix) :].lower(), v) for k, v in os.environ.items() if k.startswith(prefix)]
    return {
        "sources_sha256": hashlib.sha256((header + source).encode()).hexdigest()[:16],
        **{name: float(value) for name, value in values if name not in SET_FOR_EACH_RUN},
    }


def run_all(
    runner: Runner, cases: list[Case], targets: list[Target], jobs: int, console: Console
) -> dict[int, dict[Case, dict]]:
    """Rows by rounds and case: all cases, and those of the targets with fewer and more rounds."""
    runners = {rounds: dataclasses.replace(runner, rounds=rounds) for rounds in spread(runner)}
    runners[runner.rounds] = runner
    of_targets = list(dict.fromkeys(case for target in targets for case in target.cases))
    work = [(runner.rounds, case) for case in cases]
    work += [(rounds, case) for rounds in spread(runner) for case in of_targets]

    def seconds(item: tuple[int, Case]) -> float:
        return cost(item[1]) * item[0] / ROUNDS

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    rows: dict[int, dict[Case, dict]] = {rounds: {} for rounds in runners}
    with (
        Progress(*columns, console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("predicting", total=sum(map(seconds, work)))
        dearest_first = sorted(work, key=seconds, reverse=True)
        started = {pool.submit(predict, runners[item[0]], item[1]): item for item in dearest_first}
        for future in concurrent.futures.as_completed(started):
            rounds, case = item = started[future]
            try:
                rows[rounds][case] = future.result()
            except Exception:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            progress.update(task, advance=seconds(item), description=str(case))
    return rows


def spread(runner: Runner) -> tuple[int, int]:
    """Other numbers of rounds that the targets' cases are predicted with."""
    return max(1, runner.rounds // 2), 2 * runner.rounds


def judge(targets: list[Target], rows: dict[int, dict[Case, dict]], rounds: int) -> list[dict]:
    """A verdict at `rounds`, beside the values at the others: where those disagree it is noise."""
    judged = []
    for target in targets:
        values = {
            n: round(target.value(*(of[case] for case in target.cases)), 3)
            for n, of in sorted(rows.items())
        }
        judged.append(
            {
                "target": target.name,
                "at_most" if target.at_most else "at_least": target.bound,
                "predicted": values[rounds],
                "predicted_by_rounds": values,
                "met_by_prediction": target.is_met(values[rounds]),
                "met_with_all_rounds": all(map(target.is_met, values.values())),
            }
        )
    return judged


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulator", type=pathlib.Path, default=ROOT / "build" / "cudasim")
    parser.add_argument(
        "--harness", type=pathlib.Path, default=ROOT / "build" / "predict" / "attention"
    )
    parser.add_argument("--machine", choices=MACHINES, default="sm80")
    parser.add_argument("--filter", default="", help="only cases whose name has this")
    parser.add_argument("--rounds", type=int, help="blocks replayed, per slot")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=pathlib.Path, help="JSON; with --filter none is written")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    machine = MACHINES[options.machine]
    cases = [case for case in machine.cases if options.filter in str(case)]
    if not cases:
        sys.exit(f"--filter must be part of a case such as {machine.cases[0]}")
    rounds = options.rounds or machine.rounds
    runner = Runner(options.simulator / "build", options.harness, machine, rounds)
    try:
        targets = [target for target in machine.targets if set(target.cases) <= set(cases)]
        predicted = run_all(runner, cases, targets, options.jobs, console)
    except Failure as error:
        sys.exit(str(error))
    result = {
        "note": "predicted by a simulator's timing model; nothing here was measured on a GPU",
        "predicted_machine": machine.label,
        **revision(),
        "predicted_with": constants(options.simulator, machine.cc) | {"rounds": rounds},
        "predicted_rows": [predicted[rounds][case] for case in cases],
        "predicted_targets": judge(targets, predicted, rounds),
    }
    show(result, machine, console)
    out = options.out
    if out is None and not options.filter:
        out = ROOT / "benchmarks" / "results" / f"predicted-{options.machine}.json"
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written: {out}")
    if options.check and not all(x["met_by_prediction"] for x in result["predicted_targets"]):
        sys.exit("a target is missed")


if __name__ == "__main__":
    main()
