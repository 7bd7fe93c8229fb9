"""Hub cards: the templates of dataset and model cards, and their rendering."""

from __future__ import annotations

__all__: list[str] = []
