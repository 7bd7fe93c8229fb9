"""The cache under eight processes at once: set and get, against plain diskcache in the same folder.

The peer stores the same texts under the same keys, one `set` a record, with diskcache's own settings
but for the time limit: its FanoutCache, which waits 10 ms and then drops a write, is no peer.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TypeAlias

import diskcache

from hf_relabel import VerdictCache
from hf_relabel.cache import Call
from hf_relabel.questions import Reply
from tests.benchmarks import Ratio

N_PROCESSES = 8
N_EACH = 4000
GROUP = 50
"""Records in one `write`: about what comes in while a transaction is on its way, at 1,000 calls/s."""

_Work: TypeAlias = "Callable[[Path, list[Call]], None]"
_SPAWN = multiprocessing.get_context("spawn")
_TEXT = "\n".join(f"Doc ({number}): {'reasoning ' * 12}" for number in range(1, 16))


def measure() -> Iterator[Ratio]:
    """Write and read 32,000 replies four ways, in turns; then count what is there."""
    n_runs = 3
    writes: list[float] = []
    plain_writes: list[float] = []
    reads: list[float] = []
    plain_reads: list[float] = []
    for _ in range(n_runs):
        with tempfile.TemporaryDirectory() as folder:
            ours, plain = Path(folder, "ours"), Path(folder, "plain")
            VerdictCache(ours).close()
            diskcache.Cache(str(plain)).close()
            writes.append(_rate(_write, ours))
            plain_writes.append(_rate(_write_plain, plain))
            reads.append(_rate(_read, ours))
            plain_reads.append(_rate(_read_plain, plain))
            _check(ours)
    total = N_PROCESSES * N_EACH
    note = f"{N_PROCESSES} processes, {total:,} replies of {len(_TEXT):,} characters, 0 lost."
    for name, mine, theirs, bound in (
        ("set", writes, plain_writes, ">= 1.0"),
        ("get", reads, plain_reads, ">= 0.5"),  # the peer reads JSON, and no Call is built from it
    ):
        yield Ratio(
            name=f"cache {name} / plain diskcache", ours=statistics.median(mine),
            peer=statistics.median(theirs), unit="ops/s", bound=bound, n_runs=n_runs,
            note=note + (f" Ours {GROUP} a transaction." if name == "set" else " Ours parsed."),
        )  # fmt: skip


def _calls(number: int) -> list[Call]:
    reply = Reply(text=_TEXT, finish_reason="stop", model="bench", usage={"prompt_tokens": 2500})
    return [
        Call(
            key=f"{number:02d}-{index:08d}" + "0" * 53, judge="bench", reply=reply,
            query="q" * 64, passages=("p" * 64,) * 15, time=time.time(),
        )
        for index in range(N_EACH)
    ]  # fmt: skip


def _write(folder: Path, calls: list[Call]) -> None:
    cache = VerdictCache(folder)
    for start in range(0, len(calls), GROUP):
        cache.write(calls[start : start + GROUP])
    cache.close()


def _write_plain(folder: Path, calls: list[Call]) -> None:
    cache = diskcache.Cache(str(folder), timeout=60)
    for call in calls:
        cache.set(call.row_key, call.merged(None))
    cache.close()


def _read(folder: Path, calls: list[Call]) -> None:
    cache = VerdictCache(folder)
    for call in calls:
        if cache.call(call.key) is None:
            raise RuntimeError(f"the cache lost {call.key}")
    cache.close()


def _read_plain(folder: Path, calls: list[Call]) -> None:
    cache = diskcache.Cache(str(folder), timeout=60)
    for call in calls:
        if json.loads(cache[call.row_key])["judge"] != call.judge:
            raise RuntimeError(f"diskcache lost {call.key}")
    cache.close()


def _check(folder: Path) -> None:
    cache = VerdictCache(folder)
    n_calls = cache.stats().n_calls
    cache.close()
    if n_calls != N_PROCESSES * N_EACH:
        raise RuntimeError(f"expected {N_PROCESSES * N_EACH} replies in the cache, found {n_calls}")


def _rate(work: _Work, folder: Path) -> float:
    """Let all processes work at once and return records a second, from the first to the last."""
    barrier = _SPAWN.Barrier(N_PROCESSES + 1)
    workers = [
        _SPAWN.Process(target=_work, args=(work, folder, number, barrier), daemon=True)
        for number in range(N_PROCESSES)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(timeout=120)
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"exit codes {[worker.exitcode for worker in workers]}")
    return N_PROCESSES * N_EACH / seconds


def _work(work: _Work, folder: Path, number: int, barrier: Barrier) -> None:
    calls = _calls(number)
    barrier.wait(timeout=120)
    work(folder, calls)
