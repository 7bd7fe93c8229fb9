"""Batch files: the JSONL lines that a Batch API takes, and those that it gives back.

Lines in, values out; nothing here opens a file or a socket. `vllm run-batch` takes and gives the
same lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_relabel.judges.faults import Fault, fault_of_status
from hf_relabel.questions import Reply

__all__ = ["CHAT_URL", "Outcome", "base_key", "outcome_of_line", "request_id", "request_line"]

CHAT_URL = "/v1/chat/completions"
_REPAIR = "-repair"
# Requests that a batch did not get to: nothing was paid, and nothing is wrong with them.
_NOT_REACHED = frozenset({"batch_expired", "batch_cancelled"})
# The model was at work when they ended: they may be billed.
_CUT_OFF = frozenset({"request_timeout", "timeout"})
_FINAL = frozenset({"context_length", "content_filter", "quota"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request: a reply or a fault.

    Attributes:
        custom_id: The request's.
        reply: What the model said; its `usage` is marked `"processing": "batch"`.
        fault: Why there is none.
    """

    custom_id: str
    reply: Reply | None = None
    fault: Fault | None = None

    @property
    def usage(self) -> Mapping[str, Any] | None:
        """The tokens that it cost: None where the model never worked, empty where nobody says."""
        if self.reply is not None:
            return self.reply.usage
        return None if self.fault is None else self.fault.usage


def request_id(key: str, *, is_repair: bool = False) -> str:
    """Return the `custom_id` of a call: its cache key, so that a line finds its row by itself."""
    return key + _REPAIR if is_repair else key


def base_key(custom_id: str) -> str:
    """Return the cache key that a `custom_id` belongs to."""
    return custom_id.removesuffix(_REPAIR)


def request_line(custom_id: str, body: Mapping[str, Any], *, url: str = CHAT_URL) -> bytes:
    """Write one request as a line, its end included."""
    values = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    text = json.dumps(values, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half an emoji, cut by whoever made the dataset
        return json.dumps(values).encode() + b"\n"


def outcome_of_line(line: str | bytes) -> Outcome | None:
    """Read one line of an output or error file; None for a line that names no request."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("custom_id"), str):
        return None
    found = _reply_or_fault(values)
    if isinstance(found, Reply):
        return Outcome(custom_id=values["custom_id"], reply=found)
    return Outcome(custom_id=values["custom_id"], fault=found)


def _reply_or_fault(values: Mapping[str, Any]) -> Reply | Fault:
    response = values.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    status = response.get("status_code") if isinstance(response, dict) else None
    found = _read(values, status, body)
    if isinstance(found, Fault) and (usage := _usage(body)):  # it failed, and was charged for
        return replace(found, usage=usage)
    return found


def _read(values: Mapping[str, Any], status: object, body: object) -> Reply | Fault:
    if isinstance(status, int) and status != 200:
        # vLLM leaves the body out and puts the words beside the response.
        return fault_of_status(status, json.dumps(body or {"error": values.get("error")}), {})
    if error := values.get("error"):
        return _fault_of_error(error if isinstance(error, dict) else {"message": str(error)})
    return _reply_of_body(body)


def _fault_of_error(error: Mapping[str, Any]) -> Fault:
    code = str(error.get("code") or "")
    message = str(error.get("message") or code or "no message")
    if code in _NOT_REACHED:
        return Fault(kind="retry", reason=code, message=message)
    if code in _CUT_OFF:
        return Fault(kind="retry", reason="timeout", message=message, usage={})
    if code.isdigit():
        return fault_of_status(int(code), json.dumps({"error": dict(error)}), {})
    named = fault_of_status(400, json.dumps({"error": dict(error)}), {})
    if named.reason in _FINAL:
        return named
    return Fault(kind="retry", reason=code or "batch_error", message=message)


def _reply_of_body(body: object) -> Reply | Fault:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not choices or not isinstance(choices[0], dict):
        words = f"no choices in {str(body)[:200]}."
        return Fault(kind="retry", reason="no_choices", message=words, usage={})
    choice = choices[0]
    message = choice.get("message") or {}
    text, refusal = message.get("content") or "", message.get("refusal")
    if not text and not refusal and choice.get("finish_reason") == "stop":
        return Fault(kind="retry", reason="empty", message="the reply is empty.", usage={})
    return Reply(
        text=text,
        finish_reason=choice.get("finish_reason"),
        refusal=refusal,
        model=body.get("model"),
        usage=_usage(body),
    )


def _usage(body: object) -> dict[str, Any]:
    usage = body.get("usage") if isinstance(body, dict) else None
    # An empty usage means unknown, and must stay so.
    return {**usage, "processing": "batch"} if usage and isinstance(usage, dict) else {}
