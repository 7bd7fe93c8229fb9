"""Agreement: how far judges agree with people, and people with each other.

The sample has too many rare verdicts on purpose, so every pair weighs as many pairs of the run as it
stands for, and every figure is one of the whole run. What is estimated, of all the run's pairs:

- kappa of a judge: Cohen's, between the judge's flag and the answer of a person picked at random, so
  that it compares with that between people. Of the pairs that the judge was asked about.
- precision: of the pairs that the judge flags, the share that the majority of people finds relevant.
- recall: of the pairs that the majority finds relevant, the share that the judge flags. The cascade's
  is of all pairs, those that its first stage passed over too; a later stage's, of those it was asked.
- kappa of people: Cohen's for two, Fleiss' for three or more.

A tie is half a vote each way; "Cannot tell" is no answer. Intervals are from a weighted Bayesian
bootstrap within outcomes: random weights for the pairs of each outcome, and two pairs of half
weight, one relevant and one not, added to each. For a single share that is Jeffreys' interval. Plain
resampling would claim certainty where it knows least: if none of 150 passed-over pairs is relevant,
every resample says that nothing was missed.

References:
    Rubin (1981), "The Bayesian bootstrap". Fleiss (1971), "Measuring nominal scale agreement among
    many raters". Brown, Cai, DasGupta (2001), "Interval estimation for a binomial proportion".
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.annotation import Answers, shown, write_table
from hf_relabel.sampling import Pair, Sample
from hf_relabel.verdicts import Relevance

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

__all__ = [
    "Agreement",
    "Disagreement",
    "Figure",
    "JudgeAgreement",
    "PeopleAgreement",
    "measure",
    "write_agreement",
]

CASCADE = "cascade"
_YES_AND_NO = (((1.0, 1.0), 0.5), ((0.0, 0.0), 0.5))
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An estimate with its 95 % interval; all None where there is nothing to estimate from."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAgreement:
    """One judge against people, on one subset or on all.

    Attributes:
        stage: The stage's name, or "cascade" for the last word.
        judge: The judge's name; empty for the cascade.
        subset: The subset; None for all together.
        n_pairs: Answered pairs behind the figures.
        kappa: Cohen's kappa with a person, of all the run's pairs.
        kappa_of_sample: The same of the sample as it was drawn, unweighted: comparable with studies
            that draw as many flagged pairs, and with no other.
        precision: Of what the judge flags.
        recall: Of what is relevant among what it was asked about.
    """

    stage: str
    judge: str
    subset: str | None
    n_pairs: int
    kappa: Figure
    kappa_of_sample: float | None
    precision: Figure
    recall: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleAgreement:
    """People with each other, on one subset or on all.

    Attributes:
        subset: The subset; None for all together.
        n_people: How many answered.
        n_pairs: Pairs with two answers or more.
        kind: "cohen" for two people, "fleiss" for more; empty for one.
        kappa: Of all the run's pairs.
        kappa_of_sample: Of the sample as it was drawn, unweighted.
    """

    subset: str | None
    n_people: int
    n_pairs: int
    kind: str
    kappa: Figure
    kappa_of_sample: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A pair on which the cascade and most people differ.

    Attributes:
        kind: "missed" where people find it relevant and the cascade did not, or "wrongly flagged".
        answers: What each person said.
    """

    kind: str
    pair: Pair
    answers: Mapping[str, bool | None]


@dataclass(slots=True, kw_only=True)
class Agreement:
    """All figures of one sample.

    Attributes:
        n_tasks: Pairs in the sample.
        n_answered: Pairs with a usable answer.
        n_cannot_tell: Answers "Cannot tell".
        n_undecided: Pairs of the run that the cascade left undecided: in no figure.
        judges: One entry for each judge and the cascade, of all pairs and by subset.
        people: Of all pairs and by subset.
        unanswered: Strata of which no pair is answered, as "subset: outcome": in no figure.
        disagreements: What the cascade missed, then what it wrongly flagged.
    """

    n_tasks: int
    n_answered: int
    n_cannot_tell: int
    n_undecided: int
    judges: list[JudgeAgreement] = field(default_factory=list)
    people: list[PeopleAgreement] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the figures, without the disagreements, which hold the data's text."""
        values = asdict(self)
        values["disagreements"] = dict(Counter(found.kind for found in self.disagreements))
        return values


