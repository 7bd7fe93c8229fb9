"""Configs: the shapes that people train with, each made from a batch of rows.

Every function takes a `RowBatch` and returns one table with the columns of `FEATURES`; indices are
computed in numpy and texts are taken in Arrow. What becomes of a row is what `convert` does to it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from hf_relabel.decisions import COLUMNS as DECISIONS
from hf_relabel.formats import content_hash, normalize
from hf_relabel.hub.batches import ID_CHARS, RowBatch, iter_batches
from hf_relabel.hub.runs import RunFolder
from hf_relabel.records import CALL_COLUMNS, VERDICT_COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Features

__all__ = [
    "QRELS_COLUMNS",
    "Flagged",
    "Shapes",
    "common_width",
    "features_of",
    "qrels_of_decisions",
]

TEXTS = ("query", "passage", "reason")
"""Columns of decisions that hold words of the source, or may quote them."""
QRELS_COLUMNS = (
    "query_id",
    "docid",
    "query_hash",
    "passage_hash",
    "relevance",
    "row_dropped",
    "split",
)
"""Columns of decisions that `qrels_of_decisions` reads."""
SHARED = {"run_id": "string", "schema_version": "int16"}
SOURCE = {"source_dataset": "string", "source_revision": "string"}
_WIDTH_SAMPLE = 1000  # rows that decide on an n-tuple's width, as in `convert`


def features_of(config: str, *, width: int = 0, text_free: bool = False) -> Features:
    """Return the exact columns of a config.

    Args:
        config: One of `CONFIGS`.
        width: Negatives of an n-tuple.
        text_free: Whether decisions go without query, passage and reason.
    """
    from datasets import Features, List, Value

    text = Value("string")
    passages = List({"docid": text, "text": text, "title": text})
    ids = {"query-id": text, "corpus-id": text}
    decisions = {n: k for n, k in DECISIONS.items() if not (text_free and n in TEXTS)}
    flat = {
        "decisions": {**decisions, "split": "string"},
        "verdicts": {**SHARED, **SOURCE, **VERDICT_COLUMNS, "original_role": "string"},
        "calls": {**SHARED, **CALL_COLUMNS},
    }
    if config in flat:
        return Features({name: Value(kind) for name, kind in flat[config].items()})
    slots = {f"negative_{number}": text for number in range(1, width + 1)}
    shapes: dict[str, dict[str, Any]] = {
        "triplet": {"anchor": text, "positive": text, "negative": text},
        "n-tuple": {"anchor": text, "positive": text, **slots},
        "labeled-list": {"anchor": text, "documents": List(text), "labels": List(Value("int64"))},
        "tevatron": {
            "query_id": text,
            "query": text,
            "positive_passages": passages,
            "negative_passages": passages,
            "subset": text,
        },
        "bge": {"query": text, "pos": List(text), "neg": List(text)},
        "qrels": {**ids, "score": Value("int64")},
    }
    return Features(shapes[config])


def common_width(run: RunFolder, split: str) -> int:
    """Return the most common number of negatives in the first rows, the larger of two as common."""
    counts: Counter[int] = Counter()
    for batch in islice(iter_batches(run, split), 1):
        counts.update(int(count) for count in batch.negatives.counts[:_WIDTH_SAMPLE] if count)
    most = max(counts.values(), default=0)
    return max((width for width, n in counts.items() if n == most), default=0)


class Flagged:
    """Pairs of a query and a passage that lost their label, in eight bytes each."""

    def __init__(self, run: RunFolder) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        parts = [np.empty(0, np.uint64)]
        for batch in run.table("decisions", ["relevance", "query_hash", "passage_hash"]):
            changed = pc.fill_null(
                pc.is_in(batch["relevance"], pa.array(["better", "worse"])), False
            )
            found = batch.filter(changed)
            pairs = zip(
                found["query_hash"].to_pylist(), found["passage_hash"].to_pylist(), strict=True
            )
            parts.append(np.array([_short(*pair) for pair in pairs], np.uint64))
        self._pairs = np.unique(np.concatenate(parts))

    def __contains__(self, pair: tuple[str, str]) -> bool:
        import numpy as np

        wanted = np.uint64(_short(*pair))
        place = int(np.searchsorted(self._pairs, wanted))
        return place < len(self._pairs) and bool(self._pairs[place] == wanted)


def _short(query_hash: str, passage_hash: str) -> int:
    return int(query_hash[:16], 16) ^ int(passage_hash[16:32], 16)


@dataclass(kw_only=True)
class Shapes:
    """Turns batches of rows into the tables of configs.

    Attributes:
        width: Negatives of an n-tuple; 0 builds none.
        flagged: Pairs that must not come back as refills.
        seed: Chooses refills, with the query and the slot.
    """

    width: int
    flagged: Flagged
    seed: int = 0
    _schemas: dict[str, pa.Schema] = field(default_factory=dict)

    def table(self, config: str, batch: RowBatch) -> pa.Table:
        """Return the rows of one config; there may be more than in the batch, or fewer."""
        import pyarrow as pa

        if config not in self._schemas:
            self._schemas[config] = features_of(config, width=self.width).arrow_schema
        columns = _SHAPES[config](self, batch)
        return pa.Table.from_arrays(list(columns.values()), schema=self._schemas[config])

    def triplet(self, batch: RowBatch) -> dict[str, pa.Array]:
        import numpy as np

        n_positives, n_negatives = batch.positives.counts, batch.negatives.counts
        whole = (n_positives > 0) & (n_negatives > 0)
        sizes = np.where(whole, np.maximum(n_positives, n_negatives), 0)
        rows, places = _spread(sizes)
        positives = batch.positives.offsets[rows] + places % n_positives[rows]
        negatives = batch.negatives.offsets[rows] + places % n_negatives[rows]
        return {
            "anchor": batch.queries.take(_index(rows)),
            "positive": batch.positives.shown.take(_index(positives)),
            "negative": batch.negatives.shown.take(_index(negatives)),
        }

    def n_tuple(self, batch: RowBatch) -> dict[str, pa.Array]:
        slots, is_full = self._slots(batch)
        sizes = batch.positives.counts * is_full
        rows, places = _spread(sizes)
        positives = batch.positives.offsets[rows] + places
        columns = {
            "anchor": batch.queries.take(_index(rows)),
            "positive": batch.positives.shown.take(_index(positives)),
        }
        for number in range(self.width):
            taken = batch.negatives.shown.take(_index(slots[rows, number]))
            columns[f"negative_{number + 1}"] = taken
        return columns

    def _slots(self, batch: RowBatch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the negative of each slot of each row, and which rows have all of them."""
        import numpy as np

        counts = batch.negatives.counts
        places = np.arange(self.width)
        slots = batch.negatives.offsets[:-1, None] + places[None, :]
        is_full = np.ones(len(batch), bool)
        for row in np.flatnonzero(counts < self.width):
            found = self._refills(batch, int(row), self.width - int(counts[row]))
            is_full[row] = len(found) == self.width - counts[row]
            slots[row, counts[row] : counts[row] + len(found)] = found
        slots[~is_full] = 0
        return slots, is_full

    def _refills(self, batch: RowBatch, row: int, n_wanted: int) -> list[int]:
        """Choose negatives of other queries, that nobody called relevant to this one."""
        query = batch.queries[row].as_py()
        query_hash, own = content_hash(query), _own_texts(batch, row)
        found: list[int] = []
        total = len(batch.negatives.shown)
        start = _draw(f"{self.seed}\0{query}") % max(total, 1)
        for step in range(total):
            # A stride through the batch: neighbours are negatives of one and the same query.
            place = (start + step * 7919) % total
            other = batch.queries[int(batch.negative_rows[place])].as_py()
            text = normalize(batch.negatives.shown[place].as_py())
            is_free = text not in own and normalize(other) != normalize(query)
            if is_free and (query_hash, content_hash(text)) not in self.flagged:
                found.append(place)
                own.add(text)
            if len(found) == n_wanted:
                break
        return found

    def labeled_list(self, batch: RowBatch) -> dict[str, pa.Array]:
        import numpy as np
        import pyarrow as pa

        n_positives = batch.positives.counts
        rows, places = _spread(n_positives + batch.negatives.counts)
        is_positive = places < n_positives[rows]
        first_negative = len(batch.positives.shown) + batch.negatives.offsets[rows]
        taken = np.where(
            is_positive,
            batch.positives.offsets[rows] + places,
            first_negative + places - n_positives[rows],
        )
        texts = pa.concat_arrays([batch.positives.shown, batch.negatives.shown])
        offsets = _index(batch.positives.offsets + batch.negatives.offsets)
        labels = pa.array(is_positive.astype(np.int64))
        return {
            "anchor": batch.queries,
            "documents": _list(offsets, texts.take(_index(taken))),
            "labels": _list(offsets, labels),
        }

    def tevatron(self, batch: RowBatch) -> dict[str, pa.Array]:
        import pyarrow as pa

        columns = {"query_id": batch.query_ids, "query": batch.queries}
        for name in ("positives", "negatives"):
            passages = getattr(batch, name)
            parts = [passages.docids, passages.texts, passages.titles]
            structs = pa.StructArray.from_arrays(parts, names=["docid", "text", "title"])
            columns[f"{name[:-1]}_passages"] = _list(_index(passages.offsets), structs)
        return {**columns, "subset": batch.subsets}

    def bge(self, batch: RowBatch) -> dict[str, pa.Array]:
        return {
            "query": batch.queries,
            "pos": _list(_index(batch.positives.offsets), batch.positives.shown),
            "neg": _list(_index(batch.negatives.offsets), batch.negatives.shown),
        }

    def qrels(self, batch: RowBatch) -> dict[str, pa.Array]:
        """Return the positives that the source had; decisions hold all the others."""
        import numpy as np
        import pyarrow as pa

        rows = np.repeat(np.arange(len(batch)), batch.positives.counts)
        shown, queries = batch.positives.shown.to_pylist(), batch.queries.to_pylist()
        hashes = [content_hash(query) for query in queries]
        pairs = [(hashes[row], content_hash(text)) for row, text in zip(rows, shown, strict=True)]
        own = pa.array([pair not in self.flagged for pair in pairs], pa.bool_())
        ids = batch.query_ids.take(_index(rows)).filter(own)
        scores = pa.array(np.full(len(ids), 2))
        return {"query-id": ids, "corpus-id": batch.positives.docids.filter(own), "score": scores}


