"""What becomes of a batch: the same as in the transform, and never less than one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_relabel.callbacks import VerdictIndex, relabel_batch
from hf_relabel.callbacks.edits import BatchEditor
from hf_relabel.callbacks.shapes import find_shape

from tests.callbacks.models import N_NEGATIVES, key, relabeler, rows_as
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings("ignore")

FALSE = {text for _, text in key()}


def _index(folder: Path, **settings: Any) -> VerdictIndex:
    made = relabeler(folder, **settings)
    index = VerdictIndex.build(made)
    index.refresh()
    return index


def _rows(shape: str) -> list[dict[str, Any]]:
    return [dict(row) for row in rows_as(shape)]


@pytest.mark.parametrize("action", ["drop", "promote", {"better": "promote", "worse": "drop"}])
@pytest.mark.parametrize("shape", ["labeled-pair", "labeled-list"])
def test_rows_with_labels_come_out_as_the_transform_writes_them(
    shape: str, action: Any, tmp_path: Path
) -> None:
    made = relabeler(tmp_path, action=action)
    expected = rows_as(shape).map(made, batched=True).to_list()

    found = relabel_batch(_rows(shape), VerdictIndex.build(made))

    assert found == expected
    assert found != _rows(shape)


def test_tevatron_rows_come_out_as_the_transform_writes_them(tmp_path: Path) -> None:
    from hf_relabel import Relabeler, Relevance, ScriptedJudge

    script: Any = {pair: Relevance(name) for pair, name in KEY.items()}
    judge = ScriptedJudge("scripted", answers=script, default=Relevance.NOT_RELEVANT)
    made = Relabeler(judge, cache=tmp_path / "cache")
    expected = Dataset.from_list(tevatron_rows()).map(made, batched=True).to_list()

    assert relabel_batch(tevatron_rows(), VerdictIndex.build(made)) == expected


def test_a_freed_slot_gets_another_rows_negative(tmp_path: Path) -> None:
    rows = _rows("n-tuple")
    known = {row["anchor"]: {row["positive"]} for row in rows}
    for query, text in key():
        known[query].add(text)
    negatives = {row[f"negative_{slot}"] for row in rows for slot in range(1, N_NEGATIVES + 1)}

    found = relabel_batch(rows, _index(tmp_path, action="drop"))

    assert len(found) == len(rows)
    for row, old in zip(found, rows, strict=True):
        mine = [row[f"negative_{slot}"] for slot in range(1, N_NEGATIVES + 1)]
        assert row["positive"] == old["positive"]
        assert known[row["anchor"]].isdisjoint(mine)
        assert len(set(mine)) == N_NEGATIVES
        assert set(mine) <= negatives - FALSE | set(old.values())
    untouched = [row is old for row, old in zip(found, rows, strict=True)]
    assert untouched.count(False) == len({query for query, _ in key()})


def test_promoted_passages_take_turns_by_epoch(tmp_path: Path) -> None:
    """Among the original positive and the promoted; the others are no negatives meanwhile."""
    index = _index(tmp_path, action="promote")
    rows = _rows("n-tuple")[:6]
    seen: dict[str, set[str]] = {row["anchor"]: set() for row in rows}
    for epoch in range(20):
        for row in relabel_batch(rows, index, epoch=epoch):
            seen[row["anchor"]].add(row["positive"])
            assert "text 1 stands beside plant 0" not in list(row.values())[2:]

    promoted = {"text 1 stands beside plant 0", "text 2 stands beside plant 0"}
    assert seen[rows[0]["anchor"]] == {rows[0]["positive"], *promoted}
    assert seen[rows[1]["anchor"]] == {rows[1]["positive"]}
    assert relabel_batch(rows, index, epoch=3) == relabel_batch(rows, index, epoch=3)


@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_a_query_over_the_limit_leaves_whole_wherever_its_rows_are(
    shape: str, tmp_path: Path
) -> None:
    """Two false negatives in every sixth row; one row of a triplet tells nothing of the others."""
    index = _index(tmp_path, action="drop", max_false_negatives=1)
    rows = _rows(shape)
    over = {f"what does plant {number} need" for number in range(0, 24, 6)}

    found = [row for part in (rows[::2], rows[1::2]) for row in relabel_batch(part, index)]

    assert {row["anchor"] for row in rows} - {row["anchor"] for row in found} == over


@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_remove_row_takes_out_the_rows_of_a_query(shape: str, tmp_path: Path) -> None:
    found = relabel_batch(_rows(shape), _index(tmp_path, action="remove_row"))

    assert {row["anchor"] for row in found}.isdisjoint({query for query, _ in key()})


@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_a_batch_never_gets_empty(shape: str, tmp_path: Path) -> None:
    index = _index(tmp_path, action="remove_row")
    guilty = {query for query, _ in key()}
    rows = [row for row in _rows(shape) if row["anchor"] in guilty]

    (found,) = relabel_batch(rows, index)

    labels = found.get("label", found.get("labels"))
    if labels is not None:
        assert labels in (1, [1, 1, 1, 0])


def test_known_positives_are_no_refills_and_no_negatives(tmp_path: Path) -> None:
    rows = _rows("n-tuple")
    given = {rows[1]["anchor"]: [rows[2]["positive"]]}
    editor = BatchEditor(_index(tmp_path, judged=False), known_positives=given)

    edited = editor.edit(rows, is_masked=True)

    assert edited is not None
    assert edited.mask is not None
    assert edited.rows == rows
    excluded = [set(line[3 + 1 + N_NEGATIVES :].tolist()) - {0} for line in edited.mask]
    assert [len(ids) for ids in excluded[:4]] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": "p", "negative_1": "n", "label": 0.5},  # MarginMSE
        {"sentence1": "a", "sentence2": "b", "score": 0.7},
        {"query": "q", "text": 3},
        {"text": "alone"},
    ],
)
def test_other_batches_pass_as_they_are(row: dict[str, Any], tmp_path: Path) -> None:
    assert find_shape(row) is None
    batch = [row]

    found = relabel_batch(batch, _index(tmp_path))

    assert found[0] is row
