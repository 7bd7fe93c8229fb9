"""Warm speed: `map` with every verdict in the cache, against an identity `map` over the same rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.questions import Question
from hf_relabel.verdicts import Verdict
from tests.benchmarks import Ratio, ratio_of_turns
from tests.benchmarks.rows import bench_rows

N_ROWS = 5000
_N_RUNS = 9  # of a twentieth of a second each
_BOUND = ">= 0.5"
_PLACES = {"in memory": "/dev/shm", "on a disk": None}  # noqa: S108
"""Where rows, verdicts and what `map` writes lie; on a disk, its writing is measured too."""
_FALSE = {3: Relevance.BETTER, 4: Relevance.WORSE}
"""Which negatives of every second row are false, where some are."""


def measure() -> Iterator[Ratio]:
    """Fill caches, then map the same rows two ways, in turns."""
    disable_progress_bars()
    for place, parent in _PLACES.items():
        if parent is None or Path(parent).is_dir():
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                yield from _measure(folder, place)
    enable_progress_bars()


def _measure(folder: str, place: str) -> Iterator[Ratio]:
    rows = Dataset.from_generator(
        bench_rows, gen_kwargs={"n_rows": N_ROWS}, cache_dir=f"{folder}/rows"
    )
    same = _judged(rows, Path(folder, "same"))
    yield _ratio(f"warm map / identity map, {place}", rows, [same] * _N_RUNS)
    if place != "on a disk":  # which still writes what has just been judged
        firsts = [_judged(rows, Path(folder, f"first-{number}")) for number in range(3)]
        yield _ratio(f"first map after judge / identity map, {place}", rows, firsts)
    for action in ("promote", "drop"):
        relabeler = _judged(rows, Path(folder, "false"), _Judge, action=action)
        name = f"warm map, {action} / identity map, {place}"
        note = f" Every second row has {len(_FALSE)} false negatives."
        yield _ratio(name, rows, [relabeler] * _N_RUNS, note)


class _Judge(ScriptedJudge):
    """Finds two false negatives in every second row, without a table that `map` would hash."""

    def judge(self, question: Question) -> list[Verdict]:
        verdicts = super().judge(question)
        if int(question.query.split()[2]) % 2:
            for rank, (place, relevance) in enumerate(_FALSE.items()):
                verdicts[place] = replace(verdicts[place], relevance=relevance, rank=rank)
        return verdicts


def _judged(
    rows: Dataset, cache: Path, kind: type[ScriptedJudge] = ScriptedJudge, **settings: Any
) -> Relabeler:
    """Return a relabeler as a user has it who judged the rows before, in another process."""

    def relabeler() -> Relabeler:
        judge = kind("bench", answers={}, default=Relevance.NOT_RELEVANT)
        return Relabeler(judge, cache=cache, **settings)

    first = relabeler()
    first.judge(rows)
    first.cache.close()
    return relabeler()


def _ratio(name: str, rows: Dataset, relabelers: list[Relabeler], note: str = "") -> Ratio:
    """Measure maps by relabelers in turn, each against an identity map."""
    turns = iter(relabelers)
    ratio = ratio_of_turns(
        name,
        lambda: _rate(rows, next(turns)),
        lambda: _rate(rows, _identity),
        unit="rows/s",
        bound=_BOUND,
        n_runs=len(relabelers),
        note=f"{N_ROWS} rows of 15 passages x 100 words, every verdict cached.{note}",
    )
    for relabeler in relabelers:
        if relabeler.cascade.stages[0].judge.asked:  # type: ignore[attr-defined]
            raise RuntimeError("the warm map asked the judge")
        relabeler.cache.close()
    return ratio


def _identity(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch


def _rate(rows: Dataset, transform: Callable[[Any], Any]) -> float:
    started = time.perf_counter()
    rows.map(transform, batched=True, load_from_cache_file=False)
    return N_ROWS / (time.perf_counter() - started)
