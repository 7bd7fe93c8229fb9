"""Agreement: figures by hand and by scikit-learn, and intervals that hold what they promise."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from hf_relabel.agreement import Agreement, Figure, measure, write_agreement
from hf_relabel.annotation import Answers
from hf_relabel.sampling import Pair, Sample, Stratum
from hf_relabel.verdicts import Relevance
from tests.annotators import Population, Rates

BETTER, NO, UNDECIDED = Relevance.BETTER, Relevance.NOT_RELEVANT, Relevance.UNDECIDED
JUDGES = (Rates(0.85, 0.08), Rates(0.9, 0.15))
TWO_SUBSETS = {"a": (20_000, 0.08), "b": (4_000, 0.2)}
THREE_PEOPLE = (Rates(0.92, 0.03), Rates(0.88, 0.05), Rates(0.9, 0.02))


def pairs(name: str, count: int, *relevances: Relevance, subset: str = "") -> list[Pair]:
    return [
        Pair(
            task=f"{name}{number}", query="q", positives=("p",), passage=f"{name} {number}",
            subset=subset, relevances=relevances,
        )
        for number in range(count)
    ]  # fmt: skip


def sample_of(*groups: tuple[int, list[Pair]]) -> Sample:
    """Build a sample from (size of the stratum, pairs drawn from it)."""
    strata = tuple(
        Stratum(subset=drawn[0].subset, outcome=drawn[0].outcome, size=size, drawn=len(drawn))
        for size, drawn in groups
    )
    stages = {
        f"stage {n}": f"judge {n}" for n in range(max(len(d[0].relevances) for _, d in groups))
    }
    drawn = tuple(pair for _, drawn in groups for pair in drawn)
    return Sample(seed=0, stages=stages, strata=strata, pairs=drawn)


def answers_of(**said: str) -> Answers:
    """Build answers from one letter for each person: y, n, ? or a blank for none."""
    words = {"y": True, "n": False, "?": None}
    return {
        task: {f"person {who}": words[letter] for who, letter in enumerate(text) if letter != " "}
        for task, text in said.items()
    }


def cascade_of(found: Agreement) -> tuple[Figure, Figure, Figure]:
    judge = next(judge for judge in found.judges if judge.stage == "cascade" and not judge.subset)
    return judge.kappa, judge.precision, judge.recall


def test_every_pair_weighs_what_it_stands_for() -> None:
    """4 of 10 flagged pairs drawn, 3 right; 5 of 1,000 passed ones, of which 1 is relevant."""
    sample = sample_of((10, pairs("f", 4, BETTER)), (1000, pairs("p", 5, NO)))
    answers = answers_of(f0="y", f1="y", f2="y", f3="n", p0="y", p1="n", p2="n", p3="n", p4="n")

    kappa, precision, recall = cascade_of(measure(sample, answers))

    assert precision.value == pytest.approx(0.75)
    assert recall.value == pytest.approx(7.5 / 207.5)
    for figure in (kappa, precision, recall):
        assert figure.low is not None
        assert figure.high is not None
        assert figure.value is not None
        assert figure.low < figure.value < figure.high


def test_kappa_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score  # type: ignore[import-untyped]

    sample = sample_of((40, pairs("f", 4, BETTER)), (90, pairs("p", 6, NO)))
    answers = answers_of(
        f0="yy", f1="yn", f2="ny", f3="yy", p0="yn", p1="nn", p2="nn", p3="ny", p4="nn", p5="nn"
    )
    flags = [1] * 4 + [0] * 6
    weights = [10.0] * 4 + [15.0] * 6
    one, other = ([by[f"person {who}"] for by in answers.values()] for who in (0, 1))

    found = measure(sample, answers)

    people = found.people[0]
    assert people.kind == "cohen"
    assert people.kappa.value == pytest.approx(cohen_kappa_score(one, other, sample_weight=weights))
    assert people.kappa_of_sample == pytest.approx(cohen_kappa_score(one, other))
    # A judge's is with a person picked at random: both people's answers, half a pair each.
    twice = {"sample_weight": [*weights, *weights]}
    expected = cohen_kappa_score([*flags, *flags], [*one, *other], **twice)
    judge = found.judges[0]
    assert judge.kappa.value == pytest.approx(expected)
    assert judge.kappa_of_sample == pytest.approx(
        cohen_kappa_score([*flags, *flags], [*one, *other])
    )


def test_three_people_have_fleiss_kappa() -> None:
    """By hand: couples agree on 1, 1/3, 1 and 1/3 of the pairs; half of all answers are yes."""
    sample = sample_of((4, pairs("p", 4, NO)))

    people = measure(sample, answers_of(p0="yyy", p1="yyn", p2="nnn", p3="nyn")).people[0]

    assert (people.kind, people.n_people, people.n_pairs) == ("fleiss", 3, 4)
    assert people.kappa.value == pytest.approx((2 / 3 - 1 / 2) / (1 - 1 / 2))


def test_pairs_with_one_answer_say_nothing_about_people() -> None:
    sample = sample_of((4, pairs("p", 4, NO)))

    some = measure(sample, answers_of(p0="yyy", p1="yyn", p2="n  ", p3="nyn")).people[0]
    none = measure(sample, answers_of(p0="y", p1="n")).people[0]

    assert some.n_pairs == 3
    assert (none.n_people, none.n_pairs, none.kappa) == (1, 0, Figure())


def test_nothing_found_is_not_nothing_missed() -> None:
    """None of 50 is relevant; of 10,000 that they stand for, many may be."""
    sample = sample_of((100, pairs("f", 30, BETTER)), (10_000, pairs("p", 50, NO)))
    said = {pair.task: "y" if pair.task.startswith("f") else "n" for pair in sample.pairs}

    _, precision, recall = cascade_of(measure(sample, answers_of(**said)))

    assert (precision.value, precision.high, recall.value, recall.high) == (1, 1, 1, 1)
    assert precision.low == pytest.approx(0.92, abs=0.01)  # Jeffreys' interval of 30 of 30
    assert recall.low is not None
    assert recall.low < 0.4


def test_a_tie_is_half_a_vote_and_cannot_tell_is_none() -> None:
    sample = sample_of((4, pairs("f", 4, BETTER)))

    found = measure(sample, answers_of(f0="yn", f1="yy", f2="y?", f3="??"))

    assert cascade_of(found)[1].value == pytest.approx((0.5 + 1 + 1) / 3)
    assert (found.n_tasks, found.n_answered, found.n_cannot_tell) == (4, 3, 3)


def test_each_stage_is_measured_on_what_it_was_asked() -> None:
    sample = sample_of(
        (10, pairs("ff", 2, BETTER, BETTER)),
        (20, pairs("fp", 2, BETTER, NO)),
        (100, pairs("p", 2, NO)),
        (5, pairs("uf", 1, UNDECIDED, BETTER)),
    )
    said = {"ff0": "y", "ff1": "y", "fp0": "y", "fp1": "n", "p0": "y", "p1": "n", "uf0": "y"}

    judges = {judge.stage: judge for judge in measure(sample, answers_of(**said)).judges}

    assert [judges[name].n_pairs for name in judges] == [6, 5, 7]
    assert judges["stage 0"].precision.value == pytest.approx(20 / 30)
    assert judges["stage 0"].recall.value == pytest.approx(20 / 70)
    assert judges["stage 1"].recall.value == pytest.approx(15 / 25)
    assert judges["cascade"].recall.value == pytest.approx(15 / 75)


def test_figures_come_by_subset_and_unanswered_strata_are_named() -> None:
    sample = sample_of(
        (10, pairs("a", 2, BETTER, subset="a")), (10, pairs("b", 2, BETTER, subset="b")),
        (90, pairs("c", 2, NO, subset="b")),
    )  # fmt: skip

    found = measure(sample, answers_of(a0="y", a1="n", b0="n", b1="n"))

    cascades = [judge for judge in found.judges if judge.stage == "cascade"]
    assert [(judge.subset, judge.precision.value) for judge in cascades] == [
        (None, 0.25), ("a", 0.5), ("b", 0.0)
    ]  # fmt: skip
    assert found.unanswered == ["b: passed"]
    assert found.judges[0].kappa.value == pytest.approx(0)  # all flagged: as good as chance


def test_disagreements_are_listed_what_was_missed_first(tmp_path: Path) -> None:
    sample = sample_of((10, pairs("f", 3, BETTER)), (90, pairs("p", 3, NO)))
    answers = answers_of(f0="yyy", f1="nny", f2="yn?", p0="yy?", p1="nnn", p2="ynn")

    found = measure(sample, answers)
    report, table = write_agreement(found, tmp_path)

    assert [(entry.kind, entry.pair.task) for entry in found.disagreements] == [
        ("missed", "p0"), ("wrongly flagged", "f1")
    ]  # fmt: skip
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["p0", "f1"]
    assert rows[0]["answers"] == "person 0: relevant; person 1: relevant; person 2: cannot tell"
    assert rows[0]["verdicts"] == "not-relevant"
    values = json.loads(report.read_text())
    assert values["disagreements"] == {"missed": 1, "wrongly flagged": 1}
    assert values["judges"][0]["recall"]["value"] == found.judges[0].recall.value


def covered(population: Population, n: int, n_simulations: int, n_draws: int) -> dict[str, float]:
    """Return the share of simulations in which each figure's interval holds the truth."""
    truths, hits = population.truths(), Counter[str]()
    for seed in range(n_simulations):
        found = measure(*population.sample(n, seed), n_draws=n_draws)
        figures = {
            f"{judge.stage} {name}": getattr(judge, name)
            for judge in found.judges
            if judge.subset is None
            for name in ("kappa", "precision", "recall")
        }
        figures["people kappa"] = found.people[0].kappa
        for name, truth in truths.items():
            low, high = figures[name].low, figures[name].high
            hits[name] += low is not None and low <= truth <= high
    return {name: hits[name] / n_simulations for name in truths}


