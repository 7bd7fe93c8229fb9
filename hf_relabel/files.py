"""Datasets in from files, folders and the Hub, and relabeled ones out to a folder of Parquet.

The folder holds `data/<split>-00000-of-0000n.parquet` (so that `load_dataset(folder)` finds it),
`decisions.parquet`, `report.json`, `failures.jsonl` where calls failed, and what publishing needs
beside them: `verdicts.parquet`, `calls.parquet` and `run.json`. `positives.parquet` keeps what judges
compared with, also of rows that left. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hf_relabel.decisions import COLUMNS
from hf_relabel.errors import SourceError
from hf_relabel.formats import NORMALIZATION, convert
from hf_relabel.records import (
    CALL_COLUMNS,
    POSITIVE_COLUMNS,
    VERDICT_COLUMNS,
    Recorder,
    positive_columns,
    prompts_of,
)
from hf_relabel.report import RelabelReport
from hf_relabel.summary import Summary
from hf_relabel.transform import Relabeled, Relabeler

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features, IterableDataset


__all__ = [
    "ParquetWriter",
    "ShardedWriter",
    "iter_table",
    "load_source",
    "read_report",
    "write_relabeled",
    "write_report",
    "write_rows",
]

RUN_LAYOUT = 1
"""Version of `run.json`."""

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SHARD_BYTES = 500_000_000
_TABLE_BATCH = 10_000
_BATCH_SIZE = 1000  # the default of `Dataset.map`, whose output this must equal


def load_source(
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
) -> DatasetDict:
    """Load a dataset to be relabeled.

    Args:
        source: A JSONL, JSON, Parquet or CSV file (also gzipped), a folder that `save_to_disk`
            wrote, a folder of such files, or a Hub id.
        split: One split only; a single file is the split "train".
        config: The Hub dataset's subset.
        limit: The first N rows of every split.

    Raises:
        SourceError: Nothing can be read there, or the split is not in it.
    """
    from datasets import Dataset, DatasetDict

    try:
        loaded = _load(source, config)
    except Exception as error:  # `datasets` raises a dozen kinds; all mean that this cannot be read
        raise SourceError(
            f"expected a JSONL, Parquet or CSV file, a folder, or a Hub id, found {source!r}, which "
            f"cannot be read: {error}"
        ) from error
    splits = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
    if split is not None:
        if split not in splits:
            raise SourceError(f"expected one of the splits {list(splits)}, found {split!r}.")
        splits = DatasetDict({split: splits[split]})
    if limit is not None:
        splits = DatasetDict(
            {name: part.select(range(min(limit, len(part)))) for name, part in splits.items()}
        )
    return splits


def _load(source: str, config: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    path = Path(source)
    if path.is_dir():
        is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return load_from_disk(source) if is_saved else load_dataset(source, config)
    suffixes = [suffix for suffix in path.suffixes if suffix in _READERS]
    if path.is_file() and suffixes:
        return load_dataset(_READERS[suffixes[0]], data_files=source)
    if path.exists() or suffixes:
        raise FileNotFoundError(f"no file of a known kind ({', '.join(_READERS)}) is there.")
    return load_dataset(source, config)


def write_relabeled(
    relabeler: Relabeler,
    splits: Mapping[str, Dataset | IterableDataset],
    folder: Path,
    *,
    to: str | None = None,
) -> RelabelReport:
    """Write a judged dataset, its decisions, verdicts and report, from the cache alone.

    Args:
        relabeler: Whose verdicts and policy are applied; `judge` ran before.
        splits: Split name → rows; those of an `IterableDataset` are read once, batch by batch.
        folder: Made when it is not there; files of earlier runs are replaced.
        to: The format to convert the result to; None keeps the rows' own.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tally, summary = relabeler.new_tally(), Summary(relabeler.cascade)
    with _Tables(folder, relabeler) as tables:
        for name, part in splits.items():
            features = part.features or part._resolve_features().features
            with ShardedWriter(folder / "data", name, features) as shards:
                first_index = 0
                for batch in part.with_format(None).iter(batch_size=_BATCH_SIZE):
                    relabeled = relabeler.relabel(batch, tally, first_index=first_index)
                    shards.write(relabeled.written.batch)
                    tables.write(relabeled, split=name)
                    for row, edit, found in zip(
                        relabeled.rows, relabeled.edits, relabeled.traces, strict=True
                    ):
                        summary.add(name, row, edit, found)
                    first_index += len(next(iter(batch.values())))
            if to is not None:
                _convert_shards(relabeler, folder / "data", name, to)
    _write_failures(relabeler, folder / "failures.jsonl")
    write_report(folder, tally.report)
    _write_json(folder / "run.json", _run(relabeler, splits, summary, to))
    return tally.report


