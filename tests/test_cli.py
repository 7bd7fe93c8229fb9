"""The command line: real processes, real HTTP, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from tests.chat_server import ChatServer, from_key
from tests.rows import KEY, tevatron_rows

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tevatron_rows()))
    return path


@pytest.fixture
def relabel(run_cli: Run, chat_server: ChatServer, rows_file: Path, tmp_path: Path) -> Run:
    """Run `hf-relabel run` on the rows, against the server, with a cache of the test's own."""
    chat_server.answer = from_key(KEY)

    def run(*args: str, source: str | Path = rows_file, **env: str) -> CompletedProcess[str]:
        return run_cli(
            *("run", source, "--output", "out", "--cache", tmp_path / "cache"),
            *("--base-url", chat_server.base_url, *args),
            **{"OPENAI_API_KEY": "x", **env},
        )

    return run


def output(tmp_path: Path, folder: str = "out") -> Dataset:
    return load_dataset(str(tmp_path / folder), split="train")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_run_gives_what_map_gives_and_a_second_run_asks_nothing(
    relabel: Run, chat_server: ChatServer, rows_file: Path, tmp_path: Path
) -> None:
    assert relabel().returncode == 0
    n_requests = len(chat_server.seen)
    first = (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes()
    decisions = (tmp_path / "out/decisions.parquet").read_bytes()

    again = relabel()

    assert len(chat_server.seen) == n_requests
    assert (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes() == first
    assert (tmp_path / "out/decisions.parquet").read_bytes() == decisions
    assert "(16 from the cache)" in again.stdout
    script: Any = {pair: Relevance(name) for pair, name in KEY.items()}
    judge = ScriptedJudge("j", answers=script, default=Relevance.NOT_RELEVANT)
    rows = load_dataset("json", data_files=str(rows_file), split="train")
    expected = rows.map(Relabeler(judge, cache=tmp_path / "other"), batched=True)
    assert output(tmp_path).to_list() == expected.to_list()


def test_the_report_counts_every_stage(relabel: Run, tmp_path: Path, run_cli: Run) -> None:
    relabel()

    report = read_json(tmp_path / "out/report.json")

    assert (report["rows_in"], report["rows_out"], report["rows_dropped"]) == (12, 12, {})
    assert report["negatives"] == {
        "seen": 60, "kept": 54, "dropped": 0, "promoted": 6, "undecided": 0
    }  # fmt: skip
    cheap, strong = report["stages"]
    asked = ["rows_asked", "rows_flagged", "better", "worse", "undecided", "calls", "cached"]
    assert [cheap[name] for name in asked] == [12, 4, 4, 2, 0, 12, 0]
    assert [strong[name] for name in asked] == [4, 4, 4, 2, 0, 4, 0]
    assert cheap["prompt_tokens"] > 12 * 100
    printed = run_cli("report", "out", "--json")
    assert json.loads(printed.stdout) == report


@pytest.mark.parametrize(
    ("args", "n_rows", "n_negatives"),
    [(["--action", "drop"], 12, 54), (["--action", "remove-row"], 8, 40), (["--limit", "1"], 1, 3)],
)
def test_other_actions_make_no_call(
    relabel: Run, chat_server: ChatServer, tmp_path: Path,
    args: list[str], n_rows: int, n_negatives: int,
) -> None:  # fmt: skip
    relabel()
    n_requests = len(chat_server.seen)

    assert relabel(*args).returncode == 0

    rows = output(tmp_path)
    assert len(rows) == n_rows
    assert sum(len(row["negative_passages"]) for row in rows) == n_negatives
    assert len(chat_server.seen) == n_requests


def test_json_protocol_sends_a_schema_and_gives_the_same_labels(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    assert relabel("--protocol", "json", "--model", "only").returncode == 0

    assert all(seen.body["response_format"]["json_schema"]["strict"] for seen in chat_server.seen)
    assert read_json(tmp_path / "out/report.json")["negatives"]["promoted"] == 6


@pytest.mark.parametrize("kind", ["parquet", "csv", "saved", "splits"])
def test_inputs_of_every_kind(relabel: Run, tmp_path: Path, kind: str) -> None:
    rows = Dataset.from_list(tevatron_rows(3))
    if kind == "parquet":
        rows.to_parquet(tmp_path / "in.parquet")
    elif kind == "csv":
        from hf_relabel import convert

        convert(rows, to="triplet").to_csv(tmp_path / "in.csv")
    elif kind == "saved":
        rows.save_to_disk(tmp_path / "in.saved")
    else:
        DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "in.splits")

    done = relabel(source=f"in.{kind}")

    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "out/report.json")
    assert report["negatives"]["promoted"] == (4 if kind == "splits" else 2)


def test_the_result_can_be_converted(relabel: Run, tmp_path: Path) -> None:
    assert relabel("--to", "n-tuple").returncode == 0

    rows = output(tmp_path)
    assert rows.column_names[:2] == ["anchor", "positive"]
    assert len(rows) == 12 + 6


def test_undecided_passages_above_the_limit_end_with_3_and_are_asked_again(
    relabel: Run, chat_server: ChatServer
) -> None:
    chat_server.fail(*["refusal"] * 8, model="gpt-4o")  # four rows, and their repair questions

    done = relabel("--max-undecided", "2")
    assert done.returncode == 3
    assert "20 undecided" in done.stdout

    assert relabel("--max-undecided", "2").returncode == 0


def test_an_account_fault_ends_with_2_and_the_same_command_resumes(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    chat_server.fail("401", model="gpt-4o")

    stopped = relabel()
    assert stopped.returncode == 2
    assert "Stopped: judge 'gpt-4o': HTTP 401" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out").exists()

    assert relabel().returncode == 0
    assert chat_server.counts["gpt-4o-mini"] == 12


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "missing.jsonl", "--output", "out"], "cannot be read"),
        (["run", "rows.jsonl"], "--output"),
        (["run", "rows.jsonl", "--output", "out", "--preset", "papr"], "presets"),
        (["run", "rows.jsonl", "--output", "out", "--column", "query=nope"], "nope"),
        (["report", "."], "report.json"),
        (["convert", "rows.jsonl", "--to", "tevatrom", "--output", "x.jsonl"], "tevatrom"),
        (["convert", "rows.jsonl", "--to", "triplet", "--output", "x.txt"], "x.txt"),
        (["nonsense"], "nonsense"),
    ],
)
@pytest.mark.usefixtures("rows_file")
def test_mistakes_end_with_1_and_one_message(
    run_cli: Run, tmp_path: Path, args: list[str], words: str
) -> None:
    done = run_cli(*args, HF_RELABEL_CACHE=str(tmp_path / "cache"), OPENAI_API_KEY="x")

    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_missing_key_is_said_before_anything_is_sent(relabel: Run) -> None:
    done = relabel(OPENAI_API_KEY="")

    assert done.returncode == 2
    assert "expected an API key" in " ".join(done.stderr.split())


