"""Formats with a fixed width: triplet and n-tuple, as sentence-transformers trains on them.

A freed slot is refilled (see `refill`), and a promoted passage becomes one more dataset row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hf_relabel.errors import RowError
from hf_relabel.formats.base import SHARED_ROLES, Format, Role
from hf_relabel.formats.checks import row_error, text_of
from hf_relabel.formats.groups import Group, GroupKey, check_groups, gather, group_key
from hf_relabel.formats.labeled import ANCHOR
from hf_relabel.formats.refill import Refills
from hf_relabel.formats.rows import Batch, Edit, Passage, Row, Written
from hf_relabel.verdicts import Action

__all__ = ["NTuple", "Triplet"]

_POSITIVE = Role(
    name="positive",
    aliases=("answer",),
    words=("positives",),
    needs_sample=("pos",),
    is_list=False,
)


@dataclass(slots=True)
class _Line:
    """One dataset row of a fixed-width format, with what its row's edit says about it."""

    index: int
    key: GroupKey
    positive: Passage
    negatives: list[Passage]
    actions: list[Action]
    drop: str | None
    freed: list[int] = field(default_factory=list)

    @property
    def kept(self) -> list[Passage]:
        freed = set(self.freed)
        return [p for slot, p in enumerate(self.negatives) if slot not in freed]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promotion:
    """A passage that becomes a positive of a query, and the line that it was a negative of."""

    key: GroupKey
    passage: Passage
    source: int


class _FixedWidth(Format):
    """A format whose dataset rows hold one positive and always as many negatives."""

    refills = True
    aligned = frozenset({"label", "labels", "score", "scores"})

    @property
    def negative_columns(self) -> list[str]:
        own = (role.name for role in self.roles if not role.is_numbered)
        others = set(own) - {"negative"}
        return [column for role, column in self.columns.items() if role not in others]

    @abstractmethod
    def _unfold(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit]
    ) -> tuple[list[_Line], list[_Promotion]]:
        """Return one line per dataset row, in order, and what becomes a row of its own, in order.

        Raises:
            RowError: The rows are not those of this batch.
        """

    @abstractmethod
    def _beside(self, rank: int, refilled: list[Passage], own: list[Passage]) -> list[Passage]:
        """Return the negatives of a promoted passage's own row.

        Args:
            rank: How many passages of the query were promoted before.
            refilled: The negatives of the dataset row that it came from, refilled.
            own: The query's kept negatives.
        """

    def _write(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit], *, seed: int
    ) -> Written:
        lines, promotions_in_order = self._unfold(batch, rows, edits)
        promotions: dict[GroupKey, list[_Promotion]] = {}
        for promotion in promotions_in_order:
            promotions.setdefault(promotion.key, []).append(promotion)
        labels = _Labels(lines, promotions)
        labels.free()
        refills = Refills(
            ((line.key[0], p) for line in lines if line.drop is None for p in line.kept),
            excluded=labels.excluded,
            seed=seed,
        )
        negatives = _refilled(lines, refills, is_spread=self.is_spread)
        last = {line.key: line.index for line in lines}
        added = {
            last[key]: self._added(some, negatives, refills.own(key[0]), known=labels.original(key))
            for key, some in promotions.items()
        }
        return self._assemble(batch, lines, negatives, added)

    def _added(
        self,
        promotions: Sequence[_Promotion],
        negatives: dict[int, list[Passage]],
        own: list[Passage],
        *,
        known: set[str],
    ) -> list[tuple[int, Passage, list[Passage]]]:
        """Return (source row, positive, negatives) of the new rows of one query.

        Left out: a passage that is a positive already, and one whose row has no negative left.
        """
        seen = set(known)
        added: list[tuple[int, Passage, list[Passage]]] = []
        for promotion in promotions:
            if promotion.passage.key in seen or promotion.source not in negatives:
                continue
            seen.add(promotion.passage.key)
            beside = self._beside(len(added), negatives[promotion.source], own)
            added.append((promotion.source, promotion.passage, beside))
        return added

    def _assemble(
        self,
        batch: Batch,
        lines: Sequence[_Line],
        negatives: dict[int, list[Passage]],
        added: dict[int, list[tuple[int, Passage, list[Passage]]]],
    ) -> Written:
        out: Batch = {column: [] for column in batch}
        reasons: Counter[str] = Counter()
        for line in lines:
            if line.index in negatives:
                texts = {slot: negatives[line.index][slot].text for slot in line.freed}
                self._append(out, batch, line.index, texts)
            else:
                reasons[line.drop or "no_negative"] += 1
            for source, positive, beside in added.get(line.index, ()):
                texts = {slot: passage.text for slot, passage in enumerate(beside)}
                self._append(out, batch, source, texts, positive.text)
        n_added = sum(len(some) for some in added.values())
        return Written(batch=out, rows_dropped=dict(reasons), rows_added=n_added)

    def _append(
        self,
        out: Batch,
        batch: Batch,
        index: int,
        negatives: dict[int, str],
        positive: str | None = None,
    ) -> None:
        """Append one row of the batch, with some negatives, and maybe the positive, replaced."""
        columns = self.negative_columns
        changed: dict[str, Any] = {columns[slot]: text for slot, text in negatives.items()}
        if positive is not None:
            changed[self.columns["positive"]] = positive
        for column, values in batch.items():
            out[column].append(changed[column] if column in changed else values[index])


