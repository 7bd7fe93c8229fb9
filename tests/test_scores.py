"""Scores beside the passages, and TopK-PercPos by them: aligned, exact, and resumable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from hf_relabel import convert, drop_by_score, score
from hf_relabel import scores as scores_module
from hf_relabel.errors import AccountError, ColumnError, JudgeError, RowError, SettingError
from hf_relabel.judges.pair_scorer import PairScorer, probability
from hf_relabel.scores import count_negatives, write_scores
from tests.cross_encoders import lit_rows, random_cross_encoder
from tests.rows import tevatron_rows

FORMATS = ("tevatron", "flagembedding", "triplet", "n-tuple", "labeled-pair", "labeled-list")


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(lit_rows())


def directly(folder: str, query: str, texts: list[str]) -> list[float]:
    """Ask the model itself."""
    from sentence_transformers import CrossEncoder
    from torch import nn

    pairs = [(query, text) for text in texts]
    found = CrossEncoder(folder, device="cpu").predict(pairs, activation_fn=nn.Identity())
    return [float(value) for value in found]


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gets_scores_that_are_the_models_own(
    format_: str, rows: Dataset, cross_encoder: str
) -> None:
    given = convert(rows, to=format_)

    scored = score(given, cross_encoder)

    plain = convert(given, to="flagembedding")
    assert [(r["query"], r["pos"], r["neg"]) for r in scored] == [
        (r["query"], r["pos"], r["neg"]) for r in plain
    ]
    for row in list(scored)[:2]:
        for texts, found in (("pos", "pos_scores"), ("neg", "neg_scores")):
            expected = directly(cross_encoder, row["query"], row[texts])
            assert row[found] == pytest.approx(expected, abs=6e-4)


def test_other_columns_stay_and_old_scores_go(rows: Dataset, cross_encoder: str) -> None:
    old = rows.map(lambda row: {"pos_scores": [9.0], "neg_scores": [9.0] * len(row["neg"])})
    old = old.add_column("prompt", [f"p{i}" for i in range(len(rows))])

    scored = score(old, cross_encoder)

    assert scored["prompt"] == old["prompt"]
    assert scored["pos_scores"] == score(rows, cross_encoder)["pos_scores"]


def test_probabilities_are_the_sigmoid_of_the_logits(rows: Dataset, cross_encoder: str) -> None:
    logits = score(rows, cross_encoder)["neg_scores"]

    found = score(rows, cross_encoder, scale="probability")["neg_scores"]

    assert found == [[probability(logit) for logit in each] for each in logits]


def test_streams_dicts_and_loaded_models_are_scored_alike(
    rows: Dataset, cross_encoder: str
) -> None:
    from sentence_transformers import CrossEncoder

    expected = score(rows, cross_encoder)
    loaded = CrossEncoder(cross_encoder, device="cpu")

    assert list(score(rows.to_iterable_dataset(), cross_encoder)) == list(expected)
    assert score(DatasetDict({"a": rows}), cross_encoder)["a"].to_list() == expected.to_list()
    assert score(rows, loaded).to_list() == expected.to_list()


def test_other_weights_in_the_same_folder_are_another_map(rows: Dataset, tmp_path: Path) -> None:
    """`map` must not serve the old model's scores from its cache."""
    rows.to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    first = score(stored, random_cross_encoder(tmp_path / "model", seed=0))["pos_scores"]

    second = score(stored, random_cross_encoder(tmp_path / "model", seed=1))["pos_scores"]

    assert first != second


def test_a_nan_is_no_score(rows: Dataset, cross_encoder: str) -> None:
    scorer = PairScorer(cross_encoder)
    scorer.logits = lambda pairs: [math.nan] * len(pairs)  # type: ignore[method-assign]

    with pytest.raises(JudgeError, match="found NaN for the query 'what does plant 0 need'"):
        score(rows, scorer)