def measure(sample: Sample, answers: Answers, *, seed: int = 0, n_draws: int = 2000) -> Agreement:
    """Compare verdicts with people's answers.

    Args:
        sample: What was drawn, with its verdicts.
        answers: What people said.
        seed: Chooses the bootstrap's draws.
        n_draws: How many there are.
    """
    bootstrap = _Bootstrap(seed=seed, n_draws=n_draws)
    items = _items(sample, answers)
    subsets = sorted({stratum.subset for stratum in sample.strata})
    domains: list[str | None] = [None, *(subsets if len(subsets) > 1 else [])]
    answered = {item.pair.stratum for item in items}
    result = Agreement(
        n_tasks=len(sample.pairs),
        n_answered=len(items),
        n_cannot_tell=sum(said is None for by in answers.values() for said in by.values()),
        n_undecided=sample.n_undecided,
        unanswered=[
            f"{stratum.subset or 'all'}: {stratum.outcome}"
            for stratum in sample.strata
            if (stratum.subset, stratum.outcome) not in answered
        ],
        disagreements=_disagreements(items),
    )
    for domain in domains:
        chosen = [item for item in items if domain is None or item.pair.subset == domain]
        result.people.append(_measure_people(chosen, domain, bootstrap))
        for index, (stage, judge) in enumerate([*sample.stages.items(), (CASCADE, "")]):
            last = index == len(sample.stages)
            found = _measure_judge(chosen, -1 if last else index, bootstrap)
            result.judges.append(JudgeAgreement(stage=stage, judge=judge, subset=domain, **found))
    return result


def write_agreement(found: Agreement, folder: Path) -> tuple[Path, Path]:
    """Write the figures to `agreement.json`, and the pairs to read to `disagreements.csv`.

    Returns:
        The two files.
    """
    report, table = folder / "agreement.json", folder / "disagreements.csv"
    report.write_text(json.dumps(found.to_json(), indent=2) + "\n", "utf-8")
    columns = ("kind", "subset", "query", "positives", "passage", "verdicts", "answers")
    write_table(
        table,
        (*columns, "reason", "query_id", "docid", "task"),
        [_as_cells(disagreement) for disagreement in found.disagreements],
    )
    return report, table


