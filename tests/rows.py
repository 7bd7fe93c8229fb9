"""Rows for tests: a small dataset in each format, with an answer key of its own."""

from __future__ import annotations

from typing import Any

__all__ = ["KEY", "QUERIES", "tevatron_rows"]

QUERIES = tuple(f"what does plant {index} need to grow" for index in range(12))


def tevatron_rows(n_rows: int = 12, n_negatives: int = 5) -> list[dict[str, Any]]:
    """Return rows whose negative 1 is a false one in every third row, 1 and 2 in every sixth."""
    return [
        {
            "query_id": f"q{index}",
            "query": f"what does plant {index} need to grow",
            "positive_passages": [_passage(index, "p0", f"Plant {index} needs light.")],
            "negative_passages": [
                _passage(index, f"n{number}", f"Text {number} beside plant {index}.")
                for number in range(n_negatives)
            ],
            "subset": "plants",
        }
        for index in range(n_rows)
    ]


def _passage(index: int, name: str, text: str) -> dict[str, str]:
    return {"docid": f"{name}-of-{index}", "text": text, "title": ""}


def _key() -> dict[tuple[str, str], str]:
    key = {}
    for index, query in enumerate(QUERIES):
        if index % 3 == 0:
            key[query, f"Text 1 beside plant {index}."] = "better"
        if index % 6 == 0:
            key[query, f"Text 2 beside plant {index}."] = "worse"
    return key


KEY: dict[tuple[str, str], str] = _key()
"""(query, passage) → "better" or "worse"; whatever is not in it is not relevant."""