class _Labels:
    """What is known about each query of a batch, whatever its subset.

    A query that no edit touched is left as it was found, even if a negative of one of its rows is
    the positive of another: a round trip changes nothing.
    """

    def __init__(
        self, lines: Sequence[_Line], promotions: dict[GroupKey, list[_Promotion]]
    ) -> None:
        self._by_query: dict[str, list[_Line]] = {}
        for line in lines:
            self._by_query.setdefault(line.key[0], []).append(line)
        self._promoted: dict[str, set[str]] = {}
        for (query, _), some in promotions.items():
            keys = self._promoted.setdefault(query, set())
            keys.update(promotion.passage.key for promotion in some)
        self.excluded = cache(self._find_excluded)

    def original(self, key: GroupKey) -> set[str]:
        """Return the keys of the positives that one (query, subset) had before its edits."""
        return {line.positive.key for line in self._by_query[key[0]] if line.key == key}

    def _positives(self, query: str) -> set[str]:
        own = {line.positive.key for line in self._by_query[query]}
        return own | self._promoted.get(query, set())

    def _find_excluded(self, query: str) -> frozenset[str]:
        # A dropped passage is a suspect for this query, however innocent it is for the others.
        dropped = {
            passage.key
            for line in self._by_query[query]
            for passage, action in zip(line.negatives, line.actions, strict=True)
            if action is not Action.KEEP
        }
        return frozenset(self._positives(query) | dropped)

    def free(self) -> None:
        """Mark the slots that need a refill: those acted on, and known positives among the rest."""
        for query, lines in self._by_query.items():
            if all(a is Action.KEEP for line in lines for a in line.actions):
                continue
            positives = self._positives(query)
            for line in lines:
                line.freed = [
                    slot
                    for slot, (p, a) in enumerate(zip(line.negatives, line.actions, strict=True))
                    if a is not Action.KEEP or p.key in positives
                ]


def _refilled(
    lines: Sequence[_Line], refills: Refills, *, is_spread: bool
) -> dict[int, list[Passage]]:
    """Return each line's negatives with its freed slots filled.

    Lines that leave are missing: those of a dropped row, and those that nothing can fill.
    """
    used: dict[str, set[str]] = {}
    filled = {}
    for line in lines:
        if line.drop is not None:
            continue
        negatives = list(line.negatives)
        in_row = {p.key for p in line.kept} if line.freed else set()
        # Rows of one slot would otherwise meet the same refill again and again.
        spent = used.setdefault(line.key[0], set()) if is_spread else set()
        for slot in line.freed:
            choice = refills.pick(line.key[0], f"{line.index}:{slot}", in_row=in_row, used=spent)
            if choice is None:
                break
            negatives[slot] = choice
            in_row.add(choice.key)
            spent.add(choice.key)
        else:
            filled[line.index] = negatives
    return filled


