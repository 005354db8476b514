# SPDX-License-Identifier: Apache-2.0
"""What becomes of the results of benchmarks/: schema, comparison, documents."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
from benchmark_rows import case, make_result, timed_row

from benchmarks import compare, report, results

HERE = pathlib.Path(__file__).parent.parent
CASES = [case(seqlen=s) for s in (32, 64, 96, 128)]


def run_of(*pfa: float, flash: float = 5.0) -> dict[str, Any]:
    pairs = zip(CASES, pfa, strict=True)
    return make_result([timed_row(c, pfa=x, flash=flash) for c, x in pairs])


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [x["verdict"] for x in compare.changes(before, after)["rows"]]


def test_compare_flags_a_change_and_not_noise() -> None:
    before = run_of(1.0, 1.0, 1.0, 1.0)
    assert verdicts(before, before) == ["same"] * 4
    after = run_of(1.01, 1.1, 0.9, 0.99)
    assert verdicts(before, after) == ["same", "slower", "faster", "same"]
    # The machine itself became slower: the peer, whose version is the same, shows it.
    after = run_of(1.01, 1.1, 1.3, 0.95, flash=5.6)
    assert verdicts(before, after) == ["same", "same", "slower", "same"]
    # The case itself was noisy.
    after = run_of(1.0, 1.1, 1.0, 1.0)
    after["rows"][1]["peers"]["pfa"]["noise"] = 0.12
    assert verdicts(before, after) == ["same"] * 4
    # A peer of another version says nothing of the machine.
    after = run_of(1.0, 1.1, 1.0, 1.0, flash=5.6)
    after["peers"]["found"]["sdpa-flash"] = "3"
    assert verdicts(before, after)[1] == "slower"


def compared(tmp_path: pathlib.Path, before: Any, after: Any) -> Any:
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path, result in zip(paths, (before, after), strict=True):
        path.write_text(result if isinstance(result, str) else json.dumps(result))
    with pytest.raises(SystemExit) as ended:
        compare.main([str(path) for path in paths])
    return ended.value.code


def test_compare_as_a_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run_of(1.0, 1.0, 1.0, 1.0)
    assert compared(tmp_path, before, before) == 0
    assert compared(tmp_path, before, run_of(1.0, 1.2, 1.0, 1.0)) == 1
    assert "4 cases: 1 slower, 0 faster" in capsys.readouterr().out
    other = run_of(1.0, 1.0, 1.0, 1.0)
    other["environment"]["cpu"] = "D"
    assert compared(tmp_path, before, other) == "cpu must be the same in both runs, got C and D"
    assert "cannot be read as JSON" in compared(tmp_path, before, "{")
    assert "no case in common" in compared(tmp_path, before, make_result([]))


def test_schema() -> None:
    good = run_of(1.0, 1.0, 1.0, 1.0)
    assert results.problems_of(good) == ""
    assert results.problems_of([]) == "it holds no object"
    assert "schema must be 2" in results.problems_of(good | {"schema": 1})
    assert "rows must be list, got NoneType" in results.problems_of(good | {"rows": None})
    lacking = {k: v for k, v in good["rows"][0].items() if k != "seqlen"}
    assert "has no seqlen" in results.problems_of(good | {"rows": [lacking]})
    for entry in ({"status": "ok"}, {"status": "wrong"}):
        row = good["rows"][0] | {"peers": {"x": entry}}
        assert "x" in results.problems_of(good | {"rows": [row]})


def test_published_results_are_of_this_schema() -> None:
    paths = [x for x in results.FOLDER.glob("*.json") if x.name.startswith(("cpu-", "gpu-"))]
    assert paths
    for path in paths:
        results.read(path)


def test_documents_are_what_the_results_give() -> None:
    for name in report.DOCUMENTS:
        text = (HERE / name).read_text()
        assert report.fill(text) == text, f"{name}: run python -m benchmarks report"
    assert "<!-- begin" in (HERE / "docs" / "performance.md").read_text()


def test_the_two_readmes_have_the_same_figures() -> None:
    english, chinese = ((HERE / x).read_text() for x in ("README.md", "README.zh-CN.md"))
    figures = re.compile(r"\d+(?:\.\d+)?x\b")
    assert set(figures.findall(chinese)) == set(figures.findall(english))


def test_report_refuses_what_it_does_not_know() -> None:
    with pytest.raises(results.Invalid, match="a place must be of"):
        report.fill("<!-- begin nothing x.json -->\n<!-- end -->")


def test_a_result_that_is_not_there_is_pending(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    place = "<!-- begin launch none.json -->\n<!-- end -->"
    assert "Pending: `benchmarks/results/none.json` is not there yet." in report.fill(place)
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(results.Invalid, match="cannot be read"):
        report.fill(place)
    made = run_of(1.0, 1.0, 1.0, 1.0)
    made["launch"] = [{"case": "a call", "us": 7.25, "empty_us": 5.0}, {"case": "b", "us": 1.0}]
    (tmp_path / "none.json").write_text(json.dumps(made))
    filled = report.fill(place)
    assert "| a call | 7.2 | 5.0 | 2.2 |" in filled and "| b | 1.0 |  |  |" in filled
    assert "Pending" not in filled
    assert report.fill(filled) == filled


def test_report_of_a_repetition() -> None:
    text = report.spread(run_of(1.0, 1.0, 1.0, 1.0), run_of(1.0, 1.01, 1.02, 1.2))
    assert "by 1.5 % (median of 4 cases) and by 20.0 % at most" in text
    assert "calls 1 of them changed" in text
