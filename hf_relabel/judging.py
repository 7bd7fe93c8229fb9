"""Judging: a stream of rows or questions through a cascade, so many at a time, to its end.

Live, each of them is asked at once; through the Batch API they wait in the same window until their
batch has ended. Either way the first error ends the stream, after what is in flight: it is paid for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Generic, TypeAlias, TypeVar

from hf_relabel.cache import VerdictCache
from hf_relabel.cascade import Cascade
from hf_relabel.errors import AccountError
from hf_relabel.judges.batches import Batches, BatchSettings
from hf_relabel.judges.money import Prices

__all__ = ["READ_BATCH", "Progress", "Work", "judge_in_batches", "judge_live"]

T = TypeVar("T")

READ_BATCH = 100
"""Rows read at a time while judging: few, so that memory stays flat."""

_MAX_ROWS_AHEAD = 512

Work: TypeAlias = Callable[[Cascade, T], Awaitable[object]]
"""What is done with one item, by the cascade that it is given."""

Watch: TypeAlias = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        n_rows: Rows judged so far; queries, where several rows share one.
        n_calls: Calls made, by this process.
        n_cached: Calls answered from the cache.
        prompt_tokens: Of the calls made, where the server counted them.
        completion_tokens: Likewise.
        elapsed_s: Since the run began.
        cost_usd: Of the calls made; None while no cost is known, or not every price is.
    """

    n_rows: int
    n_calls: int
    n_cached: int
    prompt_tokens: int
    completion_tokens: int
    elapsed_s: float
    cost_usd: float | None = None


async def judge_live(
    items: Iterator[T],
    work: Work[T],
    *,
    cascade: Cascade,
    progress: Watch | None = None,
    max_ahead: int = _MAX_ROWS_AHEAD,
) -> Progress:
    """Work on a stream of items, `max_ahead` of them at a time.

    Args:
        items: Of any number; each is read when there is room for it.
        work: What is done with each.
        cascade: Whose calls are counted, and who is told to stop after an error.
        progress: Called after each item.
        max_ahead: How many items are under way at most.

    Returns:
        The totals.
    """
    window = _Window(partial(work, cascade), max_ahead, on_stop=cascade.stop)
    started, before = time.monotonic(), replace(cascade.counts)

    def snapshot() -> Progress:
        counts = cascade.counts.since(before)
        return Progress(
            n_rows=window.n_done,
            n_calls=counts.n_calls,
            n_cached=counts.n_cached,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            elapsed_s=time.monotonic() - started,
            cost_usd=counts.cost_usd,
        )

    if progress is not None:
        window.on_done = lambda: progress(snapshot())
    await window.run(items)
    return snapshot()


async def judge_in_batches(
    items: Iterator[T],
    work: Work[T],
    *,
    cascade: Cascade,
    settings: BatchSettings,
    cache: VerdictCache,
    prices: Prices,
    progress: Watch | None = None,
) -> Progress:
    """Work on a stream of items by a cascade whose chat judges ask through the Batch API.

    Args:
        items: As `judge_live` takes them.
        work: Likewise; it is given the cascade of batches.
        cascade: Whose judges ask, and whose calls are counted.
        settings: Of the batches.
        cache: Where replies go, and what batches are under way.
        prices: For the cost in `progress`.
        progress: As for `judge_live`.
    """
    async with Batches(settings, cache) as batches:
        by_batch = _asking(batches, cascade, prices)

        async def stopping(cascade: Cascade, item: T) -> None:
            try:
                await work(cascade, item)
            except BaseException as error:  # the others would wait for their batches first
                batches.stop(error)
                raise

        watched = _stopping(items, asyncio.get_running_loop(), batches.stop)
        stream = asyncio.create_task(
            judge_live(
                watched,
                stopping,
                cascade=by_batch,
                progress=progress,
                max_ahead=settings.max_rows,
            )
        )
        try:
            return await asyncio.shield(stream)
        except asyncio.CancelledError:  # Ctrl-C: rows stop waiting; batches go on
            batches.stop(AccountError("the run was interrupted.", reason="interrupted"))
            await asyncio.wait([stream])
            stream.exception()
            raise


def _asking(batches: Batches, cascade: Cascade, prices: Prices) -> Cascade:
    """Return a cascade that asks through batches, and counts where the given one does."""
    twin = copy(cascade)
    twin.start_run(prices=prices)
    twin.counts = cascade.counts
    twin.stages = tuple(
        replace(stage, judge=batches.judge(stage.judge)) for stage in cascade.stages
    )
    return twin


def _stopping(
    items: Iterator[T], loop: asyncio.AbstractEventLoop, stop: Callable[[BaseException], None]
) -> Iterator[T]:
    """Pass items on; one that cannot be read stops those under way."""
    try:
        yield from items
    except Exception as error:
        loop.call_soon_threadsafe(stop, error)
        raise


class _Window(Generic[T]):
    """Runs a coroutine for each item of a stream, so many at a time, without a barrier."""

    def __init__(
        self,
        work: Callable[[T], Awaitable[object]],
        size: int,
        *,
        on_stop: Callable[[], None],
    ) -> None:
        self.n_done = 0
        self._on_stop = on_stop
        self.on_done: Callable[[], None] = lambda: None
        self._work = work
        self._slots = asyncio.Semaphore(size)
        self._running: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def run(self, items: Iterator[T]) -> None:
        """Work on all items; after an error or an interrupt, end what runs, then raise."""
        try:
            while self._error is None and (batch := await asyncio.to_thread(_take, items)):
                for item in batch:
                    await self._start(item)
        except BaseException as error:
            self._stop(error)
        while self._running:
            # Never cancelled: what is in flight is paid for, and its reply goes to the cache.
            try:
                await asyncio.wait(self._running)
            except asyncio.CancelledError as error:  # Ctrl-C, when all rows were started already
                self._stop(error)
        if self._error is not None:
            raise self._error

    def _stop(self, error: BaseException) -> None:
        self._error = self._error or error
        self._on_stop()

    async def _start(self, item: T) -> None:
        await self._slots.acquire()
        if self._error is not None:
            return
        task = asyncio.create_task(self._do(item))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _do(self, item: T) -> None:
        try:
            await self._work(item)
        except BaseException as error:  # kept for `run`, which raises it when all has ended
            self._error = self._error or error
        else:
            self.n_done += 1
            self.on_done()
        finally:
            self._slots.release()


def _take(items: Iterator[T]) -> list[T]:
    return list(islice(items, READ_BATCH))
