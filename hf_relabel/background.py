"""One event loop in a thread of its own, for each process that judges.

`Dataset.map` calls plain functions, notebooks already run a loop, and a forked worker inherits no
thread; so calls to judges run on this loop, started when it is first needed, in the process that
needs it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["calm_collector", "loop", "run"]

_CALM = (20_000, 20, 100)
"""Allocations between two looks at the young, and such looks between those at the older two."""

T = TypeVar("T")

_started: dict[int, asyncio.AbstractEventLoop] = {}
_lock = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """Return this process's background loop, starting it when there is none."""
    with _lock:
        found = _started.get(os.getpid())
        if found is None:
            found = asyncio.new_event_loop()
            threading.Thread(target=found.run_forever, name="hf_relabel-loop", daemon=True).start()
            _started.clear()
            _started[os.getpid()] = found
    return found


@contextmanager
def calm_collector() -> Iterator[None]:
    """Keep the garbage collector from looking at everything again and again while calls run.

    A thousand rows in flight are a few hundred thousand objects, all alive: walking over them, and
    over all that was imported, took a quarter of the time. What is there now is set aside, and what
    comes is looked at less often; reference counts free nearly all of it anyway.
    """
    thresholds = gc.get_threshold()
    if thresholds == _CALM:  # another thread judges already
        yield
        return
    gc.freeze()
    gc.set_threshold(*_CALM)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop and wait for its result.

    Safe inside a running loop (a notebook), but blocks it, as any plain function does. When the
    wait is interrupted (Ctrl-C), the coroutine is cancelled and its clean-up awaited; a second
    interrupt ends that wait too.
    """
    has_ended = threading.Event()

    async def watched() -> T:
        try:
            return await work
        finally:
            has_ended.set()

    future = asyncio.run_coroutine_threadsafe(watched(), loop())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        has_ended.wait()
        raise


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _started.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
