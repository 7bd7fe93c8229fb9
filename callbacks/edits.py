"""Edits: one training batch before and after, by the policy of the Relabeler and nothing else.

Rows with labels go through the formats that `Dataset.map` uses. Tuples keep their number of columns:
a freed slot is masked by the loss, or its text is replaced by a negative of another row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from hf_relabel.callbacks.counts import Counts
from hf_relabel.callbacks.identity import Ids, TextIds, seeded_draw
from hf_relabel.callbacks.index import Known, VerdictIndex
from hf_relabel.callbacks.shapes import ASIDE, TrainingRow, TrainingShape, find_shape

from hf_relabel.errors import ColumnError
from hf_relabel.formats import Edit, Format, Passage, Row, get_format, resolve
from hf_relabel.verdicts import Action

__all__ = ["N_HEAD", "BatchEditor", "Edited"]

N_HEAD = 3
"""Numbers before the documents' ids in a row of `Edited.mask`."""

KnownPositives = Mapping[str, Iterable[str]]


@dataclass(slots=True, kw_only=True)
class Edited:
    """One batch after its edits.

    Attributes:
        rows: The rows; those that no edit touched are the original objects.
        counts: What was done.
        mask: What the loss must mask, for tuples, or None: (B, 3 + D + K) int64 with, for each row,
            the number D of its documents, the query's id, whether the row is silent, the D ids of
            positive and negatives, and K ids that must never be negatives of this query, filled up
            with 0. A silent row stands in for one that was dropped, where the size must stay.
    """

    rows: list[TrainingRow]
    counts: Counts = field(default_factory=Counts)
    mask: npt.NDArray[np.int64] | None = None


