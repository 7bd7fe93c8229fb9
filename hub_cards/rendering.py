"""Rendering: facts into Markdown, with templates that fail on any field that is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["END", "START", "insert_block", "render_dataset_card", "render_model_card_note"]

START = "<!-- hf_relabel:start (written at each publish; your own words go outside) -->"
END = "<!-- hf_relabel:end -->"
_BLOCK = re.compile(r"<!-- hf_relabel:start.*?-->.*?<!-- hf_relabel:end -->", re.DOTALL)


def render_dataset_card(facts: Mapping[str, Any]) -> str:
    """Render the body of a dataset's card, between its markers; the YAML header is not part of it.

    Raises:
        jinja2.UndefinedError: A fact that the template prints is missing.
    """
    return _render("dataset_card.md.jinja", facts)


def render_model_card_note(facts: Mapping[str, Any]) -> str:
    """Render what a model's card says of the relabeled rows that it was trained on.

    Args:
        facts: `report` (as in report.json); and `dataset` (Hub id) and `revision`, or empty text.
    """
    return _render("model_card_note.md.jinja", facts)


def insert_block(card: str, block: str, *, before: str = "") -> str:
    """Put a rendered block into a card: in the place of an earlier one, else before a heading.

    Args:
        card: The whole card; it may be empty.
        block: What a render function returned.
        before: A line such as "## Citation", to stand before it; the end of the card otherwise.
    """
    if _BLOCK.search(card):
        return _BLOCK.sub(lambda _: block.strip(), card, count=1)
    place = card.find(f"\n{before}\n") if before else -1
    if place >= 0:
        return f"{card[:place].rstrip()}\n\n{block.strip()}\n{card[place:]}"
    return f"{card.rstrip()}\n\n{block.strip()}\n".lstrip("\n")


def _render(template: str, facts: Mapping[str, Any]) -> str:
    text = _environment().get_template(template).render(**facts, start=START, end=END)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_relabel.hub_cards", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  Markdown, not HTML; cells are escaped by `cell`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(n=_number, percent=_percent, cell=_cell)
    return environment


def _number(value: float) -> str:
    return f"{value:,}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _cell(text: object) -> str:
    """Escape what would break a table's cell."""
    line = re.sub(r"\s+", " ", str(text))
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