def test_estimate_makes_no_call_and_sees_the_cache(
    relabel: Run, run_cli: Run, chat_server: ChatServer
) -> None:
    args = ["estimate", "rows.jsonl", "--base-url", chat_server.base_url, "--cache", "cache"]

    before = run_cli(*args)
    assert before.returncode == 0
    assert "gpt-4o-mini" in before.stdout
    assert chat_server.seen == []

    relabel()
    assert "100% of them are in the cache" in run_cli(*args).stdout


def test_verdicts_travel_as_tables(
    relabel: Run, run_cli: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    relabel()
    first = output(tmp_path).to_list()
    n_requests = len(chat_server.seen)
    assert "16 calls" in run_cli("verdicts", "stats", "--cache", "cache").stdout
    assert run_cli("verdicts", "export", "tables", "--cache", "cache").returncode == 0

    assert run_cli("verdicts", "import", "tables", "--cache", "elsewhere").returncode == 0
    assert relabel("--cache", "elsewhere").returncode == 0

    assert len(chat_server.seen) == n_requests
    assert output(tmp_path).to_list() == first


def test_convert_writes_one_file(run_cli: Run, rows_file: Path, tmp_path: Path) -> None:
    done = run_cli("convert", rows_file, "--to", "bge", "--output", "bge.jsonl")

    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "bge.jsonl").read_text().splitlines()[0])
    assert first["pos"] == ["Plant 0 needs light."]


def test_a_cap_stops_with_2_and_the_same_command_goes_on_with_the_same_budget(
    relabel: Run, chat_server: ChatServer, tmp_path: Path
) -> None:
    # 50,000 tokens' worth of money: a call may take 5,000 and takes some 700.
    args = ("--model", "m", "--price", "m=10,10", "--max-concurrency", "2")
    stopped = relabel(*args, "--max-cost-usd", "0.085")
    assert stopped.returncode == 2
    assert "Stopped: the cap of $0.0850 is reached" in stopped.stderr
    assert "--max-cost-usd" in stopped.stderr
    assert 0 < len(chat_server.seen) < 12

    done = relabel(*args, "--max-cost-usd", "5")
    assert done.returncode == 0, done.stderr
    assert len(chat_server.seen) == 12
    cost = read_json(tmp_path / "out/report.json")["stages"][0]["cost_usd"]
    assert f"${cost:.4f} of the cap of $5.00 are spent" in done.stdout


def test_a_cap_without_a_price_ends_before_the_first_call(
    relabel: Run, chat_server: ChatServer
) -> None:
    done = relabel("--model", "mine", "--max-cost-usd", "1")

    assert done.returncode == 1
    assert "--price mine=IN,OUT" in " ".join(done.stderr.split())
    assert chat_server.seen == []


def test_shards_are_whole_queries_and_together_the_whole(relabel: Run, tmp_path: Path) -> None:
    queries = []
    for index in range(3):
        assert relabel("--shard", f"{index}/3", "--output", f"out-{index}").returncode == 0
        queries += output(tmp_path, f"out-{index}")["query"]

    assert sorted(queries) == sorted(row["query"] for row in tevatron_rows())
    assert relabel("--shard", "3/3").returncode == 1


def test_what_happens_is_logged_and_failures_are_written(
    relabel: Run, chat_server: ChatServer, tmp_path: Path, run_cli: Run
) -> None:
    chat_server.fail("500", "refusal", "refusal", model="gpt-4o")

    assert relabel("--log-file", "run.log", "--max-concurrency", "1").returncode == 0

    events = [json.loads(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["run", "fault", "report"]
    assert events[1]["reason"] == "server_error"
    failures = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in failures] == ["refused", "refused"]
    latency = read_json(tmp_path / "out/report.json")["stages"][0]["latency_s"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    shown = run_cli("stats", "cache").stdout
    assert "gpt-4o-mini" in shown
    assert "2 refused" in shown
