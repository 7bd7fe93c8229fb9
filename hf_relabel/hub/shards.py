"""Shards: a config's split as Parquet files, the same bytes every time, with what was written."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

__all__ = ["SplitWriter", "Written", "sha256_of"]

SHARD_BYTES = 500_000_000
"""Uncompressed bytes of a shard: 50 GB stay below 100 files, the most that a commit should have."""
_GROUP_BYTES = 16_000_000
"""Uncompressed bytes of a row group: what is in memory, and small enough for the Hub's viewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One split of one config, as written.

    Attributes:
        n_rows: Its rows.
        n_bytes: Its size in Arrow, uncompressed.
        paths: Its files, in order.
    """

    n_rows: int
    n_bytes: int
    paths: tuple[Path, ...]


class SplitWriter:
    """Writes tables to `<folder>/<split>-0000i-of-0000n.parquet`, n being known at the end alone.

    Args:
        folder: The config's folder.
        split: The split's name.
        features: The exact columns; their description goes into the files.
    """

    def __init__(self, folder: Path, split: str, features: Features) -> None:
        self._folder = folder
        self._split = split
        self._schema: pa.Schema = features.arrow_schema
        self._pending: list[pa.Table] = []
        self._pending_bytes = self._shard_bytes = 0
        self._paths: list[Path] = []
        self._open = ExitStack()
        self.n_rows = self.n_bytes = 0

    def write(self, table: pa.Table) -> None:
        """Add rows; they reach the disk in groups."""
        self._pending.append(table)
        self.n_rows += len(table)
        self._pending_bytes += table.nbytes
        if self._pending_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        if not self._paths or self._shard_bytes >= SHARD_BYTES:
            self._next_shard()
        table = pa.concat_tables(self._pending).cast(self._schema)
        self._writer.write_table(table, row_group_size=max(len(table), 1))
        self.n_bytes += self._pending_bytes
        self._shard_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def _next_shard(self) -> None:
        import pyarrow.parquet as pq

        self._open.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f".{self._split}-{len(self._paths):05d}.parquet"
        self._paths.append(path)
        self._shard_bytes = 0
        # As `Dataset.to_parquet` writes: the viewer's page index, and chunks that Xet finds again.
        options: dict[str, Any] = {"write_page_index": True, "use_content_defined_chunking": True}
        self._writer = self._open.enter_context(pq.ParquetWriter(path, self._schema, **options))

    def close(self) -> Written | None:
        """Finish the files and name them; None where there was no row, and so no file."""
        self._flush()
        self._open.close()
        total = len(self._paths)
        names = [
            path.with_name(f"{self._split}-{index:05d}-of-{total:05d}.parquet")
            for index, path in enumerate(self._paths)
        ]
        for path, name in zip(self._paths, names, strict=True):
            path.replace(name)
        if not names:
            return None
        return Written(n_rows=self.n_rows, n_bytes=self.n_bytes, paths=tuple(names))

    def abandon(self) -> None:
        """Close and remove what was begun."""
        self._open.close()
        for path in self._paths:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hash a file, with flat memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
