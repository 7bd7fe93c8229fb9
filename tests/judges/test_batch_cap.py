"""The cap on the cost in batches: never exceeded, in any end state, through kills, by all."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from hf_relabel import BatchSettings, Relabeler, VerdictCache, background
from hf_relabel.cli import app
from hf_relabel.errors import AccountError, BudgetError, CacheError, SettingError
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
    """What the provider charges, and how it draws the tokens of each reply."""

    def __init__(self, seed: int = 0, *, share_unreadable: float = 0.0) -> None:
        self.usd = 0.0
        self.is_batch = True
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
        price = Prices().price_of(body["model"], is_batch=self.is_batch)
        assert price is not None
        self.usd += price.cost_usd(counts) or 0.0
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


# Within the cap, whatever happens


def random_ends(seed: int) -> list[End]:
    """Return how the first batches of a run end: well, for the most part."""
    draw = random.Random(seed)
    fates = [
        End(),
        End(),
        End("expired", share=draw.random()),
        End("cancelled", share=draw.random()),
        End(faults={0: "500", 2: "429"}),
        End(cut=(0,)),
        End("failed", errors=[("token_limit_exceeded", None, "Limit: 9,000,000 tokens.")]),
    ]
    return draw.choices(fates, k=8)


@pytest.mark.parametrize("part", range(4))
def test_the_providers_bill_stays_within_the_cap(
    server: BatchServer, memory: Path, rows: Dataset, part: int
) -> None:
    """Thirty-two runs of batches small and large, with replies and ends of every kind."""
    n_stopped = 0
    for seed in range(8 * part, 8 * part + 8):
        draw = random.Random(seed)
        bill = Bill(seed, share_unreadable=draw.choice([0.0, 0.3]))
        server.answer, server.ends = bill, random_ends(seed)
        server.processed.clear()
        cap_usd, size = draw.choice([0.004, 0.02, 0.05, 0.1, 0.2]), draw.choice([2, 5, 50])
        own = capped(server, memory / str(seed), cap_usd, max_requests=size, quiet_s=0.02)

        stopped = run(own, rows)

        assert bill.usd <= spent_usd(own) + 1e-9 <= cap_usd + 2e-9, f"seed {seed}"
        assert totals(memory / str(seed)).in_batches == 0
        assert set(server.processed.values()) == {1}
        if stopped is None:
            assert n_judged(own, rows) == 12
        else:
            n_stopped += 1
            assert spent_usd(own) + next_usd(stopped) > cap_usd - 1e-4  # and the cap is used
    assert n_stopped >= 2


def next_usd(stopped: BudgetError) -> float:
    """Read what the next request could have cost."""
    found = re.search(r"next call could cost up to \$(\d+\.\d+)", str(stopped))
    assert found is not None
    return float(found[1])


def test_the_rows_that_fit_are_judged_and_a_higher_cap_goes_on(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    """A batch goes out as large as the cap allows, and a higher cap takes up the rest."""
    own = capped(server, tmp_path, 0.005)

    stopped = run(own, rows)

    assert stopped is not None
    assert stopped.reason == "budget"
    assert "run the same again with a higher cap" in str(stopped)
    sizes = [len(server.requests(batch_id)) for batch_id in server.batches]
    assert 1 <= sizes[0] == int(0.005 / worst_usd(requests(server)[0])) < 12
    # How many follow, now and in the next run, depends on when the strong judge, which does not fit,
    # is first needed.
    n_first = n_judged(own, rows)
    assert 0 < n_first < 12
    again = capped(server, tmp_path, 0.005)
    assert isinstance(run(again, rows), BudgetError)
    assert n_judged(again, rows) >= n_first
    assert spent_usd(again) <= 0.005
    higher = capped(server, tmp_path, PLENTY)
    assert run(higher, rows) is None
    assert list(server.processed.values()) == [1] * N_CALLS
    assert n_judged(higher, rows) == 12
    assert spent_usd(higher) == pytest.approx(higher.report(rows).cost_usd)


def test_a_stage_and_a_repair_question_are_set_aside_too(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    bill = Bill(share_unreadable=1.0)
    server.answer, server.held_from = bill, 0
    own = capped(server, tmp_path, PLENTY)
    held: list[tuple[float, float]] = []
    errors: list[BaseException] = []

    def judge() -> None:
        try:
            own.judge(rows)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    for n_batches in range(1, 5):  # the cheap judge, its repairs, the strong judge, its repairs
        wait_until(lambda: len(server.batches) == n_batches)  # noqa: B023
        batch_id = f"batch_{n_batches - 1}"
        worst = sum(worst_usd(line["body"]) for line in server.requests(batch_id))
        held.append((totals(tmp_path).in_batches / PICO, worst))
        server.held_from = n_batches
    thread.join()

    assert errors == []
    assert [found for found, _ in held] == pytest.approx([worst for _, worst in held])
    assert bill.usd <= spent_usd(own)


def test_progress_report_and_stats_count_batches(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    own = capped(server, tmp_path, PLENTY)

    done = own.judge(rows)

    assert done.cost_usd == pytest.approx(own.report(rows).cost_usd)
    assert done.cost_usd == pytest.approx(spent_usd(own))
    assert own.cascade.counts.n_calls == N_CALLS
    shown = CliRunner().invoke(app, ["stats", str(tmp_path)]).output
    assert f"Spent under a cap: ${spent_usd(own):.4f}; set aside for 0 batches" in shown


# What a batch's end costs


@pytest.mark.parametrize(
    ("end", "n_paid"),
    [
        (End("expired", share=0.25), 3),
        (End("cancelled", share=0.25), 3),
        (End("expired", share=0.0), 0),
        (End("failed", errors=[("", None, "This model does no batches.")]), 0),
        (End("cancelled", share=1.0, cut=tuple(range(9))), 3),  # the rest is named in no file
    ],
)
def test_requests_that_never_ran_free_what_was_set_aside(
    server: BatchServer, tmp_path: Path, rows: Dataset, end: End, n_paid: int
) -> None:
    server.ends = [end]
    server.create_faults = ["", *["401"] * 4]  # nothing after the first batch
    own = capped(server, tmp_path, PLENTY, quiet_s=0.3)

    with pytest.raises(AccountError):
        own.judge(rows)

    price = batch_price(CHEAP)
    usage = small_replies({**requests(server)[0]}).usage
    assert usage is not None
    assert totals(tmp_path).n_batches <= 2  # those that were refused, one of each stage at most
    assert spent_usd(own) == pytest.approx(n_paid * (price.cost_usd(usage) or 0))


def test_a_request_of_a_completed_batch_that_is_in_no_file_counts_at_its_most(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    server.ends = [End(cut=(0, 5))]
    own = capped(server, tmp_path, PLENTY, quiet_s=0.3)

    own.judge(rows)

    lost = [server.requests("batch_0")[index]["body"] for index in (0, 5)]
    cost = own.report(rows).cost_usd
    assert cost is not None
    assert spent_usd(own) == pytest.approx(cost + sum(map(worst_usd, lost)))


@pytest.mark.usefixtures("key_in_environment")
def test_a_cancelled_batch_keeps_its_money_until_the_next_run_books_it(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    server.held_from, server.ends = 0, [End(share=0.5)]
    kill(submitted(start(PLENTY, max_requests=12), tmp_path, 1))
    held = totals(tmp_path)
    assert held.in_batches > 0

    endpoint = Endpoint(base_url=server.base_url)
    background.run(cancel_batches(endpoint, tmp_path))
    wait_until(lambda: server.batches["batch_0"]["status"] == "cancelled")

    assert totals(tmp_path) == held
    server.held_from = None
    own = capped(server, tmp_path, PLENTY)
    own.judge(rows)
    assert totals(tmp_path).in_batches == 0
    assert list(server.processed.values()) == [1] * N_CALLS
    assert spent_usd(own) == pytest.approx(own.report(rows).cost_usd)


# Killed, and run again

_SCRIPT = """
import sys
from pathlib import Path
from datasets import Dataset
from tests.judges.test_batch_cap import capped
from tests.rows import tevatron_rows
class server:
    base_url = sys.argv[1]
