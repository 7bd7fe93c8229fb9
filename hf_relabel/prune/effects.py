"""Effects: how much a score changes when a subset is left out, and whether that is noise.

Training again with another seed changes the score too. That is the noise, and a change counts only
where it stands out of it. What is compared is the mean score over the benchmarks, y, of every run:

    y[arm, seed] = (what the arm is worth) + (what the seed is worth) + noise

An arm is the data with one subset left out; the arm with nothing left out is the baseline. The gain
of an arm is the mean over seeds of y[arm, seed] - y[baseline, seed]: paired by seed, since arms of
one seed share their start and their luck with it. The noise is the standard deviation of what the
model above leaves over, pooled over all arms: a textbook two-way layout (randomized blocks, seeds
being the blocks) with (arms - 1) x (seeds - 1) degrees of freedom. A gain has the standard error
noise x sqrt(2 / seeds), its own noise and the baseline's.

Pooled, since three seeds tell too little of any single arm: alone, each would have two degrees of
freedom and would have to gain 6.2 standard errors among four subsets; pooled it is 2.8. The price is
an assumption: that every arm is about as noisy as the next.

A subset is marked when its gain is at least `min_gain` and Student's t, one-sided, says so at
`alpha` divided by the number of subsets (Bonferroni). All gains share one baseline, and an unlucky
baseline would flatter all of them at once; the correction holds whatever they share, so that the
chance of marking any subset wrongly is at most `alpha`. It is a little stricter than Dunnett's test,
which is made for this layout, and needs no simulated quantiles.

The noise is that of training alone. Which queries a benchmark asks is luck as well, the same for
all arms and seeds: a benchmark of few queries can mark a subset that another one would not.

References:
    Many arms against one baseline: Dunnett (1955), doi:10.1080/01621459.1955.10501294.
    Seeds as a source of variance in comparisons: Bouthillier et al. (2021), arXiv:2103.03098.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hf_relabel.errors import MissingExtraError, SettingError

__all__ = ["Effect", "Effects", "check_scipy", "measure_effects"]

Scores = Mapping[int, Mapping[str, float]]
"""Seed → benchmark → score, of one arm."""

_STEP = 0.001
"""A benchmark is up or down beyond this: a tenth of a point, as the counts of the paper's table."""
_ZERO = 1e-12
"""Less noise than this is what rounding leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What leaving one subset out does.

    Attributes:
        subset: The subset.
        mean: The score without it, over benchmarks and seeds.
        gain: `mean` less the baseline's.
        gains: Benchmark → gain there.
        stands_out: Benchmarks whose own gain or loss is beyond their own noise, each taken alone
            (two-sided at alpha, not corrected: for reading, not for marking).
        low: The gain is at least this, at the level of the mark; None where noise is not known.
        p_value: One-sided and corrected for the number of subsets; None likewise.
        is_marked: Whether leaving it out helps beyond noise.
    """

    subset: str
    mean: float
    gain: float
    gains: Mapping[str, float]
    stands_out: frozenset[str]
    low: float | None
    p_value: float | None
    is_marked: bool

    @property
    def n_up(self) -> int:
        """Benchmarks that gain more than 0.001."""
        return sum(gain > _STEP for gain in self.gains.values())

    @property
    def n_down(self) -> int:
        """Benchmarks that lose more than 0.001."""
        return sum(gain < -_STEP for gain in self.gains.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """All arms against the baseline.

    Attributes:
        baseline: Seed → mean score over benchmarks, with nothing left out.
        benchmarks: Their names.
        noise: Standard deviation of one run's mean score; None where it is not known.
        n_freedom: Degrees of freedom of the noise.
        alpha: The chance that any subset is marked wrongly.
        min_gain: Smaller gains are not marked.
        effects: One for each subset, the most helped by leaving it out first.
        why_no_noise: Why the noise is not known, in words; empty where it is.
    """

    baseline: Mapping[int, float]
    benchmarks: tuple[str, ...]
    noise: float | None
    n_freedom: int
    alpha: float
    min_gain: float
    effects: tuple[Effect, ...]
    why_no_noise: str

    @property
    def mean(self) -> float:
        """The baseline's score, over benchmarks and seeds."""
        return fmean(self.baseline.values())

    @property
    def marked(self) -> tuple[str, ...]:
        """The subsets that do harm, the worst first."""
        return tuple(effect.subset for effect in self.effects if effect.is_marked)


def measure_effects(
    baseline: Scores,
    arms: Mapping[str, Scores],
    *,
    alpha: float = 0.05,
    min_gain: float = 0.001,
) -> Effects:
    """Compare the score without each subset with the score of all.

    Args:
        baseline: The scores with nothing left out.
        arms: Left-out subset → its scores, of the same seeds and benchmarks.
        alpha: The chance that any subset is marked wrongly.
        min_gain: Smaller gains are not marked, however sure they are.

    Raises:
        SettingError: The seeds or the benchmarks are not the same everywhere.
        MissingExtraError: scipy is not installed.
    """
    benchmarks = _check_layout(baseline, arms)
    means = {subset: _means(scores) for subset, scores in arms.items()}
    base = _means(baseline)
    noise = _Noise([base, *means.values()])
    level = alpha / len(arms)
    by_benchmark = {
        name: _Noise([_column(scores, name) for scores in (baseline, *arms.values())])
        for name in benchmarks
    }
    effects = []
    for subset, scores in arms.items():
        gain = _gain(means[subset], base)
        gains = {b: _gain(_column(scores, b), _column(baseline, b)) for b in benchmarks}
        p_value = noise.p_value(gain)
        # The correction is in the level: p_value is shown, corrected, beside alpha.
        is_marked = p_value is not None and p_value < level and gain >= min_gain
        effects.append(
            Effect(
                subset=subset,
                mean=fmean(means[subset].values()),
                gain=gain,
                gains=gains,
                stands_out=frozenset(
                    b for b in benchmarks if by_benchmark[b].is_exceeded(gains[b], alpha / 2)
                ),
                low=noise.low(gain, level),
                p_value=None if p_value is None else min(1.0, p_value * len(arms)),
                is_marked=is_marked,
            )
        )
    return Effects(
        baseline=base,
        benchmarks=benchmarks,
        noise=noise.deviation,
        n_freedom=noise.n_freedom,
        alpha=alpha,
        min_gain=min_gain,
        effects=tuple(sorted(effects, key=lambda effect: (-effect.gain, effect.subset))),
        why_no_noise=noise.why_unknown,
    )


class _Noise:
    """What seeds do to a score, from a table of arms (the baseline is one) by seeds."""

    def __init__(self, table: Sequence[Mapping[int, float]]) -> None:
        seeds = list(table[0])
        self._n_seeds = len(seeds)
        self.n_freedom = (len(table) - 1) * (len(seeds) - 1)
        self.deviation: float | None = None
        self.why_unknown = ""
        if self.n_freedom == 0:
            self.why_unknown = "one seed tells nothing of the noise"
            return
        deviation = math.sqrt(_left_over(table, seeds) / self.n_freedom)
        if deviation > _ZERO:
            self.deviation = deviation
        else:
            self.why_unknown = "the seeds changed nothing, so that the noise is not known"

    def p_value(self, gain: float) -> float | None:
        """Return the chance of such a gain, or a larger one, from noise alone."""
        if self.deviation is None:
            return None
        return float(_student().sf(gain / self._error, self.n_freedom))

    def low(self, gain: float, level: float) -> float | None:
        """Return what the gain is at least, but for a chance of `level`."""
        if self.deviation is None:
            return None
        return gain - float(_student().isf(level, self.n_freedom)) * self._error

    def is_exceeded(self, gain: float, level: float) -> bool:
        p_value = self.p_value(abs(gain))
        return p_value is not None and p_value < level

    @property
    def _error(self) -> float:
        return (self.deviation or 0.0) * math.sqrt(2 / self._n_seeds)


def _left_over(table: Sequence[Mapping[int, float]], seeds: Sequence[int]) -> float:
    """Return the sum of squares that neither arms nor seeds explain."""
    arm_means = [fmean(arm.values()) for arm in table]
    seed_means = {seed: fmean(arm[seed] for arm in table) for seed in seeds}
    mean = fmean(arm_means)
    return math.fsum(
        (arm[seed] - arm_mean - seed_means[seed] + mean) ** 2
        for arm, arm_mean in zip(table, arm_means, strict=True)
        for seed in seeds
    )


def _means(scores: Scores) -> dict[int, float]:
    return {seed: fmean(found.values()) for seed, found in scores.items()}


def _column(scores: Scores, benchmark: str) -> dict[int, float]:
    return {seed: found[benchmark] for seed, found in scores.items()}


def _gain(arm: Mapping[int, float], base: Mapping[int, float]) -> float:
    return fmean(arm[seed] - base[seed] for seed in base)


def _check_layout(baseline: Scores, arms: Mapping[str, Scores]) -> tuple[str, ...]:
    """Return the benchmarks."""
    seeds = set(baseline)
    benchmarks = set(next(iter(baseline.values()), {}))
    for scores in (baseline, *arms.values()):
        found = [set(values) for values in scores.values()]
        if (
            not seeds
            or not benchmarks
            or set(scores) != seeds
            or found != [benchmarks] * len(seeds)
        ):
            raise SettingError(
                f"expected the seeds {sorted(seeds)} and the benchmarks {sorted(benchmarks)} in "
                f"every arm, found {[(s, sorted(v)) for s, v in scores.items()]}. Let `evaluate` "
                "return the same benchmarks for every model."
            )
    return tuple(sorted(benchmarks))


def check_scipy() -> None:
    """Raise MissingExtraError now, not after hours of training, where scipy is not installed."""
    _student()


def _student() -> Any:  # scipy brings no types
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError.of("scipy", "evaluate", "Telling a gain from noise") from error
    return t
