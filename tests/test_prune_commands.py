"""`hf-relabel prune`: what users type, and what they see."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prune.trainings import word_rows

Cli = Callable[..., subprocess.CompletedProcess[str]]
TRAIN = f"{sys.executable} train.py --data {{data}} --output {{output}} --seed {{seed}}"
_CLI = "import sys; from hf_relabel.cli import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with rows, a small benchmark, and a training command that fails."""
    lines = [json.dumps(row) for row in word_rows(0, n_rows=40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "bench/qrels").mkdir(parents=True)
    (tmp_path / "bench/corpus.jsonl").write_text('{"_id": "1", "title": "", "text": "cats"}\n')
    (tmp_path / "bench/queries.jsonl").write_text('{"_id": "q", "text": "a cat"}\n')
    (tmp_path / "bench/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    (tmp_path / "train.py").write_text(
        "import sys\nprint('step 1')\nsys.exit('CUDA error: out of memory')\n"
    )
    return tmp_path


def arguments(*more: str) -> list[str]:
    return ["prune", "rows.jsonl", "--train", TRAIN, "--benchmark", "bench", "--output", "p", *more]


def test_a_failing_command_shows_its_last_words_and_exits_with_2(
    folder: Path, run_cli: Cli
) -> None:
    done = run_cli(*arguments("--seeds", "1", "--jobs", "2"), cwd=folder)

    assert done.returncode == 2
    assert "5 failed" in done.stderr
    assert "the training command ended with status 1" in done.stderr
    assert "CUDA error: out of memory" in done.stderr
    assert "p/runs/all/seed-0/log.txt" in done.stderr
    assert "the same command resumes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "p/keep.json").exists()


def test_print_commands_gives_one_for_each_run_and_each_does_one(
    folder: Path, run_cli: Cli
) -> None:
    printed = run_cli(*arguments("--seeds", "2", "--print-commands"), cwd=folder)
    lines = printed.stdout.splitlines()

    assert printed.returncode == 0
    assert len(lines) == 10
    assert len({line.rsplit(" ", 1)[1] for line in lines}) == 10
    assert not (folder / "p/runs").exists()
    one = run_cli(*arguments("--seeds", "2", "--run", "without-c/seed-1"), cwd=folder)
    assert one.returncode == 2
    assert "without c, seed 1: the training command" in one.stderr
    assert [p.parent.name for p in folder.glob("p/runs/*/*/log.txt")] == ["seed-1"]


def test_ctrl_c_ends_the_training_and_says_what_resumes(
    folder: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    (folder / "train.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nos.rename('pid', 'ready')\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", _CLI, *arguments()],
        cwd=folder,
        env=subprocess_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)

    assert process.returncode == 2
    assert "interrupted" in stderr
    assert "the same command resumes: hf-relabel prune rows.jsonl" in " ".join(stderr.split())
    assert not Path(f"/proc/{(folder / 'ready').read_text()}").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--subset-column", "source"], "expected a 'source' column"),
        (["--benchmark", "nowhere"], "nowhere"),
        (["--write", "kept.txt"], ".parquet or .jsonl"),
        (["--run", "without-nli/seed-0"], "expected a run out of"),
    ],
)
def test_a_mistake_exits_with_1_before_anything_is_trained(
    folder: Path, run_cli: Cli, more: list[str], message: str
) -> None:
    done = run_cli(*arguments(*more), cwd=folder)

    assert done.returncode == 1
    assert message in done.stderr
    assert not list(folder.glob("p/runs/*/*/log.txt"))
