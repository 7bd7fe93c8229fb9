"""Shapes: which column of a training batch is what, as the trainers of sentence-transformers see it.

The trainers go by the order of the columns, not by their names: first the query, then the positive,
then negatives; a label column (label, labels, score, scores) stands aside. So do these shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ASIDE", "TrainingRow", "TrainingShape", "find_shape"]

ASIDE = "dataset_name"
"""What the trainers add to rows of a DatasetDict; never text."""

_LABELS = ("label", "labels", "score", "scores")

TrainingRow = Mapping[str, Any]
"""One row as a data loader hands it to its collate function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """What the columns of a batch are.

    Attributes:
        kind: "tuples" (query, positive, negatives; triplets too), "pairs" (query, passage, label)
            or "lists" (query, passages, labels).
        query: The column of the query.
        texts: The other columns of text, in order: positive and negatives, or the one of passages.
        label: The column of labels; None for tuples.
    """

    kind: Literal["tuples", "pairs", "lists"]
    query: str
    texts: tuple[str, ...]
    label: str | None = None

    @property
    def is_spread(self) -> bool:
        """Whether one query's negatives lie in several rows, as the transform's formats say."""
        return self.kind == "pairs" or (self.kind == "tuples" and len(self.texts) == 2)


def find_shape(row: TrainingRow) -> TrainingShape | None:
    """Return the shape of a batch by its first row.

    Returns:
        None where there is nothing to relabel: a teacher's scores beside several negatives, which
        would go out of step with them, pairs with a similarity score, or values that are no text.
    """
    label = next((name for name in _LABELS if name in row), None)
    query, *texts = [name for name in row if name not in (label, ASIDE)] or [""]
    values = [row[name] for name in (query, *texts) if name in row]
    if not texts or not isinstance(values[0], str):
        return None
    if label is None:
        is_text = all(isinstance(value, str) for value in values)
        return TrainingShape(kind="tuples", query=query, texts=tuple(texts)) if is_text else None
    if len(texts) > 1 or label in ("score", "scores"):
        return None
    if isinstance(values[1], str):
        return TrainingShape(kind="pairs", query=query, texts=tuple(texts), label=label)
    if isinstance(values[1], list | tuple) and isinstance(row[label], list | tuple):
        return TrainingShape(kind="lists", query=query, texts=tuple(texts), label=label)
    return None
