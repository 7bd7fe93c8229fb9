"""The cap on the cost: never exceeded, by any number of calls, processes and runs."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import Relabeler, background
from hf_relabel.errors import AccountError, BudgetError, CacheError, JudgeError, SettingError
from hf_relabel.judges.budget import Budget, worst_tokens
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.models import ShutdownWarning
from hf_relabel.judges.money import Prices
from hf_relabel.questions import Question
from tests.chat_server import Answer, ChatServer, Fault, from_key, prompt_of
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
PRICES = Prices({"m": (2.5, 10.0)})
IN_FLIGHT = 256


def body(n_chars: int = 1000, limit: int = 1000, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "x" * n_chars}]
    return {"model": "m", "messages": messages, "max_completion_tokens": limit, **more}


def worst_usd(request: Mapping[str, Any]) -> float:
    price = PRICES.price_of("m")
    assert price is not None
    return price.worst_usd(*worst_tokens(request))


def budget(folder: Path, cap_usd: float, name: str = "test") -> Budget:
    return Budget(cap_usd, name=name, folder=folder, prices=PRICES)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


class Bill:
    """What a provider charges: the sum of what its replies counted, in whole tokens."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.n_calls = 0

    def add(self, counts: Mapping[str, int]) -> None:
        self.prompt += counts["prompt_tokens"]
        self.completion += counts["completion_tokens"]
        self.n_calls += 1

    @property
    def usd(self) -> float:
        return (self.prompt * 2.5 + self.completion * 10) / 1e6


