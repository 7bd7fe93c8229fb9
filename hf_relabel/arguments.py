"""What the command groups read from their arguments alike."""

from __future__ import annotations

import typer

__all__ = ["mapping_of", "shard_of"]


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
