"""What the tests of publishing share: a judged run's folder, and a way to publish it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.files import write_relabeled
from hf_relabel.hub.build import Built, build
from hf_relabel.hub.push import Pushed, PushSettings, push
from hf_relabel.hub.retries import Retries
from hf_relabel.hub.settings import BuildSettings
from tests.rows import KEY, tevatron_rows

REPO = "me/plants"


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def relabeler(tmp_path: Path) -> Relabeler:
    """Two stages: a cheap judge that flags one passage too many, and one that knows."""
    script: Any = {pair: Relevance(name) for pair, name in KEY.items()}
    text = "Text 1 beside plant 4."
    eager = {**script, ("what does plant 4 need to grow", text): Relevance.WORSE}
    judges = [
        ScriptedJudge("cheap", answers=eager, default=Relevance.NOT_RELEVANT),
        ScriptedJudge("strong", answers=script, default=Relevance.NOT_RELEVANT),
    ]
    return Relabeler(judges, cache=tmp_path / "cache")


@pytest.fixture
def make_run(relabeler: Relabeler, tmp_path: Path) -> Callable[..., Path]:
    """Judge some rows and write what `hf-relabel run` writes."""

    def make(n_rows: int = 12, name: str = "run", n_negatives: int = 5) -> Path:
        rows = Dataset.from_list(tevatron_rows(n_rows, n_negatives))
        relabeler.judge(rows)
        write_relabeled(relabeler, {"train": rows}, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def build_rows(make_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Built]:
    """Build a folder; without plots, which take a second, unless asked for."""

    def make(n_rows: int = 12, configs: Sequence[str] = (), **settings: Any) -> Built:
        values = {"license": "cc-by-4.0", "languages": ["en"], "has_plots": False, **settings}
        chosen = BuildSettings(configs=configs, **values)
        return build(make_run(n_rows), tmp_path / "built", REPO, chosen)

    return make


class Waits(list[float]):
    """How long each retry would have waited."""

    @property
    def retries(self) -> Retries:
        return Retries(max_attempts=4, sleep=self.append)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def push_built(waits: Waits) -> Callable[..., Pushed]:
    """Push without waiting between attempts."""

    def send(built: Built, **settings: Any) -> Pushed:
        return push(built, PushSettings(retries=waits.retries, **settings))

    return send
