"""Arguments that several commands take, and how they are read."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Columns", "Config", "FormatName", "Input", "Limit", "Split", "mapping_of", "shard_of",
]  # fmt: skip

Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A JSONL, Parquet or CSV file, a folder saved by save_to_disk, or a Hub id.",
    ),
]
Split = Annotated[str | None, typer.Option("--split", help="One split only.")]
Config = Annotated[str | None, typer.Option("--config", help="The Hub dataset's subset.")]
Limit = Annotated[int | None, typer.Option("--limit", help="The first N rows.", min=1)]
FormatName = Annotated[
    str | None, typer.Option("--format", help="The rows' format, if columns do not tell.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="role=column, where columns have names of their own."),
]


def mapping_of(columns: list[str] | None) -> dict[str, str]:
    """Read role=column pairs."""
    pairs = [column.partition("=") for column in columns or ()]
    for role, equals, name in pairs:
        if not (role and equals and name):
            raise typer.BadParameter(f"expected role=column, found {role!r}", param_hint="--column")
    return {role: name for role, _, name in pairs}


def shard_of(text: str | None) -> tuple[int, int | None]:
    """Read "i/n", i counted from 0."""
    if text is None:
        return 0, None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise typer.BadParameter(
            f"expected i/n with i from 0 to n-1, found {text!r}", param_hint="--shard"
        )
    return int(index), int(count)
