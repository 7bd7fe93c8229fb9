"""Comparison of two models on the same queries: the difference, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.evaluate import METRICS, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare", "compare_all", "draw"]

_BATCH = 200  # resamples held at once: of 10,000 queries, 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models, A and B, on the same queries.

    Attributes:
        model_a: A's name.
        model_b: B's name.
        benchmark: The benchmark's name, or "average" of several.
        metric: As ir-measures writes it.
        mean_a: A's mean.
        mean_b: B's mean.
        difference: B's mean less A's: above 0, B is better.
        interval: The difference's confidence interval, low and high.
        confidence: The interval's level.
        p_value: Two-sided, of the hypothesis that it does not matter which model answers.
        n_queries: How many queries.
        n_better: On how many of them B is better.
        n_worse: On how many of them A is better.
        seed_differences: With several seeds each, the difference of each pair of them.
    """

    model_a: str
    model_b: str
    benchmark: str
    metric: str
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float]
    confidence: float
    p_value: float
    n_queries: int
    n_better: int
    n_worse: int
    seed_differences: tuple[float, ...] = ()


def compare(
    a: Evaluation | Sequence[Evaluation],
    b: Evaluation | Sequence[Evaluation],
    metric: str = METRICS[0],
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two models on one benchmark, query by query.

    The test is a paired randomization test: were the models alike, each query's difference could
    as well have had the other sign. The interval is a bootstrap over queries (percentiles). Both
    speak of other queries of the same kind.

    Args:
        a: One evaluation, or those of several seeds of one training, which are averaged for each
            query. The test then says nothing of further seeds: look at `seed_differences`.
        b: The same for the other model; B's mean less A's is the difference.
        metric: Which metric.
        seed: Of the resampling: the same inputs and seed give the same numbers.
        n_resamples: Random sign patterns, and bootstrap samples; few queries are tested exactly.
        confidence: The level of the interval.

    Raises:
        SettingError: The two do not stand on the same queries, or a setting cannot work.
        MissingExtraError: SciPy is not installed.

    References:
        Randomization tests in retrieval: Smucker, Allan and Carterette (2007), CIKM.
    """
    seeds_a, seeds_b = _seeds(a), _seeds(b)
    name = seeds_a[0].benchmark
    return compare_all(
        {name: seeds_a},
        {seeds_b[0].benchmark: seeds_b},
        metric,
        seed=seed,
        n_resamples=n_resamples,
        confidence=confidence,
    )[0]


def compare_all(
    a: Mapping[str, Sequence[Evaluation]],
    b: Mapping[str, Sequence[Evaluation]],
    metric: str = METRICS[0],
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare two models on several benchmarks, and on their average.

    Args:
        a: Benchmark → evaluations, one for each seed.
        b: The same for the other model.
        metric: This and what follows: see `compare`.
        seed: Of the resampling.
        n_resamples: How many resamples.
        confidence: The level of the intervals.

    Returns:
        A comparison for each benchmark in the order of `a`, and, of more than one, that of the
        average, in which each benchmark weighs the same, however many queries it has. No p-value
        is corrected for the number of benchmarks.
    """
    _check_resampling(n_resamples, confidence)
    if only := sorted(set(a) ^ set(b)):
        raise SettingError(
            f"expected two models evaluated on the same benchmarks, found {', '.join(only)} for "
            "one alone. Evaluate the other there too, or compare single files."
        )
    pairs = [_Pairs.of(a[name], b[name], metric) for name in a]
    groups = [[pair] for pair in pairs] + ([pairs] if len(pairs) > 1 else [])
    return [_comparison(group, metric, seed, n_resamples, confidence) for group in groups]


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw differences with their intervals, one line for each benchmark, as PNG, SVG or PDF.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SettingError: The file's name says none of these.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "report", "The plot") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise SettingError(
            f"expected a plot's file to end in .png, .svg or .pdf, found {path.name!r}."
        )
    figure = Figure(
        figsize=(8, 1.6 + 0.36 * len(comparisons)), dpi=150, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    _draw_lines(figure.add_subplot(), comparisons)
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def _draw_lines(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    first = comparisons[0]
    for place, found in enumerate(comparisons):
        low, high = found.interval
        is_clear = found.p_value < 1 - found.confidence
        axes.plot([100 * low, 100 * high], [place, place], color="#3b6ea5", linewidth=2)
        axes.plot(
            [100 * found.difference], [place], "o", markersize=7, markeredgecolor="#3b6ea5",
            markerfacecolor="#3b6ea5" if is_clear else "white",
        )  # fmt: skip
    axes.axvline(0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(comparisons)), [found.benchmark for found in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel(
        f"100 * {first.metric}: {first.model_b} less {first.model_a}, with {first.confidence:.0%} "
        f"intervals; filled: p < {1 - first.confidence:.2g}"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The values of two models on the queries of one benchmark, seeds averaged."""

    a: Sequence[Evaluation]
    b: Sequence[Evaluation]
    values_a: Sequence[float]
    values_b: Sequence[float]

    @classmethod
    def of(cls, a: Sequence[Evaluation], b: Sequence[Evaluation], metric: str) -> _Pairs:
        values_a, values_b = _per_query(a, metric), _per_query(b, metric)
        _check_queries(values_a, values_b, a[0].benchmark)
        order = sorted(values_a)
        return cls(
            a=a,
            b=b,
            values_a=[values_a[query_id] for query_id in order],
            values_b=[values_b[query_id] for query_id in order],
        )

    @property
    def differences(self) -> list[float]:
        return [of_b - of_a for of_a, of_b in zip(self.values_a, self.values_b, strict=True)]

    def seed_differences(self, metric: str) -> tuple[float, ...]:
        if len(self.a) != len(self.b) or len(self.a) == 1:
            return ()
        pairs = zip(self.a, self.b, strict=True)
        return tuple(of_b.mean(metric) - of_a.mean(metric) for of_a, of_b in pairs)


def _comparison(
    group: Sequence[_Pairs], metric: str, seed: int, n_resamples: int, confidence: float
) -> Comparison:
    samples = [pair.differences for pair in group]
    mean_a = fmean(fmean(pair.values_a) for pair in group)
    mean_b = fmean(fmean(pair.values_b) for pair in group)
    by_seed = [pair.seed_differences(metric) for pair in group]
    return Comparison(
        model_a=group[0].a[0].model,
        model_b=group[0].b[0].model,
        benchmark=group[0].a[0].benchmark if len(group) == 1 else "average",
        metric=metric,
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_b - mean_a,
        interval=_interval(samples, seed, n_resamples, confidence),
        confidence=confidence,
        p_value=_p_value(samples, seed, n_resamples),
        n_queries=sum(map(len, samples)),
        n_better=sum(value > 0 for values in samples for value in values),
        n_worse=sum(value < 0 for values in samples for value in values),
        seed_differences=tuple(map(fmean, zip(*by_seed, strict=True))) if _is_even(by_seed) else (),
    )


def _is_even(values: Sequence[Sequence[float]]) -> bool:
    return len({len(each) for each in values}) == 1


def _seeds(given: Evaluation | Sequence[Evaluation]) -> Sequence[Evaluation]:
    seeds = [given] if isinstance(given, Evaluation) else list(given)
    if not seeds:
        raise SettingError("expected an evaluation, or one for each seed, found none.")
    return seeds


def _per_query(seeds: Sequence[Evaluation], metric: str) -> dict[str, float]:
    """Average over seeds, for each query."""
    by_seed = [found.values(metric) for found in seeds]
    for values in by_seed[1:]:
        _check_queries(by_seed[0], values, seeds[0].benchmark)
    return {query_id: fmean(values[query_id] for values in by_seed) for query_id in by_seed[0]}


def _check_queries(a: Mapping[str, float], b: Mapping[str, float], benchmark: str) -> None:
    if only := sorted(set(a) ^ set(b)):
        raise SettingError(
            f"expected evaluations on the same queries of {benchmark!r}, found {len(only):,} "
            f"queries in one alone, the first {only[0]!r}. Evaluate both on the same split."
        )


def _check_resampling(n_resamples: int, confidence: float) -> None:
    if isinstance(n_resamples, bool) or not isinstance(n_resamples, int) or n_resamples < 1:
        raise SettingError(f"expected n_resamples to be an integer from 1, found {n_resamples!r}.")
    if not 0 < confidence < 1:
        raise SettingError(f"expected confidence between 0 and 1, found {confidence!r}.")


def _p_value(samples: Sequence[Sequence[float]], seed: int, n_resamples: int) -> float:
    """Test the mean of the samples' means by flipping the signs of single differences."""
    np, stats = _libraries()
    # Each difference as what it adds to the mean of means: a sum of these is the statistic.
    parts = np.concatenate(
        [np.asarray(values) / (len(values) * len(samples)) for values in samples]
    )
    # Without a difference nothing can flip, and SciPy wants more than one.
    parts = parts[parts != 0]
    if len(parts) < 2:
        return 1.0
    test = stats.permutation_test(
        (parts,), np.sum, permutation_type="samples", vectorized=True, n_resamples=n_resamples,
        batch=_BATCH, rng=seed,
    )  # fmt: skip
    return float(test.pvalue)


def _interval(
    samples: Sequence[Sequence[float]], seed: int, n_resamples: int, confidence: float
) -> tuple[float, float]:
    """Bootstrap the mean of the samples' means, each sample from its own queries."""
    np, stats = _libraries()

    def mean_of_means(*drawn: Any, axis: int = -1) -> Any:
        return sum(values.mean(axis=axis) for values in drawn) / len(drawn)

    if any(len(values) < 2 for values in samples):
        return (-math.inf, math.inf)  # one query tells nothing of others
    found = stats.bootstrap(
        [np.asarray(values) for values in samples], mean_of_means, n_resamples=n_resamples,
        batch=_BATCH, confidence_level=confidence, method="percentile", vectorized=True, rng=seed,
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _libraries() -> tuple[Any, Any]:
    try:
        import numpy as np
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError.of(error.name or "scipy", "evaluate", "Comparison") from error
    return np, stats
