"""Budget: a cap on what a run may spend, never exceeded.

Before a call is sent, the most that it could cost is reserved; when its reply is there, the rest is
given back. A ledger in the cache folder holds what was spent, for all processes and all runs of a
budget. A process draws an allotment from it, spends from that without touching the disk, and hands
back what is left whenever none of its calls is in flight.

What a process held when it was killed stays counted as spent, for its calls may have been billed.
So may be a call that timed out, and a reply that came without its token counts: both count as the
most that they could cost. A cap is therefore never exceeded, and may not be used up.

Batches are under the same cap: what is set aside for one is held by the batch itself, whatever
becomes of the process that submitted it, until a run finds how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_relabel.errors import BudgetError, SettingError
from hf_relabel.judges.ledger import PICO, BatchGrant, Ledger, ledger_file, to_pico
from hf_relabel.judges.money import Price, Prices

__all__ = ["Budget", "Reservation", "worst_tokens"]

_CALLS_DRAWN = 256  # calls that an allotment pays for, at their worst
_POLL_S = 0.1  # how often to look whether another process has given something back
_REFUSED_S = 1.0
_TOKENS_PER_CALL = 64
"""Tokens that the chat format, a tool or a schema's own words add to a call, at most."""
_TOKENS_PER_MESSAGE = 16
_DEARER_TIERS = ("priority", "fast")


def worst_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the most tokens that a request's prompt and reply can have.

    A tokenizer that works on bytes never makes more tokens than there are bytes, so the prompt has
    at most as many as its messages and its schema have bytes, plus a few for the chat format.

    Raises:
        SettingError: The length of the reply has no limit.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if not limit:
        raise SettingError(
            "expected max_completion_tokens with a cap on the cost, found a call without: its reply "
            "could cost any amount. Set max_completion_tokens."
        )
    n_prompt = _TOKENS_PER_CALL
    for message in body["messages"]:
        n_prompt += _TOKENS_PER_MESSAGE + sum(map(_n_bytes, message.values()))
    n_prompt += sum(_n_bytes(body[name]) for name in ("response_format", "tools") if name in body)
    return n_prompt, limit * (body.get("n") or 1)


def _n_bytes(value: Any) -> int:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


@dataclass(slots=True, eq=False)
class Reservation:
    """What is set aside for one call in flight."""

    pico: int
    price: Price
    account: _Account
    is_open: bool = True

    @property
    def usd(self) -> float:
        return self.pico / PICO


