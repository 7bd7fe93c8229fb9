"""Subsets: which rows of a training set belong to which, and the rows of one run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from hf_relabel.errors import ColumnError, RowError, SettingError
from hf_relabel.files import write_rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FILE_TYPES", "Subsets"]

FILE_TYPES = ("parquet", "jsonl")
"""What a training command can be handed."""
_MAX_HASHED = 5_000
"""Rows that the fingerprint reads: all of a small set, an even sample of a large one."""


class Subsets:
    """A training set by its subsets.

    Args:
        dataset: The training rows, in any format.
        column: The column that names each row's subset.
        file_type: One of `FILE_TYPES`.

    Raises:
        ColumnError: There is no such column.
        RowError: A row names no subset.
        SettingError: There are fewer than two subsets, or the file type is unknown.
    """

    def __init__(
        self, dataset: Dataset, *, column: str = "subset", file_type: str = "parquet"
    ) -> None:
        _check_dataset(dataset, column)
        if file_type not in FILE_TYPES:
            raise SettingError(f"expected a file type out of {FILE_TYPES}, found {file_type!r}.")
        self.dataset = dataset
        self.file_type = file_type
        self._subset_of = [_name(value, i, column) for i, value in enumerate(dataset[column])]
        counts = Counter(self._subset_of)
        if len(counts) < 2:
            raise SettingError(
                f"expected two subsets or more in the column {column!r}, found "
                f"{len(counts)}: {sorted(counts)}. Leaving it out would leave nothing; name a "
                "column that tells parts of the data apart."
            )
        self.counts = {name: counts[name] for name in sorted(counts)}
        """Subset → rows, by name."""

    def n_rows(self, left_out: Collection[str] = ()) -> int:
        """Return how many rows stay."""
        return sum(count for name, count in self.counts.items() if name not in left_out)

    def without(self, left_out: Collection[str]) -> Dataset:
        """Return the rows that stay, in their order; nothing is copied."""
        if not left_out:
            return self.dataset
        kept = [i for i, name in enumerate(self._subset_of) if name not in left_out]
        return self.dataset.select(kept)

    def write(self, left_out: Collection[str], folder: Path) -> Path:
        """Write the rows that stay to `data.parquet` or `data.jsonl` in a folder."""
        path = folder / f"data.{self.file_type}"
        write_rows(self.without(left_out), path)
        return path

    @property
    def fingerprint(self) -> str:
        """Hash of the subsets, their sizes and their rows (a sample, where they are many)."""
        digest = hashlib.sha256(json.dumps(self.counts).encode())
        n_rows = len(self.dataset)
        step = max(1, -(-n_rows // _MAX_HASHED))
        for row in self.dataset.with_format(None).select(range(0, n_rows, step)):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _check_dataset(dataset: Dataset, column: str) -> None:
    if isinstance(dataset, dict):
        raise SettingError(
            f"expected one dataset, found the splits {list(dataset)}. Choose one: dataset['train']."
        )
    if not hasattr(dataset, "select"):
        raise SettingError(
            "expected a dataset whose rows can be chosen by number, found "
            f"{type(dataset).__name__}. Load it without streaming."
        )
    if column not in dataset.column_names:
        raise ColumnError(
            f"expected a {column!r} column, found {dataset.column_names}. Name the column that says "
            "which part of the data a row comes from: column='source', or --subset-column source."
        )


def _name(value: object, index: int, column: str) -> str:
    if value is None or value == "":
        raise RowError(
            f"expected a subset in the column {column!r} of every row, found {value!r} in row "
            f"{index}. Fill it in, or leave such rows out."
        )
    return str(value)