# Into a file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scored.jsonl", "scored.parquet"])
def test_the_file_holds_what_score_returns(
    name: str, rows: Dataset, cross_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_ROWS_A_PART", 4)
    monkeypatch.setattr(scores_module, "_ROWS_AT_ONCE", 3)
    seen: list[tuple[int, int]] = []

    n_rows = write_scores(
        rows, tmp_path / name, cross_encoder, progress=lambda *done: seen.append(done)
    )

    kind = "json" if name.endswith("jsonl") else "parquet"
    written = load_dataset(kind, data_files=str(tmp_path / name), split="train")
    assert written.to_list() == score(rows, cross_encoder).to_list()
    assert n_rows == 6
    assert seen == [(3, 6), (4, 6), (4, 6), (6, 6), (6, 6)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_file_goes_on_where_it_was(
    rows: Dataset, cross_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_ROWS_A_PART", 2)
    output, scorer = tmp_path / "scored.jsonl", CountingScorer(cross_encoder, stop_after=2)
    with pytest.raises(AccountError, match=r"interrupted\. 4 of 6 rows are scored and kept"):
        write_scores(rows, output, scorer)
    assert not output.exists()
    n_before = scorer.n_calls
    scorer.stop_after = None

    write_scores(rows, output, scorer)

    assert scorer.n_calls == n_before + 1  # the third part alone
    whole = tmp_path / "whole.jsonl"
    write_scores(rows, whole, cross_encoder)
    assert output.read_bytes() == whole.read_bytes()


def test_parts_of_other_rows_or_another_model_are_not_taken(
    rows: Dataset, cross_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_ROWS_A_PART", 2)
    output, scorer = tmp_path / "scored.jsonl", CountingScorer(cross_encoder, stop_after=2)
    with pytest.raises(AccountError):
        write_scores(rows, output, scorer)
    scorer.stop_after, scorer.n_calls = None, 0

    write_scores(rows.select([0, 1, 3, 2, 4, 5]), output, scorer)

    assert scorer.n_calls == 2  # of three parts, the first is the same
    assert [json.loads(line)["query"] for line in output.read_text().splitlines()] == [
        rows["query"][i] for i in (0, 1, 3, 2, 4, 5)
    ]


class CountingScorer(PairScorer):
    """A scorer that counts its calls, and at which the user presses Ctrl-C."""

    def __init__(self, model: str, *, stop_after: int | None) -> None:
        super().__init__(model)
        self.stop_after = stop_after
        self.n_calls = 0

    def logits(self, pairs: Any) -> list[float]:
        if self.n_calls == self.stop_after:
            raise KeyboardInterrupt
        self.n_calls += 1
        return super().logits(pairs)


def test_the_files_of_all_shards_are_the_whole_file(
    rows: Dataset, cross_encoder: str, tmp_path: Path
) -> None:
    """Also of triplets: a query's rows go to one shard."""
    triplets = convert(rows, to="triplet").shuffle(seed=1)
    write_scores(triplets, tmp_path / "whole.jsonl", cross_encoder)

    for index in range(2):
        write_scores(triplets, tmp_path / f"{index}.jsonl", cross_encoder, shard=(index, 2))

    parts = [(tmp_path / f"{index}.jsonl").read_text() for index in range(2)]
    assert all(parts)
    assert "".join(parts) == (tmp_path / "whole.jsonl").read_text()


def test_no_rows_are_an_empty_file(cross_encoder: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(lit_rows()).select([])

    assert write_scores(rows, tmp_path / "none.parquet", cross_encoder) == 0
    written = pyarrow.parquet.read_table(tmp_path / "none.parquet")
    assert {"pos_scores", "neg_scores"} < set(written.column_names)


# TopK-PercPos --------------------------------------------------------------------------------


def scored_row(pos: list[Any], neg: list[Any]) -> dict[str, Any]:
    return {
        "query": "q",
        "pos": [f"p{i}" for i in range(len(pos))],
        "neg": [f"n{i}" for i in range(len(neg))],
        "pos_scores": pos,
        "neg_scores": neg,
    }


def kept(dataset: Dataset) -> list[list[str]]:
    return [list(row["neg"]) for row in dataset]


def test_what_scores_above_the_share_goes_with_its_score() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.77, 0.76, 0.1, 0.9])])

    clean = drop_by_score(rows, scale="probability")

    assert kept(clean) == [["n1", "n2"]]  # 0.95 of 0.8 is 0.76, which is not above itself
    assert clean["neg_scores"] == [[0.76, 0.1]]


def test_logits_are_compared_as_probabilities() -> None:
    """0.95 of a logit of -4 would keep one that scores above the positive."""
    logits = [-3.9, -4.0, -4.2, 5.0]
    rows = Dataset.from_list([scored_row([-4.0], logits)])

    bar = 0.95 * probability(-4.0)
    expected = [f"n{i}" for i, each in enumerate(logits) if probability(each) <= bar]
    assert kept(drop_by_score(rows)) == [expected] == [["n2"]]


def test_which_positive_is_a_choice() -> None:
    rows = Dataset.from_list([scored_row([0.8, 0.4], [0.5, 0.1])])

    assert kept(drop_by_score(rows, scale="probability")) == [["n1"]]
    assert kept(drop_by_score(rows, scale="probability", reference="highest")) == [["n0", "n1"]]


def test_a_row_left_without_negatives_goes() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.9]), scored_row([0.8], [0.1])])

    assert kept(drop_by_score(rows, scale="probability")) == [["n0"]]
    assert kept(drop_by_score(rows, scale="probability", min_negatives=0)) == [[], ["n0"]]


