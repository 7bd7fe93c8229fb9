"""Rows for benchmarks: 15 passages of 100 words each, all different."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

__all__ = ["bench_rows"]

_WORDS = [f"word{number}" for number in range(2000)]


def bench_rows(n_rows: int, *, n_negatives: int = 15, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows in Tevatron format, one after another, so that none is kept."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(_WORDS, k=100))

    for index in range(n_rows):
        yield {
            "query_id": f"{seed}-{index}",
            "query": f"query {seed} {index} {' '.join(rng.choices(_WORDS, k=6))}",
            "positive_passages": [{"docid": f"p{index}", "text": text(), "title": ""}],
            "negative_passages": [
                {"docid": f"n{index}-{number}", "text": text(), "title": ""}
                for number in range(n_negatives)
            ],
            "subset": "bench",
        }
