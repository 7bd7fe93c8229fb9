"""The road to a Batch API: files up, batches made and watched, files down.

Through the openai client, with retries of our own. A batch may have been made although the answer
was an error, so it is looked for by its metadata before it is made again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hf_relabel.errors import AccountError
from hf_relabel.judges.batch_files import CHAT_URL
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.faults import Fault, fault_of_exception, fault_of_status

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["ENDED", "BatchApi", "BatchView"]

T = TypeVar("T")
_log = logging.getLogger(__name__)

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
MARK = "hf_relabel"
"""The metadata that holds the manifest's id: a batch without it is not ours."""

_DELETE_S = 10.0  # a run does not wait longer to tidy up
_SHORT = 3  # a local server's key is often "x": blanking that would blank the message
_KEY_LIKE = re.compile(r"\b(sk|hf|key|pk|gsk)[-_][\w-]{6,}|\bBearer\s+\S+")
_PAGE = 100
_LISTED_BEFORE_S = 3600.0  # clocks differ: batches are looked for from an hour before their time


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """A batch as the server tells of it.

    Attributes:
        id: The server's name of it.
        status: "validating", "in_progress", …; one of `ENDED` at the end.
        manifest: Our name of it, empty for a batch that is not ours.
        metadata: All that it carries.
        created_at: Seconds since the epoch.
        files: Its files so far: kind ("input", "output", "errors") → the file's id.
        errors: Of a batch that failed: code, line (from 1, or None) and message.
        counts: Requests: total, completed, failed.
    """

    id: str
    status: str
    manifest: str
    metadata: Mapping[str, str]
    created_at: float
    files: Mapping[str, str]
    errors: tuple[tuple[str, int | None, str], ...]
    counts: tuple[int, int, int]


class BatchApi:
    """Files and batches of one account; belongs to one event loop.

    Args:
        client: The openai client.
        retry: When a call is sent again.
        timeout_s: Longest time for one file, up or down.
        url: The endpoint that the requests are for.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        *,
        retry: RetryRule,
        timeout_s: float = 1800.0,
        url: str = CHAT_URL,
    ) -> None:
        self.url = url
        self._client = client
        self._retry = retry
        self._timeout_s = timeout_s

    async def upload(self, path: Path) -> str:
        """Upload a file of requests and return the server's name of it."""

        async def send() -> str:
            with path.open("rb") as file:
                made = await self._client.files.create(
                    file=(path.name, file), purpose="batch", timeout=self._timeout_s
                )
            return made.id

        return await self._call(send)

    async def create(self, file_id: str, metadata: Mapping[str, str]) -> BatchView:
        """Make a batch of an uploaded file, once, whatever the answers."""

        async def send() -> BatchView:
            made = await self._client.batches.create(
                input_file_id=file_id,
                endpoint=cast("Any", self.url),  # Azure has a name of its own for it
                completion_window="24h",
                metadata=dict(metadata),
            )
            return _view(made)

        async def find() -> BatchView | None:
            return (await self.find([metadata[MARK]], since=0.0)).get(metadata[MARK])

        return await self._call(send, before_retry=find, is_retried=_misses_a_file)

    async def retrieve(self, batch_id: str) -> BatchView:
        return await self._call(lambda: self._viewed(self._client.batches.retrieve(batch_id)))

    async def cancel(self, batch_id: str) -> BatchView:
        return await self._call(lambda: self._viewed(self._client.batches.cancel(batch_id)))

    async def find(self, manifests: Collection[str], *, since: float) -> dict[str, BatchView]:
        """Return the batches that carry these manifests, by manifest.

        Args:
            manifests: The ids looked for.
            since: No batch was made before this time.
        """
        found = await self.list_ours(since=since - _LISTED_BEFORE_S, until_found=set(manifests))
        return {view.manifest: view for view in found if view.manifest in manifests}

    async def list_ours(
        self, *, since: float = 0.0, until_found: Collection[str] = ()
    ) -> list[BatchView]:
        """Return the batches that we made, newest first.

        Args:
            since: Batches made before this are left out.
            until_found: Manifests after which nothing more is looked for; empty looks at all.
        """

        async def send() -> list[BatchView]:
            ours, missing = [], set(until_found)
            async for batch in self._client.batches.list(limit=_PAGE):
                view = _view(batch)
                if view.created_at < since:
                    break
                if view.manifest:
                    ours.append(view)
                    missing.discard(view.manifest)
                    if until_found and not missing:
                        break
            return ours

        return await self._call(send)

    async def download(self, file_id: str, path: Path) -> None:
        """Write a file of the server to `path`, which appears when it is whole."""
        temporary = path.with_name(f".{path.name}.part")

        async def send() -> None:
            streamed = self._client.files.with_streaming_response
            async with streamed.content(file_id, timeout=self._timeout_s) as response:
                await response.stream_to_file(temporary)
            temporary.replace(path)

        # A file that was just written is refused for a moment, with 403 or 404.
        await self._call(send, is_retried=lambda fault: fault.reason in _NOT_YET)

    async def delete(self, file_id: str) -> None:
        """Delete a file of the server, if it lets us; tried once, and no failure is an error."""
        try:
            await self._client.files.delete(file_id, timeout=_DELETE_S)
        except Exception as error:  # whatever it is: what was paid for is safe already
            fault = self._fault(error)
            words = self.blanked(str(error)) if fault is None else fault.message
            _log.info("file %s stays on the server: %s", file_id, words[:200])

    async def close(self) -> None:
        await self._client.close()

    async def _viewed(self, batch: Awaitable[Any]) -> BatchView:
        return _view(await batch)

    async def _call(
        self,
        send: Callable[[], Awaitable[T]],
        *,
        before_retry: Callable[[], Awaitable[T | None]] | None = None,
        is_retried: Callable[[Fault], bool] = lambda _: False,
    ) -> T:
        """Send until it works; `before_retry` may find that it had worked already.

        Raises:
            AccountError: It never worked; batches on their way go on.
        """
        attempt = 1
        while True:
            try:
                return await send()
            except Exception as error:
                fault = self._fault(error)
                if fault is None:
                    raise
            is_again = fault.kind == "retry" or is_retried(fault)
            if not is_again or attempt >= self._retry.max_attempts:
                raise self._refusal(fault)
            await asyncio.sleep(self._retry.wait_s(attempt, fault))
            attempt += 1
            if before_retry is not None and (found := await before_retry()) is not None:
                return found

    def _fault(self, error: Exception) -> Fault | None:
        import httpx2
        from openai import APIConnectionError, APIStatusError

        if isinstance(error, APIStatusError):
            # Before anything is cut to length: half a key would pass.
            words = self.blanked(error.response.text)
            return fault_of_status(error.status_code, words, error.response.headers)
        if isinstance(error, (APIConnectionError, httpx2.HTTPError, OSError, TimeoutError)):
            return fault_of_exception(_first_cause(error))
        if isinstance(error, (json.JSONDecodeError, _MalformedError)):
            return Fault(kind="retry", reason="broken_json", message=f"no JSON of a batch: {error}")
        return None

    def blanked(self, words: str) -> str:
        """Blank the key in a server's words: some repeat it in their errors."""
        key = self._client.api_key
        return _KEY_LIKE.sub("***", words.replace(key, "***") if len(key) > _SHORT else words)

    def _refusal(self, fault: Fault) -> AccountError:
        host = self._client.base_url.host
        advice = _ADVICE.get(fault.reason, "Run the same command again.")
        return AccountError(
            f"the Batch API of {host}: {fault.message} {advice} Batches on their way go on, and "
            "their replies are collected then.",
            reason="no_batch_api" if fault.reason == "unknown_model" else fault.reason,
        )