class Budget:
    """A cap on the cost of calls, shared by all that use its name and folder.

    Pickles as its settings: every process has an account of its own with the ledger.

    Args:
        cap_usd: The most that may be spent under this name, in all runs together.
        name: Which budget of the ledger; another cap under the same name goes on with what was
            spent so far.
        folder: Where the ledger lies: the cache's folder.
        prices: What calls cost.

    Raises:
        SettingError: The cap is no positive number.
    """

    def __init__(self, cap_usd: float, *, name: str, folder: Path, prices: Prices) -> None:
        if not math.isfinite(cap_usd) or cap_usd <= 0:
            raise SettingError(f"expected a cap on the cost above 0 USD, found {cap_usd!r}.")
        self.cap_usd = float(cap_usd)
        self.name = name
        self.folder = Path(folder)
        self.prices = prices
        self._open()

    def _open(self) -> None:
        self._account = _Account(
            Ledger(ledger_file(self.folder), self.name), round(self.cap_usd * PICO)
        )

    def _own(self) -> _Account:
        if self._account.pid != os.getpid():  # forked: the parent's allotment is the parent's
            self._open()
        return self._account

    async def reserve(self, model: str, body: Mapping[str, Any]) -> Reservation:
        """Set aside the most that a call can cost; waits while other calls may give money back.

        Raises:
            BudgetError: The cap leaves too little for this call.
            SettingError: The price is unknown, or the reply has no limit.
        """
        price = self._price(model, body.get("service_tier"))
        pico = to_pico(price.worst_usd(*worst_tokens(body)))
        account = self._own()
        await account.take(pico, self)
        return Reservation(pico=pico, price=price, account=account)

    def settle(self, reservation: Reservation, usage: Mapping[str, Any] | None) -> None:
        """Book what a call cost, and free the rest of what was reserved for it.

        Args:
            reservation: What `reserve` returned; a second time nothing happens.
            usage: The token counts of the reply. None: the call failed before the model worked, and
                costs nothing. Empty or without counts: all that was reserved counts as spent.
        """
        if not reservation.is_open or reservation.account.pid != os.getpid():
            return
        reservation.is_open = False
        cost: float | None = 0.0 if usage is None else reservation.price.cost_usd(usage)
        spent = reservation.pico if cost is None else to_pico(cost)
        reservation.account.settle(reservation.pico, spent)

    def batch_price(self, model: str) -> Price:
        """Return what a model costs in the Batch API.

        Raises:
            SettingError: It is unknown.
        """
        return self.prices.require(model, is_batch=True)

    def reserve_batch(self, batch: str, amounts: Sequence[int]) -> BatchGrant:
        """Set aside the most that a batch can cost, for as many of its requests as the cap allows.

        It stays, whatever becomes of this process, until `BatchLedger.book` frees it.

        Args:
            batch: Our name of it.
            amounts: The most that each of its requests can cost, in picodollars.
        """
        return self._own().reserve_batch(batch, amounts)

    @property
    def spent_usd(self) -> float:
        """What was spent under this name: by all processes and earlier runs, lost ones included.

        Other processes that run now are counted when they report, with their next allotment.
        """
        return sum(self._own().spent_and_lost()) / PICO

    @property
    def reserved_usd(self) -> float:
        """What is set aside for this process's calls in flight."""
        return self._own().reserved / PICO

    @property
    def in_batches_usd(self) -> float:
        """What is set aside for batches under way, by any process; no part of `spent_usd`."""
        return self._own().in_batches() / PICO

    def refusal(self, pico: int) -> BudgetError:
        """Build the error that ends the run."""
        spent, lost = self._own().spent_and_lost()
        words = f" (${_usd(lost)} of it held by processes that were killed)" if lost else ""
        if in_batches := self._own().in_batches():
            words += (
                f", ${_usd(in_batches)} more are set aside for batches under way (the run that "
                "submitted them frees what they do not use)"
            )
        return BudgetError(
            f"the cap of ${_usd(round(self.cap_usd * PICO))} is reached: ${_usd(spent + lost)} are "
            f"spent{words}, and the "
            f"next call could cost up to ${_usd(pico)}. Every reply that came is kept; run the same "
            "again with a higher cap (--max-cost-usd, max_cost_usd) to go on.",
            reason="budget",
        )

    def _price(self, model: str, service_tier: Any) -> Price:
        price = self.prices.require(model)
        # Other tiers cost less, or what the account says: counted at the usual price.
        if service_tier in _DEARER_TIERS:
            return self.prices.price_of(model, service_tier=service_tier) or price
        return price

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_account"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _usd(pico: int) -> str:
    digits = 2 if pico >= PICO else 4
    return f"{pico / PICO:,.{digits}f}"


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits for money: the loop that it waits on, and its wake-up."""

    pico: int
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended, and it with that
            self.loop.call_soon_threadsafe(self.event.set)


class _Account:
    """One process's part of a budget. All amounts are in picodollars.

    What the ledger holds for it is `free + reserved + unreported`, after every transaction.
    """

    def __init__(self, ledger: Ledger, cap: int) -> None:
        self.pid = os.getpid()
        self.reserved = 0
        self._id = uuid.uuid4().hex
        self._ledger = ledger
        self._cap = cap
        self._free = 0
        self._unreported = 0
        self._is_dry = False  # the ledger had too little: ask it again once nothing is in flight
        self._refused: tuple[int, float, str] | None = None
        self._waiters: deque[_Waiter] = deque()
        self._lock = threading.RLock()  # judges may run on several loops

    async def take(self, pico: int, budget: Budget) -> None:
        """Reserve an amount, in the order of asking.

        Raises:
            BudgetError: Neither this process nor another that runs can still give money back.
        """
        with self._lock:
            self._refuse_again(pico)
            if not self._waiters and self._fits(pico):
                return
            waiter = _Waiter(pico)
            self._waiters.append(waiter)
            self._wake_first()
        try:
            while True:
                await waiter.event.wait()
                waiter.event.clear()
                with self._lock:
                    self._refuse_again(pico)
                    # Looked at before drawing: what others give back until then is there to draw.
                    others_hold = not self.reserved and self._is_held_elsewhere()
                    if self._fits(pico):
                        return
                    if not self.reserved and not others_hold:
                        error = budget.refusal(pico)
                        self._refused = pico, time.monotonic(), str(error)
                        raise error
                if others_hold:
                    await asyncio.sleep(_POLL_S)
                    waiter.event.set()
        finally:
            with self._lock:
                self._waiters.remove(waiter)
                self._wake_first()
                self._hand_back_if_idle()

    def settle(self, pico: int, spent: int) -> None:
        with self._lock:
            self._refused = None
            self.reserved -= pico
            self._unreported += spent
            self._free += pico - spent
            self._wake_first()
            self._hand_back_if_idle()

    def spent_and_lost(self) -> tuple[int, int]:
        with self._lock:
            spent, lost = self._ledger.spent_and_lost(self._id)
            return spent + self._unreported, lost

    def reserve_batch(self, batch: str, amounts: Sequence[int]) -> BatchGrant:
        return self._ledger.reserve_batch(batch, amounts, self._cap)

    def in_batches(self) -> int:
        return self._ledger.in_batches()

    def _refuse_again(self, pico: int) -> None:
        """Refuse at once what was just refused: hundreds of calls wait when a cap is reached."""
        if self._refused is not None and pico >= self._refused[0]:
            if time.monotonic() < self._refused[1] + _REFUSED_S:
                raise BudgetError(self._refused[2], reason="budget")
            self._refused = None

    def _fits(self, pico: int) -> bool:
        """Reserve an amount if it is there, drawing a new allotment where that is needed."""
        if self._free < pico:
            if self.reserved and self._is_dry:
                return False
            self._draw(pico)
        if self._free < pico:
            return False
        self._free -= pico
        self.reserved += pico
        return True

    def _draw(self, pico: int) -> None:
        lacking = pico - self._free
        granted = self._ledger.draw(
            self._id, self._cap, spent=self._unreported, least=lacking, most=_CALLS_DRAWN * pico
        )
        self._unreported = 0
        self._free += granted
        self._is_dry = not granted

    def _is_held_elsewhere(self) -> bool:
        """Tell whether a process that runs may give money back; ours has gone back before."""
        self._hand_back()
        self._is_dry = False
        return self._ledger.is_held_by_others(self._id)

    def _hand_back_if_idle(self) -> None:
        if not self.reserved and not self._waiters:
            self._hand_back()

    def _hand_back(self) -> None:
        if self._free or self._unreported:
            self._ledger.hand_back(self._id, spent=self._unreported, unused=self._free)
            self._free = self._unreported = 0
            self._is_dry = False

    def _wake_first(self) -> None:
        if self._waiters:
            self._waiters[0].wake()
