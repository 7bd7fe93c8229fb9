"""Faults: what a failed call means for its row and for the run.

Three kinds: "retry" may work a moment later, "row" is final for this question, "stop" is final for
every later one too. The table follows what providers send (status, `error.code`), never the words
of the message, except where servers give nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from hf_relabel.errors import AccountError, JudgeError

__all__ = [
    "DROPPABLE",
    "Fault",
    "fault_of_body",
    "fault_of_exception",
    "fault_of_status",
    "retry_after_s",
]

Kind = Literal["retry", "row", "stop"]

DROPPABLE = frozenset(
    {"temperature", "seed", "reasoning_effort", "response_format", "top_p", "prompt_cache_options"}
)
"""Parameters whose absence still leaves a well-formed question; a server's 400 may name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One failed attempt.

    Attributes:
        kind: What it means: "retry", "row" or "stop".
        reason: A short name, as counted in reports.
        message: What the server or the client said.
        retry_after_s: How long the server asked to wait, where it did.
        parameter: The request's parameter that the server does not take, where it named one.
        usage: The tokens that it cost. None where the model never worked; empty where it may have,
            so that the call may be billed.
    """

    kind: Kind
    reason: str
    message: str
    retry_after_s: float | None = None
    parameter: str | None = None
    usage: Mapping[str, Any] | None = None

    def error(self, judge: str) -> JudgeError:
        """Build the exception that ends the row, or the run."""
        if self.kind == "stop":
            advice = _ADVICE.get(self.reason, "Mend it and run the same command again.")
            return AccountError(f"judge {judge!r}: {self.message} {advice}", reason=self.reason)
        return JudgeError(f"judge {judge!r}: {self.message}", reason=self.reason)


_ADVICE = {
    "unauthorized": "Set a valid key (OPENAI_API_KEY) and run again; what was judged is kept.",
    "forbidden": "This key may not use the model; change the key or the model and run again.",
    "unknown_model": "Check the model's name and the server's address, and run again.",
    "quota": "Add credit to the account and run again; what was judged is kept.",
}
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_CONTEXT_CODES = {"context_length_exceeded", "string_above_max_length"}
_FILTER_CODES = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_PARAMETER_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
_RETRIED = {
    408: "timeout",
    409: "conflict",
    429: "rate_limit",
    503: "overloaded",
    529: "overloaded",
}
_STOPPING = {401: "unauthorized", 402: "quota", 403: "forbidden", 404: "unknown_model"}


def fault_of_status(status: int, body: str, headers: Mapping[str, str]) -> Fault:
    """Name the fault of an answer whose HTTP status is not 200.

    Args:
        status: The HTTP status.
        body: The raw body; JSON with an `error` object, as a rule.
        headers: The answer's headers, by lower-case names.
    """
    error = _error_object(body)
    code = str(error.get("code") or error.get("type") or "")
    words = f"HTTP {status}: {error.get('message') or body[:200] or 'no message'}"
    if code in _QUOTA_CODES or error.get("type") in _QUOTA_CODES:
        return Fault(kind="stop", reason="quota", message=words)
    if status in _STOPPING:
        return Fault(kind="stop", reason=_STOPPING[status], message=words)
    if status in _RETRIED or status >= 500:
        reason = _RETRIED.get(status, "server_error")
        return Fault(
            kind="retry", reason=reason, message=words, retry_after_s=retry_after_s(headers)
        )
    return _fault_of_request(code, words, error)


def _fault_of_request(code: str, words: str, error: Mapping[str, Any]) -> Fault:
    lower = words.lower()
    if code in _CONTEXT_CODES or "context length" in lower or "context size" in lower:
        return Fault(kind="row", reason="context_length", message=words)
    if code in _FILTER_CODES or "content_filter" in lower:
        return Fault(kind="row", reason="content_filter", message=words)
    parameter = error.get("param")
    named = str(parameter).split(".")[0] if parameter else None
    reason = "parameter" if code in _PARAMETER_CODES or named else "bad_request"
    return Fault(kind="row", reason=reason, message=words, parameter=named)


def fault_of_body(body: str) -> Fault | dict[str, Any]:
    """Return the JSON object of a 200 answer, or the fault of one that holds no reply."""
    try:
        payload = json.loads(body)
    except ValueError:
        kind = "html" if body.lstrip()[:1] == "<" else "broken_json"
        words = f"expected JSON, found {body[:80]!r}."
        return Fault(kind="retry", reason=kind, message=words, usage={})
    if isinstance(payload, dict):
        choices = payload.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return payload
    words = f"no choices in {body[:200]!r}."
    return Fault(kind="retry", reason="no_choices", message=words, usage={})


def fault_of_exception(error: BaseException, *, is_sent: bool = True) -> Fault:
    """Name the fault of a call that brought no answer at all.

    Args:
        error: What was raised.
        is_sent: Whether the call may have reached the model, and may be billed.
    """
    reason = "timeout" if isinstance(error, (TimeoutError, asyncio.TimeoutError)) else "connection"
    return Fault(
        kind="retry",
        reason=reason,
        message=f"{type(error).__name__}: {error}",
        usage={} if is_sent else None,
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return how long the server asks to wait: `retry-after-ms`, else `retry-after` (s or date)."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    seconds = _number(text)
    return _seconds_until(text) if seconds is None else seconds


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _error_object(body: str) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except ValueError:
        return {}
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    return error if isinstance(error, dict) else {"message": str(error)}
