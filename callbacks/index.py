"""VerdictIndex: the verdicts of one cascade, on disk in sorted arrays, for the data path.

Workers and ranks of a node map the same two files: one that is written once (`all`), and a small
one with what came since (`recent`), replaced whole at every refresh. A reader looks at two file
stamps for each batch and takes no lock; it never calls a judge, and never opens the cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hf_relabel.callbacks.identity import Ids, id_of_hash, pair_ids

from hf_relabel.cache import Pairs, VerdictCache
from hf_relabel.policy import Policy
from hf_relabel.transform import Relabeler
from hf_relabel.verdicts import Action, Relevance, Verdict

__all__ = ["Known", "VerdictIndex"]

_MAGIC = b"hfrlidx1"
_HEADER_BYTES = 24
_OVERLAP_S = 5.0  # a record's time is taken before its transaction ends: look back that far
_MAX_RECENT = 200_000  # pairs; above it the small file is merged into the large one
_CODES = (Relevance.BETTER, Relevance.WORSE)
_NO_RANK = 255
_NOTHING: Mapping[int, Verdict] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of one query: its relevant passages, and how many were judged."""

    relevant: Mapping[int, Verdict]
    n_judged: int = 0


_UNKNOWN = Known(relevant=_NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Sorted arrays: the ids of all judged pairs, and the relevant pairs, by query.

    20 bytes a relevant pair and 8 a judged one: five million pairs with a fifth of them relevant
    take 60 MB.
    """

    judged: Ids
    query: Ids
    passage: Ids
    n_judged: npt.NDArray[np.uint16]
    code: npt.NDArray[np.uint8]
    rank: npt.NDArray[np.uint8]

    @property
    def relevant(self) -> tuple[npt.NDArray[Any], ...]:
        return self.query, self.passage, self.n_judged, self.code, self.rank

    def has(self, pairs: Ids) -> npt.NDArray[np.bool_]:
        if not len(self.judged):
            return np.zeros(pairs.shape, dtype=np.bool_)
        # In order, so that one search finds in the processor's cache what the last one read.
        order = np.argsort(pairs, axis=None)
        sought = pairs.reshape(-1)[order]
        places = np.minimum(np.searchsorted(self.judged, sought), len(self.judged) - 1)
        found = np.empty(pairs.size, dtype=np.bool_)
        found[order] = self.judged[places] == sought
        return found.reshape(pairs.shape)

    def known(self, start: int, stop: int) -> Known:
        """Return what is known of the query whose relevant pairs lie in a span."""
        relevant = {}
        for place in range(start, stop):
            rank = int(self.rank[place])
            relevant[int(self.passage[place])] = Verdict(
                relevance=_CODES[self.code[place]],
                judge="index",
                rank=None if rank == _NO_RANK else rank,
            )
        return Known(relevant=relevant, n_judged=int(self.n_judged[start]))

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all: readers hold on to the file that was there."""
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        with temporary.open("wb") as file:
            file.write(_MAGIC)
            file.write(np.array([len(self.judged), len(self.query)], dtype=np.uint64).tobytes())
            for column in (self.judged, *self.relevant):
                file.write(column.tobytes())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> _Table:
        bytes_ = np.memmap(path, dtype=np.uint8, mode="r")
        n_judged, n_relevant = bytes_[8:_HEADER_BYTES].view(np.uint64).tolist()
        columns, start = [], _HEADER_BYTES
        for kind, n in zip(_KINDS, (n_judged, *[n_relevant] * 5), strict=True):
            stop = start + n * np.dtype(kind).itemsize
            columns.append(bytes_[start:stop].view(kind))
            start = stop
        return cls(**dict(zip(cls.__slots__, columns, strict=True)))

    @classmethod
    def of(cls, pairs: Iterable[Pairs]) -> _Table:
        """Read a table off records of the cache; a query's record holds all its pairs."""
        judged: list[Ids] = []
        relevant: list[tuple[int, int, int, int, int]] = []
        for record in pairs:
            query = id_of_hash(record.query)
            ids = [id_of_hash(key) for key in record.traces]
            judged.append(pair_ids(np.uint64(query), np.array(ids, dtype=np.uint64)))  # type: ignore[arg-type]
            for id_, trace in zip(ids, record.traces.values(), strict=True):
                verdict = trace[-1]
                if verdict.relevance.is_relevant:
                    rank = _NO_RANK if verdict.rank is None else min(verdict.rank, _NO_RANK)
                    code = _CODES.index(verdict.relevance)
                    relevant.append((query, id_, min(len(ids), 65_535), code, rank))
        return cls._sorted(
            np.concatenate(judged) if judged else np.zeros(0, np.uint64),
            [
                np.array(values, dtype=kind)
                for values, kind in zip(_columns(relevant), _KINDS[1:], strict=True)
            ],
        )

    @classmethod
    def _sorted(cls, judged: Ids, relevant: Sequence[npt.NDArray[Any]]) -> _Table:
        order = np.lexsort((relevant[1], relevant[0]))
        columns = [np.unique(judged), *(column[order] for column in relevant)]
        return cls(**dict(zip(cls.__slots__, columns, strict=True)))

    def updated(self, newer: _Table) -> _Table:
        """Return this table with all that a newer one knows; its queries replace ours."""
        stays = ~np.isin(self.query, newer.query)
        return self._sorted(
            np.concatenate([self.judged, newer.judged]),
            [
                np.concatenate([old[stays], new])
                for old, new in zip(self.relevant, newer.relevant, strict=True)
            ],
        )


_KINDS = (np.uint64, np.uint64, np.uint64, np.uint16, np.uint8, np.uint8)


def _columns(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(zip(*rows, strict=True)) if rows else [()] * 5


class VerdictIndex:
    """The verdicts of one cascade and what a policy makes of them, for look-ups in batches.

    Pickles as its folder and policy: workers map the same files.

    Args:
        directory: Where `build` wrote the files.
        policy: What becomes of false negatives.
        seed: Chooses among promoted passages, and the texts that take freed slots.
    """

    def __init__(self, directory: str | Path, *, policy: Policy, seed: int = 0) -> None:
        self.directory = Path(directory)
        self.policy = policy
        self.seed = seed
        self._open()

    def _open(self) -> None:
        self._stamps: list[object] = [None, None]
        self._tables: list[_Table] = []
        self.reload()

    @classmethod
    def build(cls, relabeler: Relabeler, *, directory: str | Path | None = None) -> VerdictIndex:
        """Write the files from a Relabeler's cache, and open them.

        Args:
            relabeler: Whose cascade, cache, policy and seed are taken.
            directory: Where to; None makes a folder of its own, removed with the index.

        Raises:
            CacheError: The cache cannot be read.
        """
        folder = Path(directory or tempfile.mkdtemp(prefix="hf-relabel-index-"))
        writer = IndexWriter(relabeler, folder)
        index = cls(folder, policy=relabeler.policy, seed=relabeler.seed)
        index.writer = writer
        if directory is None:
            weakref.finalize(index, _remove, folder, os.getpid())
        return index

    writer: IndexWriter | None = None
    """What refreshes the files, in the process that built them; None in all others."""

    def refresh(self) -> int:
        """Read the verdicts that came into the cache since; returns how many records did.

        Raises:
            CacheError: The cache cannot be read.
        """
        n_records = self.writer.refresh() if self.writer else 0
        self.reload()
        return n_records

    def reload(self) -> bool:
        """Map the files again if someone has replaced them; returns whether someone had."""
        stamps = [_stamp(self.directory / name) for name in _FILES]
        if stamps == self._stamps:
            return False
        while True:  # a file that is replaced between the two looks is looked at again
            tables = [_Table.load(self.directory / name) for name in _FILES]
            again = [_stamp(self.directory / name) for name in _FILES]
            if again == stamps:
                self._stamps, self._tables = stamps, tables
                return True
            stamps = again

    def has(self, queries: Ids, passages: Ids) -> npt.NDArray[np.bool_]:
        """Return for each pair whether its verdict is known; both arguments broadcast."""
        pairs = pair_ids(queries, passages)
        whole, recent = self._tables
        found = whole.has(pairs)
        if len(recent.judged):
            found |= recent.has(pairs)
        return found

    def known(self, queries: Ids) -> list[Known]:
        """Return for each query its relevant passages by id; empty for most."""
        found = [_UNKNOWN] * len(queries)
        for table in self._tables:  # the recent one last: a query's record holds all its pairs
            if not len(table.query):
                continue
            starts = np.searchsorted(table.query, queries, side="left")
            stops = np.searchsorted(table.query, queries, side="right")
            for place in np.flatnonzero(stops > starts):
                found[place] = table.known(int(starts[place]), int(stops[place]))
        return found

    def acted_on(self, known: Known) -> dict[int, Verdict]:
        """Return the relevant passages that the policy does not keep as negatives."""
        return {
            passage: verdict
            for passage, verdict in known.relevant.items()
            if self.policy.action_on(verdict.relevance) is not Action.KEEP
        }

    @property
    def n_pairs(self) -> int:
        """How many pairs the index knows; pairs in both files count twice until they are merged."""
        return sum(len(table.judged) for table in self._tables)

    @property
    def n_bytes(self) -> int:
        """Bytes of the files."""
        return sum((self.directory / name).stat().st_size for name in _FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "policy": self.policy, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


_FILES = ("all.index", "recent.index")


class IndexWriter:
    """Keeps an index's files in step with a cache; one for each node.

    Args:
        relabeler: Whose cascade and cache are followed.
        directory: Where the files go; both are there when this returns.
    """

    def __init__(self, relabeler: Relabeler, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self._cascade = relabeler.cascade.fingerprint
        self._cache: VerdictCache = relabeler.cache
        self._lock = threading.Lock()
        self._since = time.time()
        self._cache_stamp = self._stamp_of_cache()
        self._recent = _Table.of([])
        self._recent.save(directory / _FILES[1])
        self._all = _Table.of(self._records(since=0.0))
        self._all.save(directory / _FILES[0])

    def refresh(self) -> int:
        """Take over what came into the cache since the last time.

        Returns:
            How many queries' records were new or longer than before.
        """
        stamp = self._stamp_of_cache()
        if stamp == self._cache_stamp:
            return 0
        since, self._since = self._since, time.time()
        records = list(self._records(since=since - _OVERLAP_S))
        self.add(records)
        self._cache_stamp = stamp
        return len(records)

    def add(self, records: Sequence[Pairs]) -> None:
        """Take over some queries' records, as they stand in the cache now."""
        if not records:
            return
        with self._lock:
            self._recent = self._recent.updated(_Table.of(records))
            if len(self._recent.judged) > _MAX_RECENT:
                self._all = self._all.updated(self._recent)
                self._all.save(self.directory / _FILES[0])
                self._recent = _Table.of([])
            self._recent.save(self.directory / _FILES[1])

    def record(self, query: str) -> Pairs:
        """Return one query's record, by the query's `content_hash`."""
        traces = self._cache.traces(self._cascade, query)
        return Pairs(cascade=self._cascade, query=query, judges=(), traces=traces)

    def _records(self, *, since: float) -> Iterable[Pairs]:
        if not (self._cache.directory / "cache.db").exists():
            return
        for pairs in self._cache.pairs(since=since):
            if pairs.cascade == self._cascade:
                yield pairs

    def _stamp_of_cache(self) -> object:
        # SQLite writes to one of these with every commit; reading a whole cache to find nothing new
        # would cost the training its CPU.
        return [_stamp(self._cache.directory / name) for name in ("cache.db", "cache.db-wal")]


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _remove(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker that ends must not take the files along
        shutil.rmtree(directory, ignore_errors=True)
