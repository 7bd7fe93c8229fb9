"""The preset "screened", end to end: a cross-encoder, then two chat models over real HTTP."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from hf_relabel import CrossEncoderJudge, Relabeler
from hf_relabel.cli import run_app
from hf_relabel.estimate import estimate
from hf_relabel.files import write_relabeled
from hf_relabel.formats import detect
from hf_relabel.hub.build import build
from hf_relabel.hub.check import check
from hf_relabel.hub.settings import BuildSettings
from hf_relabel.judges.models import ShutdownWarning
from tests.chat_answers import passages_shown, prompt_of
from tests.chat_server import ChatServer, from_key
from tests.cross_encoders import FALSE, TRAP, lit_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
Make = Callable[..., Relabeler]
ROWS = lit_rows()
SUSPECT = (0, 2, 4)
TRUTH = {(ROWS[index]["query"], FALSE.format(index)): "worse" for index in SUSPECT}
N_PASSAGES = sum(len(row["neg"]) for row in ROWS)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.fixture
def make(chat_server: ChatServer, cross_encoder: str, tmp_path: Path) -> Make:
    """Build the preset's relabeler on the small cross-encoder, the server and one cache."""
    chat_server.answer = from_key(TRUTH)

    def build_it(**settings: Any) -> Relabeler:
        given = {
            "screen": cross_encoder,
            "screen_threshold": 0.1,
            "base_url": chat_server.base_url,
            "api_key": "x",
            "cache": tmp_path / "cache",
        }
        return Relabeler("screened", **{**given, **settings})

    return build_it


def shown(server: ChatServer, model: str) -> list[list[str]]:
    bodies = [seen.body for seen in server.seen if seen.model == model]
    return sorted([*passages_shown(prompt_of(body)).values()] for body in bodies)


def test_each_stage_sees_only_what_the_one_before_it_flagged(
    make: Make, rows: Dataset, chat_server: ChatServer
) -> None:
    clean = rows.map(make(), batched=True)

    assert chat_server.counts == {"gpt-4o-mini": 3, "gpt-4o": 3}
    assert shown(chat_server, "gpt-4o-mini") == [[FALSE.format(i), TRAP.format(i)] for i in SUSPECT]
    assert shown(chat_server, "gpt-4o") == [[FALSE.format(index)] for index in SUSPECT]
    for index, row in enumerate(clean):
        assert row["pos"][1:] == ([FALSE.format(index)] if index in SUSPECT else [])


def test_rows_may_escalate_whole(make: Make, rows: Dataset, chat_server: ChatServer) -> None:
    rows.map(make(escalate="row"), batched=True)

    for model in ("gpt-4o-mini", "gpt-4o"):
        assert shown(chat_server, model) == [ROWS[index]["neg"] for index in SUSPECT]


def test_the_report_says_what_the_screen_saves(make: Make, rows: Dataset) -> None:
    relabeler = make()
    relabeler.judge(rows)

    report = relabeler.report(rows)

    counts = [(s.rows_asked, s.passages_asked, s.passages_settled) for s in report.stages]
    assert counts == [(6, N_PASSAGES, N_PASSAGES - 6), (3, 6, 3), (3, 3, 3)]
    assert report.stages[0].cost_usd == 0
    assert str(report).endswith("6 calls, 3 of them to the strong judge")
    assert [stage.name for stage in report.screens] == ["screen"]


