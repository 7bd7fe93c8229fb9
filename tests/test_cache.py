"""VerdictCache: nothing paid for is lost, nothing planted runs, and every failure speaks clearly."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import diskcache
import pytest

from hf_relabel import background
from hf_relabel.cache import (
    LAYOUT,
    Call,
    Entry,
    Failure,
    Pairs,
    TextDisk,
    VerdictCache,
    default_directory,
)
from hf_relabel.errors import CacheError
from hf_relabel.questions import Reply
from hf_relabel.verdicts import Relevance, Trace, Verdict

BETTER, WORSE, NOT_RELEVANT = Relevance.BETTER, Relevance.WORSE, Relevance.NOT_RELEVANT
NOBODY = 65534
WAIT_S = 30  # far above what anything here takes; a hang is a failure and not a stuck run

# A process that forks while it has threads is what `Dataset.map(num_proc=…)` does to the cache.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def call_of(key: str, text: str = "reply", *, supersedes: bool = False) -> Call:
    reply = Reply(text=text, model="m-1", usage={"prompt_tokens": 3}, latency_s=0.25)
    return Call(
        key=key, judge="j", reply=reply, query="q", passages=("p",), time=1.5, supersedes=supersedes
    )


def failure_of(key: str, reason: str, reply: Reply | None = None) -> Failure:
    return Failure(key=key, judge="j", reason=reason, message="why", time=2.0, reply=reply)


def said(judge: str, relevance: Relevance, call: str | None = None) -> Verdict:
    return Verdict(relevance=relevance, judge=judge, rank=0, confidence=0.9, grade=2, call=call)


def pairs_of(*judges: str, **traces: Trace) -> Pairs:
    return Pairs(cascade="c", query="q", judges=judges, traces=traces)


def keys_of(cache: VerdictCache) -> list[str]:
    return [call.key for call in cache.calls()]


def in_child(work: Callable[[], None]) -> int | None:
    """Run in a forked process; return its exit code, None if it hangs."""
    child = FORK.Process(target=work)
    child.start()
    child.join(WAIT_S)
    if child.exitcode is None:
        child.kill()
    return child.exitcode


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[VerdictCache]:
    found = VerdictCache(tmp_path / "verdicts")
    yield found
    found.close()


# Records


def test_a_call_comes_back_as_it_was_written(cache: VerdictCache) -> None:
    cache.write([call_of("k", "é\n\x00 {}")])

    assert cache.call("k") == call_of("k", "é\n\x00 {}")
    assert cache.has_call("k")
    assert cache.call("other") is None
    assert not cache.has_call("other")


def test_the_first_reply_stays_unless_a_later_one_supersedes_it(cache: VerdictCache) -> None:
    """Two processes may buy one answer; a reply gives way only when nobody can read it."""
    cache.write([call_of("k", "first")])
    cache.write([call_of("k", "second")])
    assert cache.call("k") == call_of("k", "first")

    cache.write([call_of("k", "third", supersedes=True)])
    assert cache.call("k") == call_of("k", "third")


def test_a_reply_with_half_an_emoji_is_kept(cache: VerdictCache) -> None:
    """JSON can hold a lone surrogate, SQLite cannot: one such reply must not fail its whole group."""
    cache.write([call_of("k", "half \ud83d"), call_of("l")])

    assert cache.call("k") == call_of("k", "half \ud83d")
    assert cache.has_call("l")


def test_failures_add_up_and_are_no_answers(cache: VerdictCache) -> None:
    truncated = failure_of("k", "truncated", Reply(text="<ver", finish_reason="length"))

    cache.write([truncated])
    cache.write([failure_of("k", "timeout")])

    assert cache.failures("k") == [truncated, failure_of("k", "timeout")]
    assert list(cache.all_failures()) == cache.failures("k")
    assert cache.call("k") is None
    assert not cache.has_call("k")
    assert cache.failures("other") == []


def test_the_first_final_verdict_of_a_pair_stays(cache: VerdictCache) -> None:
    """A later run, in other batches, must not change what an earlier one said."""
    first, later = (said("cheap", NOT_RELEVANT, "k1"),), (said("cheap", BETTER, "k2"),)

    cache.write([pairs_of("cheap", a=first)])
    cache.write([pairs_of("cheap", a=later, b=later)])

    assert cache.traces("c", "q") == {"a": first, "b": later}


def test_traces_of_more_stages_join_those_of_fewer(cache: VerdictCache) -> None:
    """A row that the cheap judge settled, then one that went on to the strong judge."""
    settled = (said("cheap", NOT_RELEVANT, "k1"),)
    went_on = (said("cheap", WORSE, "k2"), said("strong", BETTER, "k3"))

    cache.write([pairs_of("cheap", a=settled)])
    cache.write([pairs_of("cheap", "strong", b=went_on)])
    cache.write([pairs_of("cheap", d=settled)])

    assert cache.traces("c", "q") == {"a": settled, "b": went_on, "d": settled}
    (pairs,) = cache.pairs()
    assert pairs.judges == ("cheap", "strong")


def test_pairs_of_another_cascade_or_query_are_apart(cache: VerdictCache) -> None:
    cache.write([pairs_of("cheap", a=(said("cheap", BETTER),))])

    assert cache.traces("other", "q") == {}
    assert cache.traces("c", "other") == {}


def test_a_write_is_all_or_nothing(cache: VerdictCache) -> None:
    class Broken:
        row_key = "call:b"

        def merged(self, _: str | None) -> str | None:
            raise RuntimeError("broken record")

    with pytest.raises(RuntimeError, match="broken record"):
        cache.write([call_of("a"), Broken()])

    assert keys_of(cache) == []


def test_stats_count_records_and_bytes(cache: VerdictCache) -> None:
    cache.write([call_of("a"), call_of("b"), failure_of("c", "timeout")])
    cache.write([failure_of("c", "timeout"), pairs_of("j", a=(said("j", BETTER),))])

    stats = cache.stats()

    assert (stats.n_calls, stats.n_failed_calls, stats.n_queries) == (2, 1, 1)
    assert stats.n_bytes >= sum(f.stat().st_size for f in cache.directory.glob("cache.db"))


def test_scan_reads_in_order_and_only_what_was_written_since(cache: VerdictCache) -> None:
    cache.write([call_of("b"), call_of("a"), pairs_of("j", a=(said("j", BETTER),))])
    middle = time.time()
    assert [key for key, _ in cache.scan("call:")] == ["call:a", "call:b"]
    assert list(cache.scan("call:", since=middle)) == []

    cache.write([call_of("c"), pairs_of("j", b=(said("j", WORSE),))])

    assert [key for key, _ in cache.scan("call:", since=middle)] == ["call:c"]
    (changed,) = cache.pairs(since=middle)
    assert set(changed.traces) == {"a", "b"}


def test_many_records_are_read_at_once(cache: VerdictCache) -> None:
    cache.write([call_of(f"{i:04}") for i in range(1200)])
    keys = [f"call:{i:04}" for i in range(1200)]

    found = cache.texts([*keys, "call:other"])

    assert sorted(found) == keys
    assert Call.load("0007", found["call:0007"]) == call_of("0007")
    assert cache.texts([]) == {}


def test_pairs_tell_which_verdicts_came_too_late(cache: VerdictCache) -> None:
    first, later = (said("cheap", NOT_RELEVANT),), (said("cheap", BETTER),)
    early, late = pairs_of("cheap", a=first), pairs_of("cheap", a=later, b=later)

    cache.write([early])
    cache.write([late])

    assert (early.late, late.late) == (set(), {"a"})


# The loop's way in


def test_a_committed_record_is_on_disk_when_commit_returns(cache: VerdictCache) -> None:
    """Read through another connection, as another process would."""

    async def commit_and_look() -> list[list[str]]:
        seen = []
        for key in ("a", "b"):
            await cache.commit([call_of(key)])
            seen.append(await asyncio.to_thread(lambda: keys_of(cache)))
        return seen

    assert background.run(commit_and_look()) == [["a"], ["a", "b"]]


def test_many_commits_at_once_are_all_written(cache: VerdictCache) -> None:
    async def commit_all() -> None:
        await asyncio.gather(*(cache.commit([call_of(f"{i:04}")]) for i in range(1200)))

    background.run(commit_all())

    assert keys_of(cache) == [f"{i:04}" for i in range(1200)]


def test_a_cancelled_commit_takes_no_other_along(cache: VerdictCache) -> None:
    """Ctrl-C cancels hundreds of them; each was paid for, so each is written all the same."""

    async def cancel_some() -> None:
        for start in range(0, 300, 30):
            tasks = [
                asyncio.create_task(cache.commit([call_of(f"{start + i:03}")])) for i in range(30)
            ]
            await asyncio.sleep(0)  # they are handed over now
            for task in tasks[::2]:
                task.cancel()
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        await asyncio.wait_for(cache.commit([call_of("last")]), WAIT_S)

    background.run(cancel_some())

    assert len(keys_of(cache)) == 301


def test_a_closed_cache_opens_again(cache: VerdictCache) -> None:
    background.run(cache.commit([call_of("a")]))
    cache.close()

    background.run(cache.commit([call_of("b")]))

    assert keys_of(cache) == ["a", "b"]


def test_a_cache_pickles_as_its_folder_alone(cache: VerdictCache) -> None:
    cache.write([call_of("a")])
    before = pickle.dumps(cache)
    background.run(cache.commit([call_of("b")]))

    copy = pickle.loads(before)  # noqa: S301

    assert pickle.dumps(cache) == before  # `map` hashes it: a counter would make it start over
    assert keys_of(copy) == ["a", "b"]
    copy.close()


# Processes


def _write_4000(folder: Path, number: int, barrier: Barrier) -> None:
    barrier.wait()
    cache = VerdictCache(folder)  # the first opening races, too
    for i in range(4000):
        cache.write([call_of(f"{number}-{i:04}")])


def test_eight_processes_lose_no_write(tmp_path: Path) -> None:
    """The FanoutCache of diskcache lost 323 of 32,000 here without a word."""
    folder, barrier = tmp_path / "verdicts", FORK.Barrier(8)
    writers = [FORK.Process(target=_write_4000, args=(folder, n, barrier)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert [writer.exitcode for writer in writers] == [0] * 8
    cache = VerdictCache(folder)
    assert keys_of(cache) == [f"{n}-{i:04}" for n in range(8) for i in range(4000)]
    cache.close()


def _write_pairs(folder: Path, number: int, barrier: Barrier) -> None:
    cache = VerdictCache(folder)
    barrier.wait()
    for i in range(100):
        trace = (said("j", BETTER, f"call-{number}"),)
        cache.write([pairs_of("j", **{f"p{i}": trace, f"own-{number}-{i}": trace})])


def test_processes_that_write_one_query_agree_on_its_verdicts(tmp_path: Path) -> None:
    """Merging reads and writes in one transaction, so that no process undoes another's."""
    folder, barrier = tmp_path / "verdicts", FORK.Barrier(4)
    writers = [FORK.Process(target=_write_pairs, args=(folder, n, barrier)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    cache = VerdictCache(folder)
    traces = cache.traces("c", "q")
    assert len(traces) == 100 + 4 * 100
    for n in range(4):
        assert all(traces[f"own-{n}-{i}"][0].call == f"call-{n}" for i in range(100))
    cache.close()


def test_a_fork_in_the_middle_loses_nothing(cache: VerdictCache) -> None:
    """Parent and child both go on with the cache that was open before, its writer thread too."""
    background.run(cache.commit([call_of("before")]))

    def child() -> None:
        for i in range(50):
            background.run(cache.commit([call_of(f"child-{i:02}")]))
        cache.write([call_of("child-last")])
        assert cache.call("before") is not None

    writer = FORK.Process(target=child)
    writer.start()
    for i in range(50):
        background.run(cache.commit([call_of(f"parent-{i:02}")]))
    writer.join(WAIT_S)

    assert writer.exitcode == 0
    assert len(keys_of(cache)) == 102


def test_a_killed_process_loses_no_committed_record(tmp_path: Path) -> None:
    folder = tmp_path / "verdicts"

    def child() -> None:
        background.run(VerdictCache(folder).commit([call_of("a"), call_of("b")]))
        os.kill(os.getpid(), 9)

    assert in_child(child) == -9
    cache = VerdictCache(folder)
    assert keys_of(cache) == ["a", "b"]
    cache.close()


# What must never be read


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def planted(cache: VerdictCache, tmp_path: Path) -> Iterator[tuple[bytes, Path]]:
    """A pickle that makes a file when it is read, and that file, which must not be there."""
    marker = tmp_path / "ran"
    code = pickle.dumps(Planted(marker))
    pickle.loads(code)  # noqa: S301
    assert marker.exists(), "the pickle does nothing, so the test would prove nothing"
    marker.unlink()
    cache.write([call_of("k")])
    yield code, marker
    assert not marker.exists()


def _sql(cache: VerdictCache, statement: str, *values: object) -> None:
    connection = sqlite3.connect(cache.directory / "cache.db")
    with connection:
        connection.execute(statement, values)
    connection.close()


def test_a_planted_pickle_is_refused_and_does_not_run(
    cache: VerdictCache, planted: tuple[bytes, Path]
) -> None:
    """Plain diskcache unpickles rows of mode 4 (CVE-2025-69872); no read or write of ours may."""
    _sql(cache, "UPDATE Cache SET mode = 4, value = ?", planted[0])

    with pytest.raises(CacheError, match="CVE-2025-69872"):
        cache.call("k")
    with pytest.raises(CacheError, match="CVE-2025-69872"):
        cache.write([call_of("k")])
    with pytest.raises(CacheError, match="CVE-2025-69872"):
        list(cache.calls())
    with pytest.raises(CacheError, match="CVE-2025-69872"):
        cache.texts(["call:k"])
    with pytest.raises(CacheError, match="CVE-2025-69872"):
        cache.stats()


def test_a_planted_pickle_in_a_file_is_refused_and_does_not_run(
    cache: VerdictCache, planted: tuple[bytes, Path]
) -> None:
    (cache.directory / "planted.val").write_bytes(planted[0])
    _sql(cache, "UPDATE Cache SET mode = 4, filename = 'planted.val', value = NULL")

    with pytest.raises(CacheError, match="CVE-2025-69872"):
        cache.call("k")


def test_a_planted_pickle_as_a_key_is_never_read(
    cache: VerdictCache, planted: tuple[bytes, Path]
) -> None:
    """The package diskcache unpickles keys with raw = 0 when it lists them; ours are text."""
    _sql(cache, "UPDATE Cache SET raw = 0, key = ?", planted[0])

    assert cache.call("k") is None
    assert keys_of(cache) == []


def test_diskcache_itself_cannot_be_made_to_read_a_planted_key(
    cache: VerdictCache, planted: tuple[bytes, Path]
) -> None:
    """Every road to a key goes through our `Disk`, listing and popping too."""
    _sql(cache, "UPDATE Cache SET raw = 0, key = ?", planted[0])
    listing = diskcache.Cache(str(cache.directory), disk=TextDisk)

    with pytest.raises(Exception, match="key"):
        list(listing)
    listing.close()


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_rows_of_every_other_kind_are_refused(cache: VerdictCache, mode: int) -> None:
    cache.write([call_of("k")])
    _sql(cache, "UPDATE Cache SET mode = ?", mode)

    with pytest.raises(CacheError, match="found a row of another kind"):
        cache.call("k")


def test_only_text_is_stored(cache: VerdictCache) -> None:
    class NoText:
        row_key = "call:k"

        def merged(self, _: str | None) -> str | None:
            return {"a": "dict"}  # type: ignore[return-value]

    entry: Entry = NoText()
    with pytest.raises(CacheError, match="expected a text value, found dict"):
        cache.write([entry])


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Whoever can write there could plant rows."""
    (tmp_path / "open").mkdir(mode=0o755)

    for name in ("open", "new"):
        VerdictCache(tmp_path / name).close()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


# What can go wrong


def test_a_newer_layout_is_refused_and_left_alone(cache: VerdictCache) -> None:
    cache.write([call_of("k")])
    marker = cache.directory / "hf_relabel.json"
    newer = json.dumps({"layout": LAYOUT + 1})
    marker.write_text(newer)

    with pytest.raises(CacheError, match=f"found layout {LAYOUT + 1}: a newer hf_relabel"):
        VerdictCache(cache.directory)

    assert marker.read_text() == newer
    assert cache.call("k") == call_of("k")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"layout": null}'])
def test_a_damaged_layout_file_is_a_clear_error(cache: VerdictCache, content: bytes) -> None:
    marker = cache.directory / "hf_relabel.json"
    marker.write_bytes(content)

    with pytest.raises(CacheError, match=r"hf_relabel\.json\. It is damaged: put it aside"):
        VerdictCache(cache.directory)

    assert marker.read_bytes() == content


def test_a_damaged_database_is_a_clear_error_and_is_kept(cache: VerdictCache) -> None:
    cache.close()
    damaged = b"no database at all " * 1000
    (cache.directory / "cache.db").write_bytes(damaged)

    with pytest.raises(CacheError, match=r"not a database.*put it aside and keep it"):
        VerdictCache(cache.directory)

    assert (cache.directory / "cache.db").read_bytes() == damaged


def test_damage_inside_the_database_is_a_clear_error(cache: VerdictCache) -> None:
    cache.write([call_of(f"{i:04}", "z" * 500) for i in range(500)])
    cache.close()
    with (cache.directory / "cache.db").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 4)
        file.write(b"\x5a" * (size // 2))

    def read_and_write() -> None:
        found = VerdictCache(cache.directory)
        list(found.calls())
        found.write([call_of(f"n{i}") for i in range(100)])

    with pytest.raises(CacheError, match="It is damaged: put it aside and keep it"):
        read_and_write()


def test_a_record_that_is_no_json_is_a_clear_error(cache: VerdictCache) -> None:
    cache.write([call_of("k"), failure_of("k", "r"), pairs_of("j", a=(said("j", BETTER),))])
    _sql(cache, "UPDATE Cache SET value = substr(value, 1, 10)")
    reads: list[Callable[[], object]] = [
        lambda: cache.call("k"),
        lambda: cache.failures("k"),
        lambda: cache.traces("c", "q"),
        lambda: cache.write([failure_of("k", "r")]),
    ]

    for read in reads:
        with pytest.raises(CacheError, match="It is damaged: put it aside"):
            read()


def test_a_file_in_the_folders_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "verdicts").write_text("mine")

    for path in (tmp_path / "verdicts", tmp_path / "verdicts" / "below"):
        with pytest.raises(CacheError, match="There is a file where the folder should be"):
            VerdictCache(path)

    assert (tmp_path / "verdicts").read_text() == "mine"


def _limit_pages(cache: VerdictCache, pages: int) -> VerdictCache:
    """Let SQLite find the disk full; diskcache sends its settings to every new connection."""
    cache.close()
    _sql(cache, "INSERT INTO Settings VALUES ('sqlite_max_page_count', ?)", pages)
    return VerdictCache(cache.directory)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(cache: VerdictCache) -> None:
    cache.write([call_of("before")])
    full = _limit_pages(cache, 40)

    with pytest.raises(CacheError, match="database or disk is full"):
        full.write([call_of(f"{i}", "z" * 1000) for i in range(500)])

    assert keys_of(full) == ["before"]
    full.write([call_of("small")])
    assert keys_of(full) == ["before", "small"]
    full.close()


def test_a_full_disk_reaches_every_commit_that_waits(cache: VerdictCache) -> None:
    """None hangs, and none believes that it was written."""
    full = _limit_pages(cache, 40)

    async def commit_all() -> list[object]:
        commits = (full.commit([call_of(f"{i}", "z" * 100_000)]) for i in range(20))
        return await asyncio.wait_for(asyncio.gather(*commits, return_exceptions=True), WAIT_S)

    outcomes = background.run(commit_all())

    n_written = len(keys_of(full))
    assert [type(outcome) for outcome in outcomes].count(CacheError) == 20 - n_written > 0
    full.close()


def test_a_disk_that_fails_at_the_commit_leaves_no_open_transaction(cache: VerdictCache) -> None:
    """The log cannot grow for a while, as on a full disk; later writes work again."""
    cache.write([call_of("before")])

    def child() -> None:
        limit = (cache.directory / "cache.db-wal").stat().st_size + 8192
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for _ in range(2):
            with pytest.raises(CacheError, match="free some space and run again"):
                cache.write([call_of(f"{i}", "z" * 1000) for i in range(500)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        cache.write([call_of("after")])
        assert keys_of(cache) == ["after", "before"]

    assert in_child(child) == 0
    assert keys_of(cache) == ["after", "before"]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach, as pytest's own cannot."""
    folder = Path(tempfile.mkdtemp(prefix="hf-relabel-cache-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_folder_is_a_clear_error_and_is_kept(public_folder: Path) -> None:
    """As a user whom file modes bind: root gives itself up in the child."""
    folder = public_folder / "verdicts"
    cache = VerdictCache(folder)
    cache.write([call_of("k")])
    cache.close()
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def child() -> None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        with pytest.raises(CacheError, match="mend its permissions, or name another folder"):
            VerdictCache(folder)
        with pytest.raises(CacheError, match="mend its permissions, or name another folder"):
            VerdictCache(folder / "new")

    assert in_child(child) == 0
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700)
    assert keys_of(VerdictCache(folder)) == ["k"]


def test_a_folder_that_became_read_only_keeps_what_it_has(cache: VerdictCache) -> None:
    cache.write([call_of("k")])
    cache.close()
    opened = VerdictCache(cache.directory)
    _sql(cache, "INSERT INTO Settings VALUES ('sqlite_query_only', 1)")
    opened.close()  # the next connection reads the setting

    async def commit() -> None:
        await asyncio.wait_for(opened.commit([call_of("l")]), WAIT_S)

    with pytest.raises(CacheError, match="mend its permissions"):
        opened.write([call_of("l")])
    with pytest.raises(CacheError, match="mend its permissions"):
        background.run(commit())
    assert keys_of(opened) == ["k"]
    assert opened.call("k") == call_of("k")
    opened.close()


def test_the_default_folder_lies_in_the_users_cache() -> None:
    assert default_directory() == Path(os.environ["HOME"]) / ".cache" / "hf_relabel"
