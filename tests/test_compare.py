"""Comparison: differences, how sure they are, and what they say of seeds and benchmarks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from hf_relabel.compare import compare, compare_all, draw
from hf_relabel.errors import SettingError
from hf_relabel.evaluate import Evaluation


def _evaluation(values: Sequence[float], model: str = "a", benchmark: str = "set") -> Evaluation:
    by_query = {f"q{number}": value for number, value in enumerate(values)}
    return Evaluation(model=model, benchmark=benchmark, per_query={"nDCG@10": by_query})


def _noise(seed: int, n_queries: int, shift: float = 0.0) -> list[float]:
    draw_ = random.Random(seed)
    return [min(1.0, max(0.0, draw_.gauss(0.5 + shift, 0.2))) for _ in range(n_queries)]


def test_the_difference_is_b_less_a_over_shared_queries() -> None:
    found = compare(_evaluation([0.1, 0.5, 0.9]), _evaluation([0.4, 0.5, 0.8], "b"))

    assert found.difference == pytest.approx(0.2 / 3)
    assert (found.mean_a, found.mean_b) == pytest.approx((0.5, 1.7 / 3))
    assert (found.n_queries, found.n_better, found.n_worse) == (3, 1, 1)
    assert (found.model_a, found.model_b, found.benchmark) == ("a", "b", "set")


def test_few_queries_are_tested_exactly() -> None:
    """The p-value is the share of all sign patterns with at least this difference."""
    a, b = _noise(1, 8), _noise(2, 8, 0.1)
    differences = [of_b - of_a for of_a, of_b in zip(a, b, strict=True)]
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=8)
    ]
    expected = sum(value >= abs(sum(differences)) - 1e-12 for value in sums) / len(sums)

    assert compare(_evaluation(a), _evaluation(b)).p_value == pytest.approx(expected)


def test_a_clear_difference_is_clear_and_noise_is_not() -> None:
    a = _noise(1, 200)
    better = [min(1.0, value + 0.05) for value in a]

    clear = compare(_evaluation(a), _evaluation(better))
    noise = compare(_evaluation(a), _evaluation(_noise(2, 200)))

    assert clear.p_value < 0.001
    assert 0 < clear.interval[0] < clear.difference < clear.interval[1] < 0.06
    assert noise.p_value > 0.05
    assert noise.interval[0] < 0 < noise.interval[1]


def test_of_models_that_are_alike_five_in_a_hundred_seem_different() -> None:
    """What a p-value promises: at 0.05, of 200 pairs without a difference, about ten."""
    n_found = sum(
        compare(
            _evaluation(_noise(2 * n, 40)), _evaluation(_noise(2 * n + 1, 40)), n_resamples=500
        ).p_value < 0.05
        for n in range(200)
    )  # fmt: skip

    assert 3 <= n_found <= 19  # all but 1 in 200 draws of a binomial with 200 and 0.05


def test_the_same_seed_gives_the_same_numbers_and_swapping_turns_them() -> None:
    a, b = _evaluation(_noise(1, 60)), _evaluation(_noise(2, 60, 0.05), "b")

    found, again, turned = compare(a, b, seed=3), compare(a, b, seed=3), compare(b, a, seed=3)

    assert found == again
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=0.005)
    assert turned.p_value == pytest.approx(found.p_value, abs=0.01)


def test_the_same_model_twice_is_no_difference() -> None:
    found = compare(_evaluation(_noise(1, 30)), _evaluation(_noise(1, 30)))

    assert (found.difference, found.p_value, found.interval) == (0.0, 1.0, (0.0, 0.0))


def test_one_query_tells_nothing_of_others() -> None:
    found = compare(_evaluation([0.2]), _evaluation([0.9]))

    assert found.p_value == 1.0
    assert found.interval == (float("-inf"), float("inf"))


def test_seeds_are_averaged_for_each_query_and_their_spread_is_kept() -> None:
    seeds_a = [_evaluation([0.1, 0.3, 0.5]), _evaluation([0.3, 0.3, 0.7])]
    seeds_b = [_evaluation([0.2, 0.4, 0.6], "b"), _evaluation([0.6, 0.2, 0.8], "b")]

    found = compare(seeds_a, seeds_b)

    averaged = compare(_evaluation([0.2, 0.3, 0.6]), _evaluation([0.4, 0.3, 0.7], "b"))
    assert found.difference == pytest.approx(averaged.difference)
    assert found.p_value == averaged.p_value
    assert found.seed_differences == pytest.approx((0.1, 0.1))


def test_every_benchmark_weighs_the_same_in_the_average() -> None:
    a = {"small": [_evaluation(_noise(1, 10), benchmark="small")],
         "large": [_evaluation(_noise(2, 300), benchmark="large")]}  # fmt: skip
    b = {"small": [_evaluation(_noise(3, 10, 0.3), "b", "small")],
         "large": [_evaluation(_noise(4, 300), "b", "large")]}  # fmt: skip

    small, large, average = compare_all(a, b)

    assert [each.benchmark for each in (small, large, average)] == ["small", "large", "average"]
    assert average.difference == pytest.approx(fmean([small.difference, large.difference]))
    assert average.n_queries == 310
    # Half of the small set's interval, which is much the wider one.
    width = (small.interval[1] - small.interval[0]) / 2
    assert average.interval[1] - average.interval[0] == pytest.approx(width, rel=0.15)
    assert small.p_value < 0.05
    assert average.p_value < 0.05


def test_other_queries_or_benchmarks_are_refused() -> None:
    with pytest.raises(SettingError, match="found 1 queries in one alone, the first 'q2'"):
        compare(_evaluation([0.1, 0.2]), _evaluation([0.1, 0.2, 0.3]))
    with pytest.raises(SettingError, match="found set, two for one alone"):
        compare(_evaluation([0.1, 0.2]), _evaluation([0.1, 0.2], benchmark="two"))
    with pytest.raises(SettingError, match="one for each seed, found none"):
        compare([], _evaluation([0.1]))


@pytest.mark.parametrize("settings", [{"n_resamples": 0}, {"confidence": 1.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        compare(_evaluation([0.1]), _evaluation([0.1]), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_plot_is_a_file_of_its_kind(tmp_path: Path, suffix: str, magic: bytes) -> None:
    found = compare(_evaluation(_noise(1, 20)), _evaluation(_noise(2, 20), "b"))

    draw([found], tmp_path / f"plot.{suffix}")

    assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(magic)


def test_a_plot_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    found = compare(_evaluation([0.1, 0.2]), _evaluation([0.2, 0.4]))

    with pytest.raises(SettingError, match=r"found 'plot\.txt'"):
        draw([found], tmp_path / "plot.txt")
