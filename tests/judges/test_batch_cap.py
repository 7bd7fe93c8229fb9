"""The cap on the cost in batches: never exceeded, in any end state, through kills, by all together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from hf_relabel import BatchSettings, Relabeler, VerdictCache, background
from hf_relabel.cli import app
from hf_relabel.errors import AccountError, BudgetError, SettingError
from hf_relabel.judges.batch_admin import cancel_batches
from hf_relabel.judges.batch_files import base_key
from hf_relabel.judges.batch_state import BatchFolder
from hf_relabel.judges.budget import Budget, worst_tokens
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.ledger import PICO, BatchLedger, LedgerTotals, ledger_file
from hf_relabel.judges.models import ShutdownWarning
from hf_relabel.judges.money import Price, Prices
from tests.batch_server import BatchServer, End
from tests.chat_server import Answer, from_key, prompt_of
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
CHEAP, STRONG = "gpt-4o-mini", "gpt-4o"
FAST: dict[str, Any] = {
    "quiet_s": 0.05,
    "first_poll_s": 0.01,
    "max_poll_s": 0.02,
    "retry": RetryRule(max_attempts=4, first_wait_s=0.01),
}
N_CALLS = 16  # 12 rows, and 4 of them again with the strong judge
PLENTY = 5.0


def batch_price(model: str) -> Price:
    price = Prices().price_of(model, is_batch=True)
    assert price is not None
    return price


def worst_usd(body: Mapping[str, Any]) -> float:
    return batch_price(body["model"]).worst_usd(*worst_tokens(body))


class Bill:
    """What the provider charges for batches, and how it draws the tokens of each reply."""

    def __init__(self, seed: int = 0, *, share_unreadable: float = 0.0) -> None:
        self.usd = 0.0
        self._draw = random.Random(seed)
        self._truth = from_key(KEY)
        self._share_unreadable = share_unreadable

    def __call__(self, body: Mapping[str, Any]) -> Answer:
        """Answer by the key; a reply costs up to the most that its request allows."""
        draw = self._draw
        most_in, most_out = len(prompt_of(body).encode()), body["max_completion_tokens"]
        counts = {
            "prompt_tokens": draw.choice([most_in, draw.randint(1, most_in)]),
            "completion_tokens": draw.choice([most_out, draw.randint(1, most_out)]),
        }
        self.usd += batch_price(body["model"]).cost_usd(counts) or 0.0
        is_repair = any(message["role"] == "assistant" for message in body["messages"])
        is_readable = is_repair or draw.random() >= self._share_unreadable
        text = str(self._truth(body)) if is_readable else "I cannot say."
        return Answer(text=text, usage=counts, has_usage=draw.random() > 0.05)


def small_replies(body: Mapping[str, Any]) -> Answer:
    """Answer by the key, for a tenth of the most that the reply may have."""
    counts = {"prompt_tokens": 100, "completion_tokens": body["max_completion_tokens"] // 10}
    return Answer(text=str(from_key(KEY)(body)), usage=counts)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer(small_replies) as server:
        yield server


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(tevatron_rows())


def capped(
    server: BatchServer, cache: Path, cap_usd: float | None, batch: bool = True, **settings: Any
) -> Relabeler:
    return Relabeler(
        "paper",
        base_url=server.base_url,
        api_key="x",
        cache=cache,
        batch=BatchSettings(**{**FAST, **settings}) if batch else False,
        max_cost_usd=cap_usd,
        budget="test",
    )


def spent_usd(relabeler: Relabeler) -> float:
    assert relabeler.budget is not None
    return relabeler.budget.spent_usd


def totals(cache: Path) -> LedgerTotals:
    found = BatchLedger(ledger_file(cache)).totals()
    assert found is not None
    return found


def requests(server: BatchServer) -> list[dict[str, Any]]:
    return [line["body"] for batch_id in server.batches for line in server.requests(batch_id)]


def n_judged(relabeler: Relabeler, rows: Dataset) -> int:
    return sum(relabeler.known(row) is not None for row in relabeler.rows(rows))


def run(relabeler: Relabeler, rows: Dataset) -> BudgetError | None:
    try:
        relabeler.judge(rows)
    except BudgetError as stopped:
        return stopped
    return None


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: a busy disk takes 10 ms and more a commit."""
    shared = Path("/dev/shm")  # noqa: S108
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_smoke(server: BatchServer, memory: Path, rows: Dataset) -> None:
    r = capped(server, memory, PLENTY)
    print(r.judge(rows))
    print(spent_usd(r), totals(memory), len(server.batches), server.deleted, server.files.keys())
    for cap in (0.003, 0.01, 0.02, 0.05, 0.1, 0.2):
        t = time.time()
        c = memory / f"c{cap}"
        r = capped(server, c, cap)
        n = len(server.batches)
        stopped = run(r, rows)
        print(cap, stopped, spent_usd(r), totals(c), [len(server.requests(b)) for b in list(server.batches)[n:]], n_judged(r, rows), time.time() - t)
    assert 0
