"""Crash safety: processes are killed, interrupted and doubled; what was paid for is never lost.

Every process here is `hf-relabel run` itself. What it asked is read off the server, what it saved
off the cache, so that each request beyond the first for a call has to be explained by a kill.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_relabel import VerdictCache
from hf_relabel.formats import content_hash
from tests.chat_server import ChatServer, Seen, from_key
from tests.rows import tevatron_rows

_CLI = "import sys; from hf_relabel.cli import main; sys.exit(main())"
IN_FLIGHT = 8
LATENCY_S = 0.1
WAIT_S = 60.0
AskedCall = tuple[str, str]
"""A call by its judge's name and its query's hash: every query here is one row, and one call."""


class Runs:
    """Starts `hf-relabel run` on the same rows and cache, again and again."""

    def __init__(self, folder: Path, server: ChatServer, env: dict[str, str], n_rows: int) -> None:
        self.folder = folder
        self.server = server
        self.cache = folder / "cache"
        self.n_needed = n_rows + len(range(0, n_rows, 3))
        self._env = env
        self._started: list[subprocess.Popen[str]] = []
        rows = tevatron_rows(n_rows)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        server.answer = from_key(
            {(rows[i]["query"], f"Text 1 beside plant {i}."): "better" for i in range(0, n_rows, 3)}
        )

    def start(self, output: str = "out", cache: str = "cache") -> subprocess.Popen[str]:
        arguments = ["run", "rows.jsonl", "--output", output, "--cache", cache]
        limits = ["--base-url", self.server.base_url, "--max-concurrency", str(IN_FLIGHT)]
        process = subprocess.Popen(
            [sys.executable, "-c", _CLI, *arguments, *limits],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def wait_until(self, process: subprocess.Popen[str], is_there: Callable[[], bool]) -> bool:
        """Wait for a moment of a process's life; False if it ends before."""
        while not is_there():
            if _ends_within(process, 0.005):
                return False
        return True

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Let a process come to its good end; returns what it said."""
        said, complaints = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, complaints
        return said

    def saved(self) -> set[AskedCall]:
        """Return the calls whose replies are on disk."""
        if not self.cache.exists():
            return set()
        cache = VerdictCache(self.cache)
        calls = {(call.judge, call.query) for call in cache.calls()}
        cache.close()
        return calls

    def output(self, name: str = "out") -> dict[str, bytes]:
        """Return the files of an output, but for those that tell when calls were made."""
        files = sorted((self.folder / name).rglob("*"))
        return {
            str(path.relative_to(self.folder / name)): path.read_bytes()
            for path in files
            if path.is_file() and path.name not in _TELL_THE_TIME
        }

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


_TELL_THE_TIME = {"report.json", "run.json", "calls.parquet"}


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _asked(seen: list[Seen]) -> Counter[AskedCall]:
    return Counter((request.model, _query_of(request)) for request in seen)


def _query_of(request: Seen) -> str:
    found = re.search(r"<query>\n(.*?)\n</query>", request.prompt, re.DOTALL)
    assert found is not None
    return content_hash(found[1])


@pytest.fixture
def start_runs(
    tmp_path: Path, chat_server: ChatServer, subprocess_env: Callable[..., dict[str, str]]
) -> Iterator[Callable[[int], Runs]]:
    made: list[Runs] = []
    chat_server.latency_s = LATENCY_S

    def start(n_rows: int) -> Runs:
        runs = Runs(tmp_path, chat_server, subprocess_env(OPENAI_API_KEY="x"), n_rows)
        made.append(runs)
        return runs

    yield start
    for runs in made:
        runs.close()


@pytest.mark.parametrize("n_kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_nothing_but_calls_in_flight(
    start_runs: Callable[[int], Runs], chat_server: ChatServer, n_kills: int
) -> None:
    """A call is asked again only if a kill came between its request and its reply's being saved."""
    rng = random.Random(n_kills)
    runs = start_runs(15 * n_kills)
    asked: Counter[AskedCall] = Counter()
    n_open, n_lost, saved = 0, 0, runs.saved()

    for _ in range(n_kills):
        before = len(chat_server.seen)
        process = runs.start()
        enough = before + rng.randint(0, 2 * IN_FLIGHT + 8)
        assert runs.wait_until(process, lambda n=enough: len(chat_server.seen) >= n)  # type: ignore[misc]
        assert not _ends_within(process, rng.uniform(0, 1.5 * LATENCY_S))
        killed_at = time.monotonic()
        process.kill()
        process.communicate()

        life = _asked(chat_server.seen[before:])
        places = range(before, len(chat_server.seen))
        n_open += sum(chat_server.ended.get(place, killed_at) >= killed_at for place in places)
        assert max(life.values(), default=1) == 1
        assert not life.keys() & saved, "a saved reply was asked for again"
        before_kill, saved = saved, runs.saved()
        assert before_kill <= saved, "a saved reply was lost"
        n_lost += len(life.keys() - saved)
        asked += life

    before = len(chat_server.seen)
    runs.finish(runs.start())
    last = _asked(chat_server.seen[before:])
    assert max(last.values()) == 1
    assert not last.keys() & saved
    assert len(chat_server.seen) == runs.n_needed + n_lost
    # In flight until saved: replies that came are written a moment later, while others are open.
    assert n_lost <= 2 * n_kills * IN_FLIGHT
    n_paid_twice = sum(chat_server.answered.values()) - runs.n_needed
    print(
        f"\n{n_kills} kills, {runs.n_needed} calls needed, {len(chat_server.seen)} requests, "
        f"{n_open} open at the kills, {n_lost} lost, {n_paid_twice} answered twice"
    )
    runs.finish(runs.start("undisturbed", "another"))
    assert runs.output() == runs.output("undisturbed")
    assert set(runs.output()) == {
        "data/train-00000-of-00001.parquet", "decisions.parquet", "positives.parquet",
        "verdicts.parquet",
    }  # fmt: skip


