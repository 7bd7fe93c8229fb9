"""What a batch cost: by usage where it is known, at its most where it is not, else nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from hf_relabel.judges.batch_costs import BatchReserve, spent_pico
from hf_relabel.judges.batch_files import outcome_of_line
from hf_relabel.judges.ledger import PICO
from hf_relabel.judges.money import Price, Prices

PRICE = Prices({"m": (1.0, 2.0)}).price_of("m")
assert PRICE is not None
MOST = 7 * PICO
USAGE = {"prompt_tokens": 1_000_000, "completion_tokens": 500_000}  # 2 USD
CHOICE = {"finish_reason": "stop", "message": {"content": "yes"}}


def spent_usd(
    *lines: dict[str, Any] | str, end: str = "completed", n_answered: int | None = None
) -> float:
    """Book a batch of the requests a and b, each at most 7 USD, of which these lines came back."""
    reserve = BatchReserve(price=PRICE, amounts=(MOST, MOST))
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    outcomes = [outcome for text in texts if (outcome := outcome_of_line(text)) is not None]
    if n_answered is None:
        n_answered = sum(outcome.usage is not None for outcome in outcomes)
    return spent_pico(reserve, ("a", "b"), outcomes, end=end, n_answered=n_answered) / PICO


def answered(key: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": key, "response": {"status_code": 200, "body": body}}


def refused(key: str, **response: Any) -> dict[str, Any]:
    return {"custom_id": key, "response": response, "error": None}


EXPIRED = {"custom_id": "b", "response": None, "error": {"code": "batch_expired", "message": "-"}}


@pytest.mark.parametrize(
    ("line", "usd"),
    [
        (answered("a", choices=[CHOICE], usage=USAGE), 2.0),
        (answered("a", choices=[CHOICE]), 7.0),  # answered, and nobody says for how much
        (answered("a", choices=[CHOICE], usage={"prompt_tokens": 5}), 7.0),
        (answered("a", choices=[CHOICE], usage="odd"), 7.0),
        (answered("a", choices=[]), 7.0),
        (answered("a", choices=[], usage=USAGE), 2.0),
        (answered("a", choices=[{"finish_reason": "stop", "message": {}}], usage=USAGE), 2.0),
        ({"custom_id": "a", "response": None, "error": None}, 7.0),
        (refused("a", status_code=500, body={"error": {"message": "down"}}), 0.0),
        (refused("a", status_code=400, body={"error": {"code": "content_filter"}}), 0.0),
        (refused("a", status_code=400, body={"error": {"message": "late"}, "usage": USAGE}), 2.0),
        ({"custom_id": "a", "response": None, "error": {"code": "batch_cancelled"}}, 0.0),
        ({"custom_id": "a", "response": None, "error": {"code": "odd", "message": "?"}}, 0.0),
        ({"custom_id": "a", "response": None, "error": {"code": "request_timeout"}}, 7.0),
    ],
)
def test_a_request_costs_what_its_line_says(line: dict[str, Any], usd: float) -> None:
    assert spent_usd(line, EXPIRED, end="expired") == usd


@pytest.mark.parametrize(
    ("end", "n_answered", "usd"),
    [
        ("completed", 1, 9.0),  # a completed batch answered all: the other line is lost
        ("expired", 1, 2.0),
        ("expired", 2, 9.0),  # the server counts an answer that it did not give us
        ("cancelled", 0, 2.0),  # a server that counts nothing
        ("failed", 0, 2.0),
    ],
)
def test_a_request_without_a_line_costs_nothing_unless_it_may_have_been_answered(
    end: str, n_answered: int, usd: float
) -> None:
    line = answered("a", choices=[CHOICE], usage=USAGE)

    assert spent_usd(line, end=end, n_answered=n_answered) == usd
    assert spent_usd(line, '{"custom_id": "b", "resp', end=end, n_answered=n_answered) == usd


def test_lines_that_name_no_request_of_the_batch_and_repeated_ones_count_nothing() -> None:
    line = answered("a", choices=[CHOICE], usage=USAGE)
    foreign = {**line, "custom_id": "c"}

    assert spent_usd(line, line, foreign, EXPIRED) == 2.0


def test_a_failed_batch_without_files_costs_nothing() -> None:
    assert spent_usd(end="failed") == 0.0


def test_a_reserve_comes_back_from_json() -> None:
    dearer: Price = Prices({"n": (3.0, 4.0)}).price_of("n")  # type: ignore[assignment]
    tiered = Price.from_json({**asdict(PRICE), "above": (1000, asdict(dearer))})
    reserve = BatchReserve(price=tiered, amounts=(1, 2, 3))

    copy = BatchReserve.from_json(json.loads(json.dumps(asdict(reserve))))

    assert copy == reserve
    assert copy.price.worst_usd(2000, 0) == pytest.approx(0.006)
