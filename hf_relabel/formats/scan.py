"""Reading a whole dataset row by row, those of one query together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from hf_relabel.formats.base import Format
from hf_relabel.formats.groups import group_indices
from hf_relabel.formats.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["iter_rows"]


def iter_rows(
    dataset: Dataset | IterableDataset, format_: Format, *, batch_size: int
) -> Iterator[Row]:
    """Read a dataset's rows, with flat memory.

    In triplet and pair formats all rows of a query are one `Row`, wherever in a `Dataset` they
    lie; an `IterableDataset` can only be grouped batch by batch.

    Args:
        dataset: The rows.
        format_: Their format.
        batch_size: Dataset rows read at a time.

    Raises:
        RowError: A row holds what its format does not allow.
    """
    from datasets import Dataset

    dataset = dataset.with_format(None)
    if format_.is_spread and isinstance(dataset, Dataset):
        yield from _iter_grouped(dataset, format_, batch_size)
        return
    first = 0
    for batch in dataset.iter(batch_size=batch_size):
        yield from format_.read(batch, first_index=first)
        first += len(batch[format_.query_column])


def _iter_grouped(dataset: Dataset, format_: Format, batch_size: int) -> Iterator[Row]:
    for chunk in _by_size(group_indices(format_, dataset), batch_size):
        indices = list(chain.from_iterable(chunk))
        yield from format_.read_numbered(dataset[indices], indices)


def _by_size(groups: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Join whole groups into chunks of about `size` rows."""
    chunk: list[list[int]] = []
    n_rows = 0
    for group in groups:
        chunk.append(group)
        n_rows += len(group)
        if n_rows >= size:
            yield chunk
            chunk, n_rows = [], 0
    if chunk:
        yield chunk
