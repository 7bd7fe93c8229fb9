"""Benchmarks: each module `bench_*.py` has a `measure()` that yields ratios against a peer.

Run them with `make bench`, or some of them with `python -m tests.benchmarks NAME …`. Every ratio is
of two medians measured in the same run, the two sides taking turns, so that it means the same on a
slow machine and a fast one. Nothing here asserts: a figure is printed beside the one it is held to.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "medians", "ratio_of_turns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One line of the table.

    Attributes:
        name: What was measured against what.
        ours: Our median.
        peer: The peer's median.
        unit: Of both.
        bound: What the ratio ours / peer is held to: ">= 0.9", "<= 1.01".
        n_runs: Measurements behind each median.
        note: What else a reader must know.
    """

    name: str
    ours: float
    peer: float
    unit: str
    bound: str
    n_runs: int
    note: str = ""

    @property
    def value(self) -> float:
        return self.ours / self.peer

    @property
    def holds(self) -> bool:
        sign, number = self.bound.split()
        return self.value >= float(number) if sign == ">=" else self.value <= float(number)


def medians(sides: Sequence[Callable[[], float]], n_runs: int = 3) -> list[float]:
    """Measure several sides in turns and return the median of each."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(n_runs):
        for values, measure in zip(found, sides, strict=True):
            values.append(measure())
    return [statistics.median(values) for values in found]


def ratio_of_turns(
    name: str,
    ours: Callable[[], float],
    peer: Callable[[], float],
    *,
    unit: str,
    bound: str,
    n_runs: int = 3,
    note: str = "",
) -> Ratio:
    """Measure two sides in turns and return their ratio."""
    our_median, peer_median = medians([ours, peer], n_runs)
    return Ratio(
        name=name, ours=our_median, peer=peer_median, unit=unit, bound=bound, n_runs=n_runs,
        note=note,
    )  # fmt: skip
