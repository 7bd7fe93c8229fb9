"""Groups: the rows of one query, where a format spreads them over several dataset rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from hf_relabel.errors import RowError
from hf_relabel.formats.base import Format
from hf_relabel.formats.rows import Passage, Row, normalize

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Group", "GroupKey", "check_groups", "gather", "group_indices", "group_key"]

_GROUPING_BATCH = 10_000  # rows of the query column alone

GroupKey = tuple[str, str | None]
"""Normalized query and subset: dataset rows with the same key are one row."""


def group_key(query: str, subset: str | None) -> GroupKey:
    """Return what tells the queries of a dataset apart."""
    return normalize(query), subset


@dataclass(slots=True)
class _Distinct:
    """Passages in the order of their first appearance, each once."""

    passages: list[Passage] = field(default_factory=list)
    sources: list[list[int]] = field(default_factory=list)
    _by_text: dict[str, int] = field(default_factory=dict)
    _by_key: dict[str, int] = field(default_factory=dict)

    def add(self, passage: Passage, index: int) -> None:
        """Add a passage found in one row of the batch."""
        # Hashing costs more than all else here, and most repeats are the very same string.
        position = self._by_text.get(passage.text)
        if position is None:
            position = self._by_key.setdefault(passage.key, len(self.passages))
            self._by_text[passage.text] = position
        if position == len(self.passages):
            self.passages.append(passage)
            self.sources.append([])
        self.sources[position].append(index)


@dataclass(slots=True)
class Group:
    """The dataset rows of one query.

    `negatives.sources[j]` lists the batch rows that hold `row.negatives[j]`: the way back from
    a row to its dataset rows. It follows from the batch alone, so that `write` finds it again.
    """

    key: GroupKey
    indices: list[int] = field(default_factory=list)
    positives: _Distinct = field(default_factory=_Distinct)
    negatives: _Distinct = field(default_factory=_Distinct)


def gather(
    keys: Sequence[GroupKey],
    positives: Sequence[Passage | None],
    negatives: Sequence[Passage | None],
) -> list[Group]:
    """Group the rows of a batch by their keys, in the order of first appearance.

    Args:
        keys: One per batch row.
        positives: The row's positive, None where it has none.
        negatives: The row's negative, None where it has none.
    """
    groups: dict[GroupKey, Group] = {}
    for i, key in enumerate(keys):
        group = groups.setdefault(key, Group(key=key))
        group.indices.append(i)
        if (positive := positives[i]) is not None:
            group.positives.add(positive, i)
        if (negative := negatives[i]) is not None:
            group.negatives.add(negative, i)
    return list(groups.values())


def check_groups(groups: Sequence[Group], rows: Sequence[Row]) -> None:
    """Check that the rows are the ones that this batch reads as.

    Raises:
        RowError: They are others, fewer, or in another order.
    """
    if [tuple(group.indices) for group in groups] != [row.indices for row in rows]:
        raise RowError(
            f"expected all {len(groups)} rows that were read from this batch, in that order, "
            f"found {len(rows)} that do not match. Hand back the batch and the rows unchanged."
        )


def group_indices(source: Format, dataset: Dataset) -> list[list[int]]:
    """Return the rows of each query, in the order in which queries first appear."""
    roles = [source.roles[0].name, *(["subset"] if "subset" in source.columns else [])]
    groups: dict[bytes, list[int]] = {}
    start = 0
    narrow = dataset.select_columns([source.columns[role] for role in roles])
    for batch in narrow.iter(batch_size=_GROUPING_BATCH):
        numbers = range(start, start + len(batch[source.query_column]))
        subsets = source.names(batch, "subset", len(numbers))
        queries = source.queries(batch, numbers)
        for number, query, subset in zip(numbers, queries, subsets, strict=True):
            name = repr(group_key(query, subset)).encode("utf-8", "surrogatepass")
            groups.setdefault(blake2b(name, digest_size=16).digest(), []).append(number)
        start = numbers.stop
    return list(groups.values())
