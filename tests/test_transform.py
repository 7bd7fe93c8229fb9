"""Relabeler: rows in, rows out, through `Dataset.map`, with every verdict on disk."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.fingerprint import Hasher

from hf_relabel import Cascade, Relabeler, Relevance, ScriptedJudge, Stage, VerdictCache
from hf_relabel.errors import AccountError, ColumnError, SettingError
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.models import ShutdownWarning
from tests.chat_server import ChatServer, from_key
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
SCRIPT: dict[Any, Relevance] = {pair: Relevance(name) for pair, name in KEY.items()}
N_FALSE = len(KEY)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(tevatron_rows())


def scripted(tmp_path: Path, **settings: Any) -> Relabeler:
    judge = ScriptedJudge("scripted", answers=SCRIPT, default=Relevance.NOT_RELEVANT)
    return Relabeler(judge, cache=tmp_path / "cache", **settings)


def over_http(server: ChatServer, tmp_path: Path, **settings: Any) -> Relabeler:
    server.answer = from_key(KEY)
    return Relabeler(
        "paper", base_url=server.base_url, api_key="x", cache=tmp_path / "cache", **settings
    )


def n_promoted(rows: Any) -> int:
    return sum(len(row["positive_passages"]) - 1 for row in rows)


def n_negatives(rows: Any) -> int:
    return sum(len(row["negative_passages"]) for row in rows)


def test_false_negatives_become_positives_in_the_judges_order(
    rows: Dataset, tmp_path: Path
) -> None:
    clean = rows.map(scripted(tmp_path), batched=True)

    assert n_promoted(clean) == N_FALSE
    assert n_negatives(clean) == n_negatives(rows) - N_FALSE
    docids = [passage["docid"] for passage in clean[0]["positive_passages"]]
    assert docids == ["p0-of-0", "n1-of-0", "n2-of-0"]
    assert clean.features == rows.features


@pytest.mark.parametrize(
    ("action", "n_rows", "negatives", "promoted"),
    [
        ("promote", 12, 60 - N_FALSE, N_FALSE),
        ("drop", 12, 60 - N_FALSE, 0),
        ("remove_row", 8, 40, 0),
        ({"better": "promote", "worse": "drop"}, 12, 60 - N_FALSE, 4),
    ],
)
def test_actions_are_free_once_the_verdicts_are_there(
    rows: Dataset, tmp_path: Path, action: Any, n_rows: int, negatives: int, promoted: int
) -> None:
    scripted(tmp_path).judge(rows)
    silent = ScriptedJudge("scripted", answers=SCRIPT, default=Relevance.NOT_RELEVANT)

    clean = rows.map(Relabeler(silent, cache=tmp_path / "cache", action=action), batched=True)

    assert (len(clean), n_negatives(clean), n_promoted(clean)) == (n_rows, negatives, promoted)
    assert silent.asked == []


def test_all_four_kinds_of_dataset_give_the_same_rows(rows: Dataset, tmp_path: Path) -> None:
    relabeler = scripted(tmp_path)
    expected = rows.map(relabeler, batched=True).to_list()

    streamed: IterableDataset = rows.to_iterable_dataset().map(relabeler, batched=True)
    assert list(streamed) == expected
    splits = DatasetDict({"train": rows, "dev": rows.select(range(3))})
    assert splits.map(relabeler, batched=True)["dev"].to_list() == expected[:3]
    assert splits.map(relabeler, batched=True, batch_size=5)["train"].to_list() == expected


@pytest.mark.usefixtures("key_in_environment")
def test_two_processes_give_the_same_rows_over_http(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    """A key given in this process stays there; workers take theirs from a client of their own."""
    chat_server.answer = from_key(KEY)
    expected = rows.map(scripted(tmp_path / "other"), batched=True).to_list()

    relabeler = Relabeler("paper", base_url=chat_server.base_url, cache=tmp_path / "cache")
    clean = rows.map(relabeler, batched=True, batch_size=3, num_proc=2)

    assert clean.to_list() == expected


def test_the_second_map_comes_from_the_cache_of_datasets(tmp_path: Path) -> None:
    Dataset.from_list(tevatron_rows()).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(str(tmp_path / "rows"))
    relabeler = scripted(tmp_path)
    first = rows.map(relabeler, batched=True)

    again = rows.map(scripted(tmp_path), batched=True)

    assert first.cache_files == again.cache_files != []


def test_the_hash_of_map_is_stable_in_use_and_moves_with_settings(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    relabeler = over_http(chat_server, tmp_path)
    before = Hasher.hash(relabeler)
    rows.map(relabeler, batched=True)

    assert Hasher.hash(relabeler) == before
    assert Hasher.hash(over_http(chat_server, tmp_path)) == before
    for change in ({"action": "drop"}, {"seed": 1}, {"prompt": "paper-strong"}):
        changed = over_http(chat_server, tmp_path, **change)
        assert Hasher.hash(changed) != before
        assert changed.fingerprint != relabeler.fingerprint


def test_the_fingerprint_ignores_what_changes_no_answer(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    relabeler = over_http(chat_server, tmp_path)

    moved = Relabeler(
        "paper",
        endpoint=Endpoint(base_url="http://127.0.0.1:1/v1", timeout_s=5),
        api_key="another",
        max_concurrency=3,
        cache=tmp_path / "elsewhere",
    )

    assert moved.fingerprint == relabeler.fingerprint


def test_no_key_leaves_this_process(tmp_path: Path) -> None:
    secret = "sk-verysecret123"
    relabeler = Relabeler("paper", api_key=secret, cache=tmp_path)

    assert secret.encode() not in pickle.dumps(relabeler)
    assert secret not in f"{relabeler.fingerprint}{relabeler.settings()}{vars(relabeler)}"


def test_map_works_inside_a_running_loop(rows: Dataset, tmp_path: Path) -> None:
    """As in a notebook, where async functions in `map` fail."""

    async def notebook() -> int:
        return n_promoted(rows.map(scripted(tmp_path), batched=True))

    assert asyncio.run(notebook()) == N_FALSE


def test_judging_first_leaves_map_nothing_to_ask(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    relabeler = over_http(chat_server, tmp_path)
    seen: list[int] = []

    done = relabeler.judge(rows, progress=lambda progress: seen.append(progress.n_rows))
    n_requests = len(chat_server.seen)
    clean = rows.map(relabeler, batched=True)

    assert (done.n_rows, done.n_calls) == (12, n_requests)
    assert seen == list(range(1, 13))
    assert n_promoted(clean) == N_FALSE
    assert len(chat_server.seen) == n_requests


@pytest.mark.parametrize("fault", ["truncated", "refusal", "wrong_ids", "both_lists"])
def test_an_unusable_reply_changes_no_label_and_is_asked_again(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer, fault: str
) -> None:
    one = rows.select([0])
    relabeler = over_http(chat_server, tmp_path, models=["only"])
    chat_server.fail(fault, fault)  # the question, and the repair question
    relabeler.judge(one)

    assert one.map(relabeler, batched=True).to_list() == one.to_list()
    report = relabeler.report(one)
    assert (report.negatives.undecided, report.negatives.kept) == (5, 0)
    assert sum(report.undecided_reasons.values()) == 5
    assert report.stages[0].calls == len(chat_server.seen) == 2

    relabeler.judge(one)
    assert n_promoted(one.map(relabeler, batched=True, load_from_cache_file=False)) == 2
    assert relabeler.report(one).negatives.undecided == 0


def test_an_empty_reply_is_undecided(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    from hf_relabel import ChatJudge

    chat_server.answer = from_key(KEY)
    judge = ChatJudge(
        "only",
        endpoint=Endpoint(base_url=chat_server.base_url),
        api_key="x",
        retry=RetryRule(max_attempts=2, first_wait_s=0.01),
    )
    one = rows.select([0])
    chat_server.fail("empty", "empty")
    relabeler = Relabeler(judge, cache=tmp_path / "cache")

    relabeler.judge(one)

    assert relabeler.report(one).undecided_reasons == {"empty": 5}


def test_an_account_fault_stops_the_run_and_what_came_is_kept(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    relabeler = over_http(chat_server, tmp_path, max_concurrency=1)
    chat_server.fail(None, None, None, "insufficient_quota", *["insufficient_quota"] * 50)

    with pytest.raises(AccountError, match="Add credit"):
        relabeler.judge(rows)

    # One call of each judge was in flight when the account said no; nothing was sent after that.
    assert relabeler.cache.stats().n_calls == 3
    assert len(chat_server.seen) <= 3 + 2


def test_decisions_tell_who_said_what_and_why(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    relabeler = over_http(chat_server, tmp_path)
    relabeler.judge(rows)

    decisions = relabeler.decisions(rows)

    assert len(decisions) == 60
    promoted = decisions.filter(lambda row: row["action"] == "promote")
    found = {(row["query"], row["passage"]): row["relevance"] for row in promoted}
    assert found == KEY
    assert set(promoted["stage"]) == {"strong"}
    kept = decisions.filter(lambda row: row["query_id"] == "q1")
    assert set(kept["stage"]) == {"cheap"}
    assert set(kept["action"]) == {"keep"}
    assert list(relabeler.decisions(rows.to_iterable_dataset())) == decisions.to_list()


def test_skipped_subsets_pass_through_unasked(tmp_path: Path) -> None:
    judge = ScriptedJudge("none", answers={})
    rows = Dataset.from_list([{**row, "subset": "ArguAna"} for row in tevatron_rows(2)])
    relabeler = Relabeler(judge, cache=tmp_path)

    assert rows.map(relabeler, batched=True).to_list() == rows.to_list()
    assert judge.asked == []
    report = relabeler.report(rows)
    assert (report.rows_skipped, report.negatives.kept) == (2, 10)


def test_duplicates_are_asked_once_and_copies_of_the_positive_never(tmp_path: Path) -> None:
    (row,) = tevatron_rows(1, 2)
    copy = {**row["positive_passages"][0], "docid": "copy"}
    twin = {**row["negative_passages"][1], "docid": "twin", "text": " Text 1  beside plant 0."}
    row["negative_passages"] += [copy, twin]
    judge = ScriptedJudge("j", answers=SCRIPT, default=Relevance.NOT_RELEVANT)
    relabeler = Relabeler(judge, cache=tmp_path)

    (clean,) = Dataset.from_list([row]).map(relabeler, batched=True)

    assert judge.asked == ["Text 0 beside plant 0.", "Text 1 beside plant 0."]
    assert [p["docid"] for p in clean["positive_passages"]] == ["p0-of-0", "n1-of-0"]
    assert [p["docid"] for p in clean["negative_passages"]] == ["n0-of-0"]


def test_triplets_of_a_query_are_one_question_wherever_they_lie(tmp_path: Path) -> None:
    triplets = [
        {
            "anchor": row["query"],
            "positive": row["positive_passages"][0]["text"],
            "negative": row["negative_passages"][number]["text"],
        }
        for number in range(5)
        for row in tevatron_rows()
    ]
    judge = ScriptedJudge("j", answers=SCRIPT, default=Relevance.NOT_RELEVANT)
    rows = Dataset.from_list(triplets)
    relabeler = Relabeler(judge, cache=tmp_path)

    done = relabeler.judge(rows)
    clean = rows.map(relabeler, batched=True, batch_size=7)

    assert done.n_rows == done.n_calls == 12
    assert len(judge.asked) == 60
    assert len(clean) == 60 + N_FALSE
    negatives = {(row["anchor"], row["negative"]) for row in clean}
    assert not negatives & set(KEY)
    assert set(KEY) <= {(row["anchor"], row["positive"]) for row in clean}


def test_report_adds_up_and_prints_one_line(rows: Dataset, tmp_path: Path) -> None:
    relabeler = scripted(tmp_path, max_false_negatives=1)
    relabeler.judge(rows)

    report = relabeler.report(rows)

    assert report.rows_dropped == {"too_many_false_negatives": 2}
    assert report.rows_in + report.rows_added == report.rows_out + 2
    counts = report.negatives
    assert counts.seen == counts.kept + counts.dropped + counts.promoted + counts.undecided == 60
    assert str(report) == "60 negatives: 48 kept, 10 dropped, 2 promoted; 12 calls"
    assert type(report).from_json(report.to_json()) == report


def test_a_users_cascade_keeps_its_own_settings(tmp_path: Path) -> None:
    cascade = Cascade([Stage(ScriptedJudge("j", answers={}))])

    with pytest.raises(SettingError, match="with a preset's name only"):
        Relabeler(cascade, models=["gpt-4o"], cache=tmp_path)
    with pytest.raises(SettingError, match="base_url or endpoint"):
        Relabeler("paper", base_url="http://a/v1", endpoint=Endpoint(), cache=tmp_path)
    with pytest.raises(SettingError, match="presets"):
        Relabeler("papr", cache=tmp_path)


def test_columns_of_no_known_format_are_named(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"query": ["q"], "positive": ["p"], "negative_text": ["n"]})

    with pytest.raises(ColumnError, match=r"expected .* found"):
        rows.map(scripted(tmp_path), batched=True)


def test_models_near_their_end_are_named_before_the_run(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    with pytest.warns(ShutdownWarning, match="gpt-4o is shut down on 2027-01-14"):
        over_http(chat_server, tmp_path).judge(rows.select([1]))


def test_a_cache_can_be_shared_by_two_relabelers(rows: Dataset, tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "cache")
    judge = ScriptedJudge("j", answers=SCRIPT, default=Relevance.NOT_RELEVANT)

    Relabeler(judge, cache=cache).judge(rows)
    Relabeler(judge, cache=cache, action="drop").judge(rows)

    assert len(judge.asked) == 60


def test_a_hundred_negatives_take_four_calls_and_scores_stay_aligned(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    """Rows of the BGE collection: 100 negatives with a score each, 25 to a call."""
    negatives = [f"Text {number} beside plant 0." for number in range(100)]
    row = {
        "query": "what does plant 0 need to grow",
        "pos": ["Plant 0 needs light."],
        "neg": negatives,
        "pos_scores": [1.5],
        "neg_scores": [number / 100 for number in range(100)],
        "type": "normal",
    }
    rows = Dataset.from_list([row])
    relabeler = over_http(chat_server, tmp_path, models=["only"])

    (clean,) = rows.map(relabeler, batched=True)

    assert len(chat_server.seen) == 4
    assert clean["pos"] == [*row["pos"], negatives[1], negatives[2]]
    assert clean["pos_scores"] == [1.5, 0.01, 0.02]
    assert clean["neg"] == [negatives[0], *negatives[3:]]
    assert clean["neg_scores"] == [0.0, *(number / 100 for number in range(3, 100))]
    assert len(relabeler.decisions(rows)) == 100


def test_a_run_that_stops_at_the_repair_question_keeps_the_reply_it_paid_for(
    rows: Dataset, tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.answer = from_key(KEY)
    chat_server.fail("truncated", "401")
    relabeler = over_http(chat_server, tmp_path)

    with pytest.raises(AccountError):
        relabeler.judge(rows.select(range(1)))

    (failure,) = relabeler.cache.all_failures()
    assert failure.reason == "truncated"
    assert failure.reply is not None
    assert failure.reply.usage["completion_tokens"] > 0
