"""Judging over HTTP: one process, 256 calls in flight, against bare aiohttp and the openai client."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from datasets import Dataset

from hf_relabel import ChatJudge, Endpoint, Relabeler
from hf_relabel.judges.limits import Ceilings
from hf_relabel.questions import Question
from tests.benchmarks import Ratio, medians
from tests.benchmarks.rows import bench_rows
from tests.benchmarks.server import chat_server

N_ROWS = 10_000
IN_FLIGHT = 256
LATENCY_S = 0.2


def measure() -> Iterator[Ratio]:
    """Judge the same number of rows three ways, in turns.

    What is held to a bound is the rate that is sustained: one run before them, not counted, imports
    the clients and finds the server's limit, from 20 calls in flight to 256 in four round trips.
    """
    rows = Dataset.from_generator(bench_rows, gen_kwargs={"n_rows": N_ROWS})
    with chat_server(LATENCY_S) as base_url:
        bodies = _bodies(base_url, rows)
        first = _relabeler_rate(base_url, rows)
        ours, bare, plain = medians(
            [
                lambda: _relabeler_rate(base_url, rows),
                lambda: asyncio.run(_rate(bodies, _bare_sender(base_url))),
                lambda: asyncio.run(_rate(bodies, _openai_sender(base_url))),
            ]
        )
    note = (
        f"{N_ROWS} rows of 15 passages x 100 words, {IN_FLIGHT} in flight, {LATENCY_S} s a call; "
        f"{first:,.0f} rows/s in the first run, which imports and starts slowly."
    )
    yield Ratio(
        name="judge / bare aiohttp", ours=ours, peer=bare, unit="rows/s", bound=">= 0.9", n_runs=3,
        note=note + " Ours builds prompts, parses, and writes the cache.",
    )  # fmt: skip
    yield Ratio(
        name="judge / openai client", ours=ours, peer=plain, unit="rows/s", bound=">= 1.0",
        n_runs=3, note=note,
    )  # fmt: skip


def _judge(base_url: str) -> ChatJudge:
    endpoint = Endpoint(base_url=base_url)
    ceilings = Ceilings(max_concurrency=IN_FLIGHT)
    return ChatJudge("bench", endpoint=endpoint, api_key="x", ceilings=ceilings)


def _relabeler_rate(base_url: str, rows: Dataset) -> float:
    with tempfile.TemporaryDirectory() as folder:
        relabeler = Relabeler(_judge(base_url), cache=Path(folder))
        started = time.perf_counter()
        done = relabeler.judge(rows)
        seconds = time.perf_counter() - started
        relabeler.cache.close()
    if done.n_calls != N_ROWS:
        raise RuntimeError(f"expected {N_ROWS} calls, made {done.n_calls}")
    return N_ROWS / seconds


def _bodies(base_url: str, rows: Dataset) -> list[bytes]:
    judge = _judge(base_url)
    bodies = []
    for row in rows:
        passages = tuple(passage["text"] for passage in row["negative_passages"])
        question = Question(query=row["query"], passages=passages, positives=("positive",))
        bodies.append(json.dumps(judge.body(question)).encode())
    return bodies


async def _rate(
    bodies: list[bytes], open_sender: Callable[[], Awaitable[tuple[Any, Any]]]
) -> float:
    send, close = await open_sender()
    waiting = iter(bodies)
    started = time.perf_counter()

    async def work() -> None:
        for body in waiting:
            await send(body)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - started
    await close()
    return len(bodies) / seconds


def _bare_sender(base_url: str) -> Callable[[], Awaitable[tuple[Any, Any]]]:
    async def open_sender() -> tuple[Any, Any]:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        headers = {"Authorization": "Bearer x", "Content-Type": "application/json"}

        async def send(body: bytes) -> None:
            url = f"{base_url}/chat/completions"
            async with session.post(url, data=body, headers=headers) as response:
                json.loads(await response.read())

        return send, session.close

    return open_sender


def _openai_sender(base_url: str) -> Callable[[], Awaitable[tuple[Any, Any]]]:
    async def open_sender() -> tuple[Any, Any]:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0)

        async def send(body: bytes) -> None:
            await client.chat.completions.create(**json.loads(body))

        return send, client.close

    return open_sender
