"""Report: what to keep, and why, as a table and as JSON; no time and no path is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_relabel.prune.effects import Effect, Effects

__all__ = ["PruneReport", "Round"]

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One leave-one-out.

    Attributes:
        removed: The subsets that had been removed before, in order; none in the first round.
        counts: Subset → rows, of those that were there.
        effects: What leaving out each of them does.
    """

    removed: tuple[str, ...]
    counts: Mapping[str, int]
    effects: Effects

    @property
    def n_rows(self) -> int:
        return sum(self.counts.values())

    def header(self) -> tuple[str, ...]:
        """Return the columns' names."""
        n_sets = len(self.effects.benchmarks)
        average = f"avg{n_sets}" if n_sets > 1 else self.effects.benchmarks[0]
        return ("left out", "pairs left", average, "change", "p", "sets up/down", "verdict")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table's lines: nothing left out, then by score, what is dropped first."""
        found = self.effects
        spread = "" if found.noise is None else f"± {found.noise:.4f}"
        first = ("nothing", _count(self.n_rows), f"{found.mean:.3f}", spread, "", "", "")
        ordered = sorted(found.effects, key=lambda effect: not effect.is_marked)
        return [first, *(self._line(effect) for effect in ordered)]

    def _line(self, effect: Effect) -> tuple[str, ...]:
        return (
            effect.subset,
            _count(self.n_rows - self.counts[effect.subset]),
            f"{effect.mean:.3f}",
            f"{effect.gain:+.4f}",
            "?" if effect.p_value is None else _probability(effect.p_value),
            f"{effect.n_up}/{effect.n_down}",
            "drop" if effect.is_marked else "keep",
        )

    def notes(self) -> list[str]:
        """Say how the table came about."""
        found = self.effects
        seeds = ", ".join(f"{score:.4f}" for score in found.baseline.values())
        n_seeds = len(found.baseline)
        notes = [f"Nothing left out, by seed: {seeds}."]
        if found.noise is None:
            notes.append(f"Nothing can be marked: {found.why_no_noise}. {_more_seeds(n_seeds)}")
            return notes
        notes.append(
            f"Noise: one run's score has a standard deviation of {found.noise:.4f} over {n_seeds} "
            f"seeds ({found.n_freedom} degrees of freedom). A subset is marked `drop` where "
            f"leaving it out gains {found.min_gain:g} or more and p (one-sided, paired by seed, "
            f"Bonferroni for {len(found.effects)} subsets) is below {found.alpha:g}."
        )
        return notes

    def to_json(self) -> dict[str, Any]:
        found = self.effects
        return {
            "removed_before": list(self.removed),
            "rows": dict(self.counts),
            "baseline": {
                "mean": found.mean,
                "by_seed": {str(seed): score for seed, score in found.baseline.items()},
            },
            "benchmarks": list(found.benchmarks),
            "noise": found.noise,
            "degrees_of_freedom": found.n_freedom,
            "why_nothing_can_be_marked": found.why_no_noise or None,
            "left_out": [_effect_json(effect) for effect in found.effects],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What a sweep came to.

    Attributes:
        rounds: One; when greedy, one for each removal, and the last that marked none.
        keep: The subsets to train on, by name.
        drop: The others, the worst (when greedy, the first removed) first.
        is_tested: Whether training on just `keep` was a run of the sweep.
    """

    rounds: tuple[Round, ...]
    keep: tuple[str, ...]
    drop: tuple[str, ...]
    is_tested: bool

    def verdict(self) -> str:
        """Say what to do, in a sentence or two."""
        if not self.drop:
            return f"Keep all {len(self.keep)} subsets: none does harm beyond noise."
        text = f"Drop {', '.join(self.drop)}; keep {', '.join(self.keep)}."
        if not self.is_tested:
            text += (
                " Each was left out alone: no run left out all of them together. A greedy sweep "
                "does, one after the other."
            )
        return text

    def table(self) -> str:
        """Return all rounds as Markdown."""
        parts = []
        for number, round_ in enumerate(self.rounds, start=1):
            if len(self.rounds) > 1:
                before = f", without {', '.join(round_.removed)}" if round_.removed else ""
                parts.append(f"Round {number}{before}\n")
            parts.append(_markdown(round_.header(), round_.cells()))
            parts += [f"\n{note}" for note in round_.notes()]
            parts.append("")
        parts.append(self.verdict())
        return "\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        found = self.rounds[0].effects
        return {
            "keep": list(self.keep),
            "drop": list(self.drop),
            "is_tested_together": self.is_tested,
            "method": {
                "noise": "residual of score ~ arm + seed, pooled over arms",
                "test": "one-sided t of the gain paired by seed, Bonferroni over subsets",
                "alpha": found.alpha,
                "min_gain": found.min_gain,
                "seeds": list(found.baseline),
            },
            "rounds": [round_.to_json() for round_ in self.rounds],
        }


def _effect_json(effect: Effect) -> dict[str, Any]:
    values = asdict(effect)
    values["stands_out"] = sorted(effect.stands_out)
    return {**values, "n_up": effect.n_up, "n_down": effect.n_down}


def _more_seeds(n_seeds: int) -> str:
    if n_seeds == 1:
        return "Train with more seeds (three or more); the runs that are done count."
    return "See that the training uses its seed: for shuffling, for what starts at random."


def _count(n_rows: int) -> str:
    return f"{n_rows / _MILLION:.2f}M" if n_rows >= _MILLION else f"{n_rows:,}"


def _probability(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
