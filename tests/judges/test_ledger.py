"""The ledger: what batches hold outlives processes, and is booked once."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from hf_relabel.errors import CacheError
from hf_relabel.judges.ledger import BatchLedger, Ledger, LedgerTotals


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budgets.db"


def test_as_many_requests_are_granted_as_there_is_room_for(path: Path) -> None:
    own = Ledger(path, "a")

    grants = [own.reserve_batch(name, [30, 30, 30], 100).n_requests for name in "xyz"]

    assert grants == [3, 0, 0]
    assert own.in_batches() == 90
    assert own.reserve_batch("small", [10, 1], 100).n_requests == 1
    assert own.reserve_batch("free", [0, 0, 1], 100).n_requests == 2
    assert Ledger(path, "b").reserve_batch("other", [100], 100).n_requests == 1
    assert own.reserve_batch("lower", [0], 50).n_requests == 0


def test_a_batch_is_booked_once_under_the_budget_that_it_was_submitted_with(path: Path) -> None:
    own, batches = Ledger(path, "a"), BatchLedger(path)
    own.reserve_batch("x", [60], 100)
    assert own.draw("calls", 100, spent=0, least=50, most=50) == 0

    batches.book("x", 25)
    batches.book("x", 25)
    batches.book("unknown", 25)

    assert own.spent_and_lost("") == (25, 0)
    assert own.in_batches() == 0
    assert own.draw("calls", 100, spent=0, least=50, most=50) == 50
    assert own.reserve_batch("y", [25, 1], 100).n_requests == 1
    assert batches.totals() == LedgerTotals(spent=25, in_batches=25, n_batches=1)


def _submit_and_die(path: Path) -> None:
    own = Ledger(path, "a")
    own.reserve_batch("unsent", [20], 100)
    own.reserve_batch("sent", [30], 100)
    BatchLedger(path).mark_sent("sent")


def test_what_a_process_that_died_submitted_stays_held_and_the_rest_is_free(path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_submit_and_die, args=(path,))
    process.start()
    process.join(30)
    own = Ledger(path, "a")
    assert own.in_batches() == 50

    BatchLedger(path).free_unsent()

    assert own.in_batches() == 30
    assert own.spent_and_lost("") == (0, 0)
    assert own.reserve_batch("x", [70, 1], 100).n_requests == 1


def test_calls_that_may_give_money_back_are_worth_waiting_for(path: Path) -> None:
    own = Ledger(path, "a")
    assert own.draw("calls", 100, spent=0, least=90, most=90) == 90

    refused = own.reserve_batch("x", [20], 100)
    own.hand_back("calls", spent=5, unused=85)
    granted = own.reserve_batch("x", [20], 100)

    assert (refused.n_requests, refused.can_wait) == (0, True)
    assert (granted.n_requests, granted.can_wait) == (1, False)


def test_a_ledger_of_before_there_were_batches_goes_on(path: Path) -> None:
    with sqlite3.connect(path) as rows:
        rows.execute("CREATE TABLE budget (name TEXT PRIMARY KEY, spent INTEGER NOT NULL)")
        rows.execute("INSERT INTO budget VALUES ('a', 40)")
    rows.close()

    assert Ledger(path, "a").reserve_batch("x", [60, 1], 100).n_requests == 1
    assert BatchLedger(path).totals() == LedgerTotals(spent=40, in_batches=60, n_batches=1)


def test_where_nothing_is_capped_no_ledger_is_made(path: Path) -> None:
    batches = BatchLedger(path)
    batches.book("x", 5)
    batches.mark_sent("x")
    batches.free_unsent()

    assert batches.totals() is None
    assert Ledger(path, "a").in_batches() == 0
    assert not path.exists()


def test_a_damaged_ledger_is_said_and_left_alone(path: Path) -> None:
    path.write_text("no database at all, but long enough to be looked at" * 9)

    with pytest.raises(CacheError, match="ledger of costs"):
        BatchLedger(path).book("x", 1)

    assert path.read_text().startswith("no database")
