"""Checks of single values: what a format reads must be what it expects, or the row is named."""

from __future__ import annotations

from typing import Any

from hf_relabel.errors import RowError

__all__ = ["label_of", "list_of", "row_error", "text_of", "text_or_none"]

_MAX_SHOWN_CHARS = 60


def row_error(column: str, number: int, *, expected: str, found: Any, fix: str) -> RowError:
    """Build the error for one value.

    Args:
        column: The column's name in the dataset.
        number: The row's number in the dataset.
        expected: What belongs there, with its article.
        found: The value itself.
        fix: What to do now, as a sentence.
    """
    shown = _described(found)
    return RowError(
        f"expected {expected} in column {column!r}, found {shown} in row {number}. {fix}"
    )


def text_of(value: Any, column: str, number: int) -> str:
    """Return the value if it is a string.

    Raises:
        RowError: It is None or of another type.
    """
    if isinstance(value, str):
        return value
    fix = f"Fill it or leave the row out: dataset.filter(lambda row: row[{column!r}] is not None)."
    if value is not None:
        fix = f"Store text there, or map another column onto {column!r} with `columns=`."
    raise row_error(column, number, expected="a string", found=value, fix=fix)


def text_or_none(value: Any) -> str | None:
    """Return an id or a name as a string; None stays None."""
    return value if value is None or isinstance(value, str) else str(value)


def list_of(value: Any, column: str, number: int, *, of: str, fix: str = "") -> list[Any]:
    """Return the value if it is a list.

    Args:
        value: What the row holds.
        column: The column's name in the dataset.
        number: The row's number in the dataset.
        of: What the list should hold, in the plural.
        fix: What to do now if the value is a string; a general hint when empty.

    Raises:
        RowError: It is a string, None, or anything else that is not a list.
    """
    if isinstance(value, list | tuple):
        return value if isinstance(value, list) else list(value)
    if value is None:
        fix = f"Leave such rows out: dataset.filter(lambda row: row[{column!r}])."
    elif not isinstance(value, str) or not fix:
        fix = "Wrap a single value in a list, or read plain lists: dataset.with_format(None)."
    raise row_error(column, number, expected=f"a list of {of}", found=value, fix=fix)


def label_of(value: Any, column: str, number: int) -> bool:
    """Return whether a label means relevant: above 0.

    Raises:
        RowError: It is not a number.
    """
    try:
        if not isinstance(value, str | list) and value == value:  # not NaN
            return bool(value > 0)
    except TypeError:
        pass
    fix = "Label passages with numbers: above 0 is relevant, 0 or less is not."
    raise row_error(column, number, expected="a number", found=value, fix=fix)


def _described(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    if len(text) > _MAX_SHOWN_CHARS:
        text = text[:_MAX_SHOWN_CHARS] + "…"
    return f"{type(value).__name__} {text}"
