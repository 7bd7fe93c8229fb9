"""Several ranks that gather their batches equal one process with the whole batch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_relabel.callbacks import VerdictIndex

from tests.callbacks import ddp
from tests.callbacks.models import key, relabeler, rows_as, tiny_bert
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
Env = Callable[..., dict[str, str]]


def test_two_ranks_equal_one(subprocess_env: Env, tmp_path: Path) -> None:
    """Four directions; false negatives, known positives and a silent row on the other rank too."""
    bert = tiny_bert(tmp_path / "bert")
    answered = relabeler(tmp_path)
    answered.judge(rows_as("n-tuple"))
    index = VerdictIndex.build(answered, directory=tmp_path / "index")
    assert index.n_pairs
    arguments = [bert, str(tmp_path), str(tmp_path / "index"), "promote"]

    ddp.main(*arguments, n_ranks=1)
    _run(2, [*arguments, "2"], subprocess_env)

    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    whole, halves = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert float((whole - halves).norm() / whole.norm()) <= 1e-5


def test_counts_are_summed_over_ranks(subprocess_env: Env, tmp_path: Path) -> None:
    """Each rank edits its own share; one of them builds the index for both."""
    bert = tiny_bert(tmp_path / "bert")
    relabeler(tmp_path)

    _run(2, ["train", bert, str(tmp_path), "drop"], subprocess_env)

    line = json.loads((tmp_path / "log.json").read_text())
    assert line["relabel/dropped"] == len(key())
    assert line["relabel/coverage"] == 1.0


def _run(n_ranks: int, arguments: list[str], subprocess_env: Env) -> None:
    """Start the ranks as a launcher does, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.callbacks.ddp", *arguments],
            env=subprocess_env(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n_ranks)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
