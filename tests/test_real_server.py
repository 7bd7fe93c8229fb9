"""A real server, not a double: llama.cpp and a small model, at the other end of `hf-relabel run`.

It tests the road there and back, not the labels: a model of 135M parameters judges by chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from urllib.request import urlopen

import pyarrow.parquet
import pytest

from hf_relabel.cache import Call, VerdictCache
from hf_relabel.questions import Reply
from tests.conftest import ROOT

START_S = 120
Run = Callable[..., CompletedProcess[str]]

# Query, positive, negatives.
FACTS = [
    ("legs of a spider", "A spider has eight legs.", ["Spiders spin.", "All spiders have 8 legs."]),
    (
        "color of ripe lemons",
        "Ripe lemons are yellow.",
        ["Lemons grow.", "A ripe lemon is yellow."],
    ),
    ("who wrote Hamlet", "Shakespeare wrote it.", ["Hamlet is a play.", "Hamlet by Shakespeare."]),
    ("boiling point of water", "It is 100 degrees.", ["Water is wet.", "Ice floats on water."]),
    ("largest planet", "Jupiter.", ["Mars is red.", "Nothing beats Jupiter.", "Dogs bark."]),
]


class Server:
    """A llama.cpp server in a process of its own, and its own count of what it did."""

    def __init__(self, url: str) -> None:
        self.base_url = f"{url}/v1"
        self._url = url

    def get(self, path: str) -> str:
        with urlopen(self._url + path, timeout=10) as answer:  # noqa: S310  loopback
            return answer.read().decode()  # type: ignore[no-any-return]

    def tokens(self) -> dict[str, int]:
        """Count the tokens that it read and wrote since it started."""
        lines = [line.split() for line in self.get("/metrics").splitlines() if line[:1] != "#"]
        values = {name.removeprefix("llamacpp:"): float(value) for name, value in lines}
        prompt = values["prompt_tokens_total"] + values["prompt_tokens_cached_total"]
        return {"prompt": int(prompt), "completion": int(values["tokens_predicted_total"])}


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Server]:
    said, log = tmp_path / "address", tmp_path / "server.log"
    with (
        said.open("w") as out,
        log.open("w") as err,
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/llama_server.py")],
            stdin=subprocess.PIPE, stdout=out, stderr=err,
        ) as process,
    ):  # fmt: skip
        try:
            yield _wait(process, said, log)
        finally:
            process.kill()


def _wait(process: subprocess.Popen[bytes], said: Path, log: Path) -> Server:
    """Wait until the server answers; say what it said where it does not."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if (address := said.read_text()).endswith("\n"):
            server = Server(address.strip())
            try:
                server.get("/health")
            except OSError:  # not listening yet, or 503 while the model loads
                pass
            else:
                return server
        time.sleep(0.05)
    raise AssertionError(f"no llama.cpp server within {START_S} s: {log.read_text()[-3000:]}")


@pytest.fixture
def relabel(run_cli: Run, llama: Server, tmp_path: Path) -> Run:
    """Run `hf-relabel run` on some rows against the server."""

    def run(rows: list[dict[str, Any]], output: str) -> CompletedProcess[str]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_cli(
            *("run", "rows.jsonl", "--output", output, "--cache", "cache"),
            *("--base-url", llama.base_url, "--model", "local", "--max-concurrency", "1"),
            *("--protocol", "json"),
            OPENAI_API_KEY="x",
            timeout_s=300,
        )

    return run


def _row(number: int, query: str, positive: str, negatives: list[str]) -> dict[str, Any]:
    return {
        "query_id": f"q{number}",
        "query": query,
        "positive_passages": [{"docid": "p", "text": positive, "title": ""}],
        "negative_passages": [
            {"docid": f"n{i}", "text": text, "title": ""} for i, text in enumerate(negatives)
        ],
    }


def _written(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    report = json.loads((folder / "report.json").read_text())
    return report, pyarrow.parquet.read_table(folder / "decisions.parquet").to_pylist()


def _bought(folder: Path) -> tuple[list[Call], list[Reply]]:
    """Return the calls with a usable reply, and all replies, the unusable ones too."""
    with closing(VerdictCache(folder)) as cache:
        calls = list(cache.calls())
        unusable = [failure.reply for failure in cache.all_failures() if failure.reply]
    return calls, [call.reply for call in calls] + unusable


def _tokens(replies: list[Reply]) -> dict[str, int]:
    kinds = ("prompt", "completion")
    return {kind: sum(reply.usage[f"{kind}_tokens"] for reply in replies) for kind in kinds}


def test_a_real_server_judges_under_the_schema(relabel: Run, llama: Server, tmp_path: Path) -> None:
    """Every passage gets a verdict or a named reason, and no reply is bought twice."""
    rows = [_row(number, *fact) for number, fact in enumerate(FACTS)]

    done = relabel(rows, "out")

    assert done.returncode == 0, done.stderr
    report, decisions = _written(tmp_path / "out")
    assert len(decisions) == sum(len(negatives) for _, _, negatives in FACTS)
    decided = [decision for decision in decisions if decision["relevance"] != "undecided"]
    assert all(decision["grade"] in range(4) for decision in decided)
    open_ones = [decision for decision in decisions if decision not in decided]
    assert report["undecided_reasons"] == Counter(decision["reason"] for decision in open_ones)
    assert set(report["undecided_reasons"]) <= {"truncated", "context_length"}
    assert report["negatives"]["undecided"] == len(open_ones)
    assert report["rows_in"] == len(rows)
    assert report["rows_out"] == len(rows) - sum(report["rows_dropped"].values())

    # Every whole reply has the schema's form. That is the server's grammar at work: to the same
    # prompt without a schema this model answers in prose, 10 times out of 10.
    calls, replies = _bought(tmp_path / "cache")
    assert calls
    for call in calls:
        entries = json.loads(call.reply.text)
        assert list(entries) == [f"doc_{i}" for i in range(1, len(call.passages) + 1)]
        assert all(entry.keys() == {"reason", "grade"} for entry in entries.values())
    # A reply cut short is the one thing that the schema does not prevent.
    assert {reply.finish_reason for reply in replies} <= {"stop", "length"}
    # No double counts like this: the server's own tokens, to the last one.
    assert _tokens(replies) == llama.tokens()
    assert llama.tokens()["completion"] > 0

    assert relabel(rows, "again").returncode == 0

    report, decisions = _written(tmp_path / "again")
    assert [decision for decision in decisions if decision in decided] == decided
    # Only rows without a verdict are asked again: a question and a repair question each.
    n_open_rows = len({decision["query_id"] for decision in open_ones})
    assert report["stages"][0]["calls"] <= 2 * n_open_rows
    kept, replies = _bought(tmp_path / "cache")
    assert [call for call in kept if call in calls] == calls
    assert _tokens(replies) == llama.tokens()


def test_a_passage_beyond_the_servers_context_is_undecided_by_that_name(
    relabel: Run, llama: Server, tmp_path: Path
) -> None:
    """llama.cpp's refusal has a code and words of its own, unlike OpenAI's."""
    done = relabel([_row(0, "legs of a spider", "Eight.", ["It walks. " * 400])], "out")

    assert done.returncode == 0, done.stderr
    report, (decision,) = _written(tmp_path / "out")
    assert (decision["relevance"], decision["action"]) == ("undecided", "keep")
    assert report["undecided_reasons"] == {"context_length": 1}
    assert llama.tokens()["completion"] == 0
