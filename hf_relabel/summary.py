"""Summary: what a run did to each split and subset, for tables and plots; counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_relabel.cascade import Cascade
from hf_relabel.formats import Edit, Row
from hf_relabel.verdicts import Action, Trace

__all__ = ["StageFlow", "SubsetSummary", "Summary"]

_MAX_BIN = 30
"""Histograms end here: the last bin holds all that is above."""


@dataclass(slots=True, kw_only=True)
class StageFlow:
    """What one stage saw of one subset, in rows and passages."""

    rows_asked: int = 0
    rows_flagged: int = 0
    passages_asked: int = 0
    better: int = 0
    worse: int = 0
    undecided: int = 0


@dataclass(slots=True, kw_only=True)
class SubsetSummary:
    """One subset of one split, before and after; `queries` counts rows by query.

    Attributes:
        false_per_row: False negatives in a row → rows, for rows that a judge saw.
        false_at: Place in the row's list of negatives, from 0 → false negatives found there.
        seen_at: Likewise → negatives that have a verdict.
        stages: One count for each stage.
    """

    split: str
    subset: str | None
    queries: int = 0
    queries_after: int = 0
    positives: int = 0
    positives_after: int = 0
    negatives: int = 0
    negatives_after: int = 0
    promoted: int = 0
    dropped: int = 0
    undecided: int = 0
    false_per_row: dict[int, int] = field(default_factory=dict)
    false_at: dict[int, int] = field(default_factory=dict)
    seen_at: dict[int, int] = field(default_factory=dict)
    stages: list[StageFlow] = field(default_factory=list)


class Summary:
    """Counts rows by split and subset.

    Args:
        cascade: Whose stages are counted.
    """

    def __init__(self, cascade: Cascade) -> None:
        self._cascade = cascade
        self._parts: dict[tuple[str, str | None], SubsetSummary] = {}

    def add(self, split: str, row: Row, edit: Edit, traces: Mapping[str, Trace]) -> None:
        """Count one row.

        Args:
            split: Where it comes from.
            row: The row as its format read it.
            edit: What became of it.
            traces: What each stage said, by `Passage.key`.
        """
        part = self._part(split, row.subset)
        part.queries += 1
        part.positives += len(row.positives)
        part.negatives += len(row.negatives)
        if edit.drop_row is None:
            part.queries_after += 1
            part.promoted += len(edit.promoted)
            part.positives_after += len(row.positives) + len(edit.promoted)
            kept = edit.actions.count(Action.KEEP)
            part.negatives_after += kept
            part.dropped += len(row.negatives) - kept - len(edit.promoted)
        else:
            part.dropped += len(row.negatives)
        self._count_verdicts(part, row, traces)

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object for each split and subset, in order of name."""
        keys = sorted(self._parts, key=lambda key: (key[0], key[1] or ""))
        return [asdict(self._parts[key]) for key in keys]

    def _part(self, split: str, subset: str | None) -> SubsetSummary:
        key = (split, subset)
        if key not in self._parts:
            stages = [StageFlow() for _ in self._cascade.stages]
            self._parts[key] = SubsetSummary(split=split, subset=subset, stages=stages)
        return self._parts[key]

    def _count_verdicts(self, part: SubsetSummary, row: Row, traces: Mapping[str, Trace]) -> None:
        if not traces:
            return
        n_false = 0
        for place, passage in enumerate(row.negatives):
            trace = traces.get(passage.key)
            if trace is None:
                continue
            is_false = trace[-1].relevance.is_relevant
            n_false += is_false
            part.undecided += not trace[-1].relevance.is_decided
            _bump(part.seen_at, place)
            if is_false:
                _bump(part.false_at, place)
        _bump(part.false_per_row, n_false)
        for index, stage in enumerate(part.stages):
            found = Counter(t[index].relevance.value for t in traces.values() if len(t) > index)
            if not found:
                break
            stage.rows_asked += 1
            stage.rows_flagged += found["better"] + found["worse"] > 0
            stage.passages_asked += found.total()
            stage.better += found["better"]
            stage.worse += found["worse"]
            stage.undecided += found["undecided"]


def _bump(histogram: dict[int, int], value: int) -> None:
    key = min(value, _MAX_BIN)
    histogram[key] = histogram.get(key, 0) + 1
