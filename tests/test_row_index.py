"""RowIndex: known rows are edited without a look at them, and never other than by a look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import Policy, Relabeler, Relevance, ScriptedJudge, VerdictCache
from hf_relabel.cache import Pairs
from hf_relabel.exchange import export_cache, import_cache
from hf_relabel.formats import Passage, Row, content_hash
from hf_relabel.formats.lists import Tevatron
from hf_relabel.row_index import RowIndex, RowRecord
from hf_relabel.verdicts import Trace, Verdict
from tests.rows import KEY, tevatron_rows

BETTER, WORSE, NOT_RELEVANT = Relevance.BETTER, Relevance.WORSE, Relevance.NOT_RELEVANT
UNDECIDED = Relevance.UNDECIDED
SCRIPT: dict[Any, Relevance] = {pair: Relevance(name) for pair, name in KEY.items()}
POLICIES = [
    Policy(),
    Policy(action="drop", count="better", min_negatives=2),
    Policy(action="remove_row"),
    Policy(action={"better": "promote", "worse": "drop"}, max_false_negatives=0.4),
    Policy(max_false_negatives=1, skip_subsets=frozenset()),
]


def random_row(rng: Random) -> tuple[Row, dict[str, Trace]]:
    """Return a row with repeated texts and copies of positives, and a verdict on each text."""
    texts = [f"text {number}" for number in range(6)]
    positives, negatives = (
        tuple(Passage(text=text) for text in rng.choices(some, k=rng.randint(1, 5)))
        for some in (texts[:3], texts[1:])
    )
    row = Row(
        query="q",
        positives=positives,
        negatives=negatives,
        subset=rng.choice([None, "ArguAna", "fiqa"]),
        indices=(0,),
    )
    traces = {
        content_hash(text): (
            Verdict(relevance=UNDECIDED, judge="cheap"),
            Verdict(
                relevance=rng.choice([BETTER, WORSE, NOT_RELEVANT, NOT_RELEVANT]),
                judge="strong",
                rank=rng.choice([None, 0, 1, 2]),
            ),
        )
        for text in texts
    }
    return row, traces


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("can_run_out", [True, False])
def test_a_record_decides_as_the_row_does(policy: Policy, can_run_out: bool) -> None:
    for seed in range(200):
        row, traces = random_row(Random(seed))
        verdicts = {key: trace[-1] for key, trace in traces.items()}

        record = RowRecord.of(row, traces)

        assert record is not None
        again = RowRecord.load(record.dump())
        assert again == record
        expected = policy.edit(row, verdicts, can_run_out=can_run_out)
        assert again.edit(policy, can_run_out=can_run_out) == expected, seed


def test_a_row_with_an_open_passage_has_no_record() -> None:
    row = Row(
        query="q", positives=(), negatives=(Passage(text="a"), Passage(text="b")), indices=(0,)
    )
    sure = (Verdict(relevance=NOT_RELEVANT, judge="j"),)
    unsure = (*sure, Verdict(relevance=UNDECIDED, judge="k"))
    a, b = content_hash("a"), content_hash("b")

    assert RowRecord.of(row, {a: sure}) is None
    assert RowRecord.of(row, {a: sure, b: unsure}) is None
    assert RowRecord.of(row, {a: sure, b: sure}) is not None


def test_a_skipped_row_is_known_only_to_who_skips_it() -> None:
    row = replace(random_row(Random(0))[0], subset="fiqa")
    record = RowRecord.load(RowRecord.unjudged(row).dump())
    skips, judges = (Policy(skip_subsets=frozenset(names)) for names in ({"FiQA"}, set[str]()))

    edit = record.edit(skips, can_run_out=True)

    assert edit is not None
    assert edit.changes_nothing
    assert record.edit(judges, can_run_out=True) is None


# Through map


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(messy_rows())


def messy_rows() -> list[dict[str, Any]]:
    """Rows with all that an edit depends on: copies, repeats, titles, a subset that is skipped."""
    rows: list[dict[str, Any]] = tevatron_rows()
    copy = {**rows[1]["positive_passages"][0], "docid": "copy"}
    twin = {**rows[3]["negative_passages"][1], "docid": "twin", "text": " Text 1  beside plant 3."}
    rows[1]["negative_passages"].append(copy)
    rows[3]["negative_passages"].append(twin)
    rows[4]["negative_passages"][0]["title"] = "Title \U0001f331"
    rows[6]["subset"] = "ArguAna"
    rows[7]["subset"] = None
    rows[9]["negative_passages"] = rows[9]["negative_passages"][1:2]
    return rows


def relabeler_on(
    cache: Path, script: Mapping[Any, Relevance] = SCRIPT, **settings: Any
) -> Relabeler:
    judge = ScriptedJudge("scripted", answers=script, default=NOT_RELEVANT)
    return Relabeler(judge, cache=cache, **settings)


def mapped(rows: Dataset, relabeler: Relabeler, **settings: Any) -> Dataset:
    return rows.map(relabeler, batched=True, load_from_cache_file=False, **settings)


def on_lists(rows: Dataset, relabeler: Relabeler, **settings: Any) -> Dataset:
    """Map without any of it: a plain dict is read as lists, and leaves no record."""
    return rows.map(
        lambda batch: relabeler(dict(batch)), batched=True, load_from_cache_file=False, **settings
    )


def no_lists(patch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("a row was read as lists")

    patch.setattr(Tevatron, "read_numbered", read)


ACTIONS: list[dict[str, Any]] = [
    {"action": "promote"},
    {"action": "drop", "min_negatives": 4},
    {"action": "remove_row"},
    {"action": {"better": "promote", "worse": "drop"}, "skip_subsets": ()},
    {"max_false_negatives": 1},
]


@pytest.mark.parametrize("settings", ACTIONS)
def test_the_first_map_after_judge_needs_no_lists_and_gives_the_same(
    rows: Dataset, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    relabeler_on(tmp_path, skip_subsets=settings.get("skip_subsets")).judge(rows)
    relabeler = relabeler_on(tmp_path, **settings)
    expected = on_lists(rows, relabeler, batch_size=5)
    no_lists(monkeypatch)

    found = mapped(rows, relabeler, batch_size=5)

    assert found.features == expected.features
    assert found.data.table.combine_chunks() == expected.data.table.combine_chunks()
    shuffled = mapped(rows.shuffle(seed=3), relabeler, num_proc=2)
    assert sorted(map(str, shuffled)) == sorted(map(str, expected))
    assert relabeler.cascade.stages[0].judge.asked == []  # type: ignore[attr-defined]


def test_map_alone_leaves_records_for_the_next_map(
    rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mapped(rows, relabeler_on(tmp_path))
    no_lists(monkeypatch)

    assert mapped(rows, relabeler_on(tmp_path)).to_list() == first.to_list()


def test_undecided_rows_are_asked_again_among_known_ones(rows: Dataset, tmp_path: Path) -> None:
    """One question failed: its row has no record, whatever map does, until it is answered."""
    failing = {**SCRIPT, "Text 3 beside plant 0.": UNDECIDED}
    broken = relabeler_on(tmp_path, failing)
    # The same judge by its fingerprint, as a server is that answers again.
    mended = ScriptedJudge("scripted", answers=SCRIPT, default=NOT_RELEVANT)
    mended.fingerprint = broken.cascade.stages[0].judge.fingerprint
    broken.judge(rows)
    assert mapped(rows, broken)[0] == rows[0]
    assert mapped(rows, broken)[0] == rows[0]

    clean = mapped(rows, Relabeler(mended, cache=tmp_path))

    assert len(mended.asked) == 5
    assert len(clean[0]["positive_passages"]) == 3


def test_verdicts_that_come_later_are_found(rows: Dataset, tmp_path: Path) -> None:
    """Rows that were undecided here were judged elsewhere, and come as tables."""
    answers = dict.fromkeys([row["negative_passages"][0]["text"] for row in rows], UNDECIDED)
    here, there = tmp_path / "here", tmp_path / "there"
    failing = relabeler_on(here, {**SCRIPT, **answers})
    assert mapped(rows, failing).to_list()[2:3] == rows.to_list()[2:3]
    cascade = failing.cascade.fingerprint
    working = relabeler_on(there)
    working.cascade.stages[0].judge.fingerprint = failing.cascade.stages[0].judge.fingerprint  # type: ignore[misc]
    assert working.cascade.fingerprint == cascade
    expected = mapped(rows, working)
    export_cache(working.cache, tmp_path / "tables")

    import_cache(tmp_path / "tables", failing.cache)

    assert mapped(rows, failing).to_list() == expected.to_list()


def test_another_cascade_has_records_of_its_own(rows: Dataset, tmp_path: Path) -> None:
    relabeler_on(tmp_path).judge(rows)
    silent = relabeler_on(tmp_path, {})

    assert mapped(rows, silent).to_list() == on_lists(rows, silent).to_list()
    assert len(silent.cascade.stages[0].judge.asked) > 0  # type: ignore[attr-defined]


def test_the_verdict_that_was_first_decides_for_rows_too(rows: Dataset, tmp_path: Path) -> None:
    """Another process judges the row while this one asks: its verdict stays, in pairs and rows."""
    cache = VerdictCache(tmp_path)
    (text, *_) = [passage["text"] for passage in rows[1]["negative_passages"]]
    relevant = (Verdict(relevance=BETTER, judge="scripted"),)

    class Slow(ScriptedJudge):
        def judge(self, question: Any) -> list[Verdict]:
            traces = {content_hash(text): relevant}
            names = relabeler.cascade.judge_names
            cascade, query = relabeler.cascade.fingerprint, content_hash(question.query)
            cache.write([Pairs(cascade=cascade, query=query, judges=names, traces=traces)])
            return super().judge(question)

    relabeler = Relabeler(Slow("scripted", answers={}, default=NOT_RELEVANT), cache=cache)
    one = rows.select([1])

    relabeler.judge(one)

    assert [len(row["positive_passages"]) for row in mapped(one, relabeler)] == [2]
    assert mapped(one, relabeler).to_list() == on_lists(one, relabeler).to_list()
    cache.close()


def test_a_row_record_holds_no_text_and_other_versions_do_not_read_it(
    rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relabeler = relabeler_on(tmp_path)
    relabeler.judge(rows)

    records = dict(relabeler.cache.scan("row:"))

    assert len(records) == len(rows)
    assert not any("plant " in text for text in records.values())
    prefix = relabeler.row_index.prefix
    monkeypatch.setattr("hf_relabel.row_index.__version__", "0.0.0")
    assert RowIndex(relabeler.cache, relabeler.cascade.fingerprint).prefix != prefix


def test_columns_are_removed_where_map_is_told_to(rows: Dataset, tmp_path: Path) -> None:
    """Batches with edits and those without agree on what is left."""
    relabeler = relabeler_on(tmp_path)

    clean = mapped(rows, relabeler, batch_size=2, remove_columns=["query_id"])

    assert "query_id" not in clean.column_names
    kept = on_lists(rows, relabeler).remove_columns("query_id")
    assert clean.to_list() == kept.to_list()


def test_a_wrapped_relabeler_sees_lists_and_the_batch_as_it_was(
    rows: Dataset, tmp_path: Path
) -> None:
    relabeler = relabeler_on(tmp_path, min_negatives=0)
    relabeler.judge(rows)

    def counted(batch: Any) -> dict[str, Any]:
        out = relabeler(batch)
        before = [len(passages) for passages in batch["negative_passages"]]
        lost = [n - len(left) for n, left in zip(before, out["negative_passages"], strict=True)]
        return {"n_lost": lost, "clean": out["negative_passages"]}

    counts = rows.map(counted, batched=True)

    expected = on_lists(rows, relabeler)
    assert counts["clean"][:] == expected["negative_passages"][:]
    assert counts["negative_passages"][:] == rows["negative_passages"][:]
    assert sum(counts["n_lost"]) > 0
