"""Runs: one training with one seed and some subsets left out, and what is kept of it on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Result", "Run", "RunFolder", "write_json"]

_MAX_NAME = 80
"""Names of folders end here; 255 bytes is what most file systems allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        left_out: The subsets that are not trained on, sorted.
        seed: What the training command is given.
    """

    left_out: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", tuple(sorted(self.left_out)))

    @property
    def name(self) -> str:
        """Its folder below `runs/`, and its name on the command line: "without-nli/seed-0"."""
        return f"{_arm_name(self.left_out)}/seed-{self.seed}"

    def __str__(self) -> str:
        what = f"without {', '.join(self.left_out)}" if self.left_out else "nothing left out"
        return f"{what}, seed {self.seed}"


def _arm_name(left_out: Sequence[str]) -> str:
    if not left_out:
        return "all"
    plain = "+".join(left_out)
    name = "without-" + re.sub(r"[^A-Za-z0-9._+-]+", "-", plain)[:_MAX_NAME]
    if name == f"without-{plain}" and not any("+" in subset for subset in left_out):
        # Two names that differ in case alone are one folder on some file systems.
        return name if name == name.lower() else f"{name}-{_digest(left_out)}"
    return f"{name}-{_digest(left_out)}"


def _digest(left_out: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(left_out)).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        run: The run.
        scores: Benchmark → score.
    """

    run: Run
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The files of one run; the result appears whole or not at all.

    Attributes:
        path: The folder: `result.json`, `log.txt`, and an `attempt-…` folder while it runs.
        run: Whose folder it is.
    """

    path: Path
    run: Run

    @property
    def log(self) -> Path:
        """All that the training and the evaluation printed, of every attempt."""
        return self.path / "log.txt"

    @property
    def lock(self) -> Path:
        """Held by the process that has the run in work."""
        return self.path / "lock"

    @property
    def failure(self) -> Path:
        """What the last attempt failed of."""
        return self.path / "failure.json"

    @property
    def result(self) -> Path:
        """The scores."""
        return self.path / "result.json"

    def read(self) -> Result | None:
        """Return the result, or None where the run is not done."""
        if not self.result.is_file():
            return None
        found = json.loads(self.result.read_text("utf-8"))
        return Result(run=self.run, scores=found["scores"])

    def trained_attempt(self) -> Path | None:
        """Return the attempt that has a trained model which waits to be evaluated, if there is."""
        found = sorted(self.path.glob("attempt-*/trained.json"))
        return found[0].parent if found else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that appears when it is whole."""
    # By process: two that write the same file must not share a half-written one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)
