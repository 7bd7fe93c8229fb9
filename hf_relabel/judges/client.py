"""The road to a chat model: one call in, one reply out, with retries of our own.

The openai client gives addresses, keys and headers (Azure included); its own retries are switched
off, because they retry an exhausted quota and obey no limit that they do not know.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_relabel.errors import AccountError, SettingError
from hf_relabel.judges.faults import Fault, fault_of_body, fault_of_exception, fault_of_status
from hf_relabel.questions import Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["ChatClient", "Endpoint", "RetryRule"]

_DROPPABLE = frozenset({"temperature", "seed", "reasoning_effort", "response_format", "top_p"})
"""Parameters whose absence still leaves a well-formed question; a server's 400 may name them."""

_SHORT = 3  # a local server's key is often "x": blanking that would blank the message
_OPENAI = "https://api.openai.com/v1"
_SECRET_NAME = re.compile(r"auth|key|token|cookie|secret|passw|credential|sig=", re.IGNORECASE)
_KEY_LIKE = re.compile(r"\b(sk|hf|key|pk|gsk)[-_][\w-]{6,}|\bBearer\s+\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """When a failed call is sent again.

    Attributes:
        max_attempts: Sends in all, before the row is given up.
        first_wait_s: Wait before the second send; doubles with each one, with jitter.
        max_wait_s: The longest wait, unless the server asks for more.
    """

    max_attempts: int = 6
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0

    def wait_s(self, attempt: int, fault: Fault) -> float:
        """Return the seconds to wait after the n-th attempt (from 1) failed."""
        wait = min(self.max_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        wait *= 0.75 + 0.5 * random.random()
        return max(wait, fault.retry_after_s or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where calls go, and what they carry; all that a worker process needs to build a client.

    Attributes:
        base_url: An OpenAI-compatible address, ending in `/v1` as a rule; None is OpenAI's own,
            whatever OPENAI_BASE_URL says: a fingerprint names the host that answered.
        azure_endpoint: An Azure OpenAI resource instead; needs `api_version`.
        api_version: Azure's API version.
        organization: OpenAI organization id.
        headers: More headers for every call.
        timeout_s: Longest wait for one whole reply.
    """

    base_url: str | None = None
    azure_endpoint: str | None = None
    api_version: str | None = None
    organization: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, _ in self.headers:
            if _SECRET_NAME.search(name):
                raise SettingError(
                    f"expected headers without secrets, found {name!r}: settings are pickled and "
                    "hashed. Give the key as `api_key`, or build the client in a `client` function."
                )
        for url in (self.base_url, self.azure_endpoint):
            if url is not None:
                _check_address(url)
        if self.azure_endpoint is not None and self.base_url is not None:
            raise SettingError("expected base_url or azure_endpoint, found both. Leave one out.")
        if self.azure_endpoint is not None and not self.api_version:
            raise SettingError(
                "expected an api_version with azure_endpoint, found none. Take one from Azure's "
                "documentation, such as '2024-10-21'."
            )

    @property
    def host(self) -> str:
        """The host that answers; without the port, which local servers change at every start."""
        return urlsplit(self.azure_endpoint or self.base_url or "").hostname or "api.openai.com"

    def connect(self, api_key: str | None) -> AsyncOpenAI:
        """Build the openai client; without a key it takes the one its own documentation names."""
        from openai import AsyncAzureOpenAI, AsyncOpenAI, DefaultAioHttpClient, OpenAIError

        shared: dict[str, Any] = {
            "api_key": api_key,
            "organization": self.organization,
            "default_headers": dict(self.headers),
            "timeout": self.timeout_s,
            "max_retries": 0,
            "http_client": DefaultAioHttpClient(timeout=self.timeout_s),
        }
        try:
            if self.azure_endpoint is None:
                return AsyncOpenAI(base_url=self.base_url or _OPENAI, **shared)
            return AsyncAzureOpenAI(
                azure_endpoint=self.azure_endpoint, api_version=self.api_version, **shared
            )
        except OpenAIError as error:
            raise AccountError(
                f"expected an API key, found none ({error}) Set OPENAI_API_KEY, or give `api_key`; "
                "a local server takes any word.",
                reason="no_key",
            ) from error


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or _SECRET_NAME.search(parts.query):
        raise SettingError(
            "expected an address without a secret, found one with '@' or a key. Give the key as "
            "`api_key`, or build the client in a `client` function."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(
            f"expected an address that starts with http:// or https://, found {url!r}."
        )


class ChatClient:
    """Sends chat completions for one judge; belongs to one event loop.

    Args:
        judge: The judge's name, for errors.
        connect: Builds the openai client, on first use.
        retry: When to send again.
        max_concurrency: Most calls in flight.
    """

    def __init__(
        self,
        judge: str,
        *,
        connect: Callable[[], AsyncOpenAI],
        retry: RetryRule,
        max_concurrency: int,
    ) -> None:
        self._judge = judge
        self._retry = retry
        self._client = connect()
        self._in_flight = asyncio.Semaphore(max_concurrency)
        self._dropped: set[str] = set()
        self._stopped: Fault | None = None
        self._n_inside = 0
        weakref.finalize(self, _close, self._client, asyncio.get_running_loop(), os.getpid())

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

    async def _complete(self, body: dict[str, Any]) -> Reply:
        attempt = 1
        while True:
            sent = {name: value for name, value in body.items() if name not in self._dropped}
            async with self._in_flight:
                if self._stopped is not None:
                    raise self._stopped.error(self._judge)
                outcome = await self._send(sent)
            if isinstance(outcome, Reply):
                return outcome
            if outcome.parameter in _DROPPABLE and outcome.parameter in sent:
                self._dropped.add(outcome.parameter)  # known from now on: not a failed attempt
                continue
            if outcome.kind == "stop":
                self._stopped = self._without_key(outcome)
            if outcome.kind != "retry" or attempt >= self._retry.max_attempts:
                raise self._without_key(outcome).error(self._judge)
            await asyncio.sleep(self._retry.wait_s(attempt, outcome))
            attempt += 1

    def _without_key(self, fault: Fault) -> Fault:
        """Blank the key in a server's words: some repeat it in their errors."""
        return replace(fault, message=_KEY_LIKE.sub("***", self._blanked(fault.message)))

    def _blanked(self, words: str) -> str:
        key = self._client.api_key
        return words.replace(key, "***") if len(key) > _SHORT else words

    async def _send(self, body: dict[str, Any]) -> Reply | Fault:
        import httpx2
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        started = time.perf_counter()
        try:
            answer = await self._client.post(
                "/chat/completions", body=body, cast_to=httpx2.Response
            )
        except APIStatusError as error:
            # Before anything is cut to length: half a key would pass.
            words = self._blanked(error.response.text)
            return fault_of_status(error.status_code, words, error.response.headers)
        except APITimeoutError as error:
            return fault_of_exception(TimeoutError(str(error)))
        except (APIConnectionError, httpx2.HTTPError, OSError) as error:
            return fault_of_exception(error)
        payload = fault_of_body(answer.text)
        if isinstance(payload, Fault):
            return payload
        return _reply(payload, time.perf_counter() - started)


def _reply(payload: dict[str, Any], latency_s: float) -> Reply | Fault:
    choice = payload["choices"][0]
    message = choice.get("message") or {}
    text, refusal = message.get("content") or "", message.get("refusal")
    if not text and not refusal and choice.get("finish_reason") == "stop":
        return Fault(kind="retry", reason="empty", message="the reply is empty.")
    return Reply(
        text=text,
        finish_reason=choice.get("finish_reason"),
        refusal=refusal,
        model=payload.get("model"),
        usage=payload.get("usage") or {},
        latency_s=round(latency_s, 3),
    )


def _close(client: AsyncOpenAI, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Close the connections of a client that nobody holds any more, on the loop they belong to."""
    if pid != os.getpid() or not loop.is_running():
        return
    closing: Coroutine[Any, Any, None] = client.close()
    asyncio.run_coroutine_threadsafe(closing, loop)