_NOT_YET = frozenset({"forbidden", "unknown_model"})
_ADVICE = {
    "unauthorized": "Set a valid key (OPENAI_API_KEY) and run the same command again.",
    "forbidden": "Use a key that may use files and batches, and run the same command again.",
    "quota": "Add credit to the account and run the same command again.",
    "unknown_model": (
        "Either this server has no Batch API (leave batches out, or write a file for it with "
        "`hf-relabel verdicts export-batch`), or another key made the batch."
    ),
}


class _MalformedError(Exception):
    """A 200 answer that is no batch, such as a proxy's page."""


def _misses_a_file(fault: Fault) -> bool:
    """Tell whether a batch was refused because its file is not known everywhere yet."""
    is_refusal = fault.reason in ("unknown_model", "bad_request", "parameter")
    return is_refusal and "file" in fault.message.lower()


def _view(batch: Any) -> BatchView:
    if not hasattr(batch, "status") or not hasattr(batch, "id"):
        raise _MalformedError(str(batch)[:80])
    metadata = dict(batch.metadata or {})
    files = {
        "input": batch.input_file_id,
        "output": batch.output_file_id,
        "errors": batch.error_file_id,
    }
    errors = (batch.errors.data if batch.errors else None) or []
    counts = batch.request_counts
    return BatchView(
        id=batch.id,
        status=batch.status,
        manifest=metadata.get(MARK, ""),
        metadata=metadata,
        created_at=float(batch.created_at or 0),
        files={kind: file_id for kind, file_id in files.items() if file_id},
        errors=tuple((error.code or "", error.line, error.message or "") for error in errors),
        counts=(counts.total, counts.completed, counts.failed) if counts else (0, 0, 0),
    )


def _first_cause(error: Exception) -> BaseException:
    """Return what went wrong at the socket: openai's transport calls every refusal a timeout."""
    import httpx2
    from openai import APITimeoutError

    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, (APITimeoutError, httpx2.TimeoutException)):
        return TimeoutError(str(cause))
    return cause
