"""Rows as arrays: a batch of queries with their passages, in Arrow, without a Python object each.

A published dataset has a dozen million passages; reading them as `Row` values takes longer than all
the rest. List formats are read as arrays; the others go through `convert` first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.formats import Passage, content_hash, convert, resolve
from hf_relabel.hub.runs import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from hf_relabel.formats import Format

__all__ = ["ID_CHARS", "Passages", "RowBatch", "iter_batches", "made_id"]

BATCH_ROWS = 1000
ID_CHARS = 32  # as `convert` makes ids


@dataclass(slots=True, kw_only=True)
class Passages:
    """The passages of N rows, one after another.

    Attributes:
        offsets: N + 1 places: row i has the passages from offsets[i] to offsets[i + 1].
        docids: Ids; made from the text where the source has none.
        titles: Titles; empty where there are none.
        texts: The texts as stored.
        shown: Title and text, as a judge saw them.
    """

    offsets: np.ndarray[Any, Any]
    docids: pa.Array
    titles: pa.Array
    texts: pa.Array
    shown: pa.Array

    @property
    def counts(self) -> np.ndarray[Any, Any]:
        """The number of passages of each row."""
        counts: np.ndarray[Any, Any] = self.offsets[1:] - self.offsets[:-1]
        return counts


@dataclass(kw_only=True)
class RowBatch:
    """N rows.

    Attributes:
        queries: The queries.
        query_ids: Their ids; made from the query where the source has none.
        subsets: Their subsets; null where there are none.
        positives: The positives.
        negatives: The negatives.
    """

    queries: pa.Array
    query_ids: pa.Array
    subsets: pa.Array
    positives: Passages
    negatives: Passages

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def negative_rows(self) -> np.ndarray[Any, Any]:
        """The row of each negative."""
        import numpy as np

        return np.repeat(np.arange(len(self)), self.negatives.counts)


def made_id(text: str) -> str:
    """Return the id of a query or passage that the source gave none."""
    return content_hash(text)[:ID_CHARS]


def iter_batches(run: RunFolder, split: str) -> Iterator[RowBatch]:
    """Read one split's rows, with flat memory.

    Raises:
        ColumnError, RowError: The rows are not what their format holds.
    """
    import pyarrow.parquet as pq

    shards = run.shards(split)
    columns = pq.read_schema(shards[0])
    sample = {field.name: [] if _is_list(field.type) else "" for field in columns}
    format_ = resolve(
        columns.names, format=run.run["format"], mapping=run.run["columns"], sample=sample
    )
    if format_.name not in _READERS:
        yield from _converted(shards, format_)
        return
    for shard in shards:
        with pq.ParquetFile(shard, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                if len(batch):
                    yield _READERS[format_.name](batch, format_)


def _converted(shards: list[Path], format_: Format) -> Iterator[RowBatch]:
    """Read triplets, n-tuples and pairs: all rows of a query become one, wherever they lie."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
        rows = Dataset.from_parquet([str(path) for path in shards], cache_dir=scratch)
        lists = convert(rows, to="tevatron", format=format_.name, columns=format_.columns)
        new = resolve(lists.column_names, format="tevatron")
        for batch in lists.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for part in batch.to_batches(max_chunksize=BATCH_ROWS):
                yield _tevatron(part, new)


def _tevatron(batch: pa.RecordBatch, format_: Format) -> RowBatch:
    roles = ("positive_passages", "negative_passages")
    positives, negatives = (_structs(batch.column(format_.columns[role])) for role in roles)
    return _rows(batch, format_, positives, negatives)


def _flagembedding(batch: pa.RecordBatch, format_: Format) -> RowBatch:
    positives, negatives = (_strings(batch.column(format_.columns[r])) for r in ("pos", "neg"))
    return _rows(batch, format_, positives, negatives)


def _labeled_list(batch: pa.RecordBatch, format_: Format) -> RowBatch:
    import numpy as np
    import pyarrow as pa

    documents = batch.column(format_.columns["documents"])
    labels = batch.column(format_.columns["labels"])
    texts, flags = _text(documents.flatten()), labels.flatten().to_numpy(zero_copy_only=False) > 0
    rows = np.repeat(np.arange(len(batch)), _offsets(documents)[1:] - _offsets(documents)[:-1])
    parts = []
    for wanted in (flags, ~flags):
        counts = np.bincount(rows[wanted], minlength=len(batch))
        offsets = np.concatenate(([0], np.cumsum(counts)))
        parts.append(_plain(offsets, texts.filter(pa.array(wanted))))
    return _rows(batch, format_, *parts)


_READERS = {
    "tevatron": _tevatron,
    "flagembedding": _flagembedding,
    "labeled-list": _labeled_list,
}


def _rows(
    batch: pa.RecordBatch, format_: Format, positives: Passages, negatives: Passages
) -> RowBatch:
    queries = _text(batch.column(format_.query_column))
    ids = _optional(batch, format_, "query_id")
    return RowBatch(
        queries=queries,
        query_ids=_with_ids(ids, queries),
        subsets=_optional(batch, format_, "subset"),
        positives=positives,
        negatives=negatives,
    )


def _structs(column: pa.Array) -> Passages:
    values = column.flatten()
    texts = _text(values.field("text"))
    names = {field.name for field in values.type}
    nothing = _nulls(len(values))
    titles = _text(values.field("title")).fill_null("") if "title" in names else _empty(len(values))
    docids = _text(values.field("docid")) if "docid" in names else nothing
    shown = _shown(titles, texts)
    return Passages(
        offsets=_offsets(column),
        docids=_with_ids(docids, shown),
        titles=titles,
        texts=texts,
        shown=shown,
    )


def _strings(column: pa.Array) -> Passages:
    return _plain(_offsets(column), _text(column.flatten()))


def _plain(offsets: np.ndarray[Any, Any], texts: pa.Array) -> Passages:
    docids = _with_ids(_nulls(len(texts)), texts)
    titles = _empty(len(texts))
    return Passages(offsets=offsets, docids=docids, titles=titles, texts=texts, shown=texts)


def _shown(titles: pa.Array, texts: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.any(pc.not_equal(titles, "")).as_py():
        return texts
    pairs = zip(titles.to_pylist(), texts.to_pylist(), strict=True)
    return pa.array([Passage(text=text, title=title).shown for title, text in pairs], pa.string())


def _with_ids(ids: pa.Array, texts: pa.Array) -> pa.Array:
    import pyarrow as pa

    if not ids.null_count:
        return ids
    pairs = zip(ids.to_pylist(), texts.to_pylist(), strict=True)
    return pa.array([made_id(text) if id_ is None else id_ for id_, text in pairs], pa.string())


def _optional(batch: pa.RecordBatch, format_: Format, role: str) -> pa.Array:
    name = format_.columns.get(role)
    return _nulls(len(batch)) if name is None else _text(batch.column(name))


def _offsets(column: pa.Array) -> np.ndarray[Any, Any]:
    import numpy as np

    counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _text(column: pa.Array) -> pa.Array:
    import pyarrow as pa

    return column if column.type == pa.string() else column.cast(pa.string())


def _nulls(length: int) -> pa.Array:
    import pyarrow as pa

    return pa.nulls(length, pa.string())


def _empty(length: int) -> pa.Array:
    import pyarrow as pa

    return pa.repeat(pa.scalar("", pa.string()), length)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