def test_intervals_hold_the_truth_in_93_of_100_simulations() -> None:
    """Three people and two judges with known error rates, 24,000 pairs in two subsets."""
    shares = covered(
        Population(TWO_SUBSETS, JUDGES, THREE_PEOPLE), n=300, n_simulations=100, n_draws=400
    )

    assert len(shares) == 10
    assert min(shares.values()) >= 0.93, shares


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "judges", "people", "n"),
    [
        (TWO_SUBSETS, JUDGES, THREE_PEOPLE, 300),
        (TWO_SUBSETS, JUDGES, (Rates(0.92, 0.03), Rates(0.88, 0.05)), 300),
        ({"a": (20_000, 0.05)}, JUDGES, (Rates(0.9, 0.1), Rates(0.8, 0.05)), 300),
        (
            {"a": (20_000, 0.02), "b": (1_000, 0.1), "c": (6_000, 0.05)},
            (Rates(0.95, 0.05), Rates(0.97, 0.01)),
            (Rates(0.98, 0.001), Rates(0.97, 0.001), Rates(0.99, 0.002)),
            300,
        ),
    ],
    ids=["three people", "two people", "poor people", "rare and nearly perfect"],
)
def test_intervals_hold_the_truth_in_many_simulations(
    sizes: dict[str, tuple[int, float]],
    judges: tuple[Rates, Rates],
    people: tuple[Rates, ...],
    n: int,
) -> None:
    shares = covered(Population(sizes, judges, people), n=n, n_simulations=300, n_draws=2000)

    assert min(shares.values()) >= 0.93, shares
