# SPDX-License-Identifier: Apache-2.0
"""predict.py and build_harness.py, without a simulator."""

from __future__ import annotations

import io
import json
import pathlib
import re

import build_harness
import predict
import pytest
from predict_report import show
from predictions import MACHINES
from rich.console import Console

from benchmarks.cases import Case

# Takes the place of the harness. Sampling a mask's pre-pass would leave the mask incomplete.
HARNESS = """#!/usr/bin/env python3
import json, os, sys
entry = '''.entry _Z14forward_kernel1T(
.param .b8 p[8]
)
.maxntid 128, 1, 1
.minnctapersm 3
{'''
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
env = os.environ
dense, tiny = options["--pattern"] == "random", options["--seqlen"] == "64"
sliced = "CUDASIM_SMS" in env
slow = {"full": 1, "causal": 0.5, "bias": 1.1, "random": 1.2}[options["--pattern"]]
many = env.get("CUDASIM_TIMING_CTAS") == "24"  # of 8 rounds
slow += 0.1 * (many and options["--pattern"] == "bias")
launch = {"kernel": "forward_kernel(T)", "us": 1000 * slow, "clk": 1e6 * slow, "iteration_clk": 9,
          "use": {}, "bound": "", "occupancy": int(env.get("CUDASIM_TIMING_OCCUPANCY", 0))}
assert tiny or dense and (sliced or launch["occupancy"] == 0) or launch["occupancy"] == 3
assert not (dense and sliced and "CUDASIM_TIMING_SAMPLE" in env)
lines = [launch] + [launch | {"kernel": "pack_kernel(T)", "us": 20.0}] * dense
with open(env["CUDASIM_TIMING"], "w") as file:
    file.writelines(f"== text\\nJSON {json.dumps(x)}\\n" for x in lines)
print(json.dumps({"kernel": "k", "block_m": 64, "block_n": 64, "num_splits": 1}))
"""


@pytest.fixture
def runner(tmp_path: pathlib.Path) -> predict.Runner:
    harness = tmp_path / "harness"
    harness.write_text(HARNESS)
    harness.chmod(0o755)
    return predict.Runner(tmp_path, harness, MACHINES["sm80"])


def test_nominal_flop() -> None:
    full = Case("fp16", 128, "full", 8192)
    assert (full.batch, full.heads) == (2, 16)
    assert full.nominal_flop == 4 * 2 * 16 * 8192**2 * 128
    assert Case("fp16", 128, "causal", 8192).nominal_flop == full.nominal_flop / 2


def test_speed(runner: predict.Runner) -> None:
    row = predict.predict(runner, Case("fp16", 128, "full", 8192))
    assert row["blocks_per_sm"] == 3
    assert row["predicted_us"] == 1000
    assert row["predicted_tflops"] == pytest.approx(1099.5, abs=0.1)


def test_ratios(runner: predict.Runner) -> None:
    bias = predict.predict(runner, Case("fp16", 128, "bias", 2048))
    assert bias["predicted_ratio_to_no_mask"] == pytest.approx(1.1)
    dense = predict.predict(runner, Case("fp16", 128, "random", 2048))
    assert dense["predicted_kernel_ratio_to_no_mask"] == 1.2
    assert dense["predicted_pre_pass_us"] == 20
    assert dense["predicted_ratio_to_no_mask"] == pytest.approx(1.22)


def test_first_reads() -> None:
    """Two blocks of 128 rows and two tiles of 128 keys; with a causal mask the first sees one."""
    assert predict.share_of_first_reads(Case("fp16", 128, "full", 256), 128, 128) == 0.6
    assert predict.share_of_first_reads(Case("fp16", 128, "causal", 256), 128, 128) == 0.75


def test_a_failure_says_what_failed(runner: predict.Runner) -> None:
    with pytest.raises(predict.Failure, match="(?s)--pattern none failed: .*KeyError"):
        predict.predict(runner, Case("fp16", 128, "none", 2048))