def test_more_false_negatives_than_the_papers_limit_are_dropped_and_the_row_stays() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.9] * 10 + [0.1])])

    assert kept(drop_by_score(rows, scale="probability")) == [["n10"]]


def test_what_score_wrote_is_dropped_exactly(rows: Dataset, cross_encoder: str) -> None:
    clean = drop_by_score(score(rows, cross_encoder))

    for before, after in zip(rows, clean, strict=True):
        bar, *found = map(
            probability, directly(cross_encoder, before["query"], [*before["pos"], *before["neg"]])
        )
        negatives = zip(before["neg"], found, strict=True)
        assert after["neg"] == [text for text, each in negatives if each <= 0.95 * bar]
        assert len(after["neg"]) == len(after["neg_scores"])
    assert count_negatives(clean) == count_negatives(rows) - 3


def test_tevatrons_scores_work_too(rows: Dataset, cross_encoder: str) -> None:
    scored = score(rows, cross_encoder)

    clean = drop_by_score(convert(scored, to="tevatron"))

    texts = [[passage["text"] for passage in row["negative_passages"]] for row in clean]
    assert texts == kept(drop_by_score(scored))


def test_dicts_and_streams_are_filtered_alike() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.77, 0.1])])

    both = drop_by_score(DatasetDict({"a": rows}), scale="probability")

    assert kept(both["a"]) == [["n1"]]
    stream = drop_by_score(rows.to_iterable_dataset(), scale="probability")
    assert [row["neg"] for row in stream] == [["n1"]]


def test_a_scale_that_could_be_either_has_to_be_told() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.77, 0.1])])

    with pytest.raises(SettingError, match="scale='logit', or scale='probability'"):
        drop_by_score(rows)


def test_a_share_of_a_negative_score_is_refused() -> None:
    rows = Dataset.from_list([scored_row([0.8], [0.1]), scored_row([-0.2], [-0.5])])

    with pytest.raises(RowError, match=r"above 0 in row 1, found -0.2"):
        drop_by_score(rows, scale="probability")


@pytest.mark.parametrize(
    "row", [scored_row([0.8], [None]), scored_row([math.nan], [0.1])], ids=["none", "nan"]
)
def test_a_passage_without_a_score_is_named(row: dict[str, Any]) -> None:
    rows = Dataset.from_list([scored_row([5.0], [0.1]), row])

    with pytest.raises(RowError, match="a score for every passage of row 1"):
        drop_by_score(rows)


def test_rows_without_scores_say_how_to_get_them() -> None:
    with pytest.raises(ColumnError, match="hf-relabel score"):
        drop_by_score(Dataset.from_list(tevatron_rows()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 95}, "found 95"),
        ({"share": True}, "found True"),
        ({"reference": "mean"}, "'lowest' or 'highest'"),
        ({"scale": "percent"}, "'logit' or 'probability', found 'percent'"),
        ({"min_negatives": -1}, "min_negatives of 0 or more"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        drop_by_score(Dataset.from_list([scored_row([5.0], [0.1])]), **settings)
