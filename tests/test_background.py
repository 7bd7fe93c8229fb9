"""The background loop: one a process, whoever calls from wherever."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_relabel import background

FORK = multiprocessing.get_context("fork")
WAIT_S = 30
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def _is_waiting(thread: int) -> bool:
    """Whether a thread waits for a future's result."""
    frame = sys._current_frames()[thread]
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return {"result", "wait"} <= names


async def name_of_thread() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_work_runs_on_the_loop_and_hands_back_its_result() -> None:
    assert background.run(name_of_thread()) == "hf_relabel-loop"


def test_an_error_reaches_the_caller() -> None:
    async def fail() -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        background.run(fail())


def test_it_works_inside_a_running_loop() -> None:
    """A notebook's cell runs in one, where `asyncio.run` refuses."""

    async def cell() -> str:
        return background.run(name_of_thread())

    assert asyncio.run(cell()) == "hf_relabel-loop"


def test_threads_that_start_at_once_share_one_loop() -> None:
    with ThreadPoolExecutor(8) as pool:
        loops = list(pool.map(lambda _: background.loop(), range(32)))

    assert len(set(map(id, loops))) == 1


def test_a_forked_worker_gets_a_loop_of_its_own() -> None:
    """It inherits the loop's object, but not the thread that runs it."""
    background.run(name_of_thread())

    def child() -> None:
        assert background.run(name_of_thread()) == "hf_relabel-loop"

    worker = FORK.Process(target=child)
    worker.start()
    worker.join(WAIT_S)
    if worker.exitcode is None:
        worker.kill()

    assert worker.exitcode == 0
    assert background.run(name_of_thread()) == "hf_relabel-loop"


def test_an_interrupt_cancels_the_work_and_waits_for_its_clean_up() -> None:
    """Ctrl-C: what was paid for is saved before the caller goes on."""
    steps: list[str] = []
    caller = threading.get_ident()

    async def work() -> None:
        while not _is_waiting(caller):  # a signal that comes earlier is not what is tested
            await asyncio.sleep(0)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        background.run(work())

    assert steps == ["cleaned up"]


def test_the_collector_is_calm_while_calls_run_and_as_before_afterwards() -> None:
    before = gc.get_threshold()

    with background.calm_collector():
        within = gc.get_threshold()
        with background.calm_collector():  # a second thread's judging ends first
            pass
        assert gc.get_threshold() == within
        assert gc.get_freeze_count() > 0

    assert within[0] > before[0]
    assert gc.get_threshold() == before


def test_the_collector_is_as_before_after_an_error() -> None:
    before = gc.get_threshold()

    with pytest.raises(ValueError, match="stop"), background.calm_collector():
        raise ValueError("stop")

    assert gc.get_threshold() == before