class Triplet(_FixedWidth):
    """`anchor, positive, negative`: all triplets of a batch with one (query, subset) are one row.

    A row's positives and negatives are the distinct ones of its triplets, in order of appearance.
    A promoted passage's own triplet takes the query's kept negatives in turn; if there is none,
    the refill of the triplet that it came from.
    """

    name = "triplet"
    is_spread = True
    roles = (
        ANCHOR,
        _POSITIVE,
        Role(name="negative", words=("negatives",), needs_sample=("neg",), is_list=False),
        *SHARED_ROLES,
    )

    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        ids = self.names(batch, "query_id", len(numbers))
        queries = batch[self.query_column]
        return [
            Row(
                query=queries[group.indices[0]],
                positives=tuple(group.positives.passages),
                negatives=tuple(group.negatives.passages),
                query_id=ids[group.indices[0]],
                subset=group.key[1],
                indices=tuple(group.indices),
            )
            for group in self._groups(batch, numbers)
        ]

    def _groups(self, batch: Batch, numbers: Sequence[int]) -> list[Group]:
        queries = self.queries(batch, numbers)
        subsets = self.names(batch, "subset", len(numbers))
        return gather(
            [group_key(q, s) for q, s in zip(queries, subsets, strict=True)],
            _column_passages(batch, self.columns["positive"], numbers),
            _column_passages(batch, self.columns["negative"], numbers),
        )

    def _unfold(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit]
    ) -> tuple[list[_Line], list[_Promotion]]:
        groups = self._groups(batch, range(len(batch[self.query_column])))
        check_groups(groups, rows)
        lines, promotions = [], []
        for group, edit in zip(groups, edits, strict=True):
            lines += _group_lines(group, edit)
            promotions += [
                _Promotion(
                    key=group.key,
                    passage=group.negatives.passages[j],
                    source=group.negatives.sources[j][0],
                )
                for j in (edit.promoted if edit.drop_row is None else ())
            ]
        return sorted(lines, key=lambda line: line.index), promotions

    def _beside(self, rank: int, refilled: list[Passage], own: list[Passage]) -> list[Passage]:
        return [own[rank % len(own)]] if own else refilled


class NTuple(_FixedWidth):
    """`anchor, positive, negative_1 … negative_n`: each dataset row is one row.

    A promoted passage's own row has the negatives of the row that it came from, refills included.
    """

    name = "n-tuple"
    roles = (
        ANCHOR,
        _POSITIVE,
        Role(name="negative_", is_list=False, is_numbered=True),
        *SHARED_ROLES,
    )

    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        queries = self.queries(batch, numbers)
        ids = self.names(batch, "query_id", len(queries))
        subsets = self.names(batch, "subset", len(queries))
        positives = _column_passages(batch, self.columns["positive"], numbers)
        columns = [_slot_passages(batch, c, numbers) for c in self.negative_columns]
        return [
            Row(
                query=query,
                positives=(positives[i],),
                negatives=tuple([column[i] for column in columns]),
                query_id=ids[i],
                subset=subsets[i],
                indices=(i,),
            )
            for i, query in enumerate(queries)
        ]

    def _unfold(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit]
    ) -> tuple[list[_Line], list[_Promotion]]:
        n_rows = len(batch[self.query_column])
        if [row.indices for row in rows] != [(i,) for i in range(n_rows)]:
            raise RowError(
                f"expected all {n_rows} rows of this batch in order, found {len(rows)} that do "
                "not match. Hand back the batch and the rows unchanged."
            )
        lines, promotions = [], []
        for i, (row, edit) in enumerate(zip(rows, edits, strict=True)):
            line = _Line(
                index=i,
                key=group_key(row.query, row.subset),
                positive=row.positives[0],
                negatives=list(row.negatives),
                actions=list(edit.actions),
                drop=edit.drop_row,
            )
            lines.append(line)
            promotions += [
                _Promotion(key=line.key, passage=row.negatives[j], source=i)
                for j in (edit.promoted if edit.drop_row is None else ())
            ]
        return lines, promotions

    def _beside(
        self,
        rank: int,  # noqa: ARG002
        refilled: list[Passage],
        own: list[Passage],  # noqa: ARG002
    ) -> list[Passage]:
        return refilled


def _group_lines(group: Group, edit: Edit) -> list[_Line]:
    positives = {
        i: passage
        for passage, sources in zip(group.positives.passages, group.positives.sources, strict=True)
        for i in sources
    }
    return [
        _Line(
            index=i,
            key=group.key,
            positive=positives[i],
            negatives=[passage],
            actions=[action],
            drop=edit.drop_row,
        )
        for passage, sources, action in zip(
            group.negatives.passages, group.negatives.sources, edit.actions, strict=True
        )
        for i in sources
    ]


def _column_passages(batch: Batch, column: str, numbers: Sequence[int]) -> list[Passage]:
    values = zip(batch[column], numbers, strict=True)
    return [Passage(text=text_of(text, column, number)) for text, number in values]


def _slot_passages(batch: Batch, column: str, numbers: Sequence[int]) -> list[Passage]:
    for value, number in zip(batch[column], numbers, strict=True):
        if value is None:
            fix = (
                "An n-tuple has the same number of negatives in every row: leave the row out, "
                "or store the dataset as labeled-list, where lists may differ in length."
            )
            raise row_error(column, number, expected="a string", found=None, fix=fix)
    return _column_passages(batch, column, numbers)
