# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and which tests run.

    pytest                                the CPU kernels, and the CUDA kernels if there is a GPU
    pytest --backend cuda                 the cases of all tests on the GPU
    CUDASIM=<folder> pytest --backend sim the same in the simulator (backends.py), thinned

Tests marked slow run only when asked for (-m slow).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

# Before torch loads OpenMP: threads that wait asleep make these many small calls 7 times faster
# where another process wants the same cores (61 s to 8 s on 2 cores), and no slower elsewhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import backends
import pytest
import torch
from hypothesis import settings

# Derandomised: a run that passed passes again. deadline would time the machine, not the code.
settings.register_profile("pfa", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("pfa")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=backends.NAMES,
        default=os.environ.get("PFA_TEST_BACKEND", "cpu"),
        help="what the tests of the operator run on (or PFA_TEST_BACKEND)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: tests what only the CPU kernels have")
    try:
        backends.select(config.option.backend)
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header() -> str:
    return f"pfa backend: {backends.current().name}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = set()
    if not config.option.markexpr and not any("::" in arg for arg in config.args):
        unwanted = {item for item in items if item.get_closest_marker("slow")}
    if config.option.backend != "cpu":
        unwanted |= {item for item in items if not _runs_elsewhere(item)}
    config.hook.pytest_deselected(items=[item for item in items if item in unwanted])
    items[:] = [item for item in items if item not in unwanted]


def _runs_elsewhere(item: pytest.Item) -> bool:
    """Is it a test of kernels, and not of the CPU's alone?"""
    fixtures = getattr(item, "fixturenames", ())
    takes = "forward" in fixtures or "on_cuda" in fixtures
    return takes and item.get_closest_marker("cpu") is None


@pytest.fixture(scope="session")
def forward() -> Callable[..., torch.Tensor]:
    """The operator on the backend under test, with CPU tensors. It has overloads as attributes."""
    return backends.current().operator()


@pytest.fixture(scope="session")
def forward_lse(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The same of torch.ops.pfa.forward_lse, which returns (out, softmax_lse)."""
    return backends.current().operator_lse()


@pytest.fixture(scope="session")
def on_cuda() -> backends.Backend:
    """The CUDA kernels whatever the backend under test, in the simulator or on a GPU."""
    backend = backends.with_cuda()
    if backend is None:
        pytest.skip("needs a GPU and a library with CUDA kernels, or --backend sim")
    return backend


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of an integration that reached the operator."""
    import pfa
    from pfa.integrations import _sdpa

    seen: list[dict[str, Any]] = []

    def spy(*tensors: torch.Tensor, **arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        return pfa.prompt_flash_attention(*tensors, **arguments)

    monkeypatch.setattr(_sdpa, "prompt_flash_attention", spy)
    return seen


@pytest.fixture(autouse=True)
def _no_warnings_of_the_simulator(request: pytest.FixtureRequest) -> Iterator[None]:
    if backends.current().name != "sim":
        yield
        return
    output = request.getfixturevalue("capfd")
    yield
    text = output.readouterr().err
    assert "cudasim" not in text, text


@pytest.fixture(scope="module")
def one_split() -> Iterator[None]:
    """A row's bits then do not depend on the rest of the call."""
    with backends.environment(PFA_NUM_SPLITS="1"):
        yield


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
