"""VerdictCache: every reply that was paid for, on disk, and the final verdict of every pair.

One diskcache folder holds these kinds of record, all JSON text:

- calls: what a judge replied, by the hash of all that could change the reply. Raw replies are kept,
  so that a better parser costs nothing.
- failures: what came back instead of a verdict, and what it cost. Never served as an answer.
- pairs: (cascade, query, passage) → what each stage said. The first final verdict of a pair stays.
- rows: (cascade, digest of a row's texts) → what its pairs say of it (see `row_index`). Derived: a
  version of the library that does not know them leaves them alone.

Nothing expires and nothing is evicted. diskcache unpickles rows that say they are pickles
(CVE-2025-69872), so this cache has a `Disk` of its own that reads and writes text alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import sqlite3
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diskcache
from diskcache.core import MODE_RAW

from hf_relabel.errors import CacheError
from hf_relabel.presence import Presence
from hf_relabel.questions import Reply
from hf_relabel.verdicts import Relevance, Trace, Verdict

__all__ = [
    "CacheStats",
    "Call",
    "Entry",
    "Failure",
    "JudgeStats",
    "NetworkFilesystemWarning",
    "Pairs",
    "VerdictCache",
    "default_directory",
]

LAYOUT = 1
"""Version of the records. A folder of a higher one is refused, never rewritten."""

_BUSY_TIMEOUT_S = 60  # diskcache's FanoutCache waits 10 ms and loses writes; we wait instead
_MAX_GROUP = 500  # records in one transaction, and in one statement of it
# diskcache inserts a record by three statements; these are the columns that its `add` fills.
_INSERT = "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value) VALUES {}"
_INSERTED_ROW = f"(?, 1, ?, 0, 0, {MODE_RAW}, ?)"
# Rows of another kind come as NULL, which no text is.
_TEXT = f"CASE WHEN mode = {MODE_RAW} AND typeof(value) = 'text' THEN value END"
_NETWORK_FILESYSTEMS = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "lustre", "beegfs", "ceph"]
)
_CODES = {"b": Relevance.BETTER, "w": Relevance.WORSE, "n": Relevance.NOT_RELEVANT}
_CODES["u"] = Relevance.UNDECIDED
_CODE_OF = {relevance: code for code, relevance in _CODES.items()}


class NetworkFilesystemWarning(UserWarning):
    """The cache lies where SQLite's locks are not reliable."""


