"""Rates: shares and their intervals."""

from __future__ import annotations

import pytest

from hf_relabel.rates import Rate


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (1, 400, 0.0004, 0.0140),
    ],
)
def test_the_interval_is_wilsons(count: int, total: int, low: float, high: float) -> None:
    """Values of statsmodels' proportion_confint(method="wilson")."""
    rate = Rate.from_counts(count, total)

    assert rate.share == count / total
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)


def test_none_of_none_is_no_share() -> None:
    rate = Rate.from_counts(0, 0)

    assert (rate.share, rate.low, rate.high) == (None, None, None)
    assert str(rate) == "none"