_SHAPES: Mapping[str, Callable[[Shapes, RowBatch], dict[str, pa.Array]]] = {
    "triplet": Shapes.triplet,
    "n-tuple": Shapes.n_tuple,
    "labeled-list": Shapes.labeled_list,
    "tevatron": Shapes.tevatron,
    "bge": Shapes.bge,
    "qrels": Shapes.qrels,
}


def qrels_of_decisions(batch: pa.RecordBatch) -> pa.Table:
    """Return the grades that judges gave: 2 better, 1 worse, 0 not relevant; undecided has none.

    Rows that were dropped are left out, as they are in the data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array(["not-relevant", "worse", "better"])
    known = pc.and_(pc.is_in(batch["relevance"], names), pc.is_null(batch["row_dropped"]))
    kept = batch.filter(pc.fill_null(known, False))
    columns = [
        _ids_of(kept["query_id"], kept["query_hash"]),
        _ids_of(kept["docid"], kept["passage_hash"]),
        pc.cast(pc.index_in(kept["relevance"], names), pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=features_of("qrels").arrow_schema)


def _ids_of(ids: pa.Array, hashes: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    return pc.coalesce(ids, pc.utf8_slice_codeunits(hashes, 0, ID_CHARS))


def _own_texts(batch: RowBatch, row: int) -> set[str]:
    texts: set[str] = set()
    for passages in (batch.positives, batch.negatives):
        start, end = passages.offsets[row], passages.offsets[row + 1]
        texts.update(normalize(text) for text in passages.shown[start:end].to_pylist())
    return texts


def _spread(sizes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return, for sizes[i] entries of each row i, the row and the place in it."""
    import numpy as np

    rows = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    return rows, np.arange(len(rows)) - starts[rows]


def _index(values: np.ndarray[Any, Any]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.int32())


def _list(offsets: pa.Array, values: pa.Array) -> pa.Array:
    import pyarrow as pa

    return pa.ListArray.from_arrays(offsets, values)


def _draw(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