class Entry(Protocol):
    """A record that knows how it joins what the cache already holds."""

    @property
    def row_key(self) -> str: ...

    def merged(self, stored: str | None) -> str | None:
        """Return the text to store, given what is stored; None leaves that alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One reply that holds a verdict for every passage asked about.

    Attributes:
        key: Hash of the judge's fingerprint and all that the prompt showed.
        judge: The judge's name.
        reply: The raw reply.
        query: `content_hash` of the query.
        passages: `content_hash` of each passage, in the order shown.
        time: Seconds since the epoch when the reply came.
        supersedes: Whether a stored reply gives way: only one that can no longer be read does.
    """

    key: str
    judge: str
    reply: Reply
    query: str
    passages: tuple[str, ...]
    time: float
    supersedes: bool = False

    @property
    def row_key(self) -> str:
        return f"call:{self.key}"

    def merged(self, stored: str | None) -> str | None:
        if stored is not None and not self.supersedes:
            return None
        return _dump({**_reply_json(self.reply), **_fields(self)})

    @classmethod
    def load(cls, key: str, text: str) -> Call:
        values = json.loads(text)
        reply = Reply(**{name: values.pop(name) for name in list(values) if name in _REPLY_FIELDS})
        return cls(key=key, reply=reply, **{**values, "passages": tuple(values["passages"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One attempt that brought no verdict: counted and paid for, never served as an answer.

    Attributes:
        key: The key of the call that failed.
        judge: The judge's name.
        reason: A short name of the fault: "truncated", "timeout", …
        message: The whole story.
        reply: The unusable reply, where one came.
        time: Seconds since the epoch.
    """

    key: str
    judge: str
    reason: str
    message: str
    time: float
    reply: Reply | None = None

    @property
    def row_key(self) -> str:
        return f"fail:{self.key}"

    def merged(self, stored: str | None) -> str | None:
        attempts = json.loads(stored) if stored else []
        reply = _reply_json(self.reply) if self.reply else None
        return _dump([*attempts, {**_fields(self), "reply": reply}])

    @classmethod
    def load_all(cls, key: str, text: str) -> list[Failure]:
        return [
            cls(key=key, **{**values, "reply": values["reply"] and Reply(**values["reply"])})
            for values in json.loads(text)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The final verdicts of one query's passages under one cascade.

    Attributes:
        cascade: The cascade's fingerprint.
        query: `content_hash` of the query.
        judges: The stages' judge names.
        traces: `content_hash` of a passage → what each stage said of it.
        late: Filled by writing: passages that had a final verdict already, which stays.
    """

    cascade: str
    query: str
    judges: tuple[str, ...]
    traces: Mapping[str, Trace] = field(default_factory=dict)
    late: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def row_key(self) -> str:
        return f"pair:{self.cascade}:{self.query}"

    def merged(self, stored: str | None) -> str | None:
        empty: dict[str, Any] = {"judges": self.judges, "calls": [], "pairs": {}}
        values: dict[str, Any] = json.loads(stored) if stored else empty
        calls: dict[str, int] = {key: index for index, key in enumerate(values["calls"])}
        self.late.update(self.traces.keys() & values["pairs"].keys())
        new = [(key, trace) for key, trace in self.traces.items() if key not in values["pairs"]]
        if not new:
            return None
        for passage, trace in new:
            values["pairs"][passage] = [_pack(verdict, calls) for verdict in trace]
        judges = max(values["judges"], self.judges, key=len)
        return _dump({**values, "judges": judges, "calls": list(calls)})

    @classmethod
    def load(cls, cascade: str, query: str, text: str) -> Pairs:
        values = json.loads(text)
        judges, calls = tuple(values["judges"]), values["calls"]
        # Most passages of a row share one "no" of one call: they share the values too.
        known: dict[str, Trace] = {}
        traces: dict[str, Trace] = {}
        for passage, steps in values["pairs"].items():
            name = repr(steps)
            if name not in known:
                pairs = zip(steps, judges, strict=False)
                known[name] = tuple([_unpack(step, judge, calls) for step, judge in pairs])
            traces[passage] = known[name]
        return cls(cascade=cascade, query=query, judges=judges, traces=traces)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache holds: numbers of records, and bytes on disk."""

    n_calls: int
    n_failed_calls: int
    n_queries: int
    n_bytes: int


class _ForeignRowError(Exception):
    """A row is no plain text. Not an OSError, which diskcache would take for "no such row"."""


@dataclass(slots=True, kw_only=True)
class JudgeStats:
    """What a cache holds of one judge: replies, their tokens, and calls that failed."""

    n_calls: int = 0
    n_tokens: int = 0
    n_failures: int = 0


class TextDisk(diskcache.Disk):  # type: ignore[misc]
    """Reads and writes rows of plain text, and refuses every other kind unread."""

    # ruff: noqa: ARG002  the signatures are diskcache's

    def put(self, key: object) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise CacheError(f"expected a text key, found {type(key).__name__}.")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not raw or not isinstance(key, str):
            raise _ForeignRowError("key")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        if not isinstance(value, str) or read:
            raise CacheError(f"expected a text value, found {type(value).__name__}.")
        # Never in a file of its own: files are written without fsync, and can be swapped.
        return 0, MODE_RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str:
        if mode != MODE_RAW or not isinstance(value, str):
            raise _ForeignRowError("value")
        return value


class VerdictCache:
    """A folder of replies and verdicts, shared by every process on the machine.

    Pickles as its folder alone. Writes are grouped into transactions by one thread per process;
    `commit` returns when the records are on disk.

    Args:
        directory: The folder; made with mode 0700 when it is not there.

    Attributes:
        has_failures: Whether any were there at the start or written since by this process: most
            caches hold none, and then nobody has to look for one before each call.

    Raises:
        CacheError: The folder cannot be used, or a newer version of the library wrote it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self._open()

    def _open(self) -> None:
        self._writer = _Writer(self.write)
        self.presence = Presence(self.directory / "present")
        self.buying: set[str] = set()
        self._claimed: set[str] = set()
        with _as_cache_errors(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _warn_on_network_filesystem(self.directory)
            self._check_layout()
            self._disk = diskcache.Cache(
                str(self.directory),
                timeout=_BUSY_TIMEOUT_S,
                disk=TextDisk,
                eviction_policy="none",
                cull_limit=0,
                statistics=0,
            )
            self.has_failures = next(self.scan("fail:"), None) is not None

    def call(self, key: str) -> Call | None:
        """Return the reply kept under a call's key, if there is one."""
        text = self._get(f"call:{key}")
        with _as_cache_errors(self.directory):
            return None if text is None else Call.load(key, text)

    def has_call(self, key: str) -> bool:
        with _as_cache_errors(self.directory):
            return f"call:{key}" in self._disk

    def failures(self, key: str) -> list[Failure]:
        """Return what went wrong with a call so far, oldest first."""
        text = self._get(f"fail:{key}")
        with _as_cache_errors(self.directory):
            return [] if text is None else Failure.load_all(key, text)

    def traces(self, cascade: str, query: str) -> Mapping[str, Trace]:
        """Return the final verdicts of a query's passages, by `content_hash` of the passage."""
        text = self._get(f"pair:{cascade}:{query}")
        with _as_cache_errors(self.directory):
            return {} if text is None else Pairs.load(cascade, query, text).traces

    def texts(self, row_keys: Sequence[str]) -> dict[str, str]:
        """Return the records that are there, of any kind, many by one statement.

        Args:
            row_keys: Kind and key of each, as in "row:…".
        """
        found: dict[str, str] = {}
        with _as_cache_errors(self.directory):
            for start in range(0, len(row_keys), _MAX_GROUP):
                keys = row_keys[start : start + _MAX_GROUP]
                marks = ", ".join("?" * len(keys))
                query = f"SELECT key, {_TEXT} FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608
                found.update(self._disk._sql(query, keys))
        if None in found.values():
            raise _refusal("value")
        return found

    def write(self, entries: Sequence[Entry]) -> None:
        """Write records in one transaction: all of them are on disk afterwards, or none."""
        self.has_failures |= any(isinstance(entry, Failure) for entry in entries)
        with _as_cache_errors(self.directory), self._disk.transact():
            for start in range(0, len(entries), _MAX_GROUP):
                self._write_group(entries[start : start + _MAX_GROUP])

    def _write_group(self, entries: Sequence[Entry]) -> None:
        """Add what is new, as nearly all is, by two statements; merge the rest one by one.

        The GIL is free while a statement runs, and the loop's thread takes it meanwhile for up to
        five milliseconds: a statement for each record kept the writer waiting at every one.
        """
        firsts = {entry.row_key: entry for entry in reversed(entries)}
        stored = self._stored(list(firsts))
        new = {key: entry for key, entry in firsts.items() if key not in stored}
        texts = [(key, text) for key, entry in new.items() if (text := entry.merged(None))]
        if texts:
            now, store = time.time(), self._disk.disk.store
            values = [value for key, text in texts for value in (key, now, store(text, False)[3])]
            self._disk._sql(_INSERT.format(", ".join([_INSERTED_ROW] * len(texts))), values)
        for entry in entries:
            if new.get(entry.row_key) is not entry:
                self._merge(entry)

    def _stored(self, row_keys: Sequence[str]) -> set[str]:
        marks = ", ".join("?" * len(row_keys))
        query = f"SELECT key FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608  only marks
        return {key for (key,) in self._disk._sql(query, row_keys)}

    def _merge(self, entry: Entry) -> None:
        text = entry.merged(self._disk.get(entry.row_key))
        if text is not None:
            self._disk.set(entry.row_key, text)

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Write records without blocking the event loop; they are on disk when this returns."""
        await self._writer.submit(entries)

    def claim(self, key: str) -> bool:
        """Say that this process buys a call; False while another one that is at work does.

        What this process buys already, unclaimed while it was alone, is claimed along with it. A
        process that died holds nothing: its claims end when its presence does.
        """
        with _as_cache_errors(self.directory), self._disk.transact():
            for bought in self.buying - self._claimed:
                self._claim_one(bought)
            return self._claim_one(key)

    def _claim_one(self, key: str) -> bool:
        row_key, mine = f"claim:{key}", self.presence.name
        owner = self._disk.get(row_key)
        if owner is not None and owner != mine and self.presence.is_present(owner):
            return False
        self._disk.set(row_key, mine)
        self._claimed.add(key)
        return True

    def unclaim(self, key: str) -> None:
        """Give a claim back, whether or not the call brought a reply."""
        with _as_cache_errors(self.directory):
            self._disk.delete(f"claim:{key}")
        self._claimed.discard(key)

    def calls(self) -> Iterator[Call]:
        """Iterate over all replies, in the order of their keys, with flat memory."""
        for row_key, text in self.scan("call:"):
            yield Call.load(row_key.removeprefix("call:"), text)

    def pairs(self, *, since: float = 0.0) -> Iterator[Pairs]:
        """Iterate over the verdicts of all queries, or of those written after a time."""
        for row_key, text in self.scan("pair:", since=since):
            _, cascade, query = row_key.split(":")
            yield Pairs.load(cascade, query, text)

    def all_failures(self) -> Iterator[Failure]:
        for row_key, text in self.scan("fail:"):
            yield from Failure.load_all(row_key.removeprefix("fail:"), text)

    def scan(self, prefix: str, *, since: float = 0.0) -> Iterator[tuple[str, str]]:
        """Read all records of a kind, by a connection of its own that cannot write.

        diskcache reads one row a call; plain SQL over its table reads 100,000 rows a second.

        Args:
            prefix: The kind: "call:", "fail:" or "pair:".
            since: Only records stored after this time, in seconds since the epoch.
        """
        uri = f"{(self.directory / 'cache.db').absolute().as_uri()}?mode=ro"
        query = (
            "SELECT key, mode, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1 "
            "AND store_time > ? ORDER BY key"
        )
        last = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        with (
            _as_cache_errors(self.directory),
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S)) as rows,
        ):
            for key, mode, value in rows.execute(query, (prefix, last, since)):
                if mode != MODE_RAW or not isinstance(value, str):
                    raise _refusal("value")
                yield key, value

    def stats(self) -> CacheStats:
        """Count what the cache holds."""
        counts = {kind: sum(1 for _ in self.scan(kind)) for kind in ("call:", "fail:", "pair:")}
        n_bytes = sum(file.stat().st_size for file in self.directory.glob("cache.db*"))
        return CacheStats(
            n_calls=counts["call:"],
            n_failed_calls=counts["fail:"],
            n_queries=counts["pair:"],
            n_bytes=n_bytes,
        )

    def stats_by_judge(self) -> dict[str, JudgeStats]:
        """Count calls, tokens and failures of each judge."""
        found: dict[str, JudgeStats] = {}
        for call in self.calls():
            stats = found.setdefault(call.judge, JudgeStats())
            stats.n_calls += 1
            stats.n_tokens += int(call.reply.usage.get("total_tokens") or 0)
        for failure in self.all_failures():
            found.setdefault(failure.judge, JudgeStats()).n_failures += 1
        return found

    def failure_reasons(self) -> Counter[str]:
        """Count failures by reason."""
        return Counter(failure.reason for failure in self.all_failures())

    def close(self) -> None:
        """Finish what is being written and close this thread's files."""
        self._writer.close()
        self._disk.close()
        self.presence.leave()

    def _get(self, row_key: str) -> str | None:
        with _as_cache_errors(self.directory):
            text: str | None = self._disk.get(row_key)
        return text

    def _check_layout(self) -> None:
        marker = self.directory / "hf_relabel.json"
        if not marker.exists():
            # Whole or not at all: another process may read it this moment.
            temporary = self.directory / f".hf_relabel.{os.getpid()}.{threading.get_ident()}.json"
            temporary.write_text(json.dumps({"layout": LAYOUT}) + "\n")
            temporary.replace(marker)
            self.directory.chmod(0o700)
            return
        try:
            found = int(json.loads(marker.read_text("utf-8"))["layout"])
        except (ValueError, KeyError, TypeError) as error:
            raise _storage_error(self.directory, ValueError(f"malformed {marker.name}")) from error
        if found > LAYOUT:
            raise CacheError(
                f"expected a verdict cache of layout {LAYOUT} or older in {self.directory}, found "
                f"layout {found}: a newer hf_relabel wrote it. Upgrade, or use another folder."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory = state["directory"]
        self._open()


def default_directory() -> Path:
    """Return the folder that is used when none is named."""
    return Path.home() / ".cache" / "hf_relabel"


_Waiting = tuple[Sequence[Entry], asyncio.Future[None]]


class _Writer:
    """A thread that writes what is waiting, all of it in one transaction, again and again."""

    def __init__(self, write: Callable[[Sequence[Entry]], None]) -> None:
        self._write = write
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._waiting: queue.SimpleQueue[list[_Waiting] | None] = queue.SimpleQueue()
        self._handed_in: dict[asyncio.AbstractEventLoop, list[_Waiting]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, entries: Sequence[Entry]) -> asyncio.Future[None]:
        """Hand in records; the future of the running loop is done when they are on disk."""
        if self._pid != os.getpid():  # a forked worker: the thread is gone, the lock may be held
            self._reset()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        handed_in = self._handed_in.setdefault(loop, [])
        if not handed_in:  # the first in this turn of the loop: one waking for all of them
            loop.call_soon(self._hand_over, loop)
        handed_in.append((entries, future))
        return future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting.put(self._handed_in.pop(loop))
        if self._thread is None or not self._thread.is_alive():
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._work, name="hf_relabel-cache", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        if self._pid == os.getpid() and self._thread is not None and self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        is_open = True
        while is_open and (first := self._waiting.get()) is not None:
            # No waiting for more to come: what is not on disk is lost if the process is killed now,
            # and what comes in during one transaction shares the next.
            group = first
            while len(group) < _MAX_GROUP and not self._waiting.empty():
                item = self._waiting.get()
                if item is None:
                    is_open = False
                    break
                group += item
            self._settle(group)

    def _settle(self, group: list[_Waiting]) -> None:
        # What a cancelled caller handed in is written all the same, for it was paid for.
        error: BaseException | None = None
        try:
            self._write([entry for entries, _ in group for entry in entries])
        except BaseException as caught:  # every waiting caller learns that nothing was written
            error = caught
        by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for _, future in group:
            by_loop.setdefault(future.get_loop(), []).append(future)
        for loop, futures in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle_futures, futures, error)


def _settle_futures(futures: Sequence[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


_REPLY_FIELDS = ("text", "finish_reason", "refusal", "model", "usage", "latency_s")


def _reply_json(reply: Reply) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in _REPLY_FIELDS}


def _fields(record: Call | Failure) -> dict[str, Any]:
    names = (name for name in record.__slots__ if name not in ("key", "reply", "supersedes"))
    return {name: getattr(record, name) for name in names}


def _dump(values: object) -> str:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # half an emoji in a reply: SQLite takes no lone surrogate
        return json.dumps(values, separators=(",", ":"))
    return text


def _pack(verdict: Verdict, calls: dict[str, int]) -> list[Any]:
    call = None if verdict.call is None else calls.setdefault(verdict.call, len(calls))
    code = _CODE_OF[verdict.relevance]
    return [code, call, verdict.rank, verdict.grade, verdict.confidence]


def _unpack(step: list[Any], judge: str, calls: Sequence[str]) -> Verdict:
    code, call, rank, grade, confidence = step
    return Verdict(
        relevance=_CODES[code],
        judge=judge,
        rank=rank,
        grade=grade,
        confidence=confidence,
        call=None if call is None else calls[call],
    )


def _refusal(what: str) -> CacheError:
    return CacheError(
        f"expected a {what} of plain text in the verdict cache, found a row of another kind. It was "
        "not read: a row that holds a pickle can run code (CVE-2025-69872). Do not use a cache "
        "folder from someone you do not trust; exchange verdicts with `hf-relabel verdicts export`."
    )


@contextlib.contextmanager
def _as_cache_errors(directory: Path) -> Iterator[None]:
    """Turn what SQLite and the file system say into one error that names the folder."""
    try:
        yield
    except CacheError:
        raise
    except _ForeignRowError as error:
        raise _refusal(str(error)) from error
    except (diskcache.Timeout, sqlite3.Error, OSError, json.JSONDecodeError) as error:
        # diskcache says "timeout" for every error of BEGIN, and rolls back what SQLite rolled back
        # by itself, which is an error too: the first one, in the context, tells what happened.
        first: BaseException = error
        while isinstance(first.__context__, (diskcache.Timeout, sqlite3.Error)):
            first = first.__context__
        raise _storage_error(directory, first) from error


def _storage_error(directory: Path, cause: BaseException) -> CacheError:
    words = str(cause)
    if "locked" in words:
        advice = "Another process holds it for over a minute: end that one, or use another folder."
    elif "full" in words or "No space" in words or "I/O error" in words:
        advice = (
            "The disk is full, or broken: free some space and run again; what was saved is kept."
        )
    elif isinstance(cause, (FileExistsError, NotADirectoryError)):
        advice = "There is a file where the folder should be: name another folder."
    elif "readonly" in words or "unable to open" in words or isinstance(cause, PermissionError):
        advice = "It cannot be written to: mend its permissions, or name another folder."
    elif "malformed" in words or "not a database" in words or isinstance(cause, ValueError):
        advice = "It is damaged: put it aside and keep it, and start with another folder."
    else:
        advice = "Look at the folder and run again; what was saved is kept."
    return CacheError(f"the verdict cache in {directory} cannot be used: {words}. {advice}")


def _warn_on_network_filesystem(directory: Path) -> None:
    kind = _filesystem_of(directory)
    if kind in _NETWORK_FILESYSTEMS:
        warnings.warn(
            f"the verdict cache in {directory} lies on a network filesystem ({kind}), where "
            "SQLite's locks are not reliable and two machines can damage it. Use a local folder on "
            "each, and join them with `hf-relabel verdicts export` and `import`.",
            NetworkFilesystemWarning,
            stacklevel=5,
        )


def _filesystem_of(directory: Path) -> str | None:
    """Return the type of filesystem that a folder lies on, where the system tells."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    folder = directory.resolve()
    best: tuple[int, str] = (-1, "")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) > best[0]:
            best = (len(point), kind)
    return best[1] or None