async def spend(own: Budget, bill: Bill, seed: int, n_calls: int) -> int:
    """Make calls with random prompts and replies, 256 at a time; return how many were refused."""
    draw = random.Random(seed)
    slots, n_refused = asyncio.Semaphore(IN_FLIGHT), 0

    async def call() -> None:
        nonlocal n_refused
        async with slots:
            request = body(draw.randrange(100, 12_000), draw.choice([256, 4096]))
            try:
                reservation = await own.reserve("m", request)
            except BudgetError:
                n_refused += 1
                return
            for _ in range(draw.randrange(1, 6)):  # replies come in another order
                await asyncio.sleep(0)
            most_in, most_out = worst_tokens(request)
            counts = usage(
                draw.choice([most_in, draw.randint(0, most_in)]),
                draw.choice([most_out, draw.randint(0, most_out)]),
            )
            fate = draw.random()
            if fate < 0.1:  # refused before the model worked
                own.settle(reservation, None)
            else:
                bill.add(counts)
                own.settle(reservation, {} if fate < 0.15 else counts)

    await asyncio.gather(*(call() for _ in range(n_calls)))
    return n_refused


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: a busy disk takes 10 ms and more a commit."""
    shared = Path("/dev/shm")  # noqa: S108
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_fifty_runs_at_256_in_flight_never_spend_more_than_the_cap(memory: Path) -> None:
    used = []
    for seed in range(50):
        cap_usd = random.Random(seed).choice([0.05, 0.5, 3.0, 10.0])
        own, bill = budget(memory, cap_usd, name=str(seed)), Bill()

        n_refused = asyncio.run(spend(own, bill, seed, 400))

        assert bill.usd <= own.spent_usd + 1e-9 <= cap_usd + 2e-9, f"seed {seed}"
        assert own.reserved_usd == 0
        assert n_refused or bill.n_calls > 320
        if n_refused:
            used.append(own.spent_usd / cap_usd)
    assert len(used) > 20
    assert sorted(used)[len(used) // 2] > 0.97  # and the cap is used, too


def test_another_run_goes_on_with_what_is_left(tmp_path: Path) -> None:
    bill = Bill()
    for seed in range(4):
        asyncio.run(spend(budget(tmp_path, 2.0), bill, seed, 40))

    assert bill.usd <= budget(tmp_path, 2.0).spent_usd <= 2.0
    assert budget(tmp_path, 2.0, name="other").spent_usd == 0
    more = Bill()
    asyncio.run(spend(budget(tmp_path, 4.0), more, 9, 300))  # a higher cap goes on from there
    assert more.usd > 1.5
    assert bill.usd + more.usd <= budget(tmp_path, 4.0).spent_usd <= 4.0


def test_a_call_waits_while_others_may_give_money_back_and_order_is_kept(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        own, done = budget(tmp_path, worst_usd(body()) * 1.5), []
        first = await own.reserve("m", body())

        async def wait(name: str) -> None:
            reservation = await own.reserve("m", body())
            done.append(name)
            await asyncio.sleep(0)
            own.settle(reservation, usage(1, 1))

        tasks = [asyncio.create_task(wait(name)) for name in "abc"]
        await asyncio.sleep(0.01)
        assert done == []
        own.settle(first, usage(10, 10))
        own.settle(first, usage(10, 10))  # a second time does nothing
        await asyncio.gather(*tasks)
        assert own.spent_usd == pytest.approx((10 + 3) * 12.5e-6)
        return done

    assert asyncio.run(scenario()) == ["a", "b", "c"]


def test_a_refusal_says_what_was_spent_and_how_to_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        own = budget(tmp_path, 0.02)
        reservation = await own.reserve("m", body())
        own.settle(reservation, usage(1000, 1000))
        with pytest.raises(BudgetError, match=r"cap of \$0\.0200 is reached: \$0\.0125") as found:
            await own.reserve("m", body())
        assert found.value.reason == "budget"
        assert isinstance(found.value, AccountError)
        copy = pickle.loads(pickle.dumps(found.value))  # noqa: S301
        assert (str(copy), copy.reason) == (str(found.value), "budget")
        small = await own.reserve("m", body(10, 10))  # a cheaper call still fits
        own.settle(small, None)

    asyncio.run(scenario())


def test_a_cancelled_wait_leaves_the_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        own = budget(tmp_path, worst_usd(body()) * 1.5)
        first = await own.reserve("m", body())
        tasks = [asyncio.create_task(own.reserve("m", body())) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        tasks[1].cancel()
        own.settle(first, usage(1, 1))
        own.settle(await tasks[2], usage(1, 1))
        assert own.reserved_usd == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("counts", "share"), [(None, 0.0), ({}, 1.0), ({"prompt_tokens": 3}, 1.0), (usage(0, 0), 0.0)]
)
def test_a_reply_without_counts_costs_all_that_was_reserved(
    tmp_path: Path, counts: dict[str, int] | None, share: float
) -> None:
    async def scenario() -> None:
        own = budget(tmp_path, 1.0)
        reservation = await own.reserve("m", body())
        assert own.reserved_usd == reservation.usd == pytest.approx(worst_usd(body()))
        own.settle(reservation, counts)
        assert own.spent_usd == pytest.approx(share * reservation.usd)

    asyncio.run(scenario())


def test_the_worst_case_of_a_call_holds_for_any_text() -> None:
    """A byte-level tokenizer makes at most one token of each byte."""
    words = "naïve 東京 👩‍🔬 \ud83d"  # the last one is half an emoji
    n_bytes = len(words.encode("utf-8", "surrogatepass"))
    request = {"messages": [{"role": "user", "content": words}] * 3, "max_completion_tokens": 7}

    n_prompt, n_reply = worst_tokens(request)

    assert 3 * n_bytes + 3 * len("user") <= n_prompt <= 3 * n_bytes + 200
    assert n_reply == 7
    schema = {"type": "json_schema", "json_schema": {"name": "é" * 500}}
    assert worst_tokens({**request, "response_format": schema, "n": 2})[0] > n_prompt + 1000
    assert worst_tokens({**request, "n": 2})[1] == 14
    assert worst_tokens({"messages": [], "max_tokens": 5})[1] == 5


def test_a_reply_without_limit_or_a_model_without_price_cannot_be_capped(tmp_path: Path) -> None:
    own = budget(tmp_path, 1.0)

    with pytest.raises(SettingError, match="max_completion_tokens"):
        asyncio.run(own.reserve("m", {"messages": []}))
    with pytest.raises(SettingError, match=r"--price unknown-model=IN,OUT"):
        asyncio.run(own.reserve("unknown-model", body()))


@pytest.mark.parametrize("cap_usd", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_is_a_positive_number(tmp_path: Path, cap_usd: float) -> None:
    with pytest.raises(SettingError, match="above 0"):
        budget(tmp_path, cap_usd)


def test_cache_writes_and_dearer_tiers_are_in_the_worst_case(tmp_path: Path) -> None:
    async def reserved(model: str, **more: Any) -> float:
        own = Budget(10, name=model, folder=tmp_path, prices=Prices())
        reservation = await own.reserve(model, body(100_000, 1, **more))
        own.settle(reservation, None)
        return reservation.usd

    assert asyncio.run(reserved("gpt-6-luna")) == pytest.approx(0.0125, rel=0.01)  # not 0.0100
    assert asyncio.run(reserved("gpt-4o-mini")) == pytest.approx(0.0150, rel=0.01)
    dearer = asyncio.run(reserved("gpt-4o-mini", service_tier="priority"))
    assert dearer == pytest.approx(0.0250, rel=0.01)


def test_calls_do_not_touch_the_disk_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[object] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connected.append(a) or connect(*a, **k))
    bill = Bill()

    asyncio.run(spend(budget(tmp_path, 1000.0), bill, 0, 2000))

    assert bill.n_calls > 1700
    assert len(connected) < 60


def test_a_damaged_ledger_stops_the_run_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "budgets.db").write_text("no database at all, but long enough to be looked at" * 9)

    with pytest.raises(CacheError, match="ledger of costs"):
        asyncio.run(budget(tmp_path, 1.0).reserve("m", body()))

    assert (tmp_path / "budgets.db").read_text().startswith("no database")


# --- several processes


def _spend_in_process(own: Budget, seed: int, results: Any) -> None:
    bill = Bill()
    asyncio.run(spend(own, bill, seed, 150))
    results.put(bill.usd)


def test_processes_share_one_cap_and_nothing_stays_locked(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    own, results = budget(tmp_path, 1.5), context.SimpleQueue()
    workers = [
        context.Process(target=_spend_in_process, args=(own, seed, results)) for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    billed = [results.get() for _ in workers]
    for worker in workers:
        worker.join(30)

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sum(billed) <= own.spent_usd + 1e-9 <= 1.5 + 2e-9
    assert own.spent_usd > 0.9 * 1.5
    held = sqlite3.connect(tmp_path / "budgets.db").execute("SELECT * FROM holder").fetchall()
    assert held == []


_HOLD = """
import asyncio, sys
from pathlib import Path
from hf_relabel.judges.budget import Budget
from hf_relabel.judges.money import Prices

