# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and the rule that tests marked slow run only when asked for (-m slow)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Before torch loads OpenMP: threads that wait asleep make these many small calls 7 times faster
# where another process wants the same cores (61 s to 8 s on 2 cores), and no slower elsewhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# Derandomised: a run that passed passes again. deadline would time the machine, not the code.
settings.register_profile("pfa", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("pfa")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


@pytest.fixture(scope="session")
def forward() -> Callable[..., torch.Tensor]:
    """The operator. Importing pfa here leaves the tests of the reference runnable without it."""
    import pfa  # noqa: F401

    return torch.ops.pfa.forward


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """torch.empty returns NaN (of integers, the largest value), as dirty memory may."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
