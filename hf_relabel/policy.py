"""Policy: from verdicts to actions. No I/O: pure, free, and replayable with other settings.

A verdict says what a judge thinks; an action says what becomes of the negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hf_relabel.errors import SettingError
from hf_relabel.formats import Edit, Passage, Row
from hf_relabel.verdicts import Action, Relevance, Verdict

__all__ = ["Policy", "open_negatives"]

ActionName = Literal["promote", "drop", "remove_row", "keep"]
RELEVANT = (Relevance.BETTER, Relevance.WORSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What becomes of false negatives.

    Attributes:
        action: "promote" makes them positives (the paper's RLHN), "drop" takes them out (HN
            remove), "remove_row" takes out the whole row; or one of "promote", "drop", "keep" for
            each relevance: `{"better": "promote", "worse": "drop"}`.
        count: Which relevances make a false negative: "better" or "better+worse".
        max_false_negatives: Rows with more false negatives than this are dropped: a count, or a
            share of the row's negatives when it is a float in (0, 1]; None drops none. 7 is the
            paper's rule.
        skip_subsets: Subsets that pass through unjudged, in any case of letters. ArguAna's task is
            to find counter-arguments, where the judge's question makes no sense.
        min_negatives: A row that loses negatives and keeps fewer than this is dropped. Formats that
            refill a freed slot, or hold one passage a row, never run out.

    References:
        Thakur et al. (2025), arXiv:2505.16967, sections 3 and 4. One action per relevance: Choi et
        al. (2026), arXiv:2604.11092.
    """

    action: ActionName | Mapping[str, ActionName] = "promote"
    count: Literal["better", "better+worse"] = "better+worse"
    max_false_negatives: int | float | None = 7
    skip_subsets: frozenset[str] = field(default_factory=lambda: frozenset({"arguana"}))
    min_negatives: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.action, Mapping):
            for relevance, action in self.action.items():
                _expect("action's relevance", relevance, {"better", "worse"})
                _expect("action", action, {"promote", "drop", "keep"})
            object.__setattr__(self, "action", dict(sorted(self.action.items())))
        else:
            _expect("action", self.action, {"promote", "drop", "remove_row"})
        _expect("count", self.count, {"better", "better+worse"})
        self._check_limits()
        if isinstance(self.skip_subsets, str):  # a set of its letters otherwise
            raise SettingError(
                f"expected skip_subsets to be a set of names, found {self.skip_subsets!r}. "
                f"Write {{{self.skip_subsets!r}}}."
            )
        skipped = frozenset(name.lower() for name in self.skip_subsets)
        object.__setattr__(self, "skip_subsets", skipped)

    def _check_limits(self) -> None:
        limit = self.max_false_negatives
        is_share = isinstance(limit, float)
        if limit is not None and not (0 < limit <= 1 if is_share else limit >= 0):
            raise SettingError(
                "expected max_false_negatives to be a count of 0 or more, a share in (0, 1], or "
                f"None, found {limit!r}."
            )
        if self.min_negatives < 0:
            raise SettingError(f"expected min_negatives of 0 or more, found {self.min_negatives}.")

    def skips(self, row: Row) -> bool:
        """Whether a row passes through unjudged, for its subset's sake."""
        return row.subset is not None and row.subset.lower() in self.skip_subsets

    def action_on(self, relevance: Relevance) -> Action:
        """Return what becomes of a negative of this relevance, as long as its row stays."""
        if not relevance.is_relevant:
            return Action.KEEP
        if isinstance(self.action, Mapping):
            return Action(self.action.get(relevance.value, "keep"))
        if relevance is Relevance.WORSE and self.count == "better":
            return Action.KEEP
        return Action.DROP if self.action == "remove_row" else Action(self.action)

    def edit(self, row: Row, verdicts: Mapping[str, Verdict], *, can_run_out: bool = True) -> Edit:
        """Decide on every negative of a row.

        Args:
            row: The row, as its format read it.
            verdicts: Final verdicts by `Passage.key`; a negative without one is kept.
            can_run_out: Whether dropping leaves the row with fewer negatives: not in formats that
                refill freed slots.

        Returns:
            The edit. A negative whose text equals a positive's is dropped without a verdict; of
            several false negatives with one text, the first is promoted and the others dropped.
        """
        if self.skips(row) or not self._touches(row, verdicts):
            return Edit(actions=(Action.KEEP,) * len(row.negatives))
        actions = self._actions(row, verdicts)
        promoted = _promotion_order(row, actions, verdicts)
        reason = self._drop_reason(row, actions, verdicts, can_run_out=can_run_out)
        return Edit(actions=actions, promoted=promoted, drop_row=reason)

    def _touches(self, row: Row, verdicts: Mapping[str, Verdict]) -> bool:
        """Whether anything becomes of a row's negatives; most rows stay as they are."""
        positives = {passage.key for passage in row.positives}
        if not positives.isdisjoint([passage.key for passage in row.negatives]):
            return True
        relevances = {verdict.relevance for verdict in verdicts.values()}
        return any(self.action_on(relevance) is not Action.KEEP for relevance in relevances)

    def _actions(self, row: Row, verdicts: Mapping[str, Verdict]) -> tuple[Action, ...]:
        positives = {passage.key for passage in row.positives}
        promoted: set[str] = set()
        actions = []
        for passage in row.negatives:
            action = self._action(passage, positives, verdicts)
            if action is Action.PROMOTE and passage.key in promoted:
                action = Action.DROP
            elif action is Action.PROMOTE:
                promoted.add(passage.key)
            actions.append(action)
        return tuple(actions)

    def _action(
        self, passage: Passage, positives: set[str], verdicts: Mapping[str, Verdict]
    ) -> Action:
        if passage.key in positives:
            return Action.DROP
        verdict = verdicts.get(passage.key)
        return Action.KEEP if verdict is None else self.action_on(verdict.relevance)

    def _drop_reason(
        self,
        row: Row,
        actions: tuple[Action, ...],
        verdicts: Mapping[str, Verdict],
        *,
        can_run_out: bool,
    ) -> str | None:
        n_false = self._count_false(row, verdicts)
        if n_false and self.action == "remove_row":
            return "false_negative"
        if self.is_over_limit(n_false, len(row.negatives)):
            return "too_many_false_negatives"
        n_kept = actions.count(Action.KEEP)
        if can_run_out and n_kept < min(self.min_negatives, len(actions)):
            return "too_few_negatives"
        return None

    def _count_false(self, row: Row, verdicts: Mapping[str, Verdict]) -> int:
        keys = {passage.key for passage in open_negatives(row)}
        found = [verdicts[key].relevance for key in keys if key in verdicts]
        return sum(1 for relevance in found if self.action_on(relevance) is not Action.KEEP)

    def is_over_limit(self, n_false: int, n_negatives: int) -> bool:
        """Whether a row with so many false ones among its negatives is dropped."""
        limit = self.max_false_negatives
        if limit is None:
            return False
        # A quotient is rounded as the share's literal is; 0.29 * 100 is less than 29.
        return (n_false / max(n_negatives, 1) if isinstance(limit, float) else n_false) > limit


def open_negatives(row: Row) -> list[Passage]:
    """Return the passages of a row that a judge must see: each text once, no known positive."""
    seen = {passage.key for passage in row.positives}
    found = []
    for passage in row.negatives:
        key = passage.key
        if key not in seen:
            seen.add(key)
            found.append(passage)
    return found


def _promotion_order(
    row: Row, actions: tuple[Action, ...], verdicts: Mapping[str, Verdict]
) -> tuple[int, ...]:
    """Order promoted negatives as the judge did: better before worse, then by rank and place."""

    def place(index: int) -> tuple[int, float, int]:
        verdict = verdicts[row.negatives[index].key]
        rank = float("inf") if verdict.rank is None else verdict.rank
        return RELEVANT.index(verdict.relevance), rank, index

    indices = [index for index, action in enumerate(actions) if action is Action.PROMOTE]
    return tuple(sorted(indices, key=place))


def _expect(setting: str, found: object, allowed: set[str]) -> None:
    if found not in allowed:
        raise SettingError(f"expected {setting} to be one of {sorted(allowed)}, found {found!r}.")
