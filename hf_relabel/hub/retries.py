"""Retries: which answers of the Hub are worth asking again for, and how long to wait before.

The clients retry uploads by themselves, but no commit, no look-up and no repository (hub.md, A5).
Every step here can be run again: what is there already is seen and left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_relabel.errors import HubError

__all__ = ["Retries"]

T = TypeVar("T")
_CONFLICTS = (409, 412)
_PASSING = (408, 429, 500, 502, 503, 504)
_RESET = re.compile(r"\bt=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often and how long.

    Attributes:
        max_attempts: Attempts of one step in all; 1 never asks again.
        first_wait_s: Before the second attempt, where the Hub does not say; doubled each time.
        max_wait_s: No wait is longer. A commit quota is counted by the hour: better to stop and
            have the same command run later.
        sleep: Waits; tests put their own here.
    """

    max_attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, step: Callable[[], T], *, explain: Callable[[int], str] = lambda _: "") -> T:
        """Run a step until it succeeds.

        Args:
            step: What to do; runs from its start each time.
            explain: Status 401 or 403 → what to do about it.

        Raises:
            HubError: The Hub refused for good, or did not answer in all attempts.
        """
        for attempt in range(1, self.max_attempts + 1):
            try:
                return step()
            except HubError:
                raise
            except Exception as error:
                status, headers = _answer(error)
                if not _is_passing(error, status):
                    if status is None and not isinstance(error, ValueError):
                        raise  # no answer of the Hub: a fault of this machine, or of ours
                    raise _refusal(error, status, explain) from error
                wait_s = self._wait_s(attempt, headers)
                if attempt == self.max_attempts or wait_s > self.max_wait_s:
                    raise _given_up(error, status, attempt, wait_s) from error
                self.sleep(wait_s)
        raise AssertionError("no attempt was made")

    def _wait_s(self, attempt: int, headers: Any) -> float:
        for text in (headers.get("Retry-After", ""), headers.get("RateLimit", "")):
            if text.strip().isdigit():
                return float(text)
            if found := _RESET.search(text):
                return float(found[1])
        return float(min(self.first_wait_s * 2 ** (attempt - 1), self.max_wait_s))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised for: clients wrap what the Hub said, and lines cut."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _answer(error: BaseException) -> tuple[int | None, Any]:
    """Return the status and headers of the answer behind an error, if there was one."""
    for seen in _chain(error):
        response = getattr(seen, "response", None)
        if response is not None:
            return int(response.status_code), response.headers
    return None, {}


def _is_passing(error: BaseException, status: int | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if status is not None:
        return status in (*_CONFLICTS, *_PASSING)
    for seen in _chain(error):
        # By name: the clients' HTTP library is httpx in some versions, and httpx2 in others.
        if any(kind.__name__ == "TransportError" for kind in type(seen).__mro__):
            return True
        if isinstance(seen, (ConnectionError, TimeoutError, LocalEntryNotFoundError)):
            return True
    return False


def _refusal(error: Exception, status: int | None, explain: Callable[[int], str]) -> HubError:
    if status in (401, 403):
        return HubError(f"{_first_line(error)} {explain(status)}".strip(), reason="denied")
    if status == 404:
        return HubError(_first_line(error), reason="missing")
    return HubError(f"the Hub refused: {_first_line(error)}", reason="refused")


def _given_up(error: Exception, status: int | None, attempts: int, wait_s: float) -> HubError:
    reason = "conflict" if status in _CONFLICTS else "unavailable"
    found = f"HTTP {status}" if status else type(error).__name__
    later = f" The Hub asks to wait {wait_s:,.0f} s." if wait_s > 0 and status == 429 else ""
    return HubError(
        f"expected the Hub to answer, found {found} {attempts} times: {_first_line(error)}.{later} "
        "Nothing is half done: run the same command again, and it sends what is missing.",
        reason=reason,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__
