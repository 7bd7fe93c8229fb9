"""Costs as people see them: estimates before a run, reports after it, both in one process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.cli import run_app
from hf_relabel.estimate import estimate
from hf_relabel.judges.models import ShutdownWarning
from hf_relabel.judging import Progress
from hf_relabel.report import RelabelReport
from tests.chat_server import Answer, ChatServer, from_key
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
Command = Callable[..., str]


@pytest.fixture
def command(
    chat_server: ChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Run a command in this process, against the server, and return what it printed."""
    chat_server.answer = from_key(KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: str, n_rows: int = 12) -> str:
        rows = "".join(json.dumps(row) + "\n" for row in tevatron_rows(n_rows))
        Path(f"rows-{n_rows}.jsonl").write_text(rows)
        if name == "run":
            args = ("--output", "out", *args)
        server = ("--base-url", chat_server.base_url, "--cache", "cache")
        assert run_app([name, f"rows-{n_rows}.jsonl", *server, *args]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


def stages() -> list[dict[str, Any]]:
    report = json.loads(Path("out/report.json").read_text())
    return report["stages"]  # type: ignore[no-any-return]


def test_the_report_prices_every_stage(command: Command) -> None:
    printed = command("run", "--price", "gpt-4o=5,20")

    cheap, strong = stages()
    tokens = cheap["prompt_tokens"], cheap["completion_tokens"]
    assert cheap["cost_usd"] == pytest.approx((tokens[0] * 0.15 + tokens[1] * 0.6) / 1e6)
    assert cheap["price_source"].startswith("genai-prices ")
    tokens = strong["prompt_tokens"], strong["completion_tokens"]
    assert strong["cost_usd"] == pytest.approx((tokens[0] * 5 + tokens[1] * 20) / 1e6)
    assert strong["price_source"] == "given"
    assert f"Cost: ${cheap['cost_usd'] + strong['cost_usd']:.4f} (genai-prices " in printed


def test_an_unknown_price_is_said_and_never_zero(command: Command) -> None:
    printed = command("run", "--model", "mine")

    assert stages()[0]["cost_usd"] is None
    assert "no price for mine" in printed
    assert "hf-relabel[prices]" in printed


@pytest.mark.parametrize("every", [2, 1000])
def test_calls_without_counts_make_the_cost_a_lower_bound_or_unknown(
    command: Command, chat_server: ChatServer, every: int
) -> None:
    answer, turns = from_key(KEY), iter(range(1, 1000))
    chat_server.answer = lambda body: Answer(
        text=str(answer(body)), has_usage=next(turns) % every == 0
    )

    printed = command("run", "--model", "m", "--price", "m=1,2")

    (stage,) = stages()
    assert stage["calls_without_usage"] == (6 if every == 2 else 12)
    if every == 2:
        assert stage["cost_usd"] == pytest.approx(
            (stage["prompt_tokens"] + 2 * stage["completion_tokens"]) / 1e6
        )
        assert "Cost: at least $" in printed
    else:
        assert stage["cost_usd"] is None
        assert "no token counts from m" in printed


def test_a_local_judge_costs_nothing_and_an_old_report_knows_no_cost(tmp_path: Path) -> None:
    rows = Dataset.from_list(tevatron_rows(2))
    judge = ScriptedJudge("j", answers={}, default=Relevance.NOT_RELEVANT)
    relabeler = Relabeler(judge, cache=tmp_path)

    done = relabeler.judge(rows)
    report = relabeler.report(rows)

    assert done.cost_usd is None
    assert (report.cost_usd, report.stages[0].price_source) == (0.0, "local")
    assert report.stages[0].is_cost_exact
    assert RelabelReport.from_json(report.to_json()) == report
    old = report.to_json()
    del old["stages"][0]["cost_usd"]
    assert RelabelReport.from_json(old).cost_usd is None
    assert estimate(relabeler, {"train": rows}).cost_usd == 0.0


def test_progress_tells_the_cost_so_far(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = from_key(KEY)
    rows, seen = Dataset.from_list(tevatron_rows(4)), list[Progress]()
    relabeler = Relabeler(
        "paper",
        base_url=chat_server.base_url,
        api_key="x",
        cache=tmp_path,
        prices={"gpt-4o": (1, 1)},
    )

    done = relabeler.judge(rows, progress=seen.append)

    assert done.cost_usd is not None
    assert done.cost_usd == pytest.approx(relabeler.report(rows).cost_usd)
    costs = [progress.cost_usd or 0.0 for progress in seen]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert relabeler.judge(rows).cost_usd is None  # no call was made
    unknown = Relabeler(
        "paper", base_url=chat_server.base_url, api_key="x", cache=tmp_path, models=["mine"]
    )
    assert unknown.judge(rows).cost_usd is None


def test_estimate_prints_costs_and_takes_prices(command: Command, chat_server: ChatServer) -> None:
    printed = command("estimate", n_rows=100)

    assert "1,300 tokens a reply" in printed
    assert "66% of rows passed on by each stage" in printed
    assert "verified 20" in printed
    free = command("estimate", "--price", "gpt-4o=0,0", "--price", "gpt-4o-mini=0,0")
    assert "Cost: $0.00 (given)" in free
    assert "no price for mine" in command("estimate", "--model", "mine")
    assert chat_server.seen == []


def test_estimate_multiplies_tokens_by_prices(tmp_path: Path) -> None:
    rows = Dataset.from_list(tevatron_rows(12))
    relabeler = Relabeler("paper", cache=tmp_path, prices={"gpt-4o": (3, 4)})

    found = estimate(relabeler, {"train": rows})

    cheap, strong = found.stages
    assert (cheap.calls, cheap.completion_tokens) == (12, 12 * 1300)
    assert (strong.calls, strong.share_of_rows) == (8, 0.66)
    assert strong.prompt_tokens is not None
    assert strong.completion_tokens is not None
    expected = (strong.prompt_tokens * 3 + strong.completion_tokens * 4) / 1e6
    assert strong.cost_usd == pytest.approx(expected, rel=1e-3)
    assert cheap.cost_usd is not None
    assert found.cost_usd == cheap.cost_usd + (strong.cost_usd or 0)
    assert (cheap.price_source or "").startswith("genai-prices ")


def test_estimate_measures_lengths_and_shares_in_the_cache(command: Command) -> None:
    command("run", n_rows=30)
    cheap, strong = stages()

    printed = command("estimate", n_rows=200)

    mean = cheap["completion_tokens"] / 30
    assert f"{mean:,.0f} tokens a reply of gpt-4o-mini, as 30 in the cache" in printed
    assert f"{strong['calls'] / 30:.0%} of rows passed on, as of 30 in the cache" in printed
    assert "1,300 tokens a reply" in printed  # of gpt-4o: a few replies are no guide
    assert "15% of them are in the cache" in printed


def test_the_share_passed_on_is_that_of_the_same_judges_in_any_cascade(
    chat_server: ChatServer, tmp_path: Path
) -> None:
    chat_server.answer = from_key(KEY)
    rows = Dataset.from_list(tevatron_rows(24))
    settings: dict[str, Any] = {
        "base_url": chat_server.base_url, "api_key": "x", "cache": tmp_path,
    }  # fmt: skip
    Relabeler("paper", models=["a", "b"], **settings).judge(rows)

    def share(*models: str) -> float:
        relabeler = Relabeler("paper", models=models, **settings)
        return estimate(relabeler, {"train": rows}).stages[1].share_of_rows

    assert share("a", "other") == pytest.approx(4 / 24)
    assert share("b", "a") == 0.66
