"""Effects: what is noise, what is marked, and how often wrongly."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from hf_relabel.errors import SettingError
from hf_relabel.prune import measure_effects

Scores = dict[int, dict[str, float]]


def _scores(
    rng: random.Random, *, worth: float, noise: float, seeds: Mapping[int, float]
) -> Scores:
    return {seed: {"x": worth + luck + rng.gauss(0, noise)} for seed, luck in seeds.items()}


def _sweep(
    seed: int, gains: Mapping[str, float], *, noise: float = 0.01, n_seeds: int = 3
) -> tuple[Scores, dict[str, Scores]]:
    """Draw a sweep: each seed has its luck, shared by all arms."""
    rng = random.Random(seed)
    seeds = {index: rng.gauss(0, 0.05) for index in range(n_seeds)}
    base = _scores(rng, worth=0.5, noise=noise, seeds=seeds)
    arms = {
        name: _scores(rng, worth=0.5 + gain, noise=noise, seeds=seeds)
        for name, gain in gains.items()
    }
    return base, arms


def test_the_noise_is_what_arms_and_seeds_do_not_explain() -> None:
    """By hand: residuals of a table of 2 x 2 are all a quarter of the interaction, here 0.01."""
    base = {0: {"x": 0.50}, 1: {"x": 0.60}}
    arms = {"a": {0: {"x": 0.52}, 1: {"x": 0.66}}}

    found = measure_effects(base, arms)

    assert found.n_freedom == 1
    assert found.noise == pytest.approx((4 * 0.01**2) ** 0.5)
    assert found.effects[0].gain == pytest.approx(0.04)


def test_gain_and_p_value_agree_with_the_paired_t_test_of_two_arms() -> None:
    """With one arm the pooled layout is the paired t-test, which scipy computes."""
    from scipy.stats import ttest_rel

    base, arms = _sweep(1, {"a": 0.02}, n_seeds=6)
    expected = ttest_rel(
        [found["x"] for found in arms["a"].values()],
        [found["x"] for found in base.values()],
        alternative="greater",
    )

    (effect,) = measure_effects(base, arms).effects

    assert effect.p_value == pytest.approx(expected.pvalue)


def test_luck_that_a_seed_brings_to_all_arms_is_no_noise() -> None:
    base, arms = _sweep(2, {"a": 0.0, "b": 0.0, "c": 0.0}, noise=0.001)

    found = measure_effects(base, arms)

    assert found.noise is not None
    assert found.noise < 0.005  # the seeds' own luck has 0.05


def test_a_harmful_subset_is_marked_and_no_other() -> None:
    base, arms = _sweep(3, {"good": -0.05, "bad": 0.08, "idle": 0.0})

    found = measure_effects(base, arms)

    assert found.marked == ("bad",)
    assert found.effects[0].subset == "bad"


@pytest.mark.parametrize("n_subsets", [4, 15])
def test_harmless_subsets_are_marked_as_seldom_as_alpha_says(n_subsets: int) -> None:
    """Of 400 sweeps without any effect at most 5 % may mark one: 20, and twice sigma above."""
    names = {f"s{index}": 0.0 for index in range(n_subsets)}

    wrong = sum(
        bool(measure_effects(*_sweep(seed, names), min_gain=0.0).marked) for seed in range(400)
    )

    assert 1 <= wrong <= 29


def test_an_unlucky_baseline_flatters_all_arms_and_still_marks_none() -> None:
    """The chance is of any mark in a sweep, though the arms share one baseline."""
    names = {f"s{index}": 0.0 for index in range(15)}
    sweeps = [measure_effects(*_sweep(seed, names), min_gain=0.0) for seed in range(200)]

    many = [found for found in sweeps if len(found.marked) > 1]

    assert len(many) <= 10


def test_a_sure_gain_below_the_least_that_matters_is_not_marked() -> None:
    base, arms = _sweep(4, {"a": 0.0008, "b": -0.01}, noise=0.00001)

    assert measure_effects(base, arms).marked == ()
    assert measure_effects(base, arms, min_gain=0.0005).marked == ("a",)


def test_with_one_seed_nothing_is_marked_and_it_says_so() -> None:
    base, arms = _sweep(5, {"bad": 0.3, "good": -0.1}, n_seeds=1)

    found = measure_effects(base, arms)

    assert found.marked == ()
    assert found.noise is None
    assert "one seed" in found.why_no_noise


def test_seeds_that_change_nothing_mark_nothing() -> None:
    """A training that ignores its seed would make every difference look sure."""
    base = {seed: {"x": 0.5} for seed in range(3)}
    arms = {"bad": {seed: {"x": 0.7} for seed in range(3)}}

    found = measure_effects(base, arms)

    assert found.marked == ()
    assert "seeds changed nothing" in found.why_no_noise


def test_benchmarks_are_counted_up_and_down_beyond_a_tenth_of_a_point() -> None:
    base = {seed: {"x": 0.5, "y": 0.5, "z": 0.5} for seed in range(2)}
    without = {seed: {"x": 0.52, "y": 0.4, "z": 0.5009 + seed / 1e5} for seed in range(2)}

    (effect,) = measure_effects(base, {"a": without}).effects

    assert (effect.n_up, effect.n_down) == (1, 1)


def test_arms_with_other_benchmarks_or_seeds_are_refused() -> None:
    base, arms = _sweep(6, {"a": 0.0, "b": 0.0})
    arms["b"][0] = {"y": 0.1}

    with pytest.raises(SettingError, match="same benchmarks"):
        measure_effects(base, arms)
