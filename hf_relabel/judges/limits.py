"""Limits: as many calls in flight as a server takes, and no more.

One limiter for each (host, model), whoever asks. It starts small and doubles with every round of
clean replies until the server first says no; after that it adds a twentieth a round, while it is
full and all is well, and gives up a fifth once for each episode of 429s. What the server asks for
(`Retry-After`, `x-ratelimit-*`) is obeyed, and requests and tokens a minute are paced where a
ceiling is set. Waiting here is not an attempt.

Additive increase, multiplicative decrease: Chiu and Jain (1989), doi:10.1016/0169-7552(89)90019-6.
"""

from __future__ import annotations

import asyncio
import re
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from hf_relabel.errors import SettingError
from hf_relabel.judges.faults import Fault, retry_after_s

__all__ = ["Ceilings", "Limiter", "duration_s", "shared_limiter"]

_START = 20
_DECREASE = 0.8
_INCREASE = 0.05
_FULL = 0.8
"""The limit grows only while at least this share of it is in use: an idle limit proves nothing."""
_BURST_S = 1.0
"""Paced calls may come this much ahead of time: limits a minute often bite within a second."""
_REJECTIONS = frozenset({"rate_limit", "overloaded"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a user allows at most; the server's own limits are found out.

    Attributes:
        max_concurrency: Calls in flight to one (host, model).
        rpm: Requests a minute.
        tpm: Tokens a minute, prompt and reply cap together.
        n_shards: Machines that share these ceilings; each takes its part.
    """

    max_concurrency: int = 256
    rpm: float | None = None
    tpm: float | None = None
    n_shards: int = 1

    def __post_init__(self) -> None:
        for name in ("max_concurrency", "rpm", "tpm", "n_shards"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingError(f"expected {name} above 0, found {value}.")

    def share(self, n_present: int) -> Ceilings:
        """Return one process's part; at least one call in flight stays.

        Args:
            n_present: Processes at work with the same cache. Shards may be among them, so the
                greater of the two numbers counts, not their product.
        """
        n_parts = max(n_present, self.n_shards)
        return Ceilings(
            max_concurrency=max(1, self.max_concurrency // n_parts),
            rpm=None if self.rpm is None else self.rpm / n_parts,
            tpm=None if self.tpm is None else self.tpm / n_parts,
        )


class Limiter:
    """Lets calls through; belongs to one event loop.

    Use it as `await limiter.acquire(n_tokens)`, the call, `limiter.release(fault, headers)`.
    """

    def __init__(self, ceilings: Ceilings) -> None:
        self.n_in_flight = 0
        self.limit = float(min(_START, ceilings.max_concurrency))
        self._is_starting = True
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._cut_at = 0.0
        self._closed_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.ceilings = ceilings
        self._requests, self._tokens = _Pace(ceilings.rpm), _Pace(ceilings.tpm)

    @property
    def paces(self) -> bool:
        """Whether tokens are counted, so that `acquire` needs their number."""
        return self.ceilings.tpm is not None

    def set_ceilings(self, ceilings: Ceilings) -> None:
        """Take other ceilings from now on, as when a process joins or leaves."""
        if ceilings != self.ceilings:
            self.ceilings = ceilings
            self._requests.set_rate(ceilings.rpm)
            self._tokens.set_rate(ceilings.tpm)
            self.limit = min(self.limit, float(ceilings.max_concurrency))
            self._wake()

    async def acquire(self, n_tokens: int = 0) -> float:
        """Wait for a place, and take it.

        Args:
            n_tokens: Tokens that the call may take, where they are paced.

        Returns:
            When the call may be said to have started, for `release`.
        """
        while self._waiting or not self._is_open():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._wake()  # with nothing in flight, nobody else comes back when it is time
            try:
                await turn
            except asyncio.CancelledError:
                self._forget(turn)
                raise
            if self._is_open():
                break
        self.n_in_flight += 1
        now = time.monotonic()
        self._requests.take(1, now)
        self._tokens.take(n_tokens, now)
        self._wake()
        return now

    def release(
        self,
        started: float,
        *,
        fault: Fault | None = None,
        pause_s: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Give a place back, and learn from how the call ended.

        Args:
            started: What `acquire` returned.
            fault: How the call failed, if it did.
            pause_s: How long to send nothing after a rejection that names no time.
            headers: The answer's headers, where one came.
        """
        if fault is None:
            self._grow()
        elif fault.reason in _REJECTIONS:
            self._shrink(started, fault.retry_after_s or pause_s)
        self.n_in_flight -= 1
        if headers:
            self._obey(headers)
        self._wake()

    def _is_open(self) -> bool:
        if self.n_in_flight >= int(self.limit):
            return False
        now = time.monotonic()
        return self._opens_at(now) <= now

    def _opens_at(self, now: float) -> float:
        paced = max(self._requests.ready_at(now), self._tokens.ready_at(now))
        return max(self._closed_until, paced)

    def _grow(self) -> None:
        if self.n_in_flight < _FULL * int(self.limit):
            return
        # One reply is 1/limit of a round: a doubling each round while starting, then a twentieth.
        self.limit += 1.0 if self._is_starting else _INCREASE
        self.limit = min(self.limit, float(self.ceilings.max_concurrency))

    def _shrink(self, started: float, pause_s: float) -> None:
        now = time.monotonic()
        if started > self._cut_at:  # calls sent before the last cut tell nothing new
            self._is_starting = False
            self._cut_at = now
            self.limit = max(1.0, min(self.limit, self.n_in_flight) * _DECREASE)
            self._close_until(now + pause_s)

    def _obey(self, headers: Mapping[str, str]) -> None:
        """Hold back when the server says that nothing is left until its limit is reset."""
        for kind in ("requests", "tokens"):
            left = headers.get(f"x-ratelimit-remaining-{kind}")
            if left is not None and left.strip() in ("0", "0.0"):
                wait = duration_s(headers.get(f"x-ratelimit-reset-{kind}", ""))
                self._close_until(time.monotonic() + (wait or retry_after_s(headers) or 0.0))

    def _close_until(self, moment: float) -> None:
        self._closed_until = max(self._closed_until, moment)

    def _wake(self) -> None:
        """Let the next one in line try; or come back when the time is there."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if not self._waiting:
            return
        if self._is_open():
            self._waiting.popleft().set_result(None)
        elif self.n_in_flight < int(self.limit) and self._timer is None:
            now = time.monotonic()
            wait_s = max(0.0, self._opens_at(now) - now)
            self._timer = asyncio.get_running_loop().call_later(wait_s + 0.001, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake()

    def _forget(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self._wake()  # the place it was given goes to the next
        elif turn in self._waiting:
            self._waiting.remove(turn)


# Calls in flight belong to an account, not to a judge: every judge of a loop that asks the same model
# on the same host is counted by the same limiter.
_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Limiter]] = (
    weakref.WeakKeyDictionary()
)


def shared_limiter(host: str, model: str, ceilings: Ceilings) -> Limiter:
    """Return the running loop's limiter for a model on a host, under these ceilings from now on."""
    limiters = _shared.setdefault(asyncio.get_running_loop(), {})
    limiter = limiters.setdefault((host, model), Limiter(ceilings))
    limiter.set_ceilings(ceilings)
    return limiter


class _Pace:
    """So many units a minute, evenly; the clock may run one burst ahead."""

    def __init__(self, per_minute: float | None) -> None:
        self._free_at = 0.0
        self.set_rate(per_minute)

    def set_rate(self, per_minute: float | None) -> None:
        self._unit_s = 0.0 if per_minute is None else 60.0 / per_minute

    def ready_at(self, now: float) -> float:
        """Return the moment from which the next unit may be taken."""
        return self._free_at if self._unit_s and self._free_at > now else now

    def take(self, units: float, now: float) -> None:
        """Take units: the next ones are free when these are paid for in time."""
        if self._unit_s:
            self._free_at = max(self._free_at, now - _BURST_S) + units * self._unit_s


_PARTS = re.compile(r"([\d.]+)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float | None:
    """Read a duration as OpenAI writes it: "6m0s", "120ms", "1.5s"; None for anything else."""
    parts = _PARTS.findall(text)
    if not parts or _PARTS.sub("", text).strip():
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
