"""Records: the verdicts and calls behind a run, laid out in columns, without any text of the data.

Queries and passages are named by `content_hash`; whoever holds the same texts can join on it. What
judges compared with, the positives, is the one table of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hf_relabel.cache import Call, Failure
from hf_relabel.cascade import Cascade
from hf_relabel.formats import Passage, Row, content_hash
from hf_relabel.policy import open_negatives
from hf_relabel.prompts import Prompt
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Trace, Verdict

__all__ = [
    "CALL_COLUMNS",
    "POSITIVE_COLUMNS",
    "VERDICT_COLUMNS",
    "Recorder",
    "positive_columns",
    "prompts_of",
]

VERDICT_COLUMNS: dict[str, str] = {
    "split": "string",
    "subset": "string",
    "query_id": "string",
    "doc_id": "string",
    "query_sha256": "string",
    "doc_sha256": "string",
    "stage": "int8",
    "stage_name": "string",
    "judge": "string",
    "judge_model": "string",
    "prompt_sha256": "string",
    "verdict": "string",
    "is_final": "bool",
    "rank": "int16",
    "grade": "int8",
    "confidence": "float64",
    "position": "int16",
    "passages_in_call": "int16",
    "error_type": "string",
    "call_id": "string",
}
"""Column → type of the verdicts: one row for each (query, passage) and stage that was asked."""

CALL_COLUMNS: dict[str, str] = {
    "call_id": "string",
    "attempt": "int8",
    "stage": "int8",
    "stage_name": "string",
    "judge_model": "string",
    "model_answered": "string",
    "prompt_sha256": "string",
    "query_sha256": "string",
    "passages_in_call": "int16",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "cached_tokens": "int64",
    "finish_reason": "string",
    "error_type": "string",
    "raw_sha256": "string",
    "latency_ms": "int64",
    "created_at": "timestamp[us, tz=UTC]",
}
"""Column → type of the calls: one row for each attempt, in order; tokens are of the whole call."""

POSITIVE_COLUMNS: dict[str, str] = {"split": "string", "query_hash": "string", "passage": "string"}
"""Column → type of the positives as rows had them: one row for each, its title and text as shown."""

Lookup = Callable[[str], tuple[Call | None, Sequence[Failure]]]
Columns = dict[str, list[Any]]


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Lays out what stages said of rows, and each call behind it once.

    Attributes:
        cascade: Whose stages they are.
        lookup: Call key → the reply kept under it, if any, and the failures before it.
    """

    cascade: Cascade
    lookup: Lookup
    _seen: set[int] = field(default_factory=set)

    def columns(
        self, rows: Sequence[Row], traces: Sequence[Mapping[str, Trace]], *, split: str
    ) -> tuple[Columns, Columns]:
        """Return the columns of verdicts and of the calls that no earlier batch showed.

        Args:
            rows: N rows.
            traces: For each row, what each stage said, by `Passage.key`.
            split: Where the rows come from.
        """
        verdicts: Columns = {name: [] for name in VERDICT_COLUMNS}
        calls: Columns = {name: [] for name in CALL_COLUMNS}
        for row, found in zip(rows, traces, strict=True):
            shown: dict[str, tuple[Call | None, Sequence[Failure]]] = {}
            shared = {
                "split": split,
                "subset": row.subset,
                "query_id": row.query_id,
                "query_sha256": content_hash(row.query),
            }
            for passage in open_negatives(row):
                for stage, verdict in enumerate(trace := found.get(passage.key, ())):
                    if verdict.call is not None and verdict.call not in shown:
                        shown[verdict.call] = self.lookup(verdict.call)
                        self._add_calls(calls, verdict.call, stage, shared, shown[verdict.call])
                    call = shown[verdict.call][0] if verdict.call is not None else None
                    values = self._verdict(stage, verdict, passage, shared["subset"], call)
                    _append(verdicts, {**shared, **values, "is_final": stage == len(trace) - 1})
        return verdicts, calls

    def _verdict(
        self, stage: int, verdict: Verdict, passage: Passage, subset: str | None, call: Call | None
    ) -> dict[str, Any]:
        passages = call.passages if call is not None else ()
        is_decided = verdict.relevance.is_decided
        return {
            **self._stage(stage, subset),
            "doc_id": passage.docid,
            "doc_sha256": passage.key,
            "judge": verdict.judge,
            "verdict": verdict.relevance.value,
            "rank": verdict.rank,
            "grade": verdict.grade,
            "confidence": verdict.confidence,
            "position": passages.index(passage.key) if passage.key in passages else None,
            "passages_in_call": len(passages) or None,
            "error_type": None if is_decided else verdict.reason,
            "call_id": verdict.call,
        }

    def _stage(self, stage: int, subset: str | None) -> dict[str, Any]:
        judge = self.cascade.stages[stage].judge
        prompt_for = getattr(judge, "prompt_for", None)
        prompt = prompt_for(Question(query="", passages=(), subset=subset)) if prompt_for else None
        return {
            "stage": stage,
            "stage_name": self.cascade.stages[stage].title,
            "judge_model": judge.model,
            "prompt_sha256": _sha256(prompt.text) if prompt is not None else None,
        }

    def _add_calls(
        self,
        calls: Columns,
        key: str,
        stage: int,
        shared: Mapping[str, Any],
        found: tuple[Call | None, Sequence[Failure]],
    ) -> None:
        if (short := int(key[:16], 16)) in self._seen:
            return
        self._seen.add(short)
        call, failures = found
        attempts: list[Call | Failure] = [*failures]
        if call is not None:
            attempts.append(call)
        for number, attempt in enumerate(attempts):
            values = {
                **self._stage(stage, shared["subset"]),
                **_reply_values(attempt.reply),
                "call_id": key,
                "attempt": min(number, 127),
                "query_sha256": shared["query_sha256"],
                "passages_in_call": len(call.passages) if call is not None else None,
                "error_type": attempt.reason if isinstance(attempt, Failure) else None,
                "created_at": datetime.fromtimestamp(attempt.time, UTC),
            }
            _append(calls, values)


