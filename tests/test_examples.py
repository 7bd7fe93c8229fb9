"""The training examples run as they stand, on CPU, and say what they relabeled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "name",
    [
        "train_sparse",
        pytest.param("train_bi_encoder", marks=pytest.mark.slow),
        pytest.param("train_cross_encoder", marks=pytest.mark.slow),
    ],
)
def test_the_example_runs(
    name: str, subprocess_env: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / f"examples/{name}.py"), "--device", "cpu", "--cache", "cache"],
        cwd=tmp_path, env=subprocess_env(OMP_NUM_THREADS="1"), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "relabel/dropped" in done.stdout
    cards = list(tmp_path.glob("*/README.md"))
    assert len(cards) == 1
    assert "relabeled while training by hf_relabel" in cards[0].read_text("utf-8")
