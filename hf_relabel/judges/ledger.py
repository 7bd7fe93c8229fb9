"""Ledger: what was spent under each cap, and who holds how much; a file beside the cache.

All amounts are whole picodollars, so that sums do not drift. What is set aside for calls is held by
the process that makes them. What is set aside for a batch is held by the batch: the server works on
it whether the process that submitted it lives or not, so that it stays until some later run books
what the batch cost.

Every change is one transaction with a connection of its own, so that nothing stays locked, and it
is on disk before money is spent, even if the power fails.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hf_relabel.errors import CacheError

__all__ = ["PICO", "BatchGrant", "BatchLedger", "Ledger", "LedgerTotals", "ledger_file", "to_pico"]

PICO = 10**12
"""Picodollars in a dollar; SQLite's whole numbers hold 9 million dollars of them."""
_SHARE_DRAWN = 8  # no more than this part of what is left, so that other processes find some
_BUSY_TIMEOUT_S = 60
_TABLES = (
    "budget (name TEXT PRIMARY KEY, spent INTEGER NOT NULL)",
    "holder (id TEXT PRIMARY KEY, name TEXT NOT NULL, pid INTEGER NOT NULL, "
    "started TEXT NOT NULL, held INTEGER NOT NULL)",
    "batch (id TEXT PRIMARY KEY, name TEXT NOT NULL, held INTEGER NOT NULL, "
    "is_sent INTEGER NOT NULL)",
)


def to_pico(usd: float) -> int:
    """Return an amount in picodollars, rounded up."""
    return math.ceil(usd * PICO)


def ledger_file(folder: Path) -> Path:
    """Return where the ledger of a cache's folder lies."""
    return folder / "budgets.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchGrant:
    """What a cap has room for.

    Attributes:
        n_requests: How many of the requests asked for, from the first; their money is set aside.
        can_wait: Whether a process that runs may still give money back.
    """

    n_requests: int
    can_wait: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerTotals:
    """All budgets of a ledger together, in picodollars.

    Attributes:
        spent: What was spent.
        in_batches: What is set aside for batches under way.
        n_batches: How many those are.
    """

    spent: int
    in_batches: int
    n_batches: int


