# SPDX-License-Identifier: Apache-2.0
"""pfa.distributed on gloo processes of this machine: ranks.py runs in each, once per world size."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
import ranks
import torch
from compare import check_error, check_form, check_special, prepared
from test_lse import check_lse

from pfa.distributed.plan import (
    Chunk,
    Rule,
    Shape,
    Work,
    chunks,
    make_plan,
    make_works,
)

WORLDS = (2, 4)
RUNS = ranks.runs()
IDS = [f"{case.id}-{strategy}-{order}" for case, strategy, order in RUNS]


@dataclass
class Ranks:
    outcomes: list[list[ranks.Outcome]]  # of each rank and run; rank 0 has the tensors
    texts: list[dict[str, str]]  # of each rank, by the name of the check
    codes: list[int]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda n: f"{n} ranks")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    script = pathlib.Path(ranks.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)}
    command = [sys.executable, str(script), str(request.param), str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]
    codes = [int(code) for code in done.stdout.split()]
    outcomes = [[ranks.Outcome(*outcome) for outcome in x[0]] for x in saved]
    return Ranks(outcomes, [x[1] for x in saved], codes)


@pytest.mark.parametrize("index", range(len(RUNS)), ids=IDS)
def test_equals_one_process(world: Ranks, index: int) -> None:
    case, strategy, _ = RUNS[index]
    size = len(world.outcomes)
    if strategy == "ulysses" and (case.kv_heads or case.heads) % size:
        pytest.skip("more ranks than key heads")
    for rank, outcomes in enumerate(world.outcomes):
        assert outcomes[index].text == "", f"rank {rank}"
    _, out, lse = world.outcomes[0][index]
    call, expected = prepared(case)
    o = check_form(out, call)
    check_special(o, expected)
    check_error(o, expected)
    check_lse(lse, call, expected)


@pytest.mark.parametrize("name", [check.__name__ for check in ranks.CHECKS])
def test_check(world: Ranks, name: str) -> None:
    size = len(world.texts)
    killed = name == "a_killed_rank_ends_in_errors"
    for rank in range(size - 1 if killed else size):
        assert world.texts[rank].get(name, "not run") == "", f"rank {rank} of {size}"
    if killed:
        assert world.codes == [0] * (size - 1) + [9]


def visible(rule: Rule, b: int, rows: int, keys: int) -> torch.Tensor:
    """(rows, keys) bool of the whole sequence, a dense mask left aside."""
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    anchor = rule.k_lens[b] - rule.q_lens[b] if rule.bottom_right else 0
    d = j - i - anchor
    return (d >= rule.lo) & (d <= rule.hi) & (i < rule.q_lens[b]) & (j < rule.k_lens[b])


RULES = {
    "none": Rule((48, 48), (96, 96)),
    "top left": Rule((48, 48), (96, 96), hi=0),
    "bottom right": Rule((48, 31), (96, 80), hi=0, bottom_right=True),
    "band": Rule((48, 5), (90, 96), lo=-9, hi=4, bottom_right=True),
    "ahead": Rule((48, 48), (96, 96), lo=20, hi=50),
    "lengths": Rule((48, 0), (17, 96)),
    "bias": Rule((48, 48), (96, 96), by_column=True),
}


def seen_by(work: Work, b: int) -> torch.Tensor:
    """(rows, keys) bool in one call: the masks of docs/semantics.md without a mask tensor."""
    rows, keys = work.rows[1] - work.rows[0], work.keys[1] - work.keys[0]
    q_len = rows if work.q_lens is None else work.q_lens[b - work.batch[0]]
    k_len = keys if work.k_lens is None else work.k_lens[b - work.batch[0]]
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    inside = (i < q_len) & (j < k_len)
    if work.sparse_mode == 0:
        return inside
    if work.sparse_mode == 2:
        return inside & (j <= i)
    assert work.sparse_mode == 4
    d = j - i - (k_len - q_len)
    return inside & (d >= -work.pre_tokens) & (d <= work.next_tokens)


def positions(parts: tuple[Chunk, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(c.start, c.start + c.size) for c in parts])


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_calls_cover_each_pair_once(rule: Rule, order: str) -> None:
    world, rows, keys = 4, 48, 96
    seen = torch.zeros(2, rows, keys, dtype=torch.int64)
    pairs = 0
    for rank in range(world):
        q = chunks(rows, world, rank, order)
        for source in range(world):
            k = chunks(keys, world, source, order)
            for work in make_works(rule, q, k):
                pairs += work.pairs
                at_k = positions(k)[slice(*work.keys)]
                assert not rule.by_column or at_k[0] == work.column
                for b in range(*work.batch):
                    seen[b, positions(q)[slice(*work.rows)][:, None], at_k] += seen_by(work, b)
    want = torch.stack([visible(rule, b, rows, keys) for b in range(2)])
    assert torch.equal(seen, want.long())
    assert pairs == want.sum()


def test_zigzag_shares_causal_work_evenly() -> None:
    """And contiguous shards do not: the last of 8 ranks has 15 times the work of the first."""
    shape = Shape(1, 32, 8, 1 << 17, 1 << 17, 128)
    rule = Rule((1 << 17,), (1 << 17,), hi=0)
    for order, ratio in (("zigzag", 1.0), ("contiguous", 15.0)):
        flops = [
            sum(step.flops for step in make_plan(shape, rule, 8, rank, "ring", order))
            for rank in range(8)
        ]
        assert sum(flops) == 4 * 32 * 128 * ((1 << 17) * ((1 << 17) + 1) // 2)
        assert max(flops) / min(flops) == pytest.approx(ratio, rel=1e-3)


def test_plans_of_causal_zigzag_merge_little() -> None:
    """A ring step has two chunks' worth of work in one call."""
    shape = Shape(1, 32, 8, 1 << 17, 1 << 17, 128)
    rule = Rule((1 << 17,), (1 << 17,), hi=0)
    for rank in range(8):
        ring = make_plan(shape, rule, 8, rank, "ring", "zigzag")
        assert [len(step.works) for step in ring] == [3] + [1] * 7
        gather = make_plan(shape, rule, 8, rank, "all_gather", "zigzag")
        assert not any(work.merges for step in gather for work in step.works)
