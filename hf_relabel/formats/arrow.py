"""Arrow: batches of `Dataset.map` read and edited where they lie, without a Python object a passage.

`map` hands over a `LazyBatch`: an Arrow table whose columns become lists when somebody looks at
them. Making lists of passages takes twenty times as long as all else that an unchanged row needs.
`in_place` gives a way to the texts of a batch that leaves them in the table, for the formats that
hold lists of passages and for tables without anything unusual; all others are read as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, LargeList, List, Value
from datasets.formatting.formatting import LazyBatch
from numpy.typing import NDArray

from hf_relabel.formats.base import Format
from hf_relabel.formats.digests import PassageLists, RowTexts, Texts, digests_of
from hf_relabel.formats.lists import FlagEmbedding, Tevatron
from hf_relabel.formats.rows import Batch, Edit
from hf_relabel.verdicts import Action

__all__ = ["InPlace", "as_lazy", "in_place", "is_untouched", "sample_of", "some_of"]

_MAX_BYTES = 2**30  # far from the 2 GiB where offsets of 32 bits end

_Column: TypeAlias = "pa.Array[Any]"


def is_untouched(batch: object) -> bool:
    """Whether a batch is lazy still: as `map` made it, with nothing looked at or changed."""
    return (
        isinstance(batch, LazyBatch)
        and list(batch.data) == batch.pa_table.column_names
        and len(batch.keys_to_format) == len(batch.data)
    )


def sample_of(batch: LazyBatch) -> Batch:
    """Return the first row of an untouched batch, as lists of one value."""
    return dict(LazyBatch(batch.pa_table.slice(0, 1), batch.formatter))


def some_of(batch: LazyBatch, numbers: Sequence[int]) -> LazyBatch:
    """Return some rows of an untouched batch."""
    return LazyBatch(batch.pa_table.take(pa.array(numbers, pa.int64())), batch.formatter)


def as_lazy(batch: LazyBatch, values: Batch) -> LazyBatch:
    """Return what an untouched batch became, such that `map` heeds `remove_columns`."""
    out = copy(batch)
    out.data, out.keys_to_format = dict(values), set()
    return out


def in_place(format_: Format, batch: LazyBatch) -> InPlace | None:
    """Return a way to the rows of an untouched batch, or None where they must be read as lists.

    Rows may still be such that reading them as lists raises an error; no digest of a row that was
    read without one is theirs.
    """
    table = batch.pa_table
    if not isinstance(format_, (Tevatron, FlagEmbedding)) or table.nbytes > _MAX_BYTES:
        return None
    try:
        return InPlace(format_, batch, _row_texts(format_, table))
    except _UnusualError:
        return None


class InPlace:
    """The rows of one batch inside their Arrow table."""

    def __init__(
        self, format_: Tevatron | FlagEmbedding, batch: LazyBatch, texts: RowTexts
    ) -> None:
        self._format = format_
        self._batch = batch
        self._table: pa.Table = batch.pa_table
        self._texts = texts

    def digests(self, prefix: bytes) -> list[str]:
        """Return the `digest_of` each row."""
        return digests_of(self._texts, prefix)

    def write(self, edits: Mapping[int, Edit]) -> LazyBatch | None:
        """Return the batch with its edits, as `Format.write` would make it.

        Args:
            edits: Row of the batch to its edit, at least for those that change something.

        Returns:
            A batch to hand to `map`; the one that was read if nothing changes; None if a column is
            such that the edits must be made on lists.
        """
        edits = {i: edit for i, edit in edits.items() if not edit.changes_nothing}
        if not edits:
            return self._batch
        try:
            changed = self._edited_columns(edits)
        except _UnusualError:
            return None
        table = self._table
        for name, column in changed.items():
            field = table.schema.field(name)
            table = table.set_column(table.column_names.index(name), field, column)
        dropped = [i for i, edit in edits.items() if edit.drop_row is not None]
        names = table.column_names if dropped else list(changed)
        features = self._batch.formatter.features or {}
        if not all(_is_plain(features.get(name)) for name in names):
            return None
        if dropped:
            stays = np.ones(table.num_rows, dtype=bool)
            stays[dropped] = False
            table = table.filter(pa.array(stays))
        return _EditedBatch(table, self._batch, names)

    def _edited_columns(self, edits: Mapping[int, Edit]) -> dict[str, _Column]:
        # What becomes of a row that leaves does not matter: its lists stay as they are.
        moves = _Moves(self._texts.negatives.bounds, edits)
        changed: dict[str, _Column] = {}
        for roles in self._format.pairs:
            names = [self._format.columns[role] for role in roles if role in self._format.columns]
            if not names:
                continue
            if len(names) < len(roles):
                raise _UnusualError
            positives, negatives = (_list_column(self._table, name) for name in names)
            if moves.promoted.size:
                changed[names[0]] = moves.promote(positives, negatives)
            if not moves.stays.all():
                changed[names[1]] = moves.keep(negatives)
        return changed


class _Moves:
    """What a batch's edits do to its flattened lists.

    Attributes:
        stays: For each negative of the batch, whether it stays one.
        promoted: Places of promoted negatives among all negatives of the batch, row after row.
    """

    def __init__(self, bounds: NDArray[np.int64], edits: Mapping[int, Edit]) -> None:
        self._bounds = bounds
        self.stays = np.ones(bounds[-1], dtype=bool)
        places: list[int] = []
        rows: list[int] = []
        for i in sorted(edits):
            edit = edits[i]
            if edit.drop_row is None:
                start = int(bounds[i])
                self.stays[start : start + len(edit.actions)] = [
                    a is Action.KEEP for a in edit.actions
                ]
                places += [start + j for j in edit.promoted]
                rows += [i] * len(edit.promoted)
        self.promoted = np.array(places, dtype=np.int64)
        self._rows = np.array(rows, dtype=np.int64)

    def keep(self, negatives: _Column) -> _Column:
        """Return the negatives without those that left."""
        n_before = np.concatenate([[0], np.cumsum(self.stays)])
        bounds = n_before[self._bounds]
        return _list_array(bounds, negatives.flatten().filter(pa.array(self.stays)), negatives.type)

    def promote(self, positives: _Column, negatives: _Column) -> _Column:
        """Return the positives, each row's followed by its promoted negatives."""
        own, others = positives.flatten(), negatives.flatten()
        if own.type != others.type:
            raise _UnusualError
        bounds = _bounds_of(positives)
        promoted = others.take(pa.array(self.promoted))
        # What is inserted at one place keeps its order.
        places = len(own) + np.arange(len(promoted))
        taken = np.insert(np.arange(len(own)), bounds[self._rows + 1], places)
        n_more = np.concatenate([[0], np.cumsum(np.bincount(self._rows, minlength=len(positives)))])
        values = pa.concat_arrays([own, promoted]).take(pa.array(taken))
        return _list_array(bounds + n_more, values, positives.type)