def _as_cells(found: Disagreement) -> dict[str, str]:
    pair = found.pair
    words = {True: "relevant", False: "not relevant", None: "cannot tell"}
    return {
        **shown(pair),
        "kind": found.kind,
        "subset": pair.subset,
        "verdicts": " > ".join(relevance.value for relevance in pair.relevances),
        "answers": "; ".join(f"{who}: {words[said]}" for who, said in found.answers.items()),
        "reason": pair.reason or "",
        "query_id": pair.query_id or "",
        "docid": pair.docid or "",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One answered pair.

    Attributes:
        weight: How many of the run's pairs it stands for.
        said: Annotator → whether it is relevant.
    """

    pair: Pair
    weight: float
    said: Mapping[str, bool]
    answers: Mapping[str, bool | None]

    @property
    def share(self) -> float:
        return sum(self.said.values()) / len(self.said)

    @property
    def majority(self) -> float:
        return 0.5 if self.share == 0.5 else float(self.share > 0.5)


def _items(sample: Sample, answers: Answers) -> list[_Item]:
    said = {
        task: {who: answer for who, answer in by.items() if answer is not None}
        for task, by in answers.items()
    }
    answered = [pair for pair in sample.pairs if said.get(pair.task)]
    n_answered = Counter(pair.stratum for pair in answered)
    sizes = {(stratum.subset, stratum.outcome): stratum.size for stratum in sample.strata}
    return [
        _Item(
            pair=pair,
            weight=sizes[pair.stratum] / n_answered[pair.stratum],
            said=said[pair.task],
            answers=answers[pair.task],
        )
        for pair in answered
    ]


def _measure_judge(items: Sequence[_Item], index: int, bootstrap: _Bootstrap) -> dict[str, Any]:
    """Measure one stage by its place, or the cascade (-1), on the pairs that it gave a verdict on."""
    import numpy as np

    asked = [item for item in items if _verdict(item.pair, index) is not None]
    if not asked:
        none = {"kappa": Figure(), "precision": Figure(), "recall": Figure()}
        return {"n_pairs": 0, "kappa_of_sample": None, **none}
    flags = {item.pair.outcome: _is_flagged(item.pair, index) for item in asked}
    labels = np.array([[item.share, item.majority] for item in asked])
    points, draws = bootstrap.totals(asked, labels, _YES_AND_NO)
    cells = [_cells(totals, flags) for totals in (points, draws)]
    of_sample = _cells(_sums(asked, labels), flags)[..., 0]
    return {
        "n_pairs": len(asked),
        "kappa": _figure(_kappa, *(cell[..., 0] for cell in cells)),
        "kappa_of_sample": _figure(_kappa, of_sample, of_sample).value,
        "precision": _figure(_precision, *(cell[..., 1] for cell in cells)),
        "recall": _figure(_recall, *(cell[..., 1] for cell in cells)),
    }


def _verdict(pair: Pair, index: int) -> Relevance | None:
    """Return what a stage said of a pair; None where it was not asked, or had no answer."""
    if index >= len(pair.relevances):
        return None
    relevance = pair.relevances[index]
    return relevance if relevance.is_decided else None


def _is_flagged(pair: Pair, index: int) -> bool:
    relevance = _verdict(pair, index)
    return relevance is not None and relevance.is_relevant


Totals = dict[str, "tuple[float, Floats]"]
"""Outcome → how many pairs it holds (a scalar), and totals of each statistic over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bootstrap:
    """Draws of what might be true of a run, given a sample of it.

    Attributes:
        seed: Chooses the draws.
        n_draws: How many there are.
    """

    seed: int
    n_draws: int

    def totals(
        self,
        items: Sequence[_Item],
        statistics: Floats,
        made_up: Sequence[tuple[Sequence[float], float]],
    ) -> tuple[Totals, Totals]:
        """Estimate the totals of some statistics over all pairs of each outcome.

        Args:
            items: N answered pairs.
            statistics: [N, K] what is summed.
            made_up: Pairs that every outcome gets in a draw: their K statistics, and how many.

        Returns:
            The totals themselves, of shape [K], and draws of them, of shape [D, K].
        """
        import numpy as np

        points: Totals = {}
        draws: Totals = {}
        added = [list(values) for values, _ in made_up]
        counts = [count for _, count in made_up]
        for outcome, rows in _by_outcome(items).items():
            weights = np.array([items[row].weight for row in rows])
            size = float(weights.sum())
            points[outcome] = size, weights @ statistics[rows]
            shares = self._shares(outcome, weights, counts)
            draws[outcome] = size, size * (shares @ np.vstack([statistics[rows], added]))
        return points, draws

    def _shares(self, outcome: str, weights: Floats, counts: Sequence[float]) -> Floats:
        """Draw how much of an outcome each of its pairs, and each made-up one, stands for."""
        import numpy as np

        # As many pairs as these weights are worth (Kish), not as many as there are.
        worth = weights * weights.sum() / (weights @ weights)
        shape = np.concatenate([worth, counts])
        generator = _generator(self.seed, outcome)
        drawn = generator.standard_gamma(shape, size=(self.n_draws, len(shape)))
        shares: Floats = drawn / drawn.sum(axis=1, keepdims=True)
        return shares


def _sums(items: Sequence[_Item], statistics: Floats) -> Totals:
    """Return the totals of the sample itself, every pair counting one."""
    found: Totals = {}
    for outcome, rows in _by_outcome(items).items():
        found[outcome] = float(len(rows)), statistics[rows].sum(axis=0)
    return found


def _by_outcome(items: Sequence[_Item]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault(item.pair.outcome, []).append(place)
    return found


def _generator(seed: int, name: str) -> np.random.Generator:
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16)
    return np.random.default_rng(int.from_bytes(digest.digest(), "big"))


def _cells(totals: Totals, flags: Mapping[str, bool]) -> Floats:
    """Return [4, …, K] totals: flagged and relevant, flagged and not, passed and relevant, passed."""
    import numpy as np

    shape = next(iter(totals.values()))[1].shape
    cells = np.zeros((4, *shape))
    for outcome, (size, relevant) in totals.items():
        first = 0 if flags[outcome] else 2
        cells[first] += relevant
        cells[first + 1] += size - relevant
    return cells


def _kappa(cells: Floats) -> Floats:
    both, only_judge, only_people, neither = cells / cells.sum(axis=0)
    judge, people = both + only_judge, both + only_people
    return _beyond_chance(both + neither, judge * people + (1 - judge) * (1 - people))


def _beyond_chance(agreed: Floats, by_chance: Floats) -> Floats:
    """Return kappa; not a number where chance alone agrees on everything."""
    import numpy as np

    left = 1 - by_chance
    return np.where(left > _TINY, (agreed - by_chance) / np.where(left > _TINY, left, 1), np.nan)


def _precision(cells: Floats) -> Floats:
    return _ratio(cells[0], cells[0] + cells[1])


def _recall(cells: Floats) -> Floats:
    return _ratio(cells[0], cells[0] + cells[2])


def _ratio(part: Floats, whole: Floats) -> Floats:
    import numpy as np

    shares = part / np.where(whole > _TINY, whole, 1)
    return np.where(whole > _TINY, np.minimum(shares, 1.0), np.nan)  # sums of weights round


def _figure(of: Callable[[Floats], Floats], point: Floats, draws: Floats) -> Figure:
    import numpy as np

    value, drawn = float(of(point)), np.atleast_1d(of(draws))
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not drawn.size:
        return Figure()
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    # The draws of a share of 0 or 1 come close to it and never reach it.
    return Figure(value=value, low=min(low, value), high=max(high, value))


def _measure_people(
    items: Sequence[_Item], domain: str | None, bootstrap: _Bootstrap
) -> PeopleAgreement:
    import numpy as np

    people = sorted({who for item in items for who in item.said})
    shared = _reweighted([item for item in items if len(item.said) > 1], items)
    if not shared:
        return PeopleAgreement(
            subset=domain, n_people=len(people), n_pairs=0, kind="", kappa=Figure(),
            kappa_of_sample=None,
        )  # fmt: skip
    is_two = len(people) == 2
    statistics = np.array([_of_two(item, people) if is_two else _of_many(item) for item in shared])
    of = _cohen if is_two else _fleiss
    made_up = _MADE_UP_TWO if is_two else _MADE_UP_MANY
    points, draws = bootstrap.totals(shared, statistics, made_up)
    of_sample = _shares(_sums(shared, statistics))
    return PeopleAgreement(
        subset=domain,
        n_people=len(people),
        n_pairs=len(shared),
        kind="cohen" if is_two else "fleiss",
        kappa=_figure(of, _shares(points), _shares(draws)),
        kappa_of_sample=_figure(of, of_sample, of_sample).value,
    )


def _reweighted(chosen: Sequence[_Item], items: Sequence[_Item]) -> list[_Item]:
    """Let some of the answered pairs stand for all of their stratum."""
    n_items, n_chosen = (Counter(item.pair.stratum for item in some) for some in (items, chosen))
    return [
        replace(item, weight=item.weight * n_items[stratum] / n_chosen[stratum])
        for item in chosen
        for stratum in [item.pair.stratum]
    ]


# Of all ways to answer, half a pair each: all say yes, all say no, they differ. With a third each,
# kappa of two people was in 93, 96 and 92 of 100 intervals in three simulations; so in 94 to 96.
_MADE_UP_TWO = (((1.0, 1.0, 1.0), 0.5), ((0.0, 0.0, 0.0), 0.5), ((0.5, 0.5, 0.0), 0.5))
_MADE_UP_MANY = (((1.0, 1.0), 0.5), ((1.0, 0.0), 0.5), ((0.0, 0.5), 0.5))


def _of_two(item: _Item, people: Sequence[str]) -> tuple[float, float, float]:
    """Return what each of two people said, and whether both said yes."""
    one, other = (float(item.said[who]) for who in people)
    return one, other, one * other


def _of_many(item: _Item) -> tuple[float, float]:
    """Return the share of agreeing couples among those who answered, and the share of yes."""
    n, n_yes = len(item.said), sum(item.said.values())
    n_agreeing = n_yes * (n_yes - 1) + (n - n_yes) * (n - n_yes - 1)
    return n_agreeing / (n * (n - 1)), n_yes / n


def _shares(totals: Totals) -> Floats:
    """Return [K, …] means of the statistics over all outcomes."""
    import numpy as np

    size = sum(size for size, _ in totals.values())
    return np.moveaxis(np.asarray(sum(total for _, total in totals.values()) / size), -1, 0)


def _cohen(shares: Floats) -> Floats:
    one, other, both = shares
    agreed = 1 - one - other + 2 * both
    return _beyond_chance(agreed, one * other + (1 - one) * (1 - other))


def _fleiss(shares: Floats) -> Floats:
    agreed, yes = shares
    return _beyond_chance(agreed, yes**2 + (1 - yes) ** 2)


def _disagreements(items: Sequence[_Item]) -> list[Disagreement]:
    """List the pairs on which the cascade and most people differ: missed first, then by weight."""
    found = []
    for item in items:
        is_flagged = _is_flagged(item.pair, -1)
        if item.majority == (0.0 if is_flagged else 1.0):
            kind = "wrongly flagged" if is_flagged else "missed"
            found.append((kind, -item.weight, item))
    found.sort(key=lambda entry: entry[:2])
    return [Disagreement(kind=k, pair=item.pair, answers=item.answers) for k, _, item in found]
