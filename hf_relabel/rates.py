"""Rates: shares of counted things, with an interval. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

__all__ = ["Rate"]

_Z = 1.959963984540054
"""The normal distribution's 97.5th percentile, for intervals of 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share with its 95 % interval; build it with `from_counts`.

    Attributes:
        count: How many.
        total: Of how many.
        share: `count / total`; None of none, as are the ends of the interval.
        low: The interval's lower end.
        high: Its upper end.
    """

    count: int
    total: int
    share: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_counts(cls, count: int, total: int) -> Rate:
        """Compute a share and its interval.

        References:
            Wilson (1927), "Probable inference", JASA 22: it holds for few cases and for shares of
            0 and 1, where the textbook interval is a point.
        """
        if not total:
            return cls(count=count, total=total)
        share, spread = count / total, _Z**2 / total
        centre = share + spread / 2
        reach = _Z * sqrt(share * (1 - share) / total + spread / (4 * total))
        # At 0 and 1 the ends are exact; rounding would put them beyond.
        low = 0.0 if count == 0 else (centre - reach) / (1 + spread)
        high = 1.0 if count == total else (centre + reach) / (1 + spread)
        return cls(count=count, total=total, share=share, low=low, high=high)

    def __str__(self) -> str:
        if self.share is None:
            return "none"
        ends = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.count} of {self.total} ({self.share:.2f}; 95 % interval {ends})"