def _run(
    relabeler: Relabeler, splits: Mapping[str, Any], summary: Summary, to: str | None
) -> dict[str, Any]:
    """Describe a run, beside its counts: where the rows come from, and how they were judged."""
    return {
        "layout": RUN_LAYOUT,
        "normalization": NORMALIZATION,
        "source": _hub_source(splits),
        "format": to or relabeler.format,
        # A conversion writes the format's own names.
        "columns": {} if to else relabeler.columns,
        "is_converted": to is not None,
        "splits": list(splits),
        "stages": [
            {
                "name": stage.title,
                "judge": stage.judge.name,
                "model": stage.judge.model,
                "fingerprint": stage.judge.fingerprint,
            }
            for stage in relabeler.cascade.stages
        ],
        "prompts": prompts_of(relabeler.cascade),
        "subsets": summary.to_json(),
    }


_HUB_CACHE = re.compile(
    r"/([^/]+)___([^/]+)/([^/]+)/[^/]+/([0-9a-f]{40})/[^/]+\.arrow",
)
"""Where `datasets` keeps what it loaded from the Hub: owner, name, config and commit are in it."""


def _hub_source(splits: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the Hub id, revision and config that rows were loaded from; None for other rows.

    `DatasetInfo` does not say; the path of the rows' file does, as long as they are as loaded. A
    stream has no file: there the publisher names the source.
    """
    for part in splits.values():
        for file in getattr(part, "cache_files", None) or []:
            found = _HUB_CACHE.search(Path(file["filename"]).as_posix())
            if found:
                owner, name, config, revision = found.groups()
                return {"id": f"{owner}/{name}", "revision": revision, "config": config}
    return None


class _Tables:
    """The tables beside the data: decisions, verdicts and calls."""

    def __init__(self, folder: Path, relabeler: Relabeler) -> None:
        def lookup(key: str) -> Any:
            return relabeler.cache.call(key), relabeler.cache.failures(key)

        self._recorder = Recorder(cascade=relabeler.cascade, lookup=lookup)
        self._folder = folder
        self._open = ExitStack()

    def __enter__(self) -> _Tables:
        self._decisions = self._writer("decisions", {**COLUMNS, "split": "string"})
        self._verdicts = self._writer("verdicts", VERDICT_COLUMNS)
        self._calls = self._writer("calls", CALL_COLUMNS)
        self._positives = self._writer("positives", POSITIVE_COLUMNS)
        return self

    def _writer(self, name: str, columns: Mapping[str, str]) -> ParquetWriter:
        from datasets import Features, Value

        features = Features({column: Value(kind) for column, kind in columns.items()})
        path = self._folder / f"{name}.parquet"
        return self._open.enter_context(ParquetWriter(path, features))

    def write(self, relabeled: Relabeled, *, split: str) -> None:
        decisions = relabeled.decisions()
        splits = [split] * len(decisions["query"])
        self._decisions.write({**decisions, "split": splits})
        verdicts, calls = self._recorder.columns(relabeled.rows, relabeled.traces, split=split)
        self._verdicts.write(verdicts)
        self._calls.write(calls)
        self._positives.write(positive_columns(relabeled.rows, split=split))

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def _convert_shards(relabeler: Relabeler, folder: Path, split: str, to: str) -> None:
    from datasets import Dataset

    paths = sorted(map(str, folder.glob(f"{split}-?????-of-?????.parquet")))
    rows = Dataset.from_parquet(paths)
    new = convert(rows, to=to, format=relabeler.format, columns=relabeler.columns)
    with ShardedWriter(folder, split, new.features) as shards:
        for batch in new.iter(batch_size=_BATCH_SIZE):
            shards.write(batch)


def write_rows(part: Dataset, path: Path) -> None:
    """Write a dataset to one Parquet or JSONL file, by its suffix."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise SourceError(f"expected an output of .parquet or .jsonl, found {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    if path.suffix == ".parquet":
        part.to_parquet(temporary)
    else:
        part.to_json(temporary, force_ascii=False)
    temporary.replace(path)


def write_report(folder: Path, report: RelabelReport) -> None:
    """Write a run's report into its folder, in the place of an earlier one."""
    _write_json(folder / "report.json", report.to_json())


def read_report(folder: Path) -> RelabelReport:
    """Read the report of a folder that `write_relabeled` wrote.

    Raises:
        SourceError: There is none.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise SourceError(
            f"expected a report.json in {str(folder)!r}, found none. Give the --output of a run."
        )
    return RelabelReport.from_json(json.loads(path.read_text("utf-8")))


def iter_table(
    folder: Path, name: str, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a table that `write_relabeled` wrote, batch by batch; all columns, or only some."""
    import pyarrow.parquet as pq

    # Without pre-buffering, which would hold a whole row group's bytes.
    with pq.ParquetFile(folder / f"{name}.parquet", pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=_TABLE_BATCH, columns=columns)


class ParquetWriter:
    """Writes batches of columns to one Parquet file that appears when it is whole."""

    def __init__(self, path: Path, features: Features) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.part")
        self._features = features
        self._schema: pa.Schema = features.arrow_schema

    def __enter__(self) -> ParquetWriter:
        import pyarrow.parquet as pq

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._temporary, self._schema)
        return self

    def write(self, batch: Mapping[str, list[Any]]) -> int:
        """Write one batch and return its size in bytes, uncompressed."""
        import pyarrow as pa

        table = pa.Table.from_pydict(self._features.encode_batch(dict(batch)), schema=self._schema)
        self._writer.write_table(table)
        return int(table.nbytes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        if error is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


class ShardedWriter:
    """Writes one split as `<split>-00000-of-0000n.parquet`, n being known at the end alone."""

    def __init__(self, folder: Path, split: str, features: Features) -> None:
        self._folder = folder
        self._split = split
        self._features = features
        self._paths: list[Path] = []
        self._open = ExitStack()
        self._n_bytes = 0

    def __enter__(self) -> ShardedWriter:
        self._next_shard()
        return self

    def write(self, batch: Mapping[str, list[Any]]) -> None:
        if self._n_bytes >= _SHARD_BYTES:
            self._next_shard()
        self._n_bytes += self._shard.write(batch)

    def _next_shard(self) -> None:
        self._open.close()
        path = self._folder / f".{self._split}-{len(self._paths):05d}.parquet"
        self._paths.append(path)
        self._shard = self._open.enter_context(ParquetWriter(path, self._features))
        self._n_bytes = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if error is not None:
            for path in self._paths:
                path.unlink(missing_ok=True)
            return
        for stale in self._folder.glob(f"{self._split}-?????-of-?????.parquet"):
            stale.unlink()
        for index, path in enumerate(self._paths):
            name = f"{self._split}-{index:05d}-of-{len(self._paths):05d}.parquet"
            path.replace(self._folder / name)


def _write_failures(relabeler: Relabeler, path: Path) -> None:
    """Write what went wrong with calls of this run, one JSON object a line; no file for nothing."""
    lines = [
        json.dumps(
            {
                "time": failure.time,
                "judge": failure.judge,
                "reason": failure.reason,
                "message": failure.message,
                "call": failure.key,
            },
            ensure_ascii=False,
        )
        for failure in relabeler.failures()
    ]
    if lines:
        _write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
