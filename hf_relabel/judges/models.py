"""What is known of models by name: the parameters they take, and when they are shut down.

The facts are data (`data/models.toml`), so that a model's end is an edit of a table.
"""

from __future__ import annotations

import re
import tomllib
import warnings
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["ModelProfile", "ShutdownWarning", "profile_of", "shutdown_date", "warn_of_shutdown"]

_WARN_DAYS = 90


class ShutdownWarning(UserWarning):
    """A model will soon answer no more; replies in the cache stay good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """How a family of models wants to be asked.

    Attributes:
        drop: Parameters that it refuses.
        add: Parameters that it needs.
    """

    drop: tuple[str, ...] = ()
    add: dict[str, Any] = field(default_factory=dict)


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("hf_relabel").joinpath("data", "models.toml").read_text("utf-8"))


def profile_of(model: str) -> ModelProfile:
    """Return the first profile whose pattern fits a model's name, or the plain one."""
    for entry in _table()["profile"]:
        if re.search(entry["match"], model):
            return ModelProfile(drop=tuple(entry.get("drop", ())), add=entry.get("add", {}))
    return ModelProfile()


def shutdown_date(model: str) -> date | None:
    """Return the day on which a model's provider shuts it down, where that is known."""
    found: date | None = _table()["shutdown"].get(model)
    return found


def warn_of_shutdown(model: str, *, today: date | None = None) -> None:
    """Warn when a model has less than 90 days left."""
    end = shutdown_date(model)
    if end is None:
        return
    days = (end - (today or datetime.now(UTC).date())).days
    if days <= _WARN_DAYS:
        when = f"in {days} days" if days > 0 else "in the past"
        warnings.warn(
            f"{model} is shut down on {end} ({when}). Replies in the cache stay good; for new data "
            'take a model that stays, or the preset "current".',
            ShutdownWarning,
            stacklevel=3,
        )
