"""Sampling: strata of a real run, drawn by seed, with all that people must see."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.errors import SettingError, SourceError
from hf_relabel.files import write_relabeled
from hf_relabel.sampling import choose, draw_sample
from tests.rows import KEY, tevatron_rows


def run_folder(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Judge rows with a judge that flags too much and one that knows the key, and write them."""
    key = {pair: Relevance(name) for pair, name in KEY.items()}
    too_much = {(row["query"], f"Text 3 beside plant {place}."): Relevance.WORSE
                for place, row in enumerate(rows) if place % 2 == 0}  # fmt: skip
    judges = [
        ScriptedJudge("eager", answers={**key, **too_much}, default=Relevance.NOT_RELEVANT),
        ScriptedJudge("wise", answers=key, default=Relevance.NOT_RELEVANT),
    ]
    relabeler = Relabeler(judges, cache=folder / "cache", **settings)
    splits = DatasetDict({"train": Dataset.from_list(rows)})
    relabeler.judge(splits)
    write_relabeled(relabeler, splits, folder / "out")
    return folder / "out"


def test_strata_are_the_outcomes_of_every_stage(tmp_path: Path) -> None:
    rows = tevatron_rows()
    for place, row in enumerate(rows):
        row["subset"] = "even" if place % 2 == 0 else "odd"

    sample = draw_sample(run_folder(tmp_path, rows), 30)

    found = {(stratum.subset, stratum.outcome): stratum.size for stratum in sample.strata}
    assert found == {
        ("even", "flagged > flagged"): 4, ("even", "flagged > passed"): 6, ("even", "passed"): 20,
        ("odd", "flagged > flagged"): 2, ("odd", "passed"): 28,
    }  # fmt: skip
    drawn = Counter(pair.stratum for pair in sample.pairs)
    assert drawn == {(s.subset, s.outcome): s.drawn for s in sample.strata}
    assert sum(drawn.values()) == 30
    assert drawn["even", "flagged > flagged"] + drawn["odd", "flagged > flagged"] == 6  # all
    assert list(sample.stages.values()) == ["eager", "wise"]


def test_a_sample_shows_what_judges_saw_also_of_rows_that_left(tmp_path: Path) -> None:
    rows = tevatron_rows()
    rows[0]["positive_passages"].append({"docid": "x", "text": "Light.", "title": "Plant 0"})

    sample = draw_sample(run_folder(tmp_path, rows, action="remove_row"), 60)

    assert len(sample.pairs) == 60
    for pair in sample.pairs:
        row = next(row for row in rows if row["query"] == pair.query)
        assert pair.passage in {passage["text"] for passage in row["negative_passages"]}
        assert pair.query_id == row["query_id"]
        expected = ("Plant 0 needs light.", "Plant 0\nLight.")
        if row is rows[0]:
            assert pair.positives == expected
        judged = KEY.get((pair.query, pair.passage), "not-relevant")
        assert pair.relevances[-1].value == judged


def test_the_seed_chooses_and_the_order_tells_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, tevatron_rows())

    first, again, other = (draw_sample(folder, 20, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert {pair.passage for pair in first.pairs} != {pair.passage for pair in other.pairs}
    flags = [pair.relevances[-1].is_relevant for pair in first.pairs]
    assert 0 < sum(flags[:10]) < sum(flags)
    assert len({pair.task for pair in first.pairs}) == 20


def test_a_pair_in_two_rows_is_one(tmp_path: Path) -> None:
    sample = draw_sample(run_folder(tmp_path, [*tevatron_rows(), *tevatron_rows()]), 500)

    assert sum(stratum.size for stratum in sample.strata) == 60
    assert len(sample.pairs) == 60
    assert all(pair.positives == (f"Plant {pair.query.split()[3]} needs light.",)
               for pair in sample.pairs)  # fmt: skip


def test_undecided_pairs_are_in_no_stratum(tmp_path: Path) -> None:
    rows = tevatron_rows(2)
    judge = ScriptedJudge(
        "judge", answers={rows[0]["negative_passages"][0]["text"]: Relevance.UNDECIDED},
        default=Relevance.NOT_RELEVANT,
    )  # fmt: skip
    relabeler = Relabeler(judge, cache=tmp_path / "cache")
    splits = DatasetDict({"train": Dataset.from_list(rows)})
    relabeler.judge(splits)
    write_relabeled(relabeler, splits, tmp_path / "out")

    sample = draw_sample(tmp_path / "out", 5)

    assert sample.n_undecided == 5
    assert [(s.outcome, s.size) for s in sample.strata] == [("passed", 5)]


def test_every_pair_of_a_stratum_has_the_same_chance() -> None:
    strata = {("", "flagged"): np.arange(10, dtype=np.uint64),
              ("", "passed"): np.arange(100, 200, dtype=np.uint64)}  # fmt: skip
    counts: Counter[int] = Counter()
    for seed in range(400):
        for ids in choose(strata, 10, seed=seed).values():
            counts.update(map(int, ids))

    # 5 of 10 in 400 draws: 200 each, give or take 10.
    assert all(150 < counts[id_] < 250 for id_ in range(10))
    assert all(5 < counts[id_] < 45 for id_ in range(100, 200))


def test_what_cannot_be_sampled_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"found no decisions\.parquet"):
        draw_sample(tmp_path, 10)
    with pytest.raises(SettingError, match="a sample of 6 pairs or more"):
        draw_sample(run_folder(tmp_path, tevatron_rows()), 3)
