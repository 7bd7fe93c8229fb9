"""The commands of scores, as processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from hf_relabel.judges.pair_scorer import PairScorer, probability
from tests.cross_encoders import lit_rows

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lit_rows()))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_then_drop_by_score(
    run_cli: Run, rows_file: Path, cross_encoder: str, tmp_path: Path
) -> None:
    """Both baselines from the command line: scores to distil from, and TopK-PercPos by them."""
    scored = run_cli("score", rows_file, "--model", cross_encoder, "--output", "scored.jsonl")
    dropped = run_cli("drop-by-score", "scored.jsonl", "--output", "clean.jsonl")

    assert (scored.returncode, dropped.returncode) == (0, 0), scored.stderr + dropped.stderr
    assert "6 rows with scores (logit) of trained written to scored.jsonl" in scored.stdout
    assert "6 rows in, 6 out; 24 negatives in, 21 out, 3 gone" in dropped.stdout
    scorer = PairScorer(cross_encoder)
    lines = [lines_of(tmp_path / f"{name}.jsonl") for name in ("scored", "clean")]
    for row, found, clean in zip(lit_rows(), *lines, strict=True):
        texts = [*row["pos"], *row["neg"]]
        (positive, *negatives) = scorer.logits([(row["query"], text) for text in texts])
        assert (found["pos_scores"], found["neg_scores"]) == ([positive], negatives)
        bar = 0.95 * probability(positive)
        pairs = zip(row["neg"], negatives, strict=True)
        assert clean["neg"] == [t for t, s in pairs if probability(s) <= bar]


def test_scores_may_be_probabilities_of_a_shard(
    run_cli: Run, rows_file: Path, cross_encoder: str, tmp_path: Path
) -> None:
    done = run_cli(
        *("score", rows_file, "--model", cross_encoder, "--output", "part.jsonl"),
        *("--scale", "probability", "--shard", "1/3", "--batch-size", "4", "--device", "cpu"),
    )

    assert done.returncode == 0, done.stderr
    rows = lines_of(tmp_path / "part.jsonl")
    assert [row["query"] for row in rows] == [row["query"] for row in lit_rows()[2:4]]
    assert all(0 < score < 1 for row in rows for score in row["neg_scores"])
    told = run_cli("drop-by-score", "part.jsonl", "--output", "clean.jsonl")
    assert told.returncode == 1
    assert "scale='probability'" in told.stderr


def test_a_model_that_cannot_be_loaded_is_a_usage_error(run_cli: Run, rows_file: Path) -> None:
    done = run_cli("score", rows_file, "--model", "no/such-model", "--output", "scored.jsonl")

    assert done.returncode == 1
    assert "expected a cross-encoder that sentence-transformers can load" in done.stderr
    assert "Traceback" not in done.stderr
