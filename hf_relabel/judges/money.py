"""Money: what a call costs, by the tokens that its server counted.

Prices come from the caller, or from genai-prices (extra `prices`): a table that ships with its
package, so that nothing is fetched. A price that neither knows is unknown, which is not zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_relabel.errors import SettingError

__all__ = ["LOCAL", "Price", "Prices", "parse_price"]

LOCAL = "local"
"""The price source of a judge that runs in this process: nobody bills its calls."""

_PER = 1_000_000  # prices are for a million tokens
_VERIFIED = re.compile(r"verified on (\d{4}-\d{2}-\d{2})")
_COUNTED_KEYS = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "output": "output_mtok",
    "cache_write": "cache_write_mtok",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model's tokens cost, in USD for a million of them.

    Attributes:
        input: Tokens of the prompt.
        cached_input: Those that the provider had in its prompt cache.
        output: Tokens of the reply, reasoning included.
        cache_write: Tokens of the prompt that the provider put into its cache.
        source: Where the price comes from: "genai-prices 0.2.3", or "given".
        date: The day on which the source last verified it, where it says so.
        above: The number of prompt tokens above which a call costs more, and the price there.
    """

    input: float
    cached_input: float
    output: float
    cache_write: float
    source: str
    date: str | None = None
    above: tuple[int, Price] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Price:
        """Build from what `dataclasses.asdict` made of a price, after a way through JSON."""
        above = values["above"]
        if above is not None:
            above = (above[0], cls.from_json(above[1]))
        return cls(**{**values, "above": above})

    @property
    def origin(self) -> str:
        """The source and its date, as printed."""
        return self.source if self.date is None else f"{self.source}, verified {self.date}"

    def cost_usd(self, usage: Mapping[str, Any]) -> float | None:
        """Return what a call cost, or None where its usage does not tell."""
        prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        if prompt is None or completion is None:
            return None
        details, cached, written = usage.get("prompt_tokens_details"), 0, 0
        if isinstance(details, dict):
            cached = min(_count(details, "cached_tokens") or 0, prompt)
            written = min(_count(details, "cache_write_tokens") or 0, prompt - cached)
        price = self._for(prompt)
        return (
            (prompt - cached - written) * price.input
            + cached * price.cached_input
            + written * price.cache_write
            + completion * price.output
        ) / _PER

    def worst_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the most that a call of at most so many tokens can cost."""
        price = self._for(prompt_tokens)
        dearest = max(price.input, price.cached_input, price.cache_write)
        return (prompt_tokens * dearest + completion_tokens * price.output) / _PER

    def _for(self, prompt_tokens: int) -> Price:
        price = self
        while price.above is not None and prompt_tokens > price.above[0]:
            price = price.above[1]
        return price


class Prices:
    """The prices of models: those given by hand, then those of genai-prices.

    Pickles as the given prices alone. A model is looked up once; genai-prices is imported then.

    Args:
        given: Model → USD per million tokens of (prompt, reply). They hold for every token of a
            prompt, cached or not, and for batches too: no discount is assumed.

    Raises:
        SettingError: A price is negative or no number.
    """

    def __init__(self, given: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.given = {model: _pair(model, pair) for model, pair in sorted((given or {}).items())}
        self._found: dict[tuple[str, bool, str | None], Price | None] = {}

    def price_of(
        self, model: str, *, is_batch: bool = False, service_tier: str | None = None
    ) -> Price | None:
        """Return a model's price today, or None where it is unknown or the extra is missing.

        Args:
            model: The model's name, as it is sent.
            is_batch: The price in the Batch API.
            service_tier: The tier that the call asks for, such as "priority".
        """
        key = (model, is_batch, service_tier)
        if key not in self._found:
            if model in self.given:
                self._found[key] = _given_price(*self.given[model])
            else:
                self._found[key] = _listed_price(model, _context(is_batch, service_tier))
        return self._found[key]

    def price_of_call(self, model: str, usage: Mapping[str, Any]) -> Price | None:
        """Return the price of a call that was made, by the way it went: batches are marked so."""
        return self.price_of(model, is_batch=usage.get("processing") == "batch")

    def cost_usd(self, model: str, usage: Mapping[str, Any]) -> float | None:
        """Return what a call cost, or None where the price or the usage is unknown."""
        if not usage:
            return None
        price = self.price_of_call(model, usage)
        return None if price is None else price.cost_usd(usage)

    def require(self, model: str, *, is_batch: bool = False) -> Price:
        """Return a model's price, or that in the Batch API.

        Raises:
            SettingError: It is unknown, and spending can only be capped where it is known.
        """
        price = self.price_of(model, is_batch=is_batch)
        if price is None:
            raise SettingError(
                f"expected a known price for {model!r} with a cap on the cost, found none. Give it "
                f"in USD per million tokens: `--price {model}=IN,OUT`, or prices={{{model!r}: (IN, "
                f"OUT)}}.{_extra_hint()}"
            )
        return price

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.given = state["given"]
        self._found = {}


def parse_price(text: str) -> tuple[str, tuple[float, float]]:
    """Read `MODEL=IN,OUT`, in USD per million tokens.

    Raises:
        SettingError: The text has another form, or a price is negative.
    """
    model, _, numbers = text.rpartition("=")
    try:
        price_in, price_out = (float(number) for number in numbers.split(","))
    except ValueError:
        model = ""
    if not model:
        raise SettingError(
            f"expected a price as MODEL=IN,OUT in USD per million tokens, found {text!r}. Write "
            "`my-model=0.15,0.6`."
        )
    return model, _pair(model, (price_in, price_out))


def _pair(model: str, pair: tuple[float, float]) -> tuple[float, float]:
    numbers = tuple(pair)
    if len(numbers) != 2 or any(not math.isfinite(n) or n < 0 for n in numbers):
        raise SettingError(
            f"expected two prices of 0 or more for {model!r} (USD per million tokens of prompt and "
            f"reply), found {pair!r}."
        )
    return float(numbers[0]), float(numbers[1])


def _given_price(price_in: float, price_out: float) -> Price:
    return Price(
        input=price_in,
        cached_input=price_in,
        output=price_out,
        cache_write=price_in,
        source="given",
    )


def _context(is_batch: bool, service_tier: str | None) -> dict[str, str]:
    if is_batch:
        return {"processing": "batch"}
    return {} if service_tier is None else {"service_tier": service_tier}


def _listed_price(model: str, context: Mapping[str, str]) -> Price | None:
    try:
        # 0.2 to 0.6 s, for a table that most runs never read.
        import genai_prices
    except ImportError:
        return None
    try:
        found = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=0, output_tokens=0),
            model,
            price_context=context or None,
        )
    except LookupError:
        return None
    verified = _VERIFIED.findall(found.model.price_comments or "")
    return _as_price(
        {name: getattr(found.model_price, key) for name, key in _COUNTED_KEYS.items()},
        source=f"genai-prices {genai_prices.__version__}",
        date=max(verified, default=None),
    )


def _as_price(listed: Mapping[str, Any], *, source: str, date: str | None) -> Price | None:
    """Build a price from what genai-prices lists: plain numbers, or numbers with tiers."""
    if listed["input"] is None or listed["output"] is None:
        return None
    tiers = {name: getattr(value, "tiers", ()) for name, value in listed.items()}
    starts = sorted({tier.start for found in tiers.values() for tier in found})
    price: Price | None = None
    for index in range(len(starts), -1, -1):  # from the dearest down
        start = starts[index - 1] if index else 0
        at: dict[str, float] = {}
        for name, value in listed.items():
            reached = [tier.price for tier in tiers[name] if tier.start <= start]
            plain = getattr(value, "base", value)
            at[name] = float(reached[-1] if reached else plain if plain is not None else -1)
        for name in ("cached_input", "cache_write"):  # not listed: no price of its own
            at[name] = at["input"] if at[name] < 0 else at[name]
        above = None if price is None else (starts[index], price)
        price = Price(**at, source=source, date=date, above=above)
    return price


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if type(value) is int and value >= 0 else None  # True is no count


def _extra_hint() -> str:
    try:
        import genai_prices  # noqa: F401
    except ImportError:
        return " A table of prices comes with: pip install 'hf-relabel[prices]'"
    return ""