class BatchEditor:
    """Edits batches by an index and its policy.

    Args:
        index: The verdicts, and what becomes of them.
        known_positives: Query → passages that are relevant to it beyond what the rows say.
    """

    def __init__(
        self, index: VerdictIndex, *, known_positives: KnownPositives | None = None
    ) -> None:
        self.index = index
        self.ids = TextIds()
        self._known_positives = {
            self.ids(query): {self.ids(text) for text in texts}
            for query, texts in (known_positives or {}).items()
        }

    def edit(
        self,
        rows: Sequence[TrainingRow],
        *,
        epoch: int = 0,
        is_masked: bool = False,
        keeps_size: bool = False,
    ) -> Edited | None:
        """Edit one batch.

        Args:
            rows: Rows of one dataset, as a collate function gets them.
            epoch: Chooses, with the seed, which positive of a query stands in its place.
            is_masked: Whether the loss masks what `Edited.mask` says, so that texts stay.
            keeps_size: Whether as many rows must come out, because ranks gather them.

        Returns:
            The edited batch; None where its columns are none that can be relabeled.
        """
        if not rows:
            return None
        shape = find_shape(rows[0])
        format_ = _format_of(rows[0], shape)
        if shape is None and format_ is None:
            return None
        self.index.reload()
        if shape is not None and format_ is None:
            work = _Tuples(self, rows, shape, epoch=epoch)
            return work.masked(keeps_size=keeps_size) if is_masked else work.rewritten()
        return self._formatted(rows, cast("Format", format_), shape)

    def known(self, queries: Ids, subset: str | None) -> list[Known]:
        """Return what is known of each query; nothing for a subset that is not judged."""
        if self.skips(subset):
            return [Known(relevant={})] * len(queries)
        return self.index.known(queries)

    def skips(self, subset: str | None) -> bool:
        return subset is not None and subset.lower() in self.index.policy.skip_subsets

    def other_positives(self, query: int) -> set[int]:
        """Return the ids of passages that were given as known positives of a query."""
        return self._known_positives.get(query, set())

    def spread_drop(self, known: Known, positives: Iterable[int]) -> str | None:
        """Return why all rows of a query leave, where they lie in many batches; None if they stay.

        The transform sees a query's rows together. Here the index stands in for those elsewhere.
        """
        policy = self.index.policy
        n_false = len(self.index.acted_on(known).keys() - set(positives))
        if n_false and policy.action == "remove_row":
            return "false_negative"
        is_over = policy.is_over_limit(n_false, known.n_judged)
        return "too_many_false_negatives" if is_over else None

    def _formatted(
        self, rows: Sequence[TrainingRow], format_: Format, shape: TrainingShape | None
    ) -> Edited:
        """Edit rows through the format that the transform reads and writes them with."""
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        read = format_.read(batch)
        subset = rows[0].get(ASIDE)
        known = self.known(self.ids.of([row.query for row in read]), subset)
        edits = [
            self._edit(row, what, format_, subset) for row, what in zip(read, known, strict=True)
        ]
        counts = Counts(known=sum(self._n_known(row, subset) for row in read))
        if all(edit.changes_nothing for edit in edits):
            changed = list(rows)
        else:
            written = format_.write(batch, read, edits, seed=self.index.seed)
            changed = _rows_of(written.batch) or [_kept(rows[0], format_, shape, edits[0])]
        counts.rows_dropped = len(rows) - len(changed)
        _count(counts, read, edits)
        if shape is not None:  # each row is a passage, or its labels tell: exact with repeats too
            counts.seen = _n_negatives(rows, shape)
            counts.dropped = counts.seen - _n_negatives(changed, shape) - counts.promoted
        return Edited(rows=changed, counts=counts)

    def _edit(self, row: Row, known: Known, format_: Format, subset: str | None) -> Edit:
        positives = [self.ids(passage.shown) for passage in row.positives]
        ids = [self.ids(passage.shown) for passage in row.negatives]
        if format_.is_spread and (reason := self.spread_drop(known, positives)) is not None:
            return Edit(actions=(Action.DROP,) * len(ids), drop_row=reason)
        if not (known.relevant.keys() | set(positives)).intersection(ids):
            return Edit(actions=(Action.KEEP,) * len(ids))
        return self.decide(row, ids, known, subset, can_run_out=not format_.is_spread)

    def decide(
        self, row: Row, ids: Sequence[int], known: Known, subset: str | None, *, can_run_out: bool
    ) -> Edit:
        """Return the transform's own edit of a row.

        Args:
            row: The row.
            ids: The ids of its negatives, in order.
            known: What is known of its query.
            subset: The dataset's name, where there are several.
            can_run_out: As in `Policy.edit`.
        """
        verdicts = {
            passage.key: known.relevant[id_]
            for passage, id_ in zip(row.negatives, ids, strict=True)
            if id_ in known.relevant
        }
        if self.skips(subset):
            return Edit(actions=(Action.KEEP,) * len(ids))
        return self.index.policy.edit(row, verdicts, can_run_out=can_run_out)

    def _n_known(self, row: Row, subset: str | None) -> int:
        if not row.negatives or self.skips(subset):
            return 0
        query = np.uint64(self.ids(row.query))
        passages = self.ids.of([passage.shown for passage in row.negatives])
        return int(self.index.has(query, passages).sum())  # type: ignore[arg-type]