capped(server, Path(sys.argv[2]), float(sys.argv[3]) or None, max_requests=int(sys.argv[4])).judge(
    Dataset.from_list(tevatron_rows())
)
"""


@pytest.fixture
def start(
    server: BatchServer, tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a run of batches of three requests in another process."""
    started: list[subprocess.Popen[str]] = []

    def start(cap_usd: float | None, max_requests: int = 3) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SCRIPT, server.base_url, str(tmp_path),
             str(cap_usd or 0), str(max_requests)],
            env=subprocess_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(is_so: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def submitted(process: subprocess.Popen[str], cache: Path, n_batches: int) -> subprocess.Popen[str]:
    """Wait until so many batches of a run are known to be under way."""
    folder = BatchFolder(cache)
    wait_until(lambda: sum(m.batch_id is not None for m in folder.manifests()) >= n_batches)
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_runs_batches_keep_their_money_until_they_are_found_again(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    cap_usd, bill = 0.012, Bill(3)
    server.answer, server.held_from = bill, 0
    kill(submitted(start(cap_usd), tmp_path, 3))  # two full ones, and what else had room
    held = totals(tmp_path)
    worst = sum(map(worst_usd, requests(server)))
    assert held.in_batches / PICO == pytest.approx(worst)
    assert 0.8 * cap_usd < worst <= cap_usd

    plain = capped(server, tmp_path, cap_usd, batch=False)
    with pytest.raises(BudgetError, match="are set aside for batches under way"):
        plain.judge(rows)
    assert server.seen == []

    server.held_from = None
    own = capped(server, tmp_path, cap_usd)
    run(own, rows)
    assert totals(tmp_path).in_batches == 0
    assert bill.usd <= spent_usd(own) + 1e-9 <= cap_usd + 2e-9
    assert run(capped(server, tmp_path, PLENTY), rows) is None
    assert set(server.processed.values()) == {1}
    assert n_judged(own, rows) == 12


def test_a_batch_made_as_the_run_died_keeps_its_money(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    """Its id never reached the disk; it is found by its metadata, and booked once."""
    server.held_from, server.hangs_after_create = 0, True
    process = start(PLENTY)
    wait_until(lambda: len(server.batches) == 4)
    kill(process)
    assert totals(tmp_path).n_batches == 4
    server.held_from, server.hangs_after_create = None, False

    own = capped(server, tmp_path, PLENTY)
    own.judge(rows)

    assert list(server.processed.values()) == [1] * N_CALLS
    assert totals(tmp_path).in_batches == 0
    assert spent_usd(own) == pytest.approx(own.report(rows).cost_usd)


def test_a_run_killed_before_its_batches_were_made_holds_nothing_for_long(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    server.create_faults = ["hang"] * 4
    process = start(PLENTY)
    wait_until(lambda: not server.create_faults)
    kill(process)
    assert totals(tmp_path).n_batches == 4

    own = capped(server, tmp_path, PLENTY)
    own.judge(rows)

    assert totals(tmp_path).in_batches == 0
    assert spent_usd(own) == pytest.approx(own.report(rows).cost_usd)


def test_kills_at_any_moment_never_lead_above_the_cap(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    cap_usd, bill = 0.03, Bill(5, share_unreadable=0.2)
    server.answer, server.latency_s = bill, 0.05
    for n_kills in range(3):
        process = start(cap_usd)
        n_files = len(server.files)
        wait_until(lambda: len(server.files) > n_files or process.poll() is not None)  # noqa: B023
        time.sleep(0.04 * n_kills)
        kill(process)
        assert bill.usd <= cap_usd

    own = capped(server, tmp_path, cap_usd)
    run(own, rows)

    assert totals(tmp_path).in_batches == 0
    assert bill.usd <= spent_usd(own) + 1e-9 <= cap_usd + 2e-9
    assert run(capped(server, tmp_path, PLENTY), rows) is None
    assert set(server.processed.values()) == {1}


def test_a_run_without_a_cap_books_what_it_collects(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    server.held_from = 0
    kill(submitted(start(PLENTY), tmp_path, 4))
    server.held_from = None
    capped(server, tmp_path, None).judge(rows)

    found = totals(tmp_path)

    paid = 12 * (batch_price(CHEAP).cost_usd(small_replies(requests(server)[0]).usage or {}) or 0)
    assert (found.n_batches, found.spent / PICO) == (0, pytest.approx(paid))


def test_a_stage_that_no_row_has_asked_yet_is_looked_at_before_the_run_stops(
    server: BatchServer, tmp_path: Path, start: Callable[..., Any]
) -> None:
    """Batches of the strong judge hold all the money; their end frees it for new rows."""
    server.held_from = 1
    process = start(PLENTY, max_requests=12)
    wait_until(lambda: len(server.batches) == 2)
    kill(submitted(process, tmp_path, 1))
    held = totals(tmp_path)
    assert held.n_batches == 1
    server.held_from = None
    new = Dataset.from_list(tevatron_rows(20)[12:])
    cap_usd = (held.spent + held.in_batches) / PICO

    assert run(capped(server, tmp_path, cap_usd), new) is None

    assert totals(tmp_path).in_batches == 0
    assert totals(tmp_path).spent / PICO <= cap_usd


# Together with others


def test_batches_and_calls_of_two_processes_share_one_cap(
    server: BatchServer, tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cap_usd, bill = 0.08, Bill(7)
    plain = BatchServer._reply

    def reply(self: BatchServer, body: dict[str, Any]) -> dict[str, Any]:
        bill.is_batch = True
        try:
            return plain(self, body)
        finally:
            bill.is_batch = False  # what comes otherwise is a call, at twice the price

    monkeypatch.setattr(BatchServer, "_reply", reply)
    bill.is_batch = False
    server.answer, server.latency_s = bill, 0.02
    process = start(cap_usd)
    wait_until(lambda: len(server.batches) >= 1 or process.poll() is not None)
    live = capped(server, tmp_path, cap_usd, batch=False)

    run(live, Dataset.from_list(tevatron_rows(24)[::-1]))
    process.wait(60)

    assert process.returncode in (0, 1), process.communicate()
    assert server.seen
    assert server.batches
    assert bill.usd <= spent_usd(live) + 1e-9 <= cap_usd + 2e-9
    assert totals(tmp_path).in_batches == 0
    second = capped(server, tmp_path, cap_usd)
    with (
        BatchFolder(tmp_path).locked(),
        pytest.raises(CacheError, match="another process runs batches"),
    ):
        second.judge(Dataset.from_list(tevatron_rows()))


def test_a_batch_waits_for_what_another_process_may_give_back(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    """The calls of a process that runs hold all there is; they come back before the run gives up."""
    cap_usd = 0.1
    own = capped(server, tmp_path, cap_usd, quiet_s=0.02)
    assert own.budget is not None
    other = Budget(cap_usd, name="test", folder=tmp_path, prices=Prices({"m": (2.5, 10.0)}))
    body = {"messages": [], "max_completion_tokens": 9_900}

    async def hold() -> Any:
        return await other.reserve("m", body)

    reservation = background.run(hold())
    done: list[BudgetError | None] = []
    thread = threading.Thread(target=lambda: done.append(run(own, rows)))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    assert len(server.batches) == 0
    other.settle(reservation, None)
    thread.join(60)

    assert done == [None]
    assert n_judged(own, rows) == 12


# Settings that cannot work


def test_a_cap_needs_a_known_price_before_the_first_upload(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    with pytest.raises(SettingError, match=r"--price my-model=IN,OUT"):
        Relabeler("paper", models=["my-model"], max_cost_usd=1, batch=True, cache=tmp_path)
    assert server.files == {}

    priced = Relabeler(
        "paper", models=["my-model"], base_url=server.base_url, api_key="x", max_cost_usd=1,
        batch=BatchSettings(**FAST), cache=tmp_path, prices={"my-model": (1.0, 2.0)},
    )  # fmt: skip
    priced.judge(rows)
    assert 0 < spent_usd(priced) < 1


def own_judge(server: BatchServer, budget: Budget | None, model: str = STRONG) -> ChatJudge:
    return ChatJudge(model, endpoint=Endpoint(base_url=server.base_url), api_key="x", budget=budget)


def test_a_judges_own_budget_holds_in_batches(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    budget = Budget(0.03, name="mine", folder=tmp_path, prices=Prices())
    batch = BatchSettings(**FAST)
    own = Relabeler(own_judge(server, budget), batch=batch, cache=tmp_path)

    assert isinstance(run(own, rows), BudgetError)

    assert len(server.batches) > 1
    assert 0 < budget.spent_usd <= 0.03
    elsewhere = Budget(1.0, name="mine", folder=tmp_path / "other", prices=Prices())
    with pytest.raises(SettingError, match="in the cache's folder"):
        Relabeler(own_judge(server, elsewhere), batch=batch, cache=tmp_path).judge(rows)
    pair = [own_judge(server, budget), own_judge(server, None)]
    with pytest.raises(SettingError, match="expected one budget"):
        Relabeler(pair, batch=batch, cache=tmp_path).judge(rows)


# The command line


def test_the_command_stops_with_2_says_why_and_goes_on_with_more(
    server: BatchServer, tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tevatron_rows()))
    script = (
        "import hf_relabel.transform\nfrom hf_relabel.cli import main\n"
        "from tests.judges.test_batch_cap import FAST, BatchSettings\n"
        "hf_relabel.transform.BatchSettings = lambda: BatchSettings(**FAST)\nmain()"
    )

    def command(cap: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", script, "run", "rows.jsonl", "--output", "out", "--cache",
             "cache", "--batch", "--max-cost-usd", cap, "--base-url", server.base_url],
            cwd=tmp_path, env=subprocess_env(OPENAI_API_KEY="x"), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    code, words = command("0.005")
    assert (code, "Traceback" in words) == (2, False)
    assert "the cap of $0.0050 is reached" in words
    assert "at most $0.00" in words
    code, words = command("5")
    assert code == 0
    assert "of the cap of $5.00 are spent." in words
    assert list(server.processed.values()) == [1] * N_CALLS


# Files on the server


def test_files_are_deleted_once_their_replies_are_in_the_cache(
    tmp_path: Path, rows: Dataset
) -> None:
    n_looked = 0

    class Watched(BatchServer):
        async def _delete(self, request: Any) -> Any:
            nonlocal n_looked
            cache = VerdictCache(tmp_path)
            for batch in self.batches.values():
                if batch.get("output_file_id") == request.match_info["id"]:
                    lines = self.files[batch["output_file_id"]].splitlines()
                    keys = [base_key(json.loads(line)["custom_id"]) for line in lines]
                    assert all(map(cache.has_call, keys))
                    n_looked += len(keys)
            cache.close()
            return await super()._delete(request)

    with Watched(small_replies) as server:
        server.ends = [
            End("expired", share=0.5), End(), End("failed", errors=[("x", 1, "Odd.")])
        ]  # fmt: skip
        capped(server, tmp_path, PLENTY).judge(rows)

    assert n_looked >= N_CALLS - 1
    assert len(server.files) >= 7
    assert sorted(server.deleted) == sorted(server.files)


def test_files_that_cannot_be_deleted_fail_nothing(
    server: BatchServer, tmp_path: Path, rows: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    server.delete_faults = ["500", "403", "429"]
    caplog.set_level("INFO", logger="hf_relabel")
    own = capped(server, tmp_path, None)

    own.judge(rows)

    assert n_judged(own, rows) == 12
    assert len(server.files) - len(server.deleted) == 3
    kept = [record.message for record in caplog.records if "stays on the server" in record.message]
    assert len(kept) == 3


def test_files_are_kept_where_that_is_asked_for(
    server: BatchServer, tmp_path: Path, rows: Dataset
) -> None:
    capped(server, tmp_path, None, keeps_files=True).judge(rows)

    assert len(server.files) == 4
    assert server.deleted == []
    assert not ledger_file(tmp_path).exists()  # no cap, no ledger


def test_a_run_that_was_killed_leaves_no_file_behind_after_the_next(
    server: BatchServer, tmp_path: Path, rows: Dataset, start: Callable[..., Any]
) -> None:
    server.held_from = 0
    kill(submitted(start(None), tmp_path, 4))
    server.held_from = None

    capped(server, tmp_path, None).judge(rows)

    assert len(server.files) >= 10
    assert sorted(server.deleted) == sorted(server.files)