async def main():
    own = Budget(float(sys.argv[2]), name="test", folder=Path(sys.argv[1]),
                 prices=Prices({"m": (2.5, 10.0)}))
    body = {"messages": [{"role": "user", "content": "x" * 1000}], "max_completion_tokens": 1000}
    done = await own.reserve("m", body)
    held = await own.reserve("m", body)
    own.settle(done, {"prompt_tokens": 10, "completion_tokens": 10})
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    own.settle(held, {"prompt_tokens": 10, "completion_tokens": 10})
    print("settled", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


@pytest.fixture
def holder(tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]) -> Any:
    """Start a process that holds most of a small budget for a call in flight."""
    started: list[subprocess.Popen[str]] = []

    def start(cap_usd: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(tmp_path), str(cap_usd)],
            env=subprocess_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_held_counts_as_spent(tmp_path: Path, holder: Any) -> None:
    cap_usd = 2.2 * worst_usd(body())
    process = holder(cap_usd)
    own = budget(tmp_path, cap_usd)
    assert own.spent_usd == 0  # it runs, and has not reported

    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    assert 2 * worst_usd(body()) <= own.spent_usd + 1e-9 <= cap_usd + 2e-9
    with pytest.raises(BudgetError, match="held by processes that were killed"):
        asyncio.run(own.reserve("m", body()))


def test_a_call_waits_for_what_another_process_may_give_back(tmp_path: Path, holder: Any) -> None:
    cap_usd = 2.2 * worst_usd(body())
    process = holder(cap_usd)

    async def scenario() -> float:
        own = budget(tmp_path, cap_usd)
        waiting = asyncio.create_task(own.reserve("m", body()))
        await asyncio.sleep(0.25)
        assert not waiting.done()
        process.stdin.write("\n")
        process.stdin.flush()
        own.settle(await waiting, None)
        return own.spent_usd

    assert asyncio.run(scenario()) == pytest.approx(2 * 10 * 12.5e-6)


def test_a_budget_pickles_as_its_settings(tmp_path: Path) -> None:
    async def reserve_twice() -> None:
        own = budget(tmp_path, 1.0)
        before = pickle.dumps(own)
        reservation = await own.reserve("m", body())
        assert pickle.dumps(own) == before
        copy = pickle.loads(before)  # noqa: S301
        assert copy.reserved_usd == 0
        own.settle(reservation, usage(1000, 0))
        assert copy.spent_usd == own.spent_usd == pytest.approx(0.0025)

    asyncio.run(reserve_twice())


# --- over HTTP, through a Relabeler


def charging(bill: Bill, seed: int = 0) -> Callable[[Mapping[str, Any]], Answer]:
    """Answer by the key, and count random tokens up to the most that the request allows."""
    draw, answer = random.Random(seed), from_key(KEY)

    def reply(request: Mapping[str, Any]) -> Answer:
        most_in = len(prompt_of(request).encode())
        counts = usage(draw.randint(1, most_in), draw.randint(1, request["max_completion_tokens"]))
        bill.add(counts)
        return Answer(text=str(answer(request)), usage=counts)

    return reply


