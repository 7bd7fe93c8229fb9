"""Benchmarks: queries, a corpus, and which of its passages answer them. Values, and their reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_relabel.errors import SettingError, SourceError

__all__ = ["Benchmark", "Qrels", "judged_queries", "load_benchmark"]

Qrels = Mapping[str, Mapping[str, int]]
"""Query id → passage id → grade; above 0 is relevant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A retrieval test: queries, the corpus to search, and which passages are relevant.

    Attributes:
        name: Shown in tables, and the name of the result's file.
        queries: Query id → text. Those without a relevant passage in `qrels` are not asked.
        corpus: Passage id → text, its title in front.
        qrels: Query id → passage id → grade; above 0 is relevant.
        ignores_identical_ids: Whether a passage with the query's own id is no result, for sets
            whose queries are passages of the corpus (ArguAna, Quora).
    """

    name: str
    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    qrels: Qrels
    ignores_identical_ids: bool = False

    def __post_init__(self) -> None:
        if not self.corpus:
            raise SettingError(f"expected passages in the corpus of {self.name!r}, found none.")
        judged = judged_queries(self.qrels)
        if not judged:
            raise SettingError(
                f"expected a query of {self.name!r} with a passage of a grade above 0, found none "
                f"among {len(self.qrels):,} in its qrels. Check that ids are strings, and the split."
            )
        if missing := [query_id for query_id in judged if query_id not in self.queries]:
            raise SettingError(
                f"expected a text for every query in the qrels of {self.name!r}, found none for "
                f"{len(missing):,}, the first {missing[0]!r}. Add them to queries."
            )
        relevant = (id_ for query_id in judged for id_ in self.qrels[query_id])
        if not any(id_ in self.corpus for id_ in relevant):
            raise SettingError(
                f"expected the passages that the qrels of {self.name!r} name in its corpus, found "
                "not one. Check that both use the same ids, as strings."
            )


def judged_queries(qrels: Qrels) -> list[str]:
    """Return the ids of the queries that count: those with a relevant passage, sorted.

    Of any other query, no ranking is better than another.
    """
    return sorted(
        query_id
        for query_id, grades in qrels.items()
        if any(grade > 0 for grade in grades.values())
    )


def load_benchmark(
    folder: str | Path,
    split: str = "test",
    *,
    name: str | None = None,
    ignores_identical_ids: bool = False,
) -> Benchmark:
    """Read a benchmark in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.

    Args:
        folder: The folder.
        split: Which qrels. Only their queries are kept.
        name: The benchmark's name; None takes the folder's.
        ignores_identical_ids: See `Benchmark`.

    Raises:
        SourceError: A file is missing, or a line of it is not as expected.
        SettingError: The files do not fit together.
    """
    folder = Path(folder)
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv")
    queries = _read_texts(folder / "queries.jsonl")
    return Benchmark(
        name=name or folder.resolve().name,
        queries={query_id: queries[query_id] for query_id in qrels if query_id in queries},
        corpus=_read_texts(folder / "corpus.jsonl"),
        qrels=qrels,
        ignores_identical_ids=ignores_identical_ids,
    )


def _read_texts(path: Path) -> dict[str, str]:
    """Read id → title and text from a JSONL file."""
    return {str(row["_id"]): _text(row) for row in _read_jsonl(path)}


def _text(row: Mapping[str, Any]) -> str:
    """Join title and text as BEIR does: with a blank."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["_id"], row["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise SourceError(
                    f"expected a JSON object with '_id' and 'text', found line {number} of "
                    f"{path.name}: {line.strip()[:80]!r}."
                ) from error
            yield row


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.split()
            if not cells or (number == 1 and cells[-1] == "score"):
                continue
            try:
                query_id, passage_id, grade = cells
                qrels.setdefault(query_id, {})[passage_id] = int(grade)
            except ValueError as error:
                raise SourceError(
                    f"expected query id, passage id and grade, found line {number} of "
                    f"{path.name}: {line.strip()!r}."
                ) from error
    return qrels


@contextmanager
def _open(path: Path) -> Iterator[Iterator[str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except FileNotFoundError as error:
        there = sorted(found.name for found in path.parent.glob("*")) or "nothing"
        raise SourceError(
            f"expected {path.name} in the folder of a benchmark (corpus.jsonl, queries.jsonl, "
            f"qrels/SPLIT.tsv), found {there} in {path.parent}."
        ) from error
