"""Judging by an engine that no network reaches: questions out as a file, replies in as a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from typer.testing import CliRunner

from hf_relabel import Relabeler
from hf_relabel.batch_exchange import export_requests, import_replies
from hf_relabel.cli import app
from hf_relabel.errors import SourceError
from hf_relabel.judges.models import ShutdownWarning
from tests.chat_answers import Body
from tests.chat_server import ChatServer, from_key
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
TRUTH = from_key(KEY)
ROWS = DatasetDict({"train": Dataset.from_list(tevatron_rows())})


def run_batch(source: Path, target: Path, answer: Callable[[Body], Any] = TRUTH) -> None:
    """Answer a file as `vllm run-batch` does; its lines come in any order."""
    lines = []
    for line in source.read_text("utf-8").splitlines():
        request = json.loads(line)
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        message = {"role": "assistant", "content": str(answer(request["body"]))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {
            "model": request["body"]["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 9},
        }
        response = {"status_code": 200, "request_id": "r", "body": body}
        reply = {"id": "v", "custom_id": request["custom_id"], "response": response, "error": None}
        lines.append(json.dumps(reply) + "\n")
    random.Random(0).shuffle(lines)
    target.write_text("".join(lines), "utf-8")


def offline(tmp_path: Path, **settings: Any) -> Relabeler:
    """A relabeler whose address answers nothing."""
    return Relabeler(
        "paper", base_url="http://127.0.0.1:1/v1", api_key="x", cache=tmp_path / "cache", **settings
    )


def test_two_rounds_judge_everything_without_a_call(tmp_path: Path) -> None:
    relabeler, sent, got = offline(tmp_path), tmp_path / "ask.jsonl", tmp_path / "replies.jsonl"

    first = export_requests(relabeler, ROWS, sent)
    run_batch(sent, got)
    one = import_replies(relabeler, ROWS, got)
    second = export_requests(relabeler, ROWS, sent)
    run_batch(sent, got)
    two = import_replies(relabeler, ROWS, got)

    assert (first, second) == ({sent: 12}, {sent: 4})
    assert (one.n_lines, one.n_read, one.n_unusable, one.n_open) == (12, 12, 0, 4)
    assert (two.n_lines, two.n_read, two.n_unusable, two.n_open) == (4, 4, 0, 0)
    assert export_requests(relabeler, ROWS, sent) == {}
    with ChatServer(from_key(KEY)) as server:
        cache = tmp_path / "plain"
        plain = Relabeler("paper", base_url=server.base_url, api_key="x", cache=cache)
        expected = ROWS["train"].map(plain, batched=True).to_list()
    assert relabeler.judge(ROWS).n_calls == 0
    assert ROWS["train"].map(relabeler, batched=True).to_list() == expected


def test_replies_to_every_stage_in_one_file_are_read_at_once(tmp_path: Path) -> None:
    relabeler, sent, got = offline(tmp_path), tmp_path / "ask.jsonl", tmp_path / "replies.jsonl"
    export_requests(relabeler, ROWS, sent)
    run_batch(sent, got)
    import_replies(relabeler, ROWS, got)
    export_requests(relabeler, ROWS, sent)
    run_batch(sent, tmp_path / "more.jsonl")
    with got.open("a") as file:
        file.write((tmp_path / "more.jsonl").read_text())

    fresh = offline(tmp_path / "elsewhere")
    counts = import_replies(fresh, ROWS, got)

    assert (counts.n_lines, counts.n_read, counts.n_open) == (16, 16, 0)


def test_unreadable_replies_and_faults_leave_their_questions_open(tmp_path: Path) -> None:
    relabeler, sent, got = offline(tmp_path), tmp_path / "ask.jsonl", tmp_path / "replies.jsonl"
    export_requests(relabeler, ROWS, sent)
    run_batch(
        sent, got, lambda body: "hm" if "plant 3 need" in str(body["messages"]) else TRUTH(body)
    )
    *lines, last = got.read_text().splitlines()
    fault = {"custom_id": json.loads(last)["custom_id"], "response": None, "error": "engine died"}
    got.write_text("\n".join([*lines, json.dumps(fault), '{"torn']))

    counts = import_replies(relabeler, ROWS, got)
    again = import_replies(relabeler, ROWS, got)

    assert (counts.n_lines, counts.n_read, counts.n_unusable) == (12, 10, 2)
    assert (again.n_read, again.n_unusable) == (0, 0)
    reasons = sorted(failure.reason for failure in relabeler.cache.all_failures())
    assert reasons == ["batch_error", "no_verdict"]
    open_again = export_requests(relabeler, ROWS, sent)
    assert {path.name: count for path, count in open_again.items()}["ask-gpt-4o-mini.jsonl"] == 2


def test_a_file_that_is_no_reply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "q"}\n')

    with pytest.raises(SourceError, match="no line with a custom_id"):
        import_replies(offline(tmp_path), ROWS, path)
    with pytest.raises(SourceError, match="expected a file of replies"):
        import_replies(offline(tmp_path), ROWS, tmp_path / "missing.jsonl")


def test_a_long_row_is_asked_in_several_requests(tmp_path: Path) -> None:
    rows = DatasetDict({"train": Dataset.from_list(tevatron_rows(1, n_negatives=60))})
    relabeler, sent, got = offline(tmp_path), tmp_path / "ask.jsonl", tmp_path / "replies.jsonl"

    assert export_requests(relabeler, rows, sent) == {sent: 3}
    run_batch(sent, got)
    kept = got.read_text().splitlines(keepends=True)
    got.write_text("".join(kept[:2]))  # one part's reply is missing

    assert import_replies(relabeler, rows, got).n_open == 1
    assert export_requests(relabeler, rows, sent) == {sent: 1}


def test_the_command_line_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in tevatron_rows())
    Path("rows.jsonl").write_text(rows)
    options = ["--cache", "cache", "--model", "local", "--protocol", "json"]

    def run(*args: str) -> str:
        done = CliRunner().invoke(app, [*args, *options])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    made = run("verdicts", "export-batch", "rows.jsonl", "ask.jsonl")
    assert made == "12 requests written to ask.jsonl."
    run_batch(Path("ask.jsonl"), Path("replies.jsonl"))
    read = run("verdicts", "import-batch", "rows.jsonl", "replies.jsonl")
    assert read.endswith("12 replies read, 0 unusable. Rows with open questions: 0.")
    none = run("verdicts", "export-batch", "rows.jsonl", "ask.jsonl")
    assert none.startswith("Nothing is open")
    assert "6 promoted" in run("run", "rows.jsonl", "--output", "out")
    assert len(load_dataset("out", split="train")) == 12