def test_all_cases_and_targets(runner: predict.Runner) -> None:
    machine = MACHINES["sm80"]
    assert len(set(machine.cases)) == len(machine.cases)
    console = Console(file=io.StringIO(), width=120)
    wanted = [c for c in machine.cases if c.head_dim == 128 and c.seqlen in (2048, 8192)]
    wanted = [c for c in wanted if c.pattern not in ("causal-mask", "blocks")]
    targets = [t for t in machine.targets if set(t.cases) <= set(wanted)]
    rows = predict.run_all(runner, wanted, targets, 2, console)
    assert set(rows[predict.ROUNDS]) == set(wanted)
    judged = {x["target"]: x for x in predict.judge(targets, rows, predict.ROUNDS)}
    full = judged["fp16 D128 full 8192: TFLOP/s"]
    assert full["met_by_prediction"] and full["met_with_all_rounds"]
    assert list(full["predicted_by_rounds"]) == [2, 4, 8]
    assert not judged["int8 D128 full 8192: speed / fp16"]["met_by_prediction"]
    assert not judged["fp16 D128 random 2048: time / no mask"]["met_by_prediction"]
    bias = judged["fp16 D128 bias 2048: time / no mask"]
    assert bias["met_by_prediction"] and not bias["met_with_all_rounds"]
    result = {
        "note": "note",
        "predicted_rows": list(rows[predict.ROUNDS].values()),
        "predicted_targets": list(judged.values()),
    }
    console = Console(record=True, width=120, file=io.StringIO())
    show(result, machine, console)
    text = console.export_text()
    assert re.search(r"fp16 D128 full +64x64 x3 +\d+ +1100", text)
    assert re.search(r"random 2048 +1.200 +20.0 +1.220", text)
    assert text.count("MISSED") == 2 and text.count("within the noise") == 1


def test_every_target_has_its_case() -> None:
    for machine in MACHINES.values():
        assert {case for target in machine.targets for case in target.cases} <= set(machine.cases)


def test_constants(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "timing_model.h").write_text(
        "struct Params {\n  double sms = 132, steal = 0.54;  // a = b\n};\n"
    )
    (tmp_path / "src" / "timing_model.cpp").write_text(
        "if (cc == 80) {\n    g_params.sms = 108;\n  }\n  g_params.steal = 7;"
    )
    monkeypatch.setenv("CUDASIM_TIMING_DRAG", "2")
    found = predict.constants(tmp_path, 80)
    assert {name: found[name] for name in ("sms", "steal", "drag")} == {
        "sms": 108,
        "steal": 0.54,
        "drag": 2,
    }
    assert predict.constants(tmp_path, 90)["sms"] == 132


def test_predictions_cannot_be_taken_for_measurements() -> None:
    """In the file that is kept: what is not an input says that it is predicted."""
    inputs = {"case", "kernel", "block_m", "block_n", "num_splits", "blocks_per_sm"}
    for path in (build_harness.ROOT / "benchmarks" / "results").glob("predicted-*.json"):
        result = json.loads(path.read_text())
        assert set(result) >= {"sha", "dirty"}
        assert all(x.startswith("predicted") for x in set(result) - {"sha", "dirty", "note"})
        for row in result["predicted_rows"]:
            assert all(name.startswith("predicted_") for name in set(row) - inputs)


def test_objects_of_the_harness() -> None:
    ninja = "build /b/csrc/cuda/a.o: cuda_compile /a.cu\nbuild /b/csrc/ops/c.o: compile /c.cpp\n"
    assert build_harness.cuda_objects(ninja) == ["/b/csrc/cuda/a.o"]


@pytest.mark.parametrize(("flags", "runtime"), [("code=sm_80", "_static"), ("code=compute_80", "")])
def test_runtime_of_the_harness(tmp_path, flags, runtime) -> None:
    (tmp_path / "temp").mkdir()
    (tmp_path / "temp" / "build.ninja").write_text(f"cuda_post_cflags = {flags}\n")
    try:
        words = build_harness.command(tmp_path, tmp_path / "out")
    except SystemExit:
        pytest.skip("needs a CUDA toolkit")
    assert f"-lcudart{runtime}" in words
