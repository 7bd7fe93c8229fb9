"""Decisions: one flat row for each (query, negative): who said what, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_relabel.cascade import Cascade
from hf_relabel.formats import Edit, Row, content_hash
from hf_relabel.verdicts import Action, Trace

__all__ = ["COLUMNS", "decision_columns"]

COLUMNS: dict[str, str] = {
    "query_id": "string",
    "query": "string",
    "docid": "string",
    "passage": "string",
    "subset": "string",
    "query_hash": "string",
    "passage_hash": "string",
    "stage": "string",
    "judge": "string",
    "relevance": "string",
    "grade": "int8",
    "confidence": "float32",
    "action": "string",
    "row_dropped": "string",
    "reason": "string",
}
"""Column → type. `row_dropped` is the reason where the whole row left; then `action` is "drop"."""


def decision_columns(
    cascade: Cascade,
    rows: Sequence[Row],
    edits: Sequence[Edit],
    traces: Sequence[Mapping[str, Trace]],
    reasons: Sequence[Mapping[str, str]],
) -> dict[str, list[Any]]:
    """Lay the decisions on some rows out in columns.

    Args:
        cascade: Who judged; names the stages.
        rows: N rows.
        edits: What became of each.
        traces: For each row, what each stage said, by `Passage.key`; nothing for unjudged ones.
        reasons: For each row, the last judge's words, by `Passage.key`.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row, edit, found, words in zip(rows, edits, traces, reasons, strict=True):
        query_hash = content_hash(row.query)
        for passage, action in zip(row.negatives, edit.actions, strict=True):
            values = {
                "query_id": row.query_id,
                "query": row.query,
                "docid": passage.docid,
                "passage": passage.shown,
                "subset": row.subset,
                "query_hash": query_hash,
                "passage_hash": passage.key,
                "action": (Action.DROP if edit.drop_row is not None else action).value,
                "row_dropped": edit.drop_row,
                "reason": words.get(passage.key),
                **_verdict_values(cascade, found.get(passage.key, ())),
            }
            for name, column in columns.items():
                column.append(values[name])
    return columns


def _verdict_values(cascade: Cascade, trace: Trace) -> dict[str, Any]:
    if not trace:
        return dict.fromkeys(("stage", "judge", "relevance", "grade", "confidence"))
    last = trace[-1]
    return {
        "stage": cascade.stages[len(trace) - 1].title,
        "judge": last.judge,
        "relevance": last.relevance.value,
        "grade": last.grade,
        "confidence": last.confidence,
    }
