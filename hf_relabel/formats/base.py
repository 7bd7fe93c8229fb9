"""What every format shares: its roles, its columns, and the frame of read and write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_relabel.errors import ColumnError, RowError
from hf_relabel.formats.checks import text_of, text_or_none
from hf_relabel.formats.rows import Batch, Edit, Row, Written
from hf_relabel.verdicts import Action

__all__ = ["QUERY", "SHARED_ROLES", "Format", "Role", "without_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What one column is to a format.

    Attributes:
        name: The column's own name, as the format writes it.
        aliases: Other names that are taken for this role without being told.
        words: Names accepted for the role in `columns=`, beside name and aliases.
        needs_sample: Aliases that are only taken when a sample row shows that the type fits.
        is_list: Whether its values are lists; None if either may be.
        is_required: Whether the format cannot do without.
        is_numbered: Whether it is a family of columns: name_1, name_2, …
    """

    name: str
    aliases: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    needs_sample: tuple[str, ...] = ()
    is_list: bool | None = None
    is_required: bool = True
    is_numbered: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """All that names this role in `columns=`."""
        return (self.name, *self.aliases, *self.needs_sample, *self.words)


QUERY = Role(name="query", aliases=("anchor", "question"), is_list=False)
SHARED_ROLES = (
    Role(name="query_id", aliases=("qid",), is_required=False),
    Role(name="subset", is_list=False, is_required=False),
)


class Format(ABC):
    """One way to lay out rows in columns.

    A format holds column names and nothing else: it pickles, and it keeps no state between calls.

    Attributes:
        name: The format's name, one of `FORMATS`.
        roles: What its columns are.
        is_spread: Whether one query's rows lie in several dataset rows (triplet, labeled-pair).
        refills: Whether rows have a fixed width, so that a freed slot is refilled.
        in_place: Whether `arrow.in_place` knows how to read and edit its batches.
        aligned: Columns that would silently go out of step when passages move: refused by `read`.
        columns: Role name to the dataset's column name, optional roles only where present.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    is_spread: ClassVar[bool] = False
    refills: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    aligned: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.columns!r})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.columns == getattr(other, "columns", None)

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.columns.items())))

    @property
    def query_column(self) -> str:
        return self.columns[self.roles[0].name]

    def read(self, batch: Batch, *, first_index: int = 0) -> list[Row]:
        """Read a batch.

        Args:
            batch: Column name to values; columns that are not the format's are not looked at.
            first_index: The dataset's row number of the batch's first row, for error messages.

        Returns:
            Rows in the order of their first dataset row; together they cover the whole batch.

        Raises:
            ColumnError: A column is missing, or one is aligned with passages and cannot follow.
            RowError: A value is not what the format holds; names the column and the row.
        """
        self.check_columns(batch)
        n_rows = len(batch[self.query_column])
        return self.read_numbered(batch, range(first_index, first_index + n_rows))

    @abstractmethod
    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        """Read a batch whose rows have these numbers in the dataset; `read` without its checks."""

    def write(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit], *, seed: int
    ) -> Written:
        """Write a batch back in this format, with its edits.

        Args:
            batch: The batch that was read, unchanged.
            rows: All of what `read` returned for it, in that order.
            edits: One per row, aligned.
            seed: Chooses refills, together with the query and the slot; other formats ignore it.

        Returns:
            Every column of the batch; values that no edit touched are the original objects.

        Raises:
            RowError: Rows and edits do not belong together, or not to this batch.
        """
        _check_edits(rows, edits)
        if all(edit.changes_nothing for edit in edits):
            return Written(batch=dict(batch), rows_dropped={}, rows_added=0)
        return self._write(batch, rows, edits, seed=seed)

    @abstractmethod
    def _write(
        self, batch: Batch, rows: Sequence[Row], edits: Sequence[Edit], *, seed: int
    ) -> Written: ...

    def queries(self, batch: Batch, numbers: Sequence[int]) -> list[str]:
        """Return the batch's queries, checked."""
        column = self.query_column
        return [text_of(q, column, n) for q, n in zip(batch[column], numbers, strict=True)]

    def optional(self, batch: Batch, role: str, n_rows: int) -> list[Any]:
        """Return the values of a column that may be absent; then a None for every row."""
        return batch[self.columns[role]] if role in self.columns else [None] * n_rows

    def names(self, batch: Batch, role: str, n_rows: int) -> list[str | None]:
        """Return ids or names as strings, from a column that may be absent."""
        return [text_or_none(value) for value in self.optional(batch, role, n_rows)]

    @property
    def can_run_out(self) -> bool:
        """Whether a row that loses negatives has fewer of them."""
        return not (self.refills or self.is_spread)

    def check_columns(self, batch: Batch) -> None:
        """Check that a batch has the format's columns, and none that would go out of step.

        Raises:
            ColumnError: As `read` says.
        """
        missing = [column for column in self.columns.values() if column not in batch]
        if missing:
            raise ColumnError(
                f"expected the columns {missing} for the format {self.name!r}, "
                f"found {list(batch)}. Resolve the format again from this dataset's columns."
            )
        own = set(self.columns.values())
        aligned = [column for column in batch if column in self.aligned and column not in own]
        if aligned:
            raise ColumnError(
                f"expected no column that must stay aligned with the passages of a "
                f"{self.name} row, found {aligned}: its old values would stay. "
                f"Leave it out with dataset.remove_columns({aligned}), or rename it if it is not."
            )


def _check_edits(rows: Sequence[Row], edits: Sequence[Edit]) -> None:
    if len(rows) != len(edits):
        raise RowError(f"expected one edit for each of {len(rows)} rows, found {len(edits)}.")
    for row, edit in zip(rows, edits, strict=True):
        if len(edit.actions) != len(row.negatives):
            raise RowError(
                f"expected one action for each of {len(row.negatives)} negatives, "
                f"found {len(edit.actions)} for the query {row.query!r}."
            )
        wrong = [j for j in edit.promoted if edit.actions[j] is not Action.PROMOTE]
        if wrong or len(set(edit.promoted)) != len(edit.promoted):
            raise RowError(
                f"expected each promoted index once and with the action promote, "
                f"found {edit.promoted} for the query {row.query!r}."
            )


def without_rows(batch: Batch, reasons: Mapping[int, str]) -> Written:
    """Return the batch without some rows.

    Args:
        batch: Column name to values.
        reasons: Batch index of each row that leaves, to why.
    """
    if reasons:
        n_rows = len(next(iter(batch.values())))
        kept = [i for i in range(n_rows) if i not in reasons]
        batch = {column: [values[i] for i in kept] for column, values in batch.items()}
    return Written(batch=dict(batch), rows_dropped=dict(Counter(reasons.values())), rows_added=0)
