"""A run's folder, as `hf-relabel run --output DIR` leaves it, read for publishing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import SourceError
from hf_relabel.files import RUN_LAYOUT, iter_table
from hf_relabel.hub.settings import check_split

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["RunFolder"]

_TABLES = ("decisions", "verdicts", "calls")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """What a run wrote: rows, tables, and two JSON files.

    Attributes:
        folder: Where it lies.
        report: `report.json`.
        run: `run.json`: source, format, stages, prompts, counts by subset.
    """

    folder: Path
    report: dict[str, Any]
    run: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """Open a folder and see that it is whole.

        Raises:
            SourceError: A file is missing, or another version of the library wrote it.
        """
        names = ("report.json", "run.json", *(f"{name}.parquet" for name in _TABLES))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SourceError(
                f"expected the --output of `hf-relabel run` in {str(folder)!r}, found no "
                f"{', '.join(missing)}. Run again with the same cache: it asks nothing."
            )
        report, run = (json.loads((folder / name).read_text("utf-8")) for name in names[:2])
        if run.get("layout") != RUN_LAYOUT:
            raise SourceError(
                f"expected a run.json of layout {RUN_LAYOUT}, found {run.get('layout')!r}. "
                "Run again with this version."
            )
        for split in run["splits"]:
            check_split(split)
        return cls(folder=folder, report=report, run=run)

    def shards(self, split: str) -> list[Path]:
        """Return the Parquet files of one split's rows, in order."""
        return sorted((self.folder / "data").glob(f"{split}-?????-of-?????.parquet"))

    def table(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read decisions, verdicts or calls, batch by batch; all columns, or only some."""
        return iter_table(self.folder, name, columns)

    @property
    def last_call(self) -> str | None:
        """The day of the last call, as 2026-01-31; None where no call is known."""
        import pyarrow.compute as pc

        latest = None
        for batch in self.table("calls", ["created_at"]):
            found = pc.max(batch.column("created_at")).as_py()
            latest = max(filter(None, (latest, found)), default=None)
        return latest.date().isoformat() if latest else None
