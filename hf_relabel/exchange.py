"""Verdicts as data: the cache as Parquet tables, out and in.

A cache folder from someone else should never be opened; these tables can: they hold text and
numbers, and are checked as they are read. `calls.parquet` has one row for each reply,
`pairs.parquet` one for each (query, passage) and stage, without any text of the data itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_relabel.cache import Call, Pairs, VerdictCache
from hf_relabel.errors import SourceError
from hf_relabel.questions import Reply
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ExchangeCounts", "export_cache", "import_cache"]

T = TypeVar("T")
_CHUNK = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeCounts:
    """How much went out or came in."""

    n_calls: int
    n_pairs: int


def export_cache(cache: VerdictCache, folder: Path) -> ExchangeCounts:
    """Write all replies and final verdicts to `calls.parquet` and `pairs.parquet`.

    Args:
        cache: What to write.
        folder: Made when it is not there; tables of earlier exports are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calls = (_call_row(call) for call in cache.calls())
    pairs = (row for pairs in cache.pairs() for row in _pair_rows(pairs))
    n_calls = _write(folder / "calls.parquet", _calls_schema(), calls)
    _write(folder / "pairs.parquet", _pairs_schema(), pairs)
    n_pairs = sum(len(found.traces) for found in cache.pairs())
    return ExchangeCounts(n_calls=n_calls, n_pairs=n_pairs)


def import_cache(folder: Path, cache: VerdictCache) -> ExchangeCounts:
    """Add exported replies and verdicts to a cache; what it holds already stays.

    Raises:
        SourceError: A table is missing or not one of ours; earlier records stay imported.
    """
    n_calls = n_pairs = 0
    for calls in _chunks(map(_as_call, _read(folder / "calls.parquet", _calls_schema()))):
        cache.write(calls)
        n_calls += len(calls)
    for queries in _chunks(_as_pairs(_read(folder / "pairs.parquet", _pairs_schema()))):
        cache.write(queries)
        n_pairs += sum(len(pairs.traces) for pairs in queries)
    return ExchangeCounts(n_calls=n_calls, n_pairs=n_pairs)


def _calls_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        {
            "key": text,
            "judge": text,
            "query": text,
            "passages": pa.list_(text),
            "time": pa.float64(),
            "text": text,
            "finish_reason": text,
            "refusal": text,
            "model": text,
            "usage": text,
            "latency_s": pa.float64(),
        }
    )


def _pairs_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        {
            "cascade": text,
            "query": text,
            "passage": text,
            "stage": pa.int8(),
            "judge": text,
            "relevance": text,
            "rank": pa.int16(),
            "grade": pa.int8(),
            "confidence": pa.float64(),
            "call": text,
        }
    )


def _call_row(call: Call) -> dict[str, Any]:
    reply = call.reply
    return {
        "key": call.key,
        "judge": call.judge,
        "query": call.query,
        "passages": list(call.passages),
        "time": call.time,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "refusal": reply.refusal,
        "model": reply.model,
        "usage": json.dumps(reply.usage),
        "latency_s": reply.latency_s,
    }


def _as_call(row: dict[str, Any]) -> Call:
    names = ("text", "finish_reason", "refusal", "model", "latency_s")
    _expect_texts("calls.parquet", row, ("key", "judge", "query", "text", "usage"))
    try:
        usage = json.loads(row["usage"])
        passages = tuple(row["passages"])
    except (ValueError, TypeError) as error:
        raise _foreign("calls.parquet", f"{row['key']!r}: {error}") from error
    if not isinstance(usage, dict):
        raise _foreign("calls.parquet", f"the usage {row['usage']!r}")
    reply = Reply(usage=usage, **{name: row[name] for name in names})
    return Call(
        key=row["key"],
        judge=row["judge"],
        reply=reply,
        query=row["query"],
        passages=passages,
        time=row["time"],
    )


def _pair_rows(pairs: Pairs) -> Iterator[dict[str, Any]]:
    for passage, trace in pairs.traces.items():
        for stage, verdict in enumerate(trace):
            yield {
                "cascade": pairs.cascade,
                "query": pairs.query,
                "passage": passage,
                "stage": stage,
                "judge": verdict.judge,
                "relevance": verdict.relevance.value,
                "rank": verdict.rank,
                "grade": verdict.grade,
                "confidence": verdict.confidence,
                "call": verdict.call,
            }


def _as_pairs(rows: Iterable[dict[str, Any]]) -> Iterator[Pairs]:
    """Join the rows of each query again; they lie together, stage after stage."""
    for (cascade, query), same_query in groupby(rows, lambda row: (row["cascade"], row["query"])):
        traces: dict[str, tuple[Verdict, ...]] = {}
        for row in same_query:
            before = traces.get(row["passage"], ())
            verdict = _as_verdict(row)
            if row["stage"] != len(before):  # a sorted or cut table: the last word would be lost
                raise _foreign("pairs.parquet", f"stage {row['stage']} after {len(before)} stages")
            traces[row["passage"]] = (*before, verdict)
        judges = max(traces.values(), key=len)
        names = tuple(verdict.judge for verdict in judges)
        yield Pairs(cascade=cascade, query=query, judges=names, traces=traces)


def _as_verdict(row: dict[str, Any]) -> Verdict:
    names = ("judge", "rank", "grade", "confidence", "call")
    _expect_texts("pairs.parquet", row, ("cascade", "query", "passage", "judge"))
    try:
        relevance = Relevance(row["relevance"])
    except ValueError as error:
        raise _foreign("pairs.parquet", f"the relevance {row['relevance']!r}") from error
    return Verdict(relevance=relevance, **{name: row[name] for name in names})


def _expect_texts(table: str, row: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        # Keys of the cache are joined with ":"; a hash has none.
        is_hash = name in ("key", "cascade", "query", "passage")
        if row[name] is None or (is_hash and ":" in row[name]):
            raise _foreign(table, f"the {name} {row[name]!r}")


def _foreign(table: str, found: str) -> SourceError:
    return SourceError(
        f"expected the table {table} of an export, found {found} in it. Only tables of `hf-relabel "
        "verdicts export` are read, as they were written."
    )


def _write(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, count = path.with_name(f".{path.name}.part"), 0
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for chunk in _chunks(rows):
            writer.write_table(pa.Table.from_pylist(list(chunk), schema=schema))
            count += len(chunk)
    temporary.replace(path)
    return count


def _read(path: Path, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(
            f"expected the table {path.name} of an export in {str(path.parent)!r}: {error}"
        ) from error
    with file:
        if not file.schema_arrow.equals(schema):
            raise SourceError(
                f"expected the columns {schema.names} in {path.name}, found "
                f"{file.schema_arrow.names}. Only tables of `hf-relabel verdicts export` are read."
            )
        for batch in file.iter_batches(batch_size=_CHUNK):
            yield from batch.to_pylist()


def _chunks(items: Iterable[T]) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
