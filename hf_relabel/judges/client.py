"""The road to a chat model: one call in, one reply out, with limits and retries of our own.

The openai client's retries are switched off: they retry an exhausted quota, and they obey no limit
that they do not know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
import weakref
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import JudgeError
from hf_relabel.judges.budget import Budget
from hf_relabel.judges.faults import DROPPABLE, Fault, fault_of_body, fault_of_status
from hf_relabel.judges.limits import Limiter
from hf_relabel.judges.transport import Transport, transport_for
from hf_relabel.questions import Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["ChatClient", "RetryRule"]

_log = logging.getLogger("hf_relabel")
_OK = 200
_CHARS_PER_TOKEN = 4

_SHORT = 3  # a local server's key is often "x": blanking that would blank the message
_KEY_LIKE = re.compile(r"\b(sk|hf|key|pk|gsk)[-_][\w-]{6,}|\bBearer\s+\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """When a failed call is sent again.

    Attributes:
        max_attempts: Sends in all, before the row is given up.
        first_wait_s: Wait before the second send; doubles with each one, with jitter.
        max_wait_s: The longest wait, unless the server asks for more.
        max_limited_s: How long a call may be turned away by a rate limit, which is no attempt.
    """

    max_attempts: int = 6
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    max_limited_s: float = 900.0

    def wait_s(self, attempt: int, fault: Fault) -> float:
        """Return the seconds to wait after the n-th attempt (from 1) failed."""
        wait = min(self.max_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        wait *= 0.75 + 0.5 * random.random()
        return max(wait, fault.retry_after_s or 0.0)


class ChatClient:
    """Sends chat completions for one judge; belongs to one event loop.

    Args:
        judge: The judge's name, for errors.
        client: The openai client.
        limiter: Who lets calls through; shared by all that call the same model.
        retry: When to send again.
        timeout_s: Longest wait for one reply.
        budget: The cap on what calls cost; None caps nothing.

    Attributes:
        faults: How often each fault was met, retried or not.
    """

    def __init__(
        self,
        judge: str,
        client: AsyncOpenAI,
        *,
        limiter: Limiter,
        retry: RetryRule,
        timeout_s: float,
        budget: Budget | None = None,
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._judge = judge
        self._budget = budget
        self._retry = retry
        self._client = client
        self._transport = transport_for(client, timeout_s)
        self._limiter = limiter
        self._dropped: set[str] = set()
        self._stopped: Fault | None = None
        self._n_inside = 0
        weakref.finalize(self, _close, self._transport, asyncio.get_running_loop(), os.getpid())

    async def complete(self, body: dict[str, Any]) -> Reply:
        """Send one chat completion until a whole answer comes, or the fault is final.

        Raises:
            JudgeError: No attempt brought an answer; `reason` names the last fault.
            AccountError: The key, the quota or the model is refused.
        """
        self._n_inside += 1
        try:
            return await self._complete(body)
        finally:
            self._n_inside -= 1
            if not self._n_inside:  # the run has ended; a later one may find the account mended
                self._stopped = None

    def stop(self) -> None:
        """End the calls that wait for their turn; those in flight come in."""
        if self._n_inside:
            self._stopped = Fault(kind="stop", reason="interrupted", message="interrupted.")

    async def _complete(self, body: dict[str, Any]) -> Reply:
        attempt, limited_since = 1, time.monotonic()
        while True:
            outcome = await self._try(body)
            if isinstance(outcome, Reply):
                return outcome
            self._note(outcome)
            if outcome.parameter in DROPPABLE and outcome.parameter in body:
                self._dropped.add(outcome.parameter)  # known from now on: not a failed attempt
                body = {name: value for name, value in body.items() if name not in self._dropped}
                continue
            if outcome.reason == "rate_limit":  # waiting for a turn is not an attempt
                is_last = time.monotonic() - limited_since > self._retry.max_limited_s
            else:
                is_last = attempt >= self._retry.max_attempts
            if outcome.kind != "retry" or is_last:
                raise outcome.error(self._judge)
            await asyncio.sleep(self._retry.wait_s(attempt, outcome))
            attempt += outcome.reason != "rate_limit"

    async def _try(self, body: dict[str, Any]) -> Reply | Fault:
        """Send once, when it is this call's turn."""
        if self._dropped:
            body = {name: value for name, value in body.items() if name not in self._dropped}
        started = await self._limiter.acquire(_tokens_at_most(body) if self._limiter.paces else 0)
        fault, headers = None, None
        try:
            if self._stopped is not None:
                raise self._stopped.error(self._judge)
            outcome, headers = await self._send_within_budget(body)
            fault = outcome if isinstance(outcome, Fault) else None
            return outcome
        finally:
            pause_s = self._retry.first_wait_s
            self._limiter.release(started, fault=fault, pause_s=pause_s, headers=headers)

    async def _send_within_budget(
        self, body: dict[str, Any]
    ) -> tuple[Reply | Fault, Mapping[str, str] | None]:
        if self._budget is None:
            return await self._send(body)
        reservation = await self._budget.reserve(body["model"], body)
        usage: Mapping[str, Any] | None = {}  # cut off while in flight: it may be billed
        try:
            outcome, headers = await self._send(body)
            usage = outcome.usage
        except JudgeError:
            usage = None  # no request could be built
            raise
        finally:
            self._budget.settle(reservation, usage)
        return outcome, headers

    async def _send(self, body: dict[str, Any]) -> tuple[Reply | Fault, Mapping[str, str] | None]:
        sent_at = time.perf_counter()
        answer = await self._transport.send(body)
        if isinstance(answer, Fault):
            return self._without_key(answer), None
        latency_s = time.perf_counter() - sent_at
        if answer.status != _OK:
            # The key goes before the message is cut to length: half a key would pass.
            fault = fault_of_status(answer.status, self._blanked(answer.body), answer.headers)
            return self._without_key(fault), answer.headers
        payload = fault_of_body(answer.body)
        if isinstance(payload, Fault):
            return self._without_key(payload), answer.headers
        return _reply(payload, latency_s), answer.headers

    def _note(self, fault: Fault) -> None:
        self.faults[fault.reason] += 1
        if fault.kind == "stop":
            self._stopped = fault
        _log.info("fault", extra={"judge": self._judge, "reason": fault.reason, "kind": fault.kind})

    def _without_key(self, fault: Fault) -> Fault:
        """Blank the key in a server's words: some repeat it in their errors."""
        return replace(fault, message=_KEY_LIKE.sub("***", self._blanked(fault.message)))

    def _blanked(self, words: str) -> str:
        key = self._client.api_key
        return words.replace(key, "***") if len(key) > _SHORT else words


def _tokens_at_most(body: Mapping[str, Any]) -> int:
    """Estimate what a provider counts against tokens a minute: the prompt, and the reply's cap."""
    chars = sum(len(message["content"]) for message in body["messages"])
    return chars // _CHARS_PER_TOKEN + int(body.get("max_completion_tokens") or 0)


def _reply(payload: dict[str, Any], latency_s: float) -> Reply | Fault:
    choice = payload["choices"][0]
    message = choice.get("message") or {}
    text, refusal = message.get("content") or "", message.get("refusal")
    if not text and not refusal and choice.get("finish_reason") == "stop":
        usage = payload.get("usage") or {}
        return Fault(kind="retry", reason="empty", message="the reply is empty.", usage=usage)
    return Reply(
        text=text,
        finish_reason=choice.get("finish_reason"),
        refusal=refusal,
        model=payload.get("model"),
        usage=payload.get("usage") or {},
        latency_s=round(latency_s, 3),
    )


def _close(transport: Transport, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Close the connections of a client that nobody holds any more, on the loop they belong to."""
    if pid != os.getpid() or not loop.is_running():
        return
    closing: Coroutine[Any, Any, None] = transport.close()
    asyncio.run_coroutine_threadsafe(closing, loop)
