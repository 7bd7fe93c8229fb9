"""Recorded replies of both judges, replayed over HTTP: every count and every label is exact.

The 25 FiQA rows with real gpt-4o-mini and gpt-4o replies lie beside the project, where they are at
hand; rows and replies of the tests' own, of the same shape, run everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from datasets import load_dataset

from hf_relabel import Relabeler
from hf_relabel.judges.models import ShutdownWarning
from tests.chat_server import ChatServer, replay
from tests.rows import KEY, tevatron_rows

FIQA = Path(__file__).resolve().parents[2] / "shared/data/fiqa-judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Rows, what each model replied to each query, and what must come of it."""

    rows: list[dict[str, Any]]
    replies: dict[str, dict[str, str]]
    false_negatives: dict[str, list[str]]
    stages: list[tuple[int, int, int, int]]
    """Rows asked, rows flagged, better, worse; for each stage."""


def own() -> Recorded:
    """Twelve rows: the cheap judge flags every second one, the strong one what the key says."""
    rows = tevatron_rows()
    cheap = {row["query"]: _reply([], [1] if i % 2 == 0 else []) for i, row in enumerate(rows)}
    strong = {}
    for row in rows[::2]:
        texts = [passage["text"] for passage in row["negative_passages"]]
        found = {name: [i for i, text in enumerate(texts, 1) if KEY.get((row["query"], text)) == name]
                 for name in ("better", "worse")}  # fmt: skip
        strong[row["query"]] = _reply(found["better"], found["worse"])
    return Recorded(
        rows=rows,
        replies={"gpt-4o-mini": cheap, "gpt-4o": strong},
        false_negatives={"q0": ["n1-of-0", "n2-of-0"], "q6": ["n1-of-6", "n2-of-6"]},
        stages=[(12, 6, 0, 6), (6, 2, 2, 2)],
    )


def _reply(better: list[int], worse: list[int]) -> str:
    lists = [", ".join(f"Doc ({number})" for number in numbers) for numbers in (better, worse)]
    return (
        "<thinking>\nDoc (1): looked at.\n</thinking>\n<verdict>\n"
        f"<better> Preferred over ground truth: [{lists[0]}] </better>,\n"
        f"<worse> Relevant but not preferred over ground truth: [{lists[1]}] </worse>\n</verdict>"
    )


def fiqa() -> Recorded:
    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (FIQA / name).read_text("utf-8").splitlines()]

    expected = json.loads((FIQA / "expected.json").read_text())
    files = {"gpt-4o-mini": "mini.jsonl", "gpt-4o": "4o.jsonl"}
    return Recorded(
        rows=lines("rows.jsonl"),
        replies={
            model: {line["query"]: line["response"] for line in lines(name)}
            for model, name in files.items()
        },
        false_negatives=expected["false_negatives"],
        stages=[(25, 17, 5, 50), (17, 10, 2, 21)],
    )


@pytest.fixture(params=[own, fiqa] if FIQA.is_dir() else [own])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    found: Recorded = request.param()
    return found


@pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
def test_replayed_replies_promote_exactly_what_the_judges_listed(
    recorded: Recorded,
    chat_server: ChatServer,
    run_cli: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    chat_server.answer = replay(recorded.replies)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in recorded.rows), "utf-8")
    n_false = sum(map(len, recorded.false_negatives.values()))
    n_negatives = sum(len(row["negative_passages"]) for row in recorded.rows)
    shared = ("run", path, "--preset", "paper", "--base-url", chat_server.base_url)

    def run(*args: str) -> dict[str, Any]:
        done = run_cli(*shared, "--cache", "cache", *args, OPENAI_API_KEY="x")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / args[1] / "report.json").read_text())  # type: ignore[no-any-return]

    report = run("--output", "out")

    names = ("rows_asked", "rows_flagged", "better", "worse")
    assert [tuple(stage[name] for name in names) for stage in report["stages"]] == recorded.stages
    assert (report["rows_in"], report["rows_out"]) == (len(recorded.rows), len(recorded.rows))
    assert report["negatives"]["promoted"] == n_false
    assert report["negatives"]["kept"] == n_negatives - n_false
    clean = load_dataset(str(tmp_path / "out"), split="train").to_list()
    assert _added(recorded.rows, clean) == recorded.false_negatives

    # Other actions, the same rows again and `map` all read what is there.
    n_requests = len(chat_server.seen)
    assert run("--output", "again")["negatives"] == report["negatives"]
    assert _files(tmp_path / "again") == _files(tmp_path / "out")
    dropped = run("--output", "drop", "--action", "drop")["negatives"]
    assert (dropped["kept"], dropped["dropped"]) == (n_negatives - n_false, n_false)
    removed = run("--output", "removed", "--action", "remove-row")
    assert removed["rows_out"] == len(recorded.rows) - len(recorded.false_negatives)
    relabeler = Relabeler(
        "paper", base_url=chat_server.base_url, api_key="x", cache=tmp_path / "cache"
    )
    rows = load_dataset("json", data_files=str(path), split="train")
    assert rows.map(relabeler, batched=True).to_list() == clean
    assert rows.map(relabeler, batched=True, num_proc=2).to_list() == clean
    assert len(chat_server.seen) == n_requests


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}


def _added(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, list[str]]:
    added = {}
    for old, new in zip(before, after, strict=True):
        count = len(old["positive_passages"])
        if docids := [passage["docid"] for passage in new["positive_passages"][count:]]:
            added[new["query_id"]] = sorted(docids)
    return added