def test_a_kill_while_the_output_is_written_leaves_whole_files_or_none(
    start_runs: Callable[[int], Runs], chat_server: ChatServer
) -> None:
    runs = start_runs(60)
    chat_server.latency_s = 0.0
    runs.finish(runs.start("undisturbed"))
    whole = runs.output("undisturbed")

    for delay_s in (0.0, 0.02):
        process = runs.start()
        assert runs.wait_until(process, (runs.folder / "out").exists)
        _ends_within(process, delay_s)
        process.kill()
        process.communicate()
        found = {name: text for name, text in runs.output().items() if ".part" not in name}
        assert found.items() <= whole.items()

    runs.finish(runs.start())
    assert runs.output() == whole
    assert len(chat_server.seen) == runs.n_needed


def test_an_interrupt_waits_for_what_is_in_flight_and_asks_nothing_more(
    start_runs: Callable[[int], Runs], chat_server: ChatServer
) -> None:
    """Ctrl-C ends with 2 and says how to go on; every reply that was paid for is in the cache."""
    runs = start_runs(120)
    process = runs.start()
    assert runs.wait_until(process, lambda: len(chat_server.seen) >= 2 * IN_FLIGHT)

    n_sent = len(chat_server.seen)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=WAIT_S)

    said = " ".join(complaints.split())
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "in the cache" in said
    assert "calls of this run are in the cache; the same command resumes: hf-relabel" in said
    assert len(chat_server.seen) <= n_sent + 2 * IN_FLIGHT
    assert len(runs.saved()) == len(chat_server.seen) == sum(chat_server.answered.values())
    assert not (runs.folder / "out").exists()

    runs.finish(runs.start())
    assert len(chat_server.seen) == runs.n_needed


def test_two_processes_on_one_cache_buy_no_call_twice(
    start_runs: Callable[[int], Runs], chat_server: ChatServer
) -> None:
    """Started together, they share the work out; both write the same whole result."""
    runs = start_runs(90)
    one, other = runs.start("one"), runs.start("other")
    runs.finish(one)
    runs.finish(other)

    twice = [call for call, n in _asked(chat_server.seen).items() if n > 1]
    print(f"\n{runs.n_needed} calls needed, {len(chat_server.seen)} requests, {len(twice)} twice")
    assert len(runs.saved()) == runs.n_needed
    assert runs.output("one") == runs.output("other")
    assert twice == []


def test_the_claims_of_a_killed_process_end_with_it(
    tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    """The one that resumes waits for nobody, and need not share its limits with the dead."""
    claim = (
        "import sys; from hf_relabel import VerdictCache; cache = VerdictCache('cache')\n"
        "assert cache.presence.count() == 1 and cache.claim('call')\n"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", claim],
        cwd=tmp_path,
        env=subprocess_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    alive = VerdictCache(tmp_path / "cache")
    assert alive.presence.count() == 2
    assert not alive.claim("call")

    process.kill()
    process.communicate()

    alive.close()
    resumed = VerdictCache(tmp_path / "cache")
    assert resumed.presence.count() == 1
    assert resumed.claim("call")
    resumed.close()