def relabeler(
    server: ChatServer, folder: Path, cap_usd: float | None, **settings: Any
) -> Relabeler:
    return Relabeler(
        "paper",
        models=["m"],
        base_url=server.base_url,
        cache=folder / "cache",
        prices={"m": (2.5, 10.0)},
        max_cost_usd=cap_usd,
        **settings,
    )


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(tevatron_rows(200))


def test_over_http_the_servers_own_bill_stays_within_the_cap(
    tmp_path: Path, chat_server: ChatServer, rows: Dataset
) -> None:
    bill = Bill()
    chat_server.answer, chat_server.latency_s = charging(bill), 0.01
    capped = relabeler(chat_server, tmp_path, 1.5, api_key="x")

    with pytest.raises(BudgetError, match="cap of"):
        capped.judge(rows)

    assert capped.budget is not None
    assert 1.3 < bill.usd <= capped.budget.spent_usd <= 1.5
    assert capped.cache.stats().n_calls == bill.n_calls == len(chat_server.seen)

    again = relabeler(chat_server, tmp_path, 1.5, api_key="x")  # the same budget: still used up
    with pytest.raises(BudgetError):
        again.judge(rows)
    assert bill.usd <= 1.5

    done = relabeler(chat_server, tmp_path, 20, api_key="x").judge(rows)
    assert done.n_rows == 200
    assert bill.n_calls == 200
    report = relabeler(chat_server, tmp_path, None, api_key="x").report(rows)
    assert report.cost_usd == pytest.approx(bill.usd)


@pytest.mark.usefixtures("key_in_environment")
def test_two_workers_of_map_share_one_cap(
    tmp_path: Path, chat_server: ChatServer, rows: Dataset
) -> None:
    bill = Bill()
    chat_server.answer = charging(bill)
    capped = relabeler(chat_server, tmp_path, 1.0)

    with pytest.raises(BudgetError, match="cap of"):
        rows.map(capped, batched=True, batch_size=20, num_proc=2)

    assert capped.budget is not None
    assert 0 < bill.usd <= 1.0
    assert bill.usd <= capped.budget.spent_usd + 1e-9 <= 1.0 + 2e-9
    finished = relabeler(chat_server, tmp_path, 30)
    assert len(rows.map(finished, batched=True, batch_size=20, num_proc=2)) == 200
    assert bill.usd <= 30


@pytest.mark.parametrize(
    ("fault", "is_billed"),
    [("500", False), ("429", False), ("broken_json", True), ("reset", True), ("no_choices", True)],
)
def test_a_failed_call_counts_where_the_model_may_have_worked(
    tmp_path: Path, chat_server: ChatServer, fault: str, is_billed: bool
) -> None:
    bill = Bill()
    chat_server.answer = charging(bill)
    chat_server.fail(Fault(fault, {"retry-after-ms": "1"}))
    capped = relabeler(chat_server, tmp_path, 5, api_key="x")

    capped.judge(Dataset.from_list(tevatron_rows(1)))

    assert capped.budget is not None
    unseen = capped.budget.spent_usd - bill.usd
    assert len(chat_server.seen) == 2
    assert unseen > 0.04 if is_billed else unseen == pytest.approx(0, abs=1e-9)


def test_a_server_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    judge = ChatJudge(
        "m",
        endpoint=Endpoint(base_url="http://127.0.0.1:9/v1"),
        api_key="x",
        retry=RetryRule(max_attempts=2, first_wait_s=0.01),
        budget=(own := budget(tmp_path, 1.0)),
    )

    with pytest.raises(JudgeError, match="m"):
        background.run(judge.ask(Question(query="q", passages=("p",))))

    assert (own.spent_usd, own.reserved_usd) == (0, 0)


def test_a_cap_needs_known_prices_before_the_first_call(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--price my-deployment=IN,OUT"):
        Relabeler("paper", models=["my-deployment"], max_cost_usd=1, cache=tmp_path)

    assert not (tmp_path / "budgets.db").exists()
    assert Relabeler("paper", max_cost_usd=1, cache=tmp_path).budget is not None


def test_a_cap_changes_no_fingerprint_and_no_judge_of_the_user(tmp_path: Path) -> None:
    judge = ChatJudge("gpt-4o", api_key="sk-secret123")

    capped = Relabeler(judge, max_cost_usd=1, cache=tmp_path)
    plain = Relabeler(judge, cache=tmp_path)

    assert capped.fingerprint == plain.fingerprint
    assert judge.budget is None
    inner = capped.cascade.stages[0].judge
    assert isinstance(inner, ChatJudge)
    assert inner.budget is capped.budget is not None
    assert b"sk-secret123" not in pickle.dumps(capped)
    copy = pickle.loads(pickle.dumps(capped))  # noqa: S301
    assert copy.cascade.stages[0].judge.budget is copy.budget
    assert capped.settings() == plain.settings()
