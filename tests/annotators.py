"""Simulated runs and people: error rates are known, so the truth of every figure is too.

A population of pairs has a hidden truth; judges flag with known rates, people answer with known
rates. The truth of a figure is its value over the whole population, with each person's answer at its
expectation: what a study that asked everybody about everything, again and again, would find.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from hf_relabel.annotation import Answers
from hf_relabel.sampling import Pair, Sample, Stratum, choose, outcome_of
from hf_relabel.verdicts import Relevance

__all__ = ["Population", "Rates"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rates:
    """How often a judge or a person calls relevant what is, and what is not."""

    of_relevant: float
    of_others: float

    def chances(self, truth: Bools) -> Floats:
        return np.where(truth, self.of_relevant, self.of_others)


class Population:
    """All pairs of a run: two subsets, a cheap judge on all, a strong one on what it flagged."""

    def __init__(
        self,
        sizes: dict[str, tuple[int, float]],
        judges: tuple[Rates, Rates],
        people: tuple[Rates, ...],
        *,
        seed: int = 0,
    ) -> None:
        draw = np.random.default_rng(seed)
        self.subsets = np.repeat(list(sizes), [size for size, _ in sizes.values()])
        self.truth = np.concatenate(
            [draw.random(size) < prevalence for size, prevalence in sizes.values()]
        )
        self.people = people
        self.cheap = draw.random(len(self.truth)) < judges[0].chances(self.truth)
        self.strong = self.cheap & (draw.random(len(self.truth)) < judges[1].chances(self.truth))
        self._strata = self._stratified()

    def relevances(self, place: int) -> tuple[Relevance, ...]:
        if not self.cheap[place]:
            return (Relevance.NOT_RELEVANT,)
        last = Relevance.BETTER if self.strong[place] else Relevance.NOT_RELEVANT
        return (Relevance.WORSE, last)

    def _stratified(self) -> dict[tuple[str, str], npt.NDArray[np.uint64]]:
        found: dict[tuple[str, str], list[int]] = {}
        for place, subset in enumerate(self.subsets):
            key = str(subset), outcome_of(self.relevances(place))
            found.setdefault(key, []).append(place)
        return {key: np.array(ids, dtype=np.uint64) for key, ids in sorted(found.items())}

    def sample(self, n: int, seed: int) -> tuple[Sample, Answers]:
        """Draw a sample, and ask people about it."""
        chosen = choose(self._strata, n, seed=seed)
        places = [int(place) for ids in chosen.values() for place in ids]
        draw = np.random.default_rng([seed, 1])
        pairs = tuple(
            Pair(
                task=f"t-{place}",
                query="q",
                positives=("p",),
                passage=f"passage {place}",
                subset=str(self.subsets[place]),
                relevances=self.relevances(place),
            )
            for place in places
        )
        answers: Answers = {
            pair.task: {
                f"person {number}": bool(draw.random() < rates.chances(self.truth[place]))
                for number, rates in enumerate(self.people)
            }
            for pair, place in zip(pairs, places, strict=True)
        }
        strata = tuple(
            Stratum(subset=subset, outcome=outcome, size=len(ids), drawn=len(chosen[key]))
            for key, ids in self._strata.items()
            for subset, outcome in [key]
        )
        stages = {"cheap": "judge 1", "strong": "judge 2"}
        return Sample(seed=seed, stages=stages, strata=strata, pairs=pairs), answers

    def truths(self) -> dict[str, float]:
        """Return the true value of every figure."""
        share, majority = self._expected()
        found = {}
        for name, flags, asked in (
            ("cheap", self.cheap, np.ones_like(self.cheap)),
            ("strong", self.strong, self.cheap),
            ("cascade", self.strong, np.ones_like(self.cheap)),
        ):
            judge, by_one, by_most = flags[asked], share[asked], majority[asked]
            agreed = np.where(judge, by_one, 1 - by_one).mean()
            chance = judge.mean() * by_one.mean() + (1 - judge.mean()) * (1 - by_one.mean())
            found[f"{name} kappa"] = (agreed - chance) / (1 - chance)
            found[f"{name} precision"] = by_most[judge].mean()
            found[f"{name} recall"] = by_most[judge].sum() / by_most.sum()
        found["people kappa"] = self._kappa_of_people()
        return {name: float(value) for name, value in found.items()}

    def _expected(self) -> tuple[Floats, Floats]:
        """Return each pair's expected share of yes, and expected majority (a tie is a half)."""
        chances = np.array([rates.chances(self.truth) for rates in self.people])
        majority = np.zeros(len(self.truth))
        for votes in product((0, 1), repeat=len(self.people)):
            chance = np.prod(
                [p if vote else 1 - p for p, vote in zip(chances, votes, strict=True)], axis=0
            )
            mean = sum(votes) / len(votes)
            majority += chance * (0.5 if mean == 0.5 else mean > 0.5)
        return chances.mean(axis=0), majority

    def _kappa_of_people(self) -> float:
        chances = np.array([rates.chances(self.truth) for rates in self.people])
        couples = [(i, j) for i in range(len(chances)) for j in range(i)]
        agreed = np.mean(
            [(chances[i] * chances[j] + (1 - chances[i]) * (1 - chances[j])).mean()
             for i, j in couples]
        )  # fmt: skip
        means = chances.mean(axis=1)
        if len(means) == 2:
            chance = means[0] * means[1] + (1 - means[0]) * (1 - means[1])
        else:
            chance = means.mean() ** 2 + (1 - means.mean()) ** 2
        return float((agreed - chance) / (1 - chance))