def test_a_second_run_computes_and_asks_nothing(
    make: Make, rows: Dataset, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()(rows[:])
    monkeypatch.setattr("hf_relabel.judges.pair_scorer.PairScorer.logits", None)
    again = make()

    # What the callback reads, row by row, while it trains.
    known = [again.known(row) for row in detect(rows.column_names, sample=ROWS[0]).read(rows[:])]

    assert all(verdicts is not None for verdicts in known)
    assert again.judge(rows).n_calls == 0
    assert again(rows[:]) == first
    assert len(chat_server.seen) == 6


def test_workers_judge_alike(
    make: Make, rows: Dataset, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    expected = rows.map(make(), batched=True, batch_size=3)
    relabeler = make()

    copy = pickle.loads(pickle.dumps(relabeler))  # noqa: S301
    found = rows.map(relabeler, batched=True, batch_size=3, num_proc=2)

    assert copy.fingerprint == relabeler.fingerprint
    assert copy(rows[:]) == expected[:]
    assert found.to_list() == expected.to_list()
    assert len(chat_server.seen) == 6


def test_the_fingerprint_changes_with_the_screen_and_its_threshold(
    make: Make, cross_encoder: str
) -> None:
    fitted = CrossEncoderJudge(cross_encoder, threshold=0.2)
    settings: list[dict[str, Any]] = [
        {},
        {"screen_threshold": 0.2},
        {"screen": "org/reranker"},
        {"screen": fitted, "screen_threshold": None, "escalate": "row"},
    ]

    assert len({make(**each).cascade.fingerprint for each in settings}) == len(settings)
    given = make(screen=fitted, screen_threshold=None)
    assert given.fingerprint == make(screen_threshold=0.2).fingerprint


def test_an_estimate_may_ask_the_screen(make: Make, rows: Dataset, chat_server: ChatServer) -> None:
    blind, asked = (
        estimate(make(), {"train": rows}, ask_screen=is_asked) for is_asked in (False, True)
    )

    assert [stage.passages for stage in blind.stages][:2] == [N_PASSAGES, N_PASSAGES]
    assert any("all passages passed on by screen" in words for words in blind.assumptions)
    assert [stage.passages for stage in asked.stages][:2] == [N_PASSAGES, 6]
    assert (asked.stages[1].calls, asked.stages[1].share_of_rows) == (3, 0.5)
    words = "6 of the sample's 24 passages, in 3 of its 6 rows, passed on by cross-encoder"
    assert any(words in each for each in asked.assumptions)
    assert asked.stages[1].prompt_tokens is not None
    assert blind.stages[1].prompt_tokens is not None
    assert asked.stages[1].prompt_tokens < blind.stages[1].prompt_tokens / 2
    assert chat_server.seen == []


def test_an_estimate_measures_what_the_screen_settled_before(make: Make) -> None:
    make().judge(Dataset.from_list(lit_rows(24)))
    rows = Dataset.from_list([{**row, "query": f"{row['query']}?"} for row in lit_rows(24)])

    found, other = (
        estimate(make(screen_threshold=threshold), {"train": rows}) for threshold in (0.1, 0.2)
    )

    assert found.stages[1].passages == 24
    assert found.stages[1].calls == 12
    words = "50% of rows and 25% of passages passed on by screen, as of 24 rows in the cache"
    assert words in found.assumptions
    assert other.stages[1].passages == 96  # another threshold passes on another share


def test_it_can_be_published(make: Make, rows: Dataset, tmp_path: Path) -> None:
    relabeler = make()
    relabeler.judge(rows)
    write_relabeled(relabeler, {"train": rows}, tmp_path / "run")

    settings = BuildSettings(license="cc-by-4.0", languages=["en"], has_plots=False)
    built = build(tmp_path / "run", tmp_path / "built", "me/plants", settings)
    check(built.folder)

    verdicts = load_dataset(str(built.folder), "verdicts", split="train")
    assert set(verdicts["judge"]) == {"cross-encoder", "gpt-4o-mini", "gpt-4o"}
    # Neither a card nor a table says where the model's folder lies.
    files = [path for path in built.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"/trained" in path.read_bytes()]


def test_the_command_line_runs_it_twice_alike(
    chat_server: ChatServer,
    cross_encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat_server.answer = from_key(TRUTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def command(name: str, *args: str) -> str:
        options = (
            *("rows.jsonl", "--preset", "screened", "--screen", cross_encoder),
            *("--screen-threshold", "0.1", "--base-url", chat_server.base_url, "--cache", "cache"),
        )
        assert run_app([name, *options, *args]) == 0
        return " ".join(capsys.readouterr().out.split())

    estimated = command("estimate", "--ask-screen")
    printed = [command("run", "--output", f"out-{i}") for i in range(2)]

    assert "passed on by cross-encoder, which was asked" in estimated
    assert all("screen settled 18 of 24 passages; 6 went on." in text for text in printed)
    assert len(chat_server.seen) == 6
    data, decisions = (
        [Path(f"out-{i}", name).read_bytes() for i in range(2)]
        for name in ("data/train-00000-of-00001.parquet", "decisions.parquet")
    )
    assert data[0] == data[1]
    assert decisions[0] == decisions[1]
