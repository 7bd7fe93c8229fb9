"""Comparison of two models on the same queries: the difference, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.evaluate import METRICS, Evaluation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.float64]

__all__ = ["Comparison", "compare"]

_BATCH = 200  # resamples held at once: of 10,000 queries, 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models, A and B, on the same queries.

    Attributes:
        model_a: A's name.
        model_b: B's name.
        benchmark: The benchmark's name; of several, "average".
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
        seed_differences: With several seeds, the difference of each pair of them.
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
    are about other queries of the same kind.

    Args:
        a: One evaluation, or those of several seeds of one training, which are averaged for each
            query; the test then says nothing about further seeds, for which `seed_differences` is
            there.
        b: The same for the other model; B's mean less A's is the difference.
        metric: Which metric.
        seed: Of the resampling: the same inputs and seed give the same numbers.
        n_resamples: Random sign patterns, and bootstrap samples; few queries are tested exactly.
        confidence: The level of the interval.

    Raises:
        SettingError: The two do not stand on the same queries, or a setting cannot work.
        MissingExtraError: SciPy is not installed.
    """
    seeds_a, seeds_b = _seeds(a), _seeds(b)
    values_a, values_b = _per_query(seeds_a, metric), _per_query(seeds_b, metric)
    _check_pairs(values_a, values_b)
    differences = [values_b[query_id] - values_a[query_id] for query_id in sorted(values_a)]
    low, high, p_value = _resample(differences, seed, n_resamples, confidence)
    return Comparison(
        model_a=seeds_a[0].model,
        model_b=seeds_b[0].model,
        benchmark=seeds_a[0].benchmark,
        metric=metric,
        mean_a=fmean(values_a.values()),
        mean_b=fmean(values_b.values()),
        difference=fmean(differences),
        interval=(low, high),
        confidence=confidence,
        p_value=p_value,
        n_queries=len(differences),
        n_better=sum(value > 0 for value in differences),
        n_worse=sum(value < 0 for value in differences),
        seed_differences=_seed_differences(seeds_a, seeds_b, metric),
    )


def _seeds(given: Evaluation | Sequence[Evaluation]) -> Sequence[Evaluation]:
    seeds = [given] if isinstance(given, Evaluation) else list(given)
    if not seeds:
        raise SettingError("expected an evaluation, or one for each seed, found none.")
    return seeds


def _per_query(seeds: Sequence[Evaluation], metric: str) -> dict[str, float]:
    """Average over seeds, for each query."""
    by_seed = [found.values(metric) for found in seeds]
    for values in by_seed[1:]:
        _check_pairs(by_seed[0], values)
    return {query_id: fmean(values[query_id] for values in by_seed) for query_id in by_seed[0]}


def _check_pairs(a: Mapping[str, float], b: Mapping[str, float]) -> None:
    if only := sorted(set(a) ^ set(b)):
        raise SettingError(
            f"expected two evaluations on the same queries, found {len(only):,} queries in one "
            f"alone, the first {only[0]!r}. Evaluate both on the same benchmark and split."
        )


def _seed_differences(
    a: Sequence[Evaluation], b: Sequence[Evaluation], metric: str
) -> tuple[float, ...]:
    if len(a) != len(b) or len(a) == 1:
        return ()
    return tuple(of_b.mean(metric) - of_a.mean(metric) for of_a, of_b in zip(a, b, strict=True))


def _resample(
    differences: Sequence[float], seed: int, n_resamples: int, confidence: float
) -> tuple[float, float, float]:
    """Return the interval's ends and the p-value."""
    try:
        import numpy as np
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError.of(error.name or "scipy", "evaluate", "Comparison") from error
    values = np.asarray(differences, dtype=np.float64)
    if not values.any() or len(values) == 1:
        return float(values.mean()), float(values.mean()), 1.0
    options: dict[str, Any] = {"n_resamples": n_resamples, "batch": _BATCH}
    test = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", vectorized=True, rng=seed, **options
    )
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, method="percentile", rng=seed, **options
    ).confidence_interval
    return float(interval.low), float(interval.high), float(test.pvalue)
