"""The sample that ships with the package, and its answer key."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

FOLDER = files("hf_relabel") / "data" / "sample"
KINDS = {"near_duplicate", "negation", "other_question", "keyword_stuffed"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    text = (FOLDER / "rows.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def key() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "key.json").read_text(encoding="utf-8"))
    return loaded


def passages(row: Row) -> list[dict[str, str]]:
    return [*row["positive_passages"], *row["negative_passages"]]


def normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def test_rows_are_in_tevatron_format(rows: list[Row]) -> None:
    columns = ["query_id", "query", "positive_passages", "negative_passages", "subset"]
    for row in rows:
        assert list(row) == columns
        assert 1 <= len(row["positive_passages"]) <= 2
        assert 6 <= len(row["negative_passages"]) <= 8
        for passage in passages(row):
            assert list(passage) == ["docid", "text", "title"]
            assert all(value.strip() == value != "" for value in passage.values())
            assert 30 <= len(passage["text"].split()) <= 80, passage["docid"]


def test_there_are_enough_rows_of_every_subject(rows: list[Row]) -> None:
    per_subset = Counter(row["subset"] for row in rows)

    assert len(rows) >= 40
    assert len(per_subset) >= 6
    assert min(per_subset.values()) >= 3


def test_queries_docids_and_passages_are_distinct(rows: list[Row]) -> None:
    all_passages = [passage for row in rows for passage in passages(row)]

    assert len({row["query_id"] for row in rows}) == len(rows)
    assert len({normalized(row["query"]) for row in rows}) == len(rows)
    assert len({passage["docid"] for passage in all_passages}) == len(all_passages)
    # Distinct from every positive too, so that no label is settled without a judge.
    assert len({normalized(passage["text"]) for passage in all_passages}) == len(all_passages)


def test_the_key_names_negatives_of_its_rows(rows: list[Row], key: dict[str, Any]) -> None:
    negatives = {
        row["query_id"]: {passage["docid"] for passage in row["negative_passages"]} for row in rows
    }

    assert set(key) == {"about", "false_negatives", "traps"}
    for query_id, docids in key["false_negatives"].items():
        assert len(docids) == len(set(docids)) > 0
        assert set(docids) <= negatives[query_id]
    for query_id, kinds in key["traps"].items():
        assert set(kinds) <= negatives[query_id]
        assert set(kinds.values()) <= KINDS
        assert not set(kinds) & set(key["false_negatives"].get(query_id, []))


def test_most_true_negatives_are_ordinary(rows: list[Row], key: dict[str, Any]) -> None:
    """As in mined data: a trap or two in a row, of every kind, among plain hard negatives."""
    planted = Counter(kind for kinds in key["traps"].values() for kind in kinds.values())
    n_traps = sum(planted.values())
    n_false = sum(len(docids) for docids in key["false_negatives"].values())
    n_true = sum(len(row["negative_passages"]) for row in rows) - n_false

    assert set(planted) == KINDS
    assert min(planted.values()) >= 10
    assert {len(kinds) for kinds in key["traps"].values()} <= {1, 2}
    assert 50 <= n_traps <= 70
    assert n_traps <= 0.3 * n_true
    assert 35 <= n_false <= 45


def test_the_key_counts_what_it_describes(rows: list[Row], key: dict[str, Any]) -> None:
    n_negatives = sum(len(row["negative_passages"]) for row in rows)
    n_false = sum(len(docids) for docids in key["false_negatives"].values())
    n_traps = sum(len(kinds) for kinds in key["traps"].values())
    n_true = n_negatives - n_false

    for count in (
        f"{len(rows)} rows with {n_negatives} negatives",
        f"{n_false} in {len(key['false_negatives'])} rows are false",
        f"Of the {n_true} true negatives {n_true - n_traps} are ordinary and {n_traps} are traps",
    ):
        assert count in key["about"]


def test_about_three_rows_in_five_hold_a_false_negative(
    rows: list[Row], key: dict[str, Any]
) -> None:
    counts = Counter(len(docids) for docids in key["false_negatives"].values())

    assert 0.5 <= len(key["false_negatives"]) / len(rows) <= 0.7
    assert set(counts) == {1, 2, 3}


def test_no_row_runs_out_of_negatives(rows: list[Row], key: dict[str, Any]) -> None:
    for row in rows:
        n_false = len(key["false_negatives"].get(row["query_id"], []))
        assert len(row["negative_passages"]) - n_false >= 5, row["query_id"]


def test_docids_do_not_give_the_answer_away(rows: list[Row], key: dict[str, Any]) -> None:
    """A negative is numbered by its place, and false ones stand at every place."""
    for row in rows:
        expected = [f"{row['query_id']}-n{n + 1}" for n in range(len(row["negative_passages"]))]
        assert [passage["docid"] for passage in row["negative_passages"]] == expected
    places = {docid[-1] for docids in key["false_negatives"].values() for docid in docids}
    assert len(places) >= 5
