"""One event loop in a thread of its own, for each process that judges.

`Dataset.map` calls plain functions, notebooks already run a loop, and a forked worker inherits no
thread; so calls to judges run on this loop, started when it is first needed, in the process that
needs it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["loop", "run"]

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