def positive_columns(rows: Sequence[Row], *, split: str) -> Columns:
    """Return the columns of `POSITIVE_COLUMNS` for some rows."""
    columns: Columns = {name: [] for name in POSITIVE_COLUMNS}
    for row in rows:
        query_hash = content_hash(row.query)
        for passage in row.positives:
            values = {"split": split, "query_hash": query_hash, "passage": passage.shown}
            _append(columns, values)
    return columns


def prompts_of(cascade: Cascade) -> list[dict[str, Any]]:
    """Return the prompts of each stage: stage, subset, name, sha256 and text."""
    found = []
    for index, stage in enumerate(cascade.stages):
        prompts: dict[str | None, Prompt] = {None: getattr(stage.judge, "prompt", None)}  # type: ignore[dict-item]
        prompts.update(getattr(stage.judge, "prompts_by_subset", {}))
        for subset, prompt in prompts.items():
            if isinstance(prompt, Prompt):
                values = {"stage": index, "subset": subset, "name": prompt.name}
                found.append({**values, "sha256": _sha256(prompt.text), "text": prompt.text})
    return found


def _reply_values(reply: Reply | None) -> dict[str, Any]:
    names = ("model_answered", "prompt_tokens", "completion_tokens", "cached_tokens")
    if reply is None:
        return dict.fromkeys((*names, "finish_reason", "raw_sha256", "latency_ms"))
    details = reply.usage.get("prompt_tokens_details") or {}
    return {
        "model_answered": reply.model,
        "prompt_tokens": reply.usage.get("prompt_tokens"),
        "completion_tokens": reply.usage.get("completion_tokens"),
        "cached_tokens": details.get("cached_tokens") if isinstance(details, Mapping) else None,
        "finish_reason": reply.finish_reason,
        "raw_sha256": _sha256(reply.text),
        "latency_ms": round(reply.latency_s * 1000),
    }


def _append(columns: Columns, values: Mapping[str, Any]) -> None:
    for name, column in columns.items():
        column.append(values[name])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
