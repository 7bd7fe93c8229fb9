"""The demo: the sample that comes with the library, relabeled and compared with its answer key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hf_relabel.report import RelabelReport
from hf_relabel.transform import Relabeler

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DemoResult", "Promotion", "load_sample", "run_demo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """One false negative that the demo found."""

    query: str
    passage: str
    is_in_key: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The sample before and after.

    Attributes:
        report: The counts.
        before: Subset → (rows, positives, negatives).
        after: Likewise.
        promotions: Promoted passages, as the sample orders them.
        precision: Share of the promoted passages that the key names; None without any.
        recall: Share of the key's false negatives that were promoted.
        n_planted: False negatives in the key.
    """

    report: RelabelReport
    before: Mapping[str, tuple[int, int, int]]
    after: Mapping[str, tuple[int, int, int]]
    promotions: Sequence[Promotion]
    precision: float | None
    recall: float
    n_planted: int


def load_sample() -> Dataset:
    """Return the sample: rows written for this library, with planted false negatives and traps."""
    from datasets import Dataset

    text = files("hf_relabel").joinpath("data", "sample", "rows.jsonl").read_text("utf-8")
    return Dataset.from_list([json.loads(line) for line in text.splitlines()])


@cache
def answer_key() -> dict[str, list[str]]:
    """Return the sample's false negatives: query id → document ids."""
    text = files("hf_relabel").joinpath("data", "sample", "key.json").read_text("utf-8")
    key: dict[str, list[str]] = json.loads(text)["false_negatives"]
    return key


def run_demo(relabeler: Relabeler) -> DemoResult:
    """Judge and relabel the sample.

    Raises:
        AccountError: The judge's account does not answer.
        MissingExtraError: The offline judge's packages are not installed.
    """
    rows = load_sample()
    relabeler.judge(rows)
    clean = rows.map(relabeler, batched=True, load_from_cache_file=False)
    planted = {(query, docid) for query, docids in answer_key().items() for docid in docids}
    promoted = _promoted(rows, clean)
    found = [pair for pair in promoted if pair in planted]
    return DemoResult(
        report=relabeler.report(rows),
        before=_counts(rows),
        after=_counts(clean),
        promotions=[
            Promotion(query=query, passage=passage, is_in_key=pair in planted)
            for pair, (query, passage) in promoted.items()
        ],
        precision=len(found) / len(promoted) if promoted else None,
        recall=len(found) / len(planted),
        n_planted=len(planted),
    )


def _promoted(before: Dataset, after: Dataset) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (query id, docid) → (query, text) of every new positive."""
    old = {(row["query_id"], passage["docid"]) for row, passage in _positives(before)}
    return {
        (row["query_id"], passage["docid"]): (row["query"], passage["text"])
        for row, passage in _positives(after)
        if (row["query_id"], passage["docid"]) not in old
    }


def _positives(rows: Dataset) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(row, passage) for row in rows for passage in row["positive_passages"]]


def _counts(rows: Dataset) -> dict[str, tuple[int, int, int]]:
    counts: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        n_rows, n_positives, n_negatives = counts.get(row["subset"], (0, 0, 0))
        counts[row["subset"]] = (
            n_rows + 1,
            n_positives + len(row["positive_passages"]),
            n_negatives + len(row["negative_passages"]),
        )
    return counts
