"""Warm speed: `map` with every verdict in the cache, against an identity `map` over the same rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from tests.benchmarks import Ratio, ratio_of_turns
from tests.benchmarks.rows import bench_rows

N_ROWS = 3000


def measure() -> Iterator[Ratio]:
    """Fill a cache, then map the same rows two ways, in turns."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = Dataset.from_generator(
            bench_rows, gen_kwargs={"n_rows": N_ROWS}, cache_dir=f"{folder}/rows"
        )
        judge = ScriptedJudge("bench", answers={}, default=Relevance.NOT_RELEVANT)
        relabeler = Relabeler(judge, cache=Path(folder, "verdicts"))
        relabeler.judge(rows)
        n_asked = len(judge.asked)
        yield ratio_of_turns(
            "warm map / identity map",
            lambda: _rate(rows, relabeler),
            lambda: _rate(rows, _identity),
            unit="rows/s",
            bound=">= 0.5",
            note=f"{N_ROWS} rows of 15 passages x 100 words, every verdict cached.",
        )
        relabeler.cache.close()
    enable_progress_bars()
    if len(judge.asked) != n_asked:
        raise RuntimeError("the warm map asked the judge")


def _identity(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch


def _rate(rows: Dataset, transform: Callable[[Any], Any]) -> float:
    started = time.perf_counter()
    rows.map(transform, batched=True, load_from_cache_file=False)
    return N_ROWS / (time.perf_counter() - started)
