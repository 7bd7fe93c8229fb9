"""Verdicts: what a judge said about one passage for one query, and what becomes of it.

Values only: frozen, hashable, JSON in and out. Nothing here knows of files, models or datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = ["Action", "Relevance", "Trace", "Verdict"]


class Relevance(str, Enum):
    """How a negative compares with its row's positives.

    References:
        The better/worse split: Thakur et al. (2025), arXiv:2505.16967.
    """

    BETTER = "better"
    """Relevant, and at least as good an answer as the positives."""
    WORSE = "worse"
    """Relevant, but not as good an answer as the positives."""
    NOT_RELEVANT = "not-relevant"
    UNDECIDED = "undecided"
    """No usable answer came. Never the same as "not relevant"."""

    @property
    def is_relevant(self) -> bool:
        """Whether the passage answers the query, so that its negative label is false."""
        return self in (Relevance.BETTER, Relevance.WORSE)

    @property
    def is_decided(self) -> bool:
        return self is not Relevance.UNDECIDED


class Action(str, Enum):
    """What becomes of a negative."""

    KEEP = "keep"
    DROP = "drop"
    PROMOTE = "promote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judge's parsed answer on one (query, passage).

    Attributes:
        relevance: The answer.
        judge: The judge's name.
        rank: Position in the judge's own order, from 0; orders promoted passages.
        grade: 0 to 3, where the protocol asks for a grade.
        confidence: In [0, 1], where the judge gives one.
        reason: The judge's words on this passage, or why it stayed undecided.
        call: The cache key of the call whose reply it was read from.
    """

    relevance: Relevance
    judge: str
    rank: int | None = None
    grade: int | None = None
    confidence: float | None = None
    reason: str | None = None
    call: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that leaves out what is not set."""
        values: dict[str, Any] = {"relevance": self.relevance.value, "judge": self.judge}
        for name in ("rank", "grade", "confidence", "reason", "call"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """Build from what `to_json` returned.

        Raises:
            ValueError: The relevance is none of the known ones.
        """
        return cls(**{**values, "relevance": Relevance(values["relevance"])})


Trace = tuple[Verdict, ...]
"""What each stage of a cascade said about one passage, first stage first; the last has the word."""
