"""Batch costs: what a batch may cost before it runs, and what it did cost once it has ended.

Values and sums; nothing here opens a file or the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_relabel.judges.batch_files import Outcome
from hf_relabel.judges.ledger import to_pico
from hf_relabel.judges.money import Price

__all__ = ["BatchReserve", "spent_pico"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReserve:
    """What was set aside for a batch; kept with it, so that any later run books it alike.

    Attributes:
        price: What the model cost when the batch was submitted.
        amounts: The most that each request can cost, in picodollars, in their order.
    """

    price: Price
    amounts: tuple[int, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BatchReserve:
        """Build from what `dataclasses.asdict` made of a reserve, after a way through JSON."""
        price = Price.from_json(values["price"])
        return cls(price=price, amounts=tuple(values["amounts"]))


def spent_pico(
    reserve: BatchReserve,
    keys: Sequence[str],
    outcomes: Iterable[Outcome],
    *,
    end: str,
    n_answered: int,
) -> int:
    """Return what an ended batch cost, in picodollars; where that is unknown, the most it can be.

    A request that was answered costs what its usage says, or all that was set aside for it where
    there is none; so does one that timed out while the model was at work. One whose line names
    another error costs nothing: the model did not work on it. One without any line costs nothing
    if the server itself counts no more answers than it gave us, and its batch did not complete;
    else it may have been answered, and billed.

    Args:
        reserve: What was set aside.
        keys: The requests' `custom_id`, aligned with the reserve's amounts.
        outcomes: What came back.
        end: The state that the batch ended in.
        n_answered: How many requests the server says it answered.
    """
    most = dict(zip(keys, reserve.amounts, strict=True))
    costs: dict[str, int] = {}
    given: set[str] = set()
    for outcome in outcomes:
        key = outcome.custom_id
        if key in most:
            if outcome.usage is not None:
                given.add(key)
            costs[key] = max(costs.get(key, 0), _cost(reserve.price, outcome, most[key]))
    unlisted = sorted((most[key] for key in most.keys() - costs.keys()), reverse=True)
    n_unknown = len(unlisted) if end == "completed" else max(0, n_answered - len(given))
    return sum(costs.values()) + sum(unlisted[:n_unknown])


def _cost(price: Price, outcome: Outcome, most: int) -> int:
    if outcome.usage is None:
        return 0
    cost = price.cost_usd(outcome.usage)
    return most if cost is None else to_pico(cost)
