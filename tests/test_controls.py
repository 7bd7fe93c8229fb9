"""Controls: counted exactly, refused where replies do not cover them, without a trace in the data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import BatchSettings, Relabeler, Relevance, ScriptedJudge, VerdictCache
from hf_relabel.controls import run_controls
from hf_relabel.errors import SettingError
from hf_relabel.estimate import estimate
from hf_relabel.judges.models import ShutdownWarning
from hf_relabel.questions import Question
from hf_relabel.report import RelabelReport
from hf_relabel.verdicts import Verdict
from tests.batch_server import BatchServer
from tests.chat_server import Answer, ChatServer, passages_shown, prompt_of, replay, write_reply
from tests.rows import KEY, QUERIES, tevatron_rows
from tests.test_replay import FIQA, Recorded, fiqa, own

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
Run = Callable[..., CompletedProcess[str]]

CHEAP, STRONG = "gpt-4o-mini", "gpt-4o"
# Of which rows each judge recognises a positive, and takes a passage of another query for one.
RECOGNISED = {CHEAP: set(range(0, 12, 2)), STRONG: set(range(0, 12, 4))}
FOOLED = {CHEAP: {0, 1, 2}, STRONG: {0}}


def rows_with_two_positives(n_rows: int = 12) -> list[dict[str, Any]]:
    rows = tevatron_rows(n_rows)
    for index, row in enumerate(rows):
        text = f"Water is what plant {index} needs."
        row["positive_passages"].append({"docid": f"p1-of-{index}", "text": text, "title": ""})
    return rows


def answer(body: Any) -> str:
    """Judge real negatives by the key, and planted passages by the tables above."""
    prompt, model = prompt_of(body), body["model"]
    index = int(re.search(r"what does plant (\d+) need", prompt)[1])  # type: ignore[index]
    verdicts = {}
    for doc, text in passages_shown(prompt).items():
        verdict = KEY.get((QUERIES[index], text), "not-relevant")
        if int(re.search(r"[Pp]lant (\d+)", text)[1]) != index:  # type: ignore[index]
            verdict = "worse" if index in FOOLED[model] else verdict
        elif not text.startswith("Text"):
            verdict = "better" if index in RECOGNISED[model] else verdict
        verdicts[doc] = verdict
    return write_reply(body, verdicts)


@pytest.fixture
def relabel(run_cli: Run, chat_server: ChatServer, tmp_path: Path) -> Run:
    chat_server.answer = answer
    rows = "".join(json.dumps(row) + "\n" for row in rows_with_two_positives())
    (tmp_path / "rows.jsonl").write_text(rows)

    def run(output: str, *args: str, cache: str = "cache") -> CompletedProcess[str]:
        return run_cli(
            *("run", "rows.jsonl", "--output", output, "--cache", cache),
            *("--base-url", chat_server.base_url, *args),
            OPENAI_API_KEY="x",
        )

    return run


def controls_of(tmp_path: Path, output: str = "out") -> Any:
    return json.loads((tmp_path / output / "report.json").read_text())["controls"]


def counts(planted: Any) -> list[tuple[int, int]]:
    return [(rate["count"], rate["total"]) for rate in (*planted["stages"], planted["acted_on"])]


def test_a_judge_of_known_skill_is_counted_exactly(relabel: Run, tmp_path: Path) -> None:
    done = relabel("out", "--controls", "12")

    assert done.returncode == 0, done.stderr
    found = controls_of(tmp_path)
    # The cheap judge flags a positive in 6 of 12 rows. These and rows 3 and 9, for a suspect of
    # their own, reach the strong one, which flags rows 0, 4 and 8.
    assert counts(found["positives"]) == [(6, 12), (3, 8), (3, 12)]
    # A random passage: rows 0, 1 and 2 by the cheap judge; they, 3, 6 and 9 reach the strong one.
    assert counts(found["random"]) == [(3, 12), (1, 6), (1, 12)]
    assert [found[kind]["planted"] for kind in ("positives", "random")] == [12, 12]
    assert (found["random"]["among_suspects"], found["random"]["promoted"]) == (4, 1)
    assert found["refused"] is None
    assert [stage["calls"] for stage in found["stages"]] == [24, 14]
    assert found["stages"][0]["cost_usd"] > 0
    assert found["positives"]["acted_on"]["low"] == pytest.approx(0.0889, abs=1e-4)
    printed = " ".join(done.stdout.split())
    assert "known positives (recall) cheap 6 of 12 0.500 0.254 to 0.746" in printed
    assert "the cascade 1 of 12 0.083" in printed
    assert "24 of cheap, 14 of strong; cost: $" in printed


def test_controls_leave_no_trace_in_what_a_run_writes(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    """Every row is the same as without, and so are the final verdicts that other runs will read."""
    relabel("plain", cache="plain-cache")
    n_plain = len(chat_server.seen)
    relabel("out", "--controls", "12")

    n_controls = len(chat_server.seen) - 2 * n_plain
    assert n_controls == 24 + 14
    for name in ("data/train-00000-of-00001.parquet", "decisions.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    ours, theirs = (
        {(pairs.query, *sorted(pairs.traces)) for pairs in VerdictCache(tmp_path / name).pairs()}
        for name in ("cache", "plain-cache")
    )
    assert ours == theirs
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "plain")
    ]
    for report in reports:
        report.pop("controls")
        for stage in report["stages"]:
            stage.pop("latency_s")
    assert reports[0] == reports[1]


def test_the_same_controls_are_paid_for_once(
    relabel: Run, chat_server: ChatServer, tmp_path: Path, run_cli: Run
) -> None:
    relabel("out", "--controls", "4")
    n_requests, first = len(chat_server.seen), controls_of(tmp_path)

    again = relabel("out", "--controls", "4")

    assert len(chat_server.seen) == n_requests
    second = controls_of(tmp_path)
    assert [second[kind] for kind in ("positives", "random")] == [
        first[kind] for kind in ("positives", "random")
    ]
    assert [stage["cached"] for stage in second["stages"]] == [
        stage["calls"] for stage in first["stages"]
    ]
    assert run_cli("report", "out").stdout.split() == again.stdout.split()[:-3]
    report = RelabelReport.from_json(json.loads((tmp_path / "out/report.json").read_text()))
    assert report.to_json()["controls"] == second


def test_random_passages_go_beside_suspects_first(relabel: Run, tmp_path: Path) -> None:
    relabel("out", "--controls", "4")

    assert controls_of(tmp_path)["random"]["among_suspects"] == 4


@pytest.mark.parametrize("make", [own, fiqa] if FIQA.is_dir() else [own])
def test_recorded_replies_give_no_rates(
    make: Callable[[], Recorded], chat_server: ChatServer, run_cli: Run, tmp_path: Path
) -> None:
    """They parse, for they name passages by number; but they were given to other passages."""
    recorded = make()
    chat_server.answer = replay(recorded.replies)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in recorded.rows), "utf-8")

    done = run_cli(
        *("run", path, "--output", "out", "--cache", "cache", "--controls", "10"),
        *("--base-url", chat_server.base_url),
        OPENAI_API_KEY="x",
    )

    assert done.returncode == 0, done.stderr
    found = controls_of(tmp_path)
    assert (found["positives"], found["random"]) == (None, None)
    assert "'gpt-4o-mini' gave" in found["refused"]
    notice = " ".join(done.stderr.split())
    assert "Controls: no rates, for the judge 'gpt-4o-mini' gave" in notice
    assert "word for word" in notice
    assert "recall" not in done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["negatives"]["promoted"] == sum(map(len, recorded.false_negatives.values()))


def test_a_judge_of_few_words_is_not_taken_for_a_recording(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    """Without a thought written down, two rows where nothing is flagged get the same reply."""
    chat_server.answer = lambda body: re.sub(r"(?s)<thinking>.*</thinking>", "", answer(body))

    assert relabel("out", "--controls", "12").returncode == 0

    assert counts(controls_of(tmp_path)["positives"]) == [(6, 12), (3, 8), (3, 12)]


def test_controls_that_nobody_answers_give_no_rates(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    relabel("out")
    chat_server.answer = lambda _: Answer(refusal="No.")

    done = relabel("out", "--controls", "5")

    assert done.returncode == 0
    assert "none of the 10 questions" in controls_of(tmp_path)["refused"]
    assert "10 refused" in " ".join(done.stderr.split())


def test_the_data_is_there_when_controls_break_and_the_same_command_resumes(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    relabel("out")
    n_requests = len(chat_server.seen)
    chat_server.fail(None, None, None, "insufficient_quota")

    done = relabel("out", "--controls", "12", "--max-concurrency", "1")

    assert done.returncode == 2
    assert "The data is written to out; only the controls are missing." in done.stderr
    assert (tmp_path / "out/decisions.parquet").exists()
    assert relabel("out", "--controls", "12").returncode == 0
    assert len(chat_server.seen) == n_requests + 24 + 14 + 1
    assert counts(controls_of(tmp_path)["positives"]) == [(6, 12), (3, 8), (3, 12)]


class _Seeing(ScriptedJudge):
    """Remembers whole questions."""

    def judge(self, question: Question) -> list[Verdict]:
        self.__dict__.setdefault("questions", []).append(question)
        return super().judge(question)


def scripted(max_passages: int = 25, **answers: Relevance) -> _Seeing:
    judge = _Seeing("judge", answers=dict(answers), default=Relevance.NOT_RELEVANT)
    judge.max_passages = max_passages
    return judge


def judged(judge: ScriptedJudge, rows: list[dict[str, Any]], cache: Path) -> tuple[Any, Any]:
    dataset, relabeler = Dataset.from_list(rows), Relabeler(judge, cache=cache)
    relabeler.judge(dataset)
    judge.__dict__["questions"] = []
    return relabeler, dataset


def test_a_planted_positive_leaves_the_ground_truth_and_a_random_one_is_of_another_query(
    tmp_path: Path,
) -> None:
    judge = scripted()
    relabeler, dataset = judged(judge, rows_with_two_positives(), tmp_path)

    run_controls(relabeler, dataset, n=12)

    questions: list[Question] = judge.__dict__["questions"]
    assert len(questions) == 24
    for question in questions:
        row = next(row for row in rows_with_two_positives() if row["query"] == question.query)
        positives = {passage["text"] for passage in row["positive_passages"]}
        negatives = {passage["text"] for passage in row["negative_passages"]}
        planted = set(question.passages) - negatives
        assert len(planted) == 1
        assert negatives < set(question.passages)
        if planted <= positives:
            assert set(question.positives) == positives - planted
        else:
            assert set(question.positives) == positives
    places = {len(question.passages[:-1]) and question.passages.index(planted_text(question))
              for question in questions}  # fmt: skip
    assert len(places) > 3


def planted_text(question: Question) -> str:
    rows = {row["query"]: row for row in rows_with_two_positives()}
    known = {passage["text"] for passage in rows[question.query]["negative_passages"]}
    return next(text for text in question.passages if text not in known)


def test_a_question_with_a_planted_passage_is_one_call(tmp_path: Path) -> None:
    """Else it would stand alone in a call of its own, unlike any real negative."""
    judge = scripted(max_passages=5)
    relabeler, dataset = judged(judge, rows_with_two_positives(), tmp_path)

    run_controls(relabeler, dataset, n=3)

    assert [len(question.passages) for question in judge.__dict__["questions"]] == [5] * 6


def test_rows_with_one_positive_give_none(tmp_path: Path) -> None:
    relabeler, dataset = judged(scripted(), tevatron_rows(), tmp_path)

    found = run_controls(relabeler, dataset, n=5)

    assert found.positives is not None
    assert found.random is not None
    assert (found.positives.planted, found.positives.acted_on.share) == (0, None)
    assert (found.random.planted, found.random.acted_on.count) == (5, 0)


def test_passages_that_another_row_has_with_the_query_are_not_planted(tmp_path: Path) -> None:
    """Two rows of one query and a third: what the sibling knows to be relevant is no control."""
    rows = [*tevatron_rows(1), *tevatron_rows(1), *tevatron_rows(2)[1:]]
    rows[1]["positive_passages"] = [{"docid": "s", "text": "Sun and soil.", "title": ""}]
    judge = scripted()
    relabeler, dataset = judged(judge, rows, tmp_path)

    run_controls(relabeler, dataset, n=3)

    for question in judge.__dict__["questions"]:
        if question.query == QUERIES[0]:
            assert "Sun and soil." not in question.passages


def test_rows_that_were_not_judged_are_refused(tmp_path: Path) -> None:
    relabeler = Relabeler(scripted(), cache=tmp_path)

    with pytest.raises(SettingError, match=r"Call judge\(dataset\) first"):
        run_controls(relabeler, Dataset.from_list(tevatron_rows()), n=3)
    with pytest.raises(SettingError, match="one control or more"):
        run_controls(relabeler, Dataset.from_list(tevatron_rows()), n=0)


def test_the_estimate_knows_of_controls(chat_server: ChatServer, tmp_path: Path) -> None:
    relabeler = Relabeler("paper", base_url=chat_server.base_url, api_key="x", cache=tmp_path)
    splits = {"train": Dataset.from_list(rows_with_two_positives())}

    without, with_them = (estimate(relabeler, splits, n_controls=n) for n in (0, 6))

    for before, after in zip(without.stages, with_them.stages, strict=True):
        assert after.calls == before.calls + 12
        assert before.prompt_tokens is not None
        assert after.prompt_tokens is not None
        assert after.prompt_tokens > before.prompt_tokens
    assert with_them.cost_usd is not None
    assert without.cost_usd is not None
    assert with_them.cost_usd > without.cost_usd
    assert any("planted" in words for words in with_them.assumptions)


def test_batches_carry_controls_too(tmp_path: Path) -> None:
    rows = Dataset.from_list(rows_with_two_positives())
    with BatchServer(answer) as server:
        settings = BatchSettings(quiet_s=0.1, first_poll_s=0.01, max_poll_s=0.05)
        relabeler = Relabeler(
            "paper", base_url=server.base_url, api_key="x", cache=tmp_path, batch=settings
        )
        relabeler.judge(rows)
        n_batches = len(server.batches)

        found = run_controls(relabeler, rows, n=12)

        assert len(server.batches) > n_batches
        assert server.seen == []  # no call at the full price
    assert found.positives is not None
    assert found.random is not None
    assert (found.positives.acted_on.count, found.random.acted_on.count) == (3, 1)