class _EditedBatch(LazyBatch):  # type: ignore[misc]
    """A batch whose changed columns are Arrow inside still.

    Whoever looks at a column gets a list, as of every lazy batch. `map` does not look: it takes the
    changed columns out of `data`, and writes them as the Arrow arrays that they are.
    """

    def __init__(self, table: pa.Table, before: LazyBatch, changed: Iterable[str]) -> None:
        super().__init__(table, before.formatter)
        for name in changed:
            self.data[name] = _ArrowList(table.column(name))
            self.keys_to_format.remove(name)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, _ArrowList):
            value = self.data[key] = self.format(key)
        return value

    def _format_all(self) -> None:
        for key in self.data:
            self[key]


class _ArrowList(list[Any]):
    """A column of a batch for the writer of `datasets`, which takes lists and no Arrow arrays.

    The list itself is empty. The writer asks for the length and the first value, and makes the rest
    into an array by `pyarrow.array`, which finds that there is one.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        super().__init__()
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __iter__(self) -> Iterator[Any]:
        return (value.as_py() for value in self._column)

    def __arrow_array__(self, type: pa.DataType | None = None) -> _Column:  # noqa: A002
        array = _one_chunk(self._column)
        return array if type is None else array.cast(type)


def _is_plain(feature: object) -> bool:
    """Whether values of a column mean the same inside Arrow and in a list: no image, no JSON."""
    if isinstance(feature, dict):
        return all(_is_plain(field) for field in feature.values())
    if isinstance(feature, (List, LargeList)):
        return _is_plain(feature.feature)
    return isinstance(feature, (Value, ClassLabel))


class _UnusualError(Exception):
    """A table holds something that only reading it as lists deals with."""


def _row_texts(format_: Tevatron | FlagEmbedding, table: pa.Table) -> RowTexts:
    positives, negatives = (_passages(format_, table, role) for role in format_.pairs[0])
    subsets, has_subset = _subsets(format_, table)
    return RowTexts(
        queries=_texts(_one_chunk(table[format_.query_column])),
        subsets=subsets,
        has_subset=has_subset,
        positives=positives,
        negatives=negatives,
    )


def _subsets(format_: Format, table: pa.Table) -> tuple[Texts | None, NDArray[np.bool_]]:
    name = format_.columns.get("subset")
    if name is None or pa.types.is_null(table.schema.field(name).type):
        return None, np.zeros(table.num_rows, dtype=bool)
    column = _one_chunk(table[name])
    return _texts(_filled(column)), np.asarray(column.is_valid().to_numpy(zero_copy_only=False))


def _passages(format_: Tevatron | FlagEmbedding, table: pa.Table, role: str) -> PassageLists:
    lists = _list_column(table, format_.columns[role])
    bounds, values = _bounds_of(lists), lists.flatten()
    if isinstance(format_, Tevatron):
        texts, titles = _struct_field(values, "text"), _struct_field(values, "title")
        if texts is None:
            raise _UnusualError
        return PassageLists(bounds=bounds, texts=_texts(texts), titles=_titles(titles))
    _check_scores(format_, table, f"{role}_scores", bounds)
    return PassageLists(bounds=bounds, texts=_texts(values), titles=None)


def _check_scores(format_: Format, table: pa.Table, role: str, bounds: NDArray[np.int64]) -> None:
    """Check that there is a score for each passage: what is read as lists is checked for it too."""
    if role in format_.columns:
        scores = _list_column(table, format_.columns[role])
        if not np.array_equal(_bounds_of(scores), bounds):
            raise _UnusualError


def _struct_field(structs: _Column, name: str) -> _Column | None:
    type_ = structs.type
    if not pa.types.is_struct(type_) or structs.null_count:
        raise _UnusualError
    indices = type_.get_all_field_indices(name)
    if len(indices) > 1:
        raise _UnusualError
    return structs.field(indices[0]) if indices else None


def _titles(titles: _Column | None) -> Texts | None:
    """Return the titles; None counts as the empty one, as it does for whoever reads lists."""
    if titles is None or pa.types.is_null(titles.type):
        return None
    found = _texts(_filled(titles))
    return found if found.bounds[-1] > found.bounds[0] else None


def _texts(column: _Column) -> Texts:
    is_large = pa.types.is_large_string(column.type)
    if not (is_large or pa.types.is_string(column.type)) or column.null_count:
        raise _UnusualError
    _, places, data = column.buffers()
    if not len(column):
        return Texts(data=memoryview(b""), bounds=np.zeros(1, dtype=np.int64))
    kind = np.dtype(np.int64 if is_large else np.int32)
    bounds = np.frombuffer(
        places, dtype=kind, count=len(column) + 1, offset=column.offset * kind.itemsize
    )
    return Texts(
        data=memoryview(b"" if data is None else data), bounds=bounds.astype(np.int64, copy=False)
    )


def _filled(column: _Column) -> _Column:
    return column.fill_null("") if column.null_count else column


def _list_column(table: pa.Table, name: str) -> _Column:
    column = _one_chunk(table[name])
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or column.null_count:
        raise _UnusualError
    return column


def _bounds_of(lists: _Column) -> NDArray[np.int64]:
    """Return where each list begins in the flattened values, and where the last one ends."""
    places = np.asarray(lists.offsets).astype(np.int64, copy=False)
    return places - places[0]  # type: ignore[no-any-return]


def _list_array(bounds: NDArray[np.int64], values: _Column, type_: pa.DataType) -> _Column:
    kind, width = (
        (pa.LargeListArray, pa.int64())
        if pa.types.is_large_list(type_)
        else (pa.ListArray, pa.int32())
    )
    return kind.from_arrays(pa.array(bounds, width), values, type=type_)


def _one_chunk(column: pa.ChunkedArray) -> _Column:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
