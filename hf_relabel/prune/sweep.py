"""Sweep: leave one out, compare, and when greedy, remove the worst and start over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import SettingError, SourceError, StoppedError
from hf_relabel.prune.effects import Effects, check_scipy, measure_effects
from hf_relabel.prune.report import PruneReport, Round
from hf_relabel.prune.runs import Run, write_json
from hf_relabel.prune.scheduler import Failure, Progress, Scheduler, Workload
from hf_relabel.prune.subsets import Subsets
from hf_relabel.prune.training import Evaluate, Train, TrainCommand

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Sweep", "prune"]

LAYOUT = 1
"""Version of the files in a sweep's folder."""
_MAX_SHOWN = 3


def prune(
    dataset: Dataset,
    *,
    train: Train,
    evaluate: Evaluate,
    output: str | Path,
    seeds: int | Sequence[int] = 3,
    column: str = "subset",
    greedy: bool = False,
    alpha: float = 0.05,
    min_gain: float = 0.001,
    jobs: int | None = None,
    devices: Sequence[str | int] = (),
    file_type: str = "parquet",
    keep_models: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PruneReport:
    """Find the subsets of a training set that do harm, by training without each of them.

    Called again with the same `output` it goes on where it was: what is done is not done again,
    and more seeds add to those that are there.

    Args:
        dataset: The training rows, in any format, with a column that names their subsets.
        train: `train(data, output, seed)` trains on the rows in the file `data` and returns where
            the model is (None: at `output`). It runs in a process of its own, where it arrives
            with what it refers to; a `TrainCommand` is one.
        evaluate: `evaluate(model)` returns benchmark → score, in the same process;
            `BenchmarkScores` is one.
        output: The folder of the sweep.
        seeds: How many (0, 1, …), or which.
        column: The column of the subsets.
        greedy: Remove the worst marked subset and repeat on the rest, until none is marked.
        alpha: The chance that a round marks any subset wrongly.
        min_gain: Smaller gains are not marked.
        jobs: Runs at once; None is one for each device, or one.
        devices: CUDA_VISIBLE_DEVICES of the processes, handed round.
        file_type: What `data` is: "parquet" or "jsonl".
        keep_models: Keep each run's model in its folder.
        progress: Told of every run.

    Raises:
        ColumnError, RowError, SettingError: The data or a setting cannot work.
        StoppedError: Runs failed; the others are done, and calling again tries those again.
        MissingExtraError: scipy is not installed.
    """
    sweep = Sweep(
        dataset,
        train=train,
        evaluate=evaluate,
        output=output,
        seeds=seeds,
        column=column,
        greedy=greedy,
        alpha=alpha,
        min_gain=min_gain,
        file_type=file_type,
        keep_models=keep_models,
    )
    return sweep.run(jobs=jobs, devices=[str(device) for device in devices], progress=progress)


class Sweep:
    """The runs of a leave-one-out, in a folder; the arguments are those of `prune`."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        train: Train,
        evaluate: Evaluate,
        output: str | Path,
        seeds: int | Sequence[int] = 3,
        column: str = "subset",
        greedy: bool = False,
        alpha: float = 0.05,
        min_gain: float = 0.001,
        file_type: str = "parquet",
        keep_models: bool = False,
    ) -> None:
        check_scipy()
        self.seeds = _seeds(seeds)
        if isinstance(train, TrainCommand) and len(self.seeds) > 1 and not train.has_seed:
            raise SettingError(
                "expected {seed} in the training command, as there are several seeds, found none "
                f"in {train.template!r}. Without it all of them train alike, and noise is unknown."
            )
        if not 0 < alpha < 1 or min_gain < 0:
            raise SettingError(
                "expected alpha between 0 and 1 and min_gain of 0 or more, found "
                f"{alpha} and {min_gain}."
            )
        self.folder = Path(output)
        self._subsets = Subsets(dataset, column=column, file_type=file_type)
        self._greedy, self._alpha, self._min_gain = greedy, alpha, min_gain
        self._workload = Workload(
            subsets=self._subsets,
            train=train,
            evaluate=evaluate,
            folder=self.folder,
            keep_models=keep_models,
        )
        self._open_folder()

    @property
    def n_rows(self) -> int:
        """Rows with nothing left out."""
        return self._subsets.n_rows()

    def kept_rows(self, report: PruneReport) -> Dataset:
        """Return the rows of the subsets that a report keeps, in their order."""
        return self._subsets.without(report.drop)

    def runs(self) -> list[Run]:
        """Return the runs of all rounds so far: those of the last one may be open.

        Seed by seed: a first picture is there after one seed.
        """
        _, open_ = self._rounds()
        return open_

    def missing(self) -> list[Run]:
        """Return the runs that have no result yet, of the round that is under way."""
        return [run for run in self.runs() if self._workload.folder_of(run).read() is None]

    def find(self, name: str) -> Run:
        """Return a run of the current round by its name.

        Raises:
            SettingError: There is none of that name.
        """
        runs = {run.name: run for run in self.runs()}
        if name not in runs:
            raise SettingError(
                f"expected a run out of {list(runs)}, found {name!r}. A greedy sweep has other runs "
                "in every round: print the commands again."
            )
        return runs[name]

    def run(
        self,
        *,
        jobs: int | None = None,
        devices: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> PruneReport:
        """Do what is missing, and write and return the report.

        Raises:
            StoppedError: Runs failed; the others are done.
        """
        while missing := self.missing():
            self.execute(missing, jobs=jobs, devices=devices, progress=progress)
        Scheduler(self._workload).tidy(self.runs())
        report = self.report()
        write_json(self.folder / "keep.json", report.to_json())
        _write_text(self.folder / "table.md", report.table())
        return report

    def execute(
        self,
        runs: Sequence[Run],
        *,
        jobs: int | None = None,
        devices: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Carry out some runs.

        Raises:
            StoppedError: Some of them failed; the others are done.
        """
        scheduler = Scheduler(self._workload, n_jobs=jobs, devices=devices, progress=progress)
        if failures := scheduler.execute(runs):
            raise StoppedError(_failed(failures, len(runs)))

    def report(self) -> PruneReport:
        """Return the report of the runs that are done.

        Raises:
            StoppedError: Some are not.
        """
        if missing := self.missing():
            raise StoppedError(
                f"expected results of all runs, found none of {len(missing)}, the first {missing[0]}."
                " Run the sweep again; it does those that are missing."
            )
        rounds, _ = self._rounds()
        last = rounds[-1]
        marked = last.effects.marked
        drop = (*last.removed, *(() if self._greedy and not marked else marked))
        if self._greedy and marked:
            drop = (*last.removed, marked[0])
        keep = tuple(name for name in self._subsets.counts if name not in drop)
        is_tested = self._greedy or len(drop) <= 1
        return PruneReport(rounds=tuple(rounds), keep=keep, drop=drop, is_tested=is_tested)

    def _rounds(self) -> tuple[list[Round], list[Run]]:
        """Return the rounds that are done, and the runs of the one that is under way or the last."""
        rounds: list[Round] = []
        removed: tuple[str, ...] = ()
        while True:
            runs = self._round_runs(removed)
            effects = self._effects(removed)
            if effects is None:
                return rounds, runs
            counts = {n: c for n, c in self._subsets.counts.items() if n not in removed}
            rounds.append(Round(removed=removed, counts=counts, effects=effects))
            # Of two subsets one can go; the last one has nothing to be compared with.
            if not self._greedy or not effects.marked or len(counts) <= 2:
                return rounds, runs
            removed = (*removed, effects.marked[0])

    def _round_runs(self, removed: tuple[str, ...]) -> list[Run]:
        left = [name for name in self._subsets.counts if name not in removed]
        arms = [removed, *((*removed, name) for name in left)]
        return [Run(left_out=arm, seed=seed) for seed in self.seeds for arm in arms]

    def _effects(self, removed: tuple[str, ...]) -> Effects | None:
        """Compare the arms of a round, or return None where one is not done."""
        baseline = self._scores(removed)
        left = [name for name in self._subsets.counts if name not in removed]
        arms = {name: self._scores((*removed, name)) for name in left}
        if any(len(scores) < len(self.seeds) for scores in (baseline, *arms.values())):
            return None
        return measure_effects(baseline, arms, alpha=self._alpha, min_gain=self._min_gain)

    def _scores(self, left_out: tuple[str, ...]) -> dict[int, dict[str, float]]:
        runs = [Run(left_out=left_out, seed=seed) for seed in self.seeds]
        found = [self._workload.folder_of(run).read() for run in runs]
        return {r.run.seed: dict(r.scores) for r in found if r is not None}

    def _open_folder(self) -> None:
        """Make the folder, or see that it holds a sweep of the same data, training and benchmarks."""
        settings = {
            "layout": LAYOUT,
            "rows": self._subsets.fingerprint,
            "subsets": self._subsets.counts,
            "train": _described(self._workload.train),
            "evaluate": _described(self._workload.evaluate),
        }
        settings = json.loads(json.dumps(settings))
        path = self.folder / "sweep.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_json(path, settings)
        except OSError as error:
            raise SourceError(
                f"expected a folder to write to, found {str(self.folder)!r}: {error}."
            ) from error
        found = json.loads(path.read_text("utf-8"))
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise SettingError(
                f"expected the sweep that {str(self.folder)!r} was begun with, found another "
                f"{' and another '.join(changed)}: {settings[name]!r}, not {found.get(name)!r}. "
                "Results of both cannot be compared: give another output folder, or the same "
                "settings."
            )


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise SettingError(f"expected one seed or more, each once, found {seeds!r}.")
    return chosen


def _described(function: Any) -> Any:
    """Describe a training or an evaluation, so that another one is told from it by its settings."""
    kind = type(function)
    if is_dataclass(function) and not isinstance(function, type):
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", **asdict(function)}
    named = function if hasattr(function, "__qualname__") else kind
    return f"{named.__module__}.{named.__qualname__}"


def _failed(failures: Sequence[Failure], n_runs: int) -> str:
    shown = "\n".join(str(failure) for failure in failures[:_MAX_SHOWN])
    more = f"\n… and {len(failures) - _MAX_SHOWN} more." if len(failures) > _MAX_SHOWN else ""
    return (
        f"expected results of {n_runs} runs, found {n_runs - len(failures)}; {len(failures)} "
        f"failed.\n{shown}{more}\nThe others are kept; the same command resumes with those that "
        "failed."
    )


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