class _Tuples:
    """One batch of (query, positive, negatives) rows, and what becomes of each slot.

    Attributes:
        queries: (B,) ids.
        docs: (B, D) ids of positive and negatives, promoted passages in their new places.
        excluded: For each row the ids that must not be negatives of its query, its positive first.
        edits: One for each row.
    """

    def __init__(
        self,
        editor: BatchEditor,
        rows: Sequence[TrainingRow],
        shape: TrainingShape,
        *,
        epoch: int,
    ) -> None:
        self._editor = editor
        self._shape = shape
        self._epoch = epoch
        self._subset = rows[0].get(ASIDE)
        self.rows: list[TrainingRow] = list(rows)
        self.queries = editor.ids.of([row[shape.query] for row in rows])
        texts = [row[name] for row in rows for name in shape.texts]
        self.docs = editor.ids.of(texts).reshape(len(rows), len(shape.texts))
        self._known = editor.known(self.queries, self._subset)
        self.excluded = self._all_excluded()
        self.edits = [self._edit(place) for place in range(len(rows))]
        self.counts = self._counted()
        for place, edit in enumerate(self.edits):
            if edit.drop_row is None and edit.promoted:
                self._swap(place, edit.promoted)

    def masked(self, *, keeps_size: bool) -> Edited:
        """Return the batch with its texts in place, and what the loss must mask."""
        gone = {place for place, edit in enumerate(self.edits) if edit.drop_row is not None}
        stays = [place for place in range(len(self.rows)) if keeps_size or place not in gone]
        stays = stays or [0]  # silent, so that the step is one of no gradient
        width = max(len(self.excluded[place]) for place in stays)
        mask = np.zeros((len(stays), N_HEAD + self.docs.shape[1] + width), dtype=np.uint64)
        for line, place in zip(mask, stays, strict=True):
            line[:N_HEAD] = self.docs.shape[1], self.queries[place], place in gone
            line[N_HEAD : N_HEAD + self.docs.shape[1]] = self.docs[place]
            excluded = self.excluded[place]
            line[len(line) - width : len(line) - width + len(excluded)] = excluded
        rows = self.rows if len(stays) == len(self.rows) else [self.rows[place] for place in stays]
        return Edited(rows=rows, counts=self.counts, mask=mask.view(np.int64))

    def rewritten(self) -> Edited:
        """Return the batch with the texts of freed slots replaced, without dropped rows."""
        freed = [self._freed(place) for place in range(len(self.rows))]
        rows: list[TrainingRow] = []
        for place, slots in enumerate(freed):
            if self.edits[place].drop_row is not None:
                continue
            texts = self._refills(place, slots, freed) if slots else {}
            if texts is None:
                self.counts.rows_dropped += 1
            else:
                rows.append({**self.rows[place], **texts} if texts else self.rows[place])
        if not rows:  # an empty batch is no batch: the first row stays, with what others can give
            texts = self._refills(0, freed[0], [[] for _ in freed]) or {}
            rows = [{**self.rows[0], **texts}]
            self.counts.rows_dropped -= 1
        return Edited(rows=rows, counts=self.counts)

    def _all_excluded(self) -> list[list[int]]:
        """Return what each row's query must not have as a negative: known positives and suspects."""
        positives: dict[int, dict[int, None]] = {}
        own = self.docs[:, 0].tolist()
        for query, positive, known in zip(self.queries.tolist(), own, self._known, strict=True):
            ids = positives.setdefault(query, {})
            ids[positive] = None
            ids.update(dict.fromkeys(self._editor.index.acted_on(known)))
            ids.update(dict.fromkeys(self._editor.other_positives(query)))
        if self._editor.skips(self._subset):
            return [[] for _ in own]
        return [list(positives[query]) for query in self.queries.tolist()]

    def _edit(self, place: int) -> Edit:
        known, ids = self._known[place], self.docs[place].tolist()
        positive, negatives = ids[0], ids[1:]
        if self._shape.is_spread:
            reason = self._editor.spread_drop(known, [positive])
            if reason is not None:
                return Edit(actions=(Action.DROP,) * len(negatives), drop_row=reason)
        if positive not in negatives and known.relevant.keys().isdisjoint(negatives):
            return Edit(actions=(Action.KEEP,) * len(negatives))
        row, columns = self.rows[place], self._shape.texts
        read = Row(
            query=row[self._shape.query],
            positives=(Passage(text=row[columns[0]]),),
            negatives=tuple(Passage(text=row[name]) for name in columns[1:]),
            indices=(place,),
        )
        return self._editor.decide(read, negatives, known, self._subset, can_run_out=False)

    def _counted(self) -> Counts:
        n_negatives = self.docs.shape[1] - 1
        counts = Counts(seen=len(self.rows) * n_negatives)
        if n_negatives and not self._editor.skips(self._subset):
            known = self._editor.index.has(self.queries[:, None], self.docs[:, 1:])
            counts.known = int(known.sum())
        for edit in self.edits:
            if edit.drop_row is not None:
                counts.rows_dropped += 1
                counts.dropped += n_negatives
            else:
                counts.promoted += len(edit.promoted)
                counts.dropped += edit.actions.count(Action.DROP)
        return counts

    def _swap(self, place: int, promoted: Sequence[int]) -> None:
        """Put the positive of this epoch in its place: the original one, or a promoted passage."""
        ids = (int(self.queries[place]), int(self.docs[place, 0]))
        draw = seeded_draw(self._editor.index.seed, self._epoch, *ids) % (len(promoted) + 1)
        if draw == 0:
            return
        slot = 1 + promoted[draw - 1]
        positive, other = self._shape.texts[0], self._shape.texts[slot]
        row = self.rows[place]
        self.rows[place] = {**row, positive: row[other], other: row[positive]}
        self.docs[place, [0, slot]] = self.docs[place, [slot, 0]]

    def _freed(self, place: int) -> list[int]:
        actions = self.edits[place].actions
        return [1 + slot for slot, action in enumerate(actions) if action is not Action.KEEP]

    def _refills(
        self, place: int, slots: Sequence[int], freed: Sequence[Sequence[int]]
    ) -> dict[str, str] | None:
        """Return new texts for a row's freed slots; None if nothing can fill them.

        Another row's negative costs the query's gradient nothing (hooks.md, B4), a copy of the own
        positive ruins it. Rows of the same query do not serve, nor what is known of this one.
        """
        taken = set(self.excluded[place]) | set(self.docs[place].tolist())
        pool = self._pool(place, freed)
        own = [slot for slot in range(1, self.docs.shape[1]) if slot not in slots]
        texts = {}
        for slot in slots:
            found = self._pick(place, slot, pool, taken)
            if found is None and own:
                found = place, own[slot % len(own)]
            if found is None:
                return None
            texts[self._shape.texts[slot]] = self.rows[found[0]][self._shape.texts[found[1]]]
            taken.add(int(self.docs[found]))
        return texts

    def _pool(self, place: int, freed: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        others = [i for i, query in enumerate(self.queries) if query != self.queries[place]]
        slots = range(1, self.docs.shape[1])
        negatives = [(i, slot) for i in others for slot in slots if slot not in freed[i]]
        # Where no negative is left in the batch, another row's positive is one for this query.
        return negatives or [(i, 0) for i in others]

    def _pick(
        self, place: int, slot: int, pool: Sequence[tuple[int, int]], taken: set[int]
    ) -> tuple[int, int] | None:
        ids = (int(self.queries[place]), int(self.docs[place, 0]))
        first = seeded_draw(self._editor.index.seed, slot, *ids) % len(pool) if pool else 0
        for candidate in (*pool[first:], *pool[:first]):
            if int(self.docs[candidate]) not in taken:
                return candidate
        return None


def _format_of(row: TrainingRow, shape: TrainingShape | None) -> Format | None:
    """Return the format that a batch is read with; None for tuples, and for what is no format."""
    if shape is None:
        return _structured(row)
    if shape.kind == "tuples":
        return None
    name = "labeled-list" if shape.kind == "lists" else "labeled-pair"
    passage, label = ("documents", "labels") if shape.kind == "lists" else ("document", "label")
    columns = {"anchor": shape.query, passage: shape.texts[0], label: str(shape.label)}
    return get_format(name, columns)


def _structured(row: TrainingRow) -> Format | None:
    """Return the format of rows that hold lists of passages, as other trainers read them."""
    try:
        format_ = resolve(list(row), sample=row)
    except ColumnError:
        return None
    return format_ if format_.name in ("tevatron", "flagembedding") else None


def _rows_of(batch: Mapping[str, Sequence[Any]]) -> list[TrainingRow]:
    names = list(batch)
    return [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _kept(
    row: TrainingRow, format_: Format, shape: TrainingShape | None, edit: Edit
) -> TrainingRow:
    """Return the row that stays when all others left, for a batch needs one.

    Its false negatives get the label 1: by their verdict, that is true.
    """
    if shape is None:
        batch = {name: [value] for name, value in row.items()}
        edits = [replace(edit, drop_row=None)]
        return _rows_of(format_.write(batch, format_.read(batch), edits, seed=0).batch)[0]
    labels = row[str(shape.label)]
    if shape.kind == "pairs":
        return {**row, str(shape.label): type(labels)(1)}
    actions = iter(edit.actions)
    new = [
        label if label > 0 or next(actions) is Action.KEEP else type(label)(1) for label in labels
    ]
    return {**row, str(shape.label): new}


def _count(counts: Counts, rows: Sequence[Row], edits: Sequence[Edit]) -> None:
    for row, edit in zip(rows, edits, strict=True):
        counts.seen += len(row.negatives)
        if edit.drop_row is not None:
            counts.dropped += len(row.negatives)
        else:
            counts.promoted += len(edit.promoted)
            counts.dropped += edit.actions.count(Action.DROP)


def _n_negatives(rows: Sequence[TrainingRow], shape: TrainingShape) -> int:
    labels = [row[str(shape.label)] for row in rows]
    flat = labels if shape.kind == "pairs" else [label for some in labels for label in some]
    return sum(1 for label in flat if not label > 0)
