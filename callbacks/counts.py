"""Counts: what the callback did, added up by workers without a lock and by ranks in one call.

Each worker of a data loader has a line of its own in memory that they all share, so that nothing
needs a lock and nothing is lost; the main process has line 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Counts"]


@dataclass(slots=True, kw_only=True)
class Counts:
    """What became of the batches that were made so far.

    Attributes:
        seen: Negatives, those of dropped rows too.
        known: Negatives among them whose verdict was known.
        dropped: Negatives that left: false negatives, copies of a positive, those of dropped rows.
        promoted: Negatives that became positives.
        rows_dropped: Rows that left.
    """

    seen: int = 0
    known: int = 0
    dropped: int = 0
    promoted: int = 0
    rows_dropped: int = 0

    def add(self, other: Counts) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, values: Any) -> Counts:
        """Build from numbers in the order of `names`."""
        return cls(**dict(zip(cls.names(), map(int, values), strict=True)))

    @property
    def values(self) -> list[int]:
        return [getattr(self, name) for name in self.names()]