class Ledger:
    """One budget's rows in a ledger.

    Args:
        path: The file.
        name: The budget's.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name

    def draw(self, holder: str, cap: int, *, spent: int, least: int, most: int) -> int:
        """Report what was spent, and draw between `least` and `most`, or nothing.

        Returns:
            What was granted; 0 where less than `least` is left.
        """
        with _transaction(self._path) as rows:
            self._book(rows, holder, spent)
            available = self._available(rows, cap)
            if available < least:
                return 0
            granted = min(available, max(least, min(most, available // _SHARE_DRAWN)))
            self._add_held(rows, holder, granted)
            return granted

    def hand_back(self, holder: str, *, spent: int, unused: int) -> None:
        with _transaction(self._path) as rows:
            self._book(rows, holder, spent)
            self._add_held(rows, holder, -unused)
            rows.execute("DELETE FROM holder WHERE id = ? AND held = 0", (holder,))

    def reserve_batch(self, batch: str, amounts: Sequence[int], cap: int) -> BatchGrant:
        """Set aside the most that a batch's requests may cost, for as many as there is room.

        Args:
            batch: A name for it that no other batch has.
            amounts: The most that each request can cost, in their order.
            cap: The most that may be spent under this budget.
        """
        sums = list(accumulate(amounts))
        with _transaction(self._path) as rows:
            n_requests = bisect_right(sums, self._available(rows, cap))
            if n_requests:
                values = (batch, self._name, sums[n_requests - 1])
                rows.execute("INSERT INTO batch VALUES (?, ?, ?, FALSE)", values)
            can_wait = self._is_held_by_others(rows, "")
            return BatchGrant(n_requests=n_requests, can_wait=can_wait)

    def spent_and_lost(self, holder: str) -> tuple[int, int]:
        """Return what was reported, and what processes held that are no more."""
        if not self._path.exists():
            return 0, 0
        with _transaction(self._path) as rows:
            spent, holders = self._spent(rows), self._holders(rows)
        lost = [
            held
            for id_, pid, started, held in holders
            if id_ != holder and not _is_running(pid, started)
        ]
        return spent, sum(lost)

    def in_batches(self) -> int:
        """Return what is set aside for batches that no run has booked yet."""
        if not self._path.exists():
            return 0
        with _transaction(self._path) as rows:
            return self._in_batches(rows)

    def is_held_by_others(self, holder: str) -> bool:
        with _transaction(self._path) as rows:
            return self._is_held_by_others(rows, holder)

    def _is_held_by_others(self, rows: sqlite3.Connection, holder: str) -> bool:
        return any(
            held > 0 and id_ != holder and _is_running(pid, started)
            for id_, pid, started, held in self._holders(rows)
        )

    def _available(self, rows: sqlite3.Connection, cap: int) -> int:
        in_calls = sum(held for *_, held in self._holders(rows))
        return cap - self._spent(rows) - in_calls - self._in_batches(rows)

    def _spent(self, rows: sqlite3.Connection) -> int:
        row = rows.execute("SELECT spent FROM budget WHERE name = ?", (self._name,)).fetchone()
        return int(row[0]) if row else 0

    def _in_batches(self, rows: sqlite3.Connection) -> int:
        query = "SELECT COALESCE(SUM(held), 0) FROM batch WHERE name = ?"
        return int(rows.execute(query, (self._name,)).fetchone()[0])

    def _holders(self, rows: sqlite3.Connection) -> list[tuple[str, int, str, int]]:
        query = "SELECT id, pid, started, held FROM holder WHERE name = ?"
        return rows.execute(query, (self._name,)).fetchall()

    def _book(self, rows: sqlite3.Connection, holder: str, spent: int) -> None:
        if spent:
            _add_spent(rows, self._name, spent)
            self._add_held(rows, holder, -spent)

    def _add_held(self, rows: sqlite3.Connection, holder: str, amount: int) -> None:
        rows.execute(
            "INSERT INTO holder VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET held = held + excluded.held",
            (holder, self._name, os.getpid(), _started(os.getpid()), amount),
        )


class BatchLedger:
    """The rows of batches in a ledger, under whatever budget each was submitted.

    A run without a cap books what it collects, too. Where there is no ledger, none is made.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def mark_sent(self, batch: str) -> None:
        """Note that a batch goes to the server now: from here on, only `book` frees its money."""
        if self._path.exists():
            with _transaction(self._path) as rows:
                rows.execute("UPDATE batch SET is_sent = TRUE WHERE id = ?", (batch,))

    def book(self, batch: str, spent: int) -> None:
        """Book what an ended batch cost, and free the rest; a second time nothing happens."""
        if not self._path.exists():
            return
        with _transaction(self._path) as rows:
            found = rows.execute("SELECT name FROM batch WHERE id = ?", (batch,)).fetchone()
            if found is not None:
                _add_spent(rows, found[0], spent)
                rows.execute("DELETE FROM batch WHERE id = ?", (batch,))

    def free_unsent(self) -> None:
        """Free what a run that died had set aside for batches that no server has heard of."""
        if self._path.exists():
            with _transaction(self._path) as rows:
                rows.execute("DELETE FROM batch WHERE NOT is_sent")

    def totals(self) -> LedgerTotals | None:
        """Add up all budgets; None where nothing was ever capped."""
        if not self._path.exists():
            return None
        with _transaction(self._path) as rows:
            (spent,) = rows.execute("SELECT COALESCE(SUM(spent), 0) FROM budget").fetchone()
            query = "SELECT COALESCE(SUM(held), 0), COUNT(*) FROM batch"
            in_batches, n_batches = rows.execute(query).fetchone()
        return LedgerTotals(spent=spent, in_batches=in_batches, n_batches=n_batches)


def _add_spent(rows: sqlite3.Connection, name: str, spent: int) -> None:
    rows.execute(
        "INSERT INTO budget VALUES (?, ?) "
        "ON CONFLICT (name) DO UPDATE SET spent = spent + excluded.spent",
        (name, spent),
    )


@contextlib.contextmanager
def _transaction(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.closing(
            sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        ) as rows:
            rows.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                rows.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            yield rows
            rows.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise CacheError(
            f"the ledger of costs in {path} cannot be used: {error}. Nothing is sent "
            "without it: mend the folder, or run without a cap on the cost."
        ) from error


def _started(pid: int) -> str:
    """Return when a process began, which tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _is_running(pid: int, started: str) -> bool:
    if started:
        return _started(pid) == started
    if os.name != "posix":  # no way to ask; it counts as ended, and what it holds as spent
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
