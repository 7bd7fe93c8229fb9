"""Training: a command line as a function that trains, benchmark folders as one that evaluates."""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hf_relabel.errors import SettingError, StoppedError
from hf_relabel.evaluate import Benchmark, evaluate, load_benchmark

__all__ = ["BenchmarkScores", "Evaluate", "Train", "TrainCommand"]

_log = logging.getLogger(__name__)


class Train(Protocol):
    """Trains a model; it runs in a process of its own."""

    def __call__(self, data: str, output: str, seed: int) -> str | Path | None:
        """Train on the rows in `data`, and return where the model is; None is `output`."""


class Evaluate(Protocol):
    """Evaluates a model; it runs in the process that trained it."""

    def __call__(self, model: str) -> Mapping[str, float]:
        """Return benchmark → score, higher being better; the same benchmarks for every model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCommand:
    """A training command: `python train.py --data {data} --output {output} --seed {seed}`.

    Attributes:
        template: Split into words as a shell does, but without a shell: for pipes and variables
            write `bash -c '…'`. `{data}`, `{output}` and `{seed}` are filled in, in every word.
        model_in: The folder inside `{output}` where the command leaves the model, if not at its top.

    Raises:
        SettingError: `{data}` or `{output}` is missing, or the quotes do not close.
    """

    template: str
    model_in: str = ""

    def __post_init__(self) -> None:
        missing = [slot for slot in ("{data}", "{output}") if slot not in self.template]
        if missing:
            raise SettingError(
                f"expected {{data}} and {{output}} in the training command, found no "
                f"{' and no '.join(missing)} in {self.template!r}. They become the paths of the "
                "rows to train on, and of the model to write."
            )
        self._words()

    @property
    def has_seed(self) -> bool:
        return "{seed}" in self.template

    def __call__(self, data: str, output: str, seed: int) -> Path:
        """Run the command, and return where its model is.

        Raises:
            StoppedError: It ended with another status than 0, or cannot be started.
        """
        slots = {"{data}": data, "{output}": output, "{seed}": str(seed)}
        words = [_filled(word, slots) for word in self._words()]
        _log.info("$ %s", shlex.join(words))
        try:
            status = subprocess.Popen(words, stdin=subprocess.DEVNULL).wait()  # noqa: S603
        except OSError as error:
            raise StoppedError(
                f"the training command cannot be started: {error}. Check the program {words[0]!r}."
            ) from error
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise StoppedError(f"the training command {how}.")
        return Path(output) / self.model_in

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.template)
        except ValueError as error:
            raise SettingError(
                f"expected a command that splits into words, found {self.template!r}: {error}."
            ) from error


def _filled(word: str, slots: Mapping[str, str]) -> str:
    for slot, value in slots.items():
        word = word.replace(slot, value)
    return word


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScores:
    """Scores a sentence-transformers model on benchmark folders.

    Attributes:
        folders: Each in BEIR's layout, or another that `load_benchmark` reads.
        metric: As `evaluate` names it.
    """

    folders: tuple[str, ...]
    metric: str = "nDCG@10"

    def load(self) -> list[Benchmark]:
        """Load the benchmarks.

        Raises:
            SettingError: There is none, or two have one name.
            SourceError: One cannot be read.
        """
        loaded = [load_benchmark(Path(folder)) for folder in self.folders]
        names = [benchmark.name for benchmark in loaded]
        if not names or len(set(names)) < len(names):
            raise SettingError(
                f"expected benchmarks with names of their own, found {names}. Give each once, from "
                "a folder of another name."
            )
        return loaded

    def __call__(self, model: str) -> dict[str, float]:
        return {
            benchmark.name: evaluate(model, benchmark, metrics=[self.metric]).mean(self.metric)
            for benchmark in self.load()
        }
