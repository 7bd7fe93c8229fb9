"""What calls cost: prices, and the arithmetic of cached, written and batched tokens."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from hf_relabel.errors import SettingError
from hf_relabel.judges.money import Price, Prices, parse_price

MILLION = 1_000_000


def usage(prompt: int, completion: int, **details: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**counts, "prompt_tokens_details": details} if details else counts


@pytest.mark.parametrize(
    ("model", "price_in", "cached", "price_out"),
    [
        ("gpt-4o-mini", 0.15, 0.075, 0.60),
        ("gpt-4o-mini-2024-07-18", 0.15, 0.075, 0.60),
        ("gpt-4o", 2.50, 1.25, 10),
        ("gpt-4.1", 2, 0.5, 8),
        ("gpt-4.1-mini", 0.4, 0.1, 1.6),
        ("gpt-5-nano", 0.05, 0.005, 0.4),
        ("gpt-5.4-mini", 0.75, 0.075, 4.50),
        ("gpt-5.6-terra", 2, 0.2, 12),
        ("gpt-6-luna", 0.10, 0.01, 0.50),
        ("gpt-6.1-terra", 1, 0.05, 5),
    ],
)
def test_list_prices(model: str, price_in: float, cached: float, price_out: float) -> None:
    price = Prices().price_of(model)

    assert price is not None
    assert (price.input, price.cached_input, price.output) == (price_in, cached, price_out)
    assert price.source.startswith("genai-prices ")
    assert price.date is not None
    assert price.origin == f"{price.source}, verified {price.date}"


@pytest.mark.parametrize(("model", "factor"), [("gpt-6-luna", 1.25), ("gpt-4o", 1.0)])
def test_writing_to_the_prompt_cache_costs_more_where_it_is_listed(
    model: str, factor: float
) -> None:
    price = Prices().price_of(model)

    assert price is not None
    assert price.cache_write == pytest.approx(price.input * factor)


def test_a_thousand_rows_cost_what_the_table_says() -> None:
    """5,000 tokens in and 400 out: 4o-mini $0.99, 4o $16.50, gpt-6-luna $0.70, 6.1-terra $7."""
    prices, tokens = Prices(), usage(5000, 400)

    costs = {
        model: 1000 * (prices.cost_usd(model, tokens) or 0)
        for model in ("gpt-4o-mini", "gpt-4o", "gpt-6-luna", "gpt-6.1-terra")
    }

    assert costs == pytest.approx(
        {"gpt-4o-mini": 0.99, "gpt-4o": 16.50, "gpt-6-luna": 0.70, "gpt-6.1-terra": 7.0}
    )


@pytest.mark.parametrize(
    ("details", "cost"),
    [
        ({}, 10.0),
        ({"cached_tokens": MILLION}, 1.0),
        ({"cache_write_tokens": MILLION}, 12.5),
        ({"cached_tokens": MILLION // 2, "cache_write_tokens": MILLION // 2}, 6.75),
        ({"cached_tokens": 5 * MILLION}, 1.0),  # more than there are: no negative rest
    ],
)
def test_cached_and_written_tokens_have_their_own_prices(
    details: dict[str, int], cost: float
) -> None:
    price = Price(input=10, cached_input=1, output=30, cache_write=12.5, source="test")

    assert price.cost_usd(usage(MILLION, 0, **details)) == pytest.approx(cost)
    assert price.cost_usd(usage(0, MILLION)) == 30


@pytest.mark.parametrize(
    ("model", "price_in", "cached", "price_out"),
    # For gpt-4o-mini the Batch table lists no cached price of its own.
    [("gpt-4o-mini", 0.075, 0.075, 0.30), ("gpt-6-luna", 0.05, 0.005, 0.25)],
)
def test_batches_cost_half(model: str, price_in: float, cached: float, price_out: float) -> None:
    price = Prices().price_of(model, is_batch=True)

    assert price is not None
    assert (price.input, price.cached_input, price.output) == (price_in, cached, price_out)
    cost = Prices().cost_usd(model, {**usage(MILLION // 10, 0), "processing": "batch"})
    assert cost == pytest.approx(price_in / 10)


def test_long_prompts_cost_their_own_price_from_the_first_token() -> None:
    prices = Prices()

    assert prices.cost_usd("gpt-6-luna", usage(272_000, 0)) == pytest.approx(0.0272)
    assert prices.cost_usd("gpt-6-luna", usage(272_001, 0)) == pytest.approx(0.0544002)


@pytest.mark.parametrize("model", ["my-deployment", "qwen3-32b", ""])
def test_an_unknown_price_is_unknown_and_not_zero(model: str) -> None:
    assert Prices().price_of(model) is None
    assert Prices().cost_usd(model, usage(10, 10)) is None


@pytest.mark.parametrize(
    "counts",
    [{}, {"prompt_tokens": 5}, {"prompt_tokens": None, "completion_tokens": 3}, usage(-1, 3)],
)
def test_an_unknown_usage_costs_an_unknown_amount(counts: dict[str, Any]) -> None:
    assert Prices({"m": (1, 1)}).cost_usd("m", counts) is None


def test_a_given_price_wins_and_assumes_no_discount() -> None:
    prices = Prices({"gpt-4o": (1, 2), "my-deployment": (3, 4)})

    cost = prices.cost_usd("gpt-4o", usage(MILLION, MILLION, cached_tokens=MILLION))
    in_batch = {**usage(MILLION, MILLION), "processing": "batch"}
    assert cost == prices.cost_usd("gpt-4o", in_batch) == 3
    found = prices.price_of("my-deployment")
    assert found is not None
    assert (found.source, found.date, found.origin) == ("given", None, "given")


def test_prices_pickle_as_what_was_given() -> None:
    """`Dataset.map` hashes the pickle of a transform: a look-up must not move it."""
    prices = Prices({"b": (1, 2), "a": (0, 0)})
    before = pickle.dumps(prices)
    prices.price_of("gpt-4o")

    assert pickle.dumps(prices) == before
    assert pickle.dumps(Prices({"a": (0, 0), "b": (1, 2)})) == before
    assert pickle.loads(before).given == {"a": (0.0, 0.0), "b": (1.0, 2.0)}  # noqa: S301


def test_a_model_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = Prices()
    first = prices.price_of("gpt-4o")
    monkeypatch.setitem(sys.modules, "genai_prices", None)

    assert prices.price_of("gpt-4o") is first


def test_without_the_extra_prices_are_unknown_and_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)

    assert Prices().price_of("gpt-4o") is None
    assert Prices({"gpt-4o": (1, 2)}).require("gpt-4o").input == 1
    with pytest.raises(SettingError, match=r"--price gpt-4o=IN,OUT.*pip install 'hf-relabel\[pri"):
        Prices().require("gpt-4o")


def test_the_price_table_is_imported_when_a_price_is_asked_for(
    subprocess_env: Callable[..., dict[str, str]],
) -> None:
    code = (
        "import sys, hf_relabel.cli, hf_relabel.transform\n"
        "from hf_relabel import Relabeler\n"
        "Relabeler('paper', prices={'gpt-4o': (1, 2)}, cache='cache')\n"
        "assert 'genai_prices' not in sys.modules\n"
        "from hf_relabel.judges.money import Prices\n"
        "Prices().price_of('gpt-4o')\n"
        "assert 'genai_prices' in sys.modules\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=subprocess_env(),
        cwd=subprocess_env()["HOME"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_prices_are_read_from_the_command_line() -> None:
    assert parse_price("my-model=0.15,0.6") == ("my-model", (0.15, 0.6))
    assert parse_price("a=b=1,2") == ("a=b", (1.0, 2.0))


@pytest.mark.parametrize(
    "text", ["m", "m=", "m=1", "m=1,2,3", "=1,2", "m=a,b", "m=-1,2", "m=nan,1"]
)
def test_other_spellings_of_a_price_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="expected"):
        parse_price(text)
