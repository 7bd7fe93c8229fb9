"""Batches: over real HTTP, in every end state, through kills, every row is judged once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

from hf_relabel import BatchSettings, Relabeler, VerdictCache, background
from hf_relabel.cli import app
from hf_relabel.errors import AccountError, CacheError, RowError, SettingError, SourceError
from hf_relabel.judges.batch_admin import cancel_batches
from hf_relabel.judges.batch_files import outcome_of_line, request_line
from hf_relabel.judges.batch_state import BatchFolder
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.models import ShutdownWarning
from tests.batch_server import BatchServer, End
from tests.chat_answers import Body
from tests.chat_server import from_key
from tests.rows import KEY, tevatron_rows

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
CHEAP, STRONG = "gpt-4o-mini", "gpt-4o"
FAST: dict[str, Any] = {
    "quiet_s": 0.1,
    "first_poll_s": 0.01,
    "max_poll_s": 0.05,
    "retry": RetryRule(max_attempts=4, first_wait_s=0.01),
}
N_CALLS = 16  # 12 rows, and 4 of them again with the strong judge


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer(from_key(KEY)) as server:
        yield server


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(tevatron_rows())


@pytest.fixture
def in_batches(server: BatchServer, tmp_path: Path) -> Callable[..., Relabeler]:
    """Build a relabeler that asks the server in batches, all with the same cache."""

    def build(*models: str, **settings: Any) -> Relabeler:
        return Relabeler(
            "paper", models=models, base_url=server.base_url, api_key="x",
            cache=tmp_path / "cache", batch=BatchSettings(**{**FAST, **settings}),
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def expected(rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the plain road makes of the rows."""
    with BatchServer(from_key(KEY)) as plain:
        cache = tmp_path_factory.mktemp("plain")
        relabeler = Relabeler("paper", base_url=plain.base_url, api_key="x", cache=cache)
        return rows.map(relabeler, batched=True).to_list()  # type: ignore[no-any-return]


def relabeled(relabeler: Relabeler, rows: Dataset) -> list[dict[str, Any]]:
    return rows.map(relabeler, batched=True, load_from_cache_file=False).to_list()  # type: ignore[no-any-return]


def left_behind(relabeler: Relabeler) -> list[str]:
    folder = relabeler.cache.directory / "batches"
    return sorted(path.name for path in folder.iterdir() if path.name not in ("id", "lock"))


def statuses(server: BatchServer) -> list[str]:
    return [batch["status"] for batch in server.batches.values()]


def undecided(relabeler: Relabeler, rows: Dataset) -> dict[str, int]:
    return dict(relabeler.report(rows).undecided_reasons)


def test_a_run_in_batches_gives_what_the_plain_road_gives(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any]
) -> None:
    """Output lines come in another order than they were asked in; stage 2 is a batch of its own."""
    relabeler = in_batches(quiet_s=0.5)

    done = relabeler.judge(rows)

    assert (done.n_rows, done.n_calls) == (12, N_CALLS)
    assert relabeled(relabeler, rows) == expected
    assert len(server.batches) == 2
    assert list(server.processed.values()) == [1] * N_CALLS
    assert server.seen == []
    assert left_behind(relabeler) == []
    assert relabeler.judge(rows).n_calls == 0
    assert len(server.batches) == 2


def test_replies_are_kept_as_bought_by_batch(
    in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    relabeler = in_batches()
    relabeler.judge(rows)

    calls = list(relabeler.cache.calls())

    assert {call.reply.usage["processing"] for call in calls} == {"batch"}
    assert all(call.reply.usage["prompt_tokens"] > 100 for call in calls)


ENDS = {
    "expired, half of it answered": [End("expired", share=0.5)],
    "expired, nothing answered": [End("expired", share=0.0)],
    "cancelled by someone, a third of it answered": [End("cancelled", share=0.3)],
    "completed, every line in the error file": [End(faults=dict.fromkeys(range(12), "500"))],
    "completed, some lines in the error file": [End(faults={0: "429", 3: "500", 11: "503"})],
    "completed, some lines in no file": [End(cut=(1, 4))],
    "twice expired": [End("expired", share=0.5), End("expired", share=0.5)],
    "expired at the second stage": [End(), End("expired", share=0.5)],
    "queue full": [End("failed", errors=[("token_limit_exceeded", None, "Limit: 9,000 tokens")])],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_whatever_the_end_every_row_is_judged_once(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], ends: list[End],
) -> None:  # fmt: skip
    server.ends = list(ends)
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert undecided(relabeler, rows) == {}
    # Paid for once; sent again only where there was no answer.
    assert list(server.processed.values()) == [1] * N_CALLS
    assert left_behind(relabeler) == []


def test_lines_that_fail_validation_are_named_and_the_rest_goes_on(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    errors = [("invalid_request", 3, "Line 3: the messages are too odd."), ("other", 7, "Odd.")]
    server.ends = [End("failed", errors=errors)]
    relabeler = in_batches(quiet_s=0.5)

    relabeler.judge(rows)

    failures = list(relabeler.cache.all_failures())
    assert {failure.reason for failure in failures} == {"batch_invalid"}
    messages = {failure.message.removeprefix(f"judge {CHEAP!r}: ") for failure in failures}
    assert messages == {"Line 3: the messages are too odd.", "Odd."}
    assert undecided(relabeler, rows) == {}
    refused, resent = server.requests("batch_0"), server.requests("batch_1")
    assert resent == [line for index, line in enumerate(refused) if index not in (2, 6)]
    assert set(server.processed.values()) == {1}


@pytest.mark.parametrize("code", ["", "model_not_found"])
def test_a_batch_that_fails_as_a_whole_stops_the_run_and_is_not_sent_again(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, code: str
) -> None:
    line = 1 if code else None
    server.ends = [End("failed", errors=[(code, line, "This model does no batches.")])]

    with pytest.raises(AccountError, match=r"This model does no batches.*run the same command"):
        in_batches().judge(rows)

    assert "failed" in statuses(server)
    assert server.sent.total() <= 12
    in_batches().judge(rows)
    assert list(server.processed.values()) == [1] * N_CALLS


def test_validation_that_never_ends_is_given_up(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    server.ends = [End("failed", errors=[("odd", 1, "The first line is odd.")])] * 20
    relabeler = in_batches(max_attempts=2, quiet_s=0.5)

    relabeler.judge(rows)

    assert set(statuses(server)) == {"failed"}
    # Two at each stage; the row that was named first may go ahead of the others, alone.
    assert 4 <= len(server.batches) <= 5
    assert set(undecided(relabeler, rows)) == {"batch_invalid", "batch_failed"}


def test_row_faults_end_their_rows_alone(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    server.ends = [End(faults={1: "context_length", 2: "content_filter"})]
    relabeler = in_batches(quiet_s=0.5)

    relabeler.judge(rows)

    assert undecided(relabeler, rows) == {}
    reasons = sorted(failure.reason for failure in relabeler.cache.all_failures())
    assert reasons == ["content_filter", "context_length"]
    # Two are not answered: one is asked again in two halves, one goes to the strong judge.
    assert len(server.processed) == N_CALLS - 2 + 2 + 1


def test_an_exhausted_quota_stops_the_run_and_keeps_the_other_replies(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any]
) -> None:
    server.ends = [End(faults={5: "insufficient_quota"})]

    with pytest.raises(AccountError, match="Add credit") as stopped:
        in_batches(quiet_s=0.5).judge(rows)

    assert stopped.value.reason == "quota"
    relabeler = in_batches()
    relabeler.judge(rows)
    assert relabeled(relabeler, rows) == expected
    assert list(server.processed.values()) == [1] * N_CALLS


@pytest.mark.parametrize(
    ("name", "models"),
    [("temperature", (CHEAP, STRONG)), ("prompt_cache_options", ("gpt-6-luna", "gpt-6.1-terra"))],
)
def test_a_parameter_that_the_model_refuses_is_left_out(
    in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any], name: str,
    models: tuple[str, str], server: BatchServer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    error = {"message": f"No {name}.", "code": "unsupported_value", "param": name}
    plain = BatchServer._answers

    def answers(self: BatchServer, lines: Any, end: End, status: str) -> Any:
        if name not in lines[0]["body"]:
            return plain(self, lines, end, status)
        response = {"status_code": 400, "request_id": "r", "body": {"error": error}}
        return [], [{"custom_id": line["custom_id"], "response": response} for line in lines]

    monkeypatch.setattr(BatchServer, "_answers", answers)
    relabeler = in_batches(*models, max_attempts=1)

    relabeler.judge(rows)

    assert name in server.requests("batch_0")[0]["body"]
    assert relabeled(relabeler, rows) == expected


def unreadable_at_first(body: Body) -> str:
    is_repair = any(message["role"] == "assistant" for message in body["messages"])
    is_answer = is_repair or body["model"] != CHEAP
    return str(from_key(KEY)(body)) if is_answer else "I cannot say."


def test_an_unreadable_reply_gets_a_repair_question_of_its_own(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any]
) -> None:
    server.answer = unreadable_at_first
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    repairs = [custom_id for custom_id in server.processed if custom_id.endswith("-repair")]
    assert len(repairs) == 12
    assert {custom_id.removesuffix("-repair") for custom_id in repairs} < set(server.processed)
    assert left_behind(relabeler) == []


@pytest.mark.parametrize(
    "faults", [["500"], ["made_500"], ["no_file", "no_file"], ["429", "made_500", "no_file"]]
)
def test_a_batch_is_made_once_whatever_the_server_says(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], faults: list[str],
) -> None:  # fmt: skip
    server.create_faults = list(faults)
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS


def test_a_download_that_is_refused_for_a_moment_is_tried_again(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any]
) -> None:
    server.download_faults = ["403", "404_model", "500"]
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS


@pytest.mark.parametrize(
    "settings", [{"max_requests": 5}, {"max_bytes": 10_000}, {"max_enqueued_tokens": 2_500}]
)
def test_files_and_the_queue_keep_their_limits(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], settings: dict[str, int],
) -> None:  # fmt: skip
    relabeler = in_batches(**settings)

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert len(server.batches) >= 4
    sizes = [len(server.files[batch["input_file_id"]]) for batch in server.batches.values()]
    assert max(sizes) <= settings.get("max_bytes", 10**9)
    counts = [len(server.requests(batch_id)) for batch_id in server.batches]
    assert max(counts) <= settings.get("max_requests", 10**9)
    assert server.max_waiting_tokens <= settings.get("max_enqueued_tokens", 10**9)
    assert list(server.sent.values()) == [1] * N_CALLS


def test_a_shorter_queue_than_was_thought_is_found_out(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any]
) -> None:
    server.max_enqueued_tokens = 2_500
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert 1 <= statuses(server).count("failed") <= 6
    assert list(server.sent.values()) == [1] * N_CALLS


def test_a_row_that_fits_into_no_file_is_left_undecided(
    in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    relabeler = in_batches(max_bytes=100)

    relabeler.judge(rows)

    assert undecided(relabeler, rows) == {"too_large": 60}


def test_a_server_without_a_batch_api_is_said_in_one_sentence(tmp_path: Path) -> None:
    from tests.chat_server import ChatServer

    with ChatServer() as server:
        relabeler = Relabeler(
            "paper", base_url=server.base_url, api_key="x", cache=tmp_path,
            batch=BatchSettings(**FAST),
        )  # fmt: skip
        with pytest.raises(AccountError, match=r"no Batch API.*export-batch") as stopped:
            relabeler.judge(Dataset.from_list(tevatron_rows(2)))
    assert stopped.value.reason == "no_batch_api"


def test_map_only_reads(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    relabeler = in_batches()
    with pytest.raises(SettingError, match="call `judge` on the dataset first"):
        rows.map(relabeler, batched=True)
    server.answer = lambda _: "I cannot say."
    relabeler.judge(rows)

    kept = rows.map(relabeler, batched=True)

    assert kept.to_list() == rows.to_list()
    assert server.seen == []


def test_batches_change_no_fingerprint(
    in_batches: Callable[..., Relabeler], tmp_path: Path
) -> None:
    relabeler = in_batches()
    plain = Relabeler("paper", base_url="http://127.0.0.1:1/v1", cache=tmp_path)

    assert relabeler.fingerprint == plain.fingerprint


def test_a_row_that_cannot_be_read_ends_the_run_at_once(
    server: BatchServer, in_batches: Callable[..., Relabeler]
) -> None:
    """What is under way goes on, and is collected by the next run."""
    server.held_from = 0
    good, bad = tevatron_rows(150), tevatron_rows(1)
    bad[0]["negative_passages"][0]["text"] = None  # type: ignore[assignment]

    with pytest.raises(RowError):
        in_batches(quiet_s=0.02).judge(Dataset.from_list(good + bad))


def test_two_runs_on_one_cache_do_not_share_batches(
    in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    relabeler = in_batches()
    with (
        BatchFolder(relabeler.cache.directory).locked(),
        pytest.raises(CacheError, match="another process runs batches"),
    ):
        relabeler.judge(rows)


# Killed, and run again

_SCRIPT = """
import sys
from datasets import Dataset, load_dataset
from typer.testing import CliRunner
from hf_relabel import BatchSettings, Relabeler
from hf_relabel.judges.client import RetryRule
from tests.rows import tevatron_rows
url, cache, n_rows = sys.argv[1:]
batch = BatchSettings(
    quiet_s=0.3, first_poll_s=0.01, max_poll_s=0.05, max_requests=5,
    retry=RetryRule(max_attempts=4, first_wait_s=0.01),
)
relabeler = Relabeler("paper", base_url=url, api_key="x", cache=cache, batch=batch)
relabeler.judge(Dataset.from_list(tevatron_rows(int(n_rows))))
print("done")
"""


@pytest.fixture
def start(
    server: BatchServer, tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(n_rows: int = 12) -> subprocess.Popen[str]:
        args = [sys.executable, "-W", "ignore", "-c", _SCRIPT]
        process = subprocess.Popen(
            [*args, server.base_url, str(tmp_path / "cache"), str(n_rows)],
            env=subprocess_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(is_so: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_killed_between_submission_and_download_resumes(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Also where the batches end while nobody watches."""
    server.held_from = 0
    killed = start()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: len(server.batches) == 3)
    wait_until(lambda: sum(found.batch_id is not None for found in folder.manifests()) == 3)
    kill(killed)
    server.held_from = None
    wait_until(lambda: set(statuses(server)) == {"completed"})
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS
    assert left_behind(relabeler) == []


def test_a_batch_made_as_the_run_died_is_found_by_its_metadata(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Its id never reached the disk; newer batches of others fill the first pages of the list."""
    server.held_from, server.hangs_after_create = 0, True
    killed = start()
    wait_until(lambda: len(server.batches) == 3)
    kill(killed)
    folder = BatchFolder(tmp_path / "cache")
    assert [manifest.batch_id for manifest in folder.manifests()] == [None] * 3
    server.held_from, server.hangs_after_create = None, False
    for index in range(5):
        foreign = {**server.batches["batch_0"], "id": f"foreign_{index}", "metadata": {}}
        server.batches[f"foreign_{index}"] = foreign
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS
    assert left_behind(relabeler) == []


def test_a_run_killed_before_its_batch_was_made_asks_anew(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    server.create_faults = ["hang"] * 3
    killed = start()
    wait_until(lambda: not server.create_faults)
    kill(killed)
    assert len(BatchFolder(tmp_path / "cache").manifests()) == 3
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS


def test_kills_at_any_moment_buy_nothing_twice(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any],
) -> None:  # fmt: skip
    server.latency_s = 0.05
    for n_kills in range(3):
        process = start()
        wait_until(lambda: len(server.files) > 0)  # imports take longer than all the rest
        n_files = len(server.files)
        wait_until(lambda: len(server.files) > n_files or process.poll() is not None)  # noqa: B023
        time.sleep(0.03 * n_kills)
        kill(process)
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS
    assert left_behind(relabeler) == []


def test_a_run_killed_while_repairs_are_under_way_buys_neither_reply_again(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    server.answer, server.held_from = unreadable_at_first, 3
    killed = start()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: sum(server.sent.values()) == 24)
    wait_until(lambda: all(found.batch_id is not None for found in folder.manifests()))
    kill(killed)
    server.held_from = None
    relabeler = in_batches()

    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * (12 + 12 + 4)
    assert left_behind(relabeler) == []


def test_replies_whose_rows_do_not_come_again_are_kept_for_when_they_do(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    expected: list[Any], start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    server.held_from = 0
    killed = start()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: sum(found.batch_id is not None for found in folder.manifests()) == 3)
    kill(killed)
    server.held_from = None
    wait_until(lambda: set(statuses(server)) == {"completed"})

    in_batches().judge(rows.select(range(4)))
    relabeler = in_batches()
    relabeler.judge(rows)

    assert relabeled(relabeler, rows) == expected
    assert list(server.sent.values()) == [1] * N_CALLS
    assert left_behind(relabeler) == []


def test_batches_unknown_to_the_server_stop_the_run_and_are_not_bought_again(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset,
    start: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Another key, another project: the batch is there, and paid for, but not to be seen."""
    server.held_from = 0
    killed = start()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: sum(found.batch_id is not None for found in folder.manifests()) == 3)
    kill(killed)
    hidden = dict(server.batches)
    server.batches.clear()

    with pytest.raises(AccountError, match="another key made the batch"):
        in_batches().judge(rows)

    assert server.batches == {}
    server.batches.update(hidden)


# The command line

_CLI = """
import sys
import hf_relabel.transform
from hf_relabel import BatchSettings
from hf_relabel.cli import main
fast = BatchSettings(quiet_s=0.3, first_poll_s=0.01, max_poll_s=0.05)
hf_relabel.transform.BatchSettings = lambda: fast
main()
"""


@pytest.fixture
def start_cli(
    server: BatchServer, tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `hf-relabel run … --batch`, impatient, and let the test end it."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tevatron_rows()))
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        args = ["run", "rows.jsonl", "--output", "out", "--cache", "cache", "--batch"]
        process = subprocess.Popen(
            [sys.executable, "-c", _CLI, *args, "--base-url", server.base_url],
            cwd=tmp_path, env=subprocess_env(OPENAI_API_KEY="x"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, " ".join((out + err).split())


def test_ctrl_c_leaves_batches_running_and_says_how_to_go_on(
    server: BatchServer, start_cli: Callable[..., Any], tmp_path: Path, expected: list[Any]
) -> None:
    server.held_from = 0
    process = start_cli()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: [found.batch_id for found in folder.manifests()] == ["batch_0"])

    process.send_signal(signal.SIGINT)
    code, words = ended(process)

    assert code == 2
    assert "the same command resumes: hf-relabel" in words
    assert "Batches that go on without it: 1" in words
    assert "Traceback" not in words
    assert statuses(server) == ["in_progress"]
    server.held_from = None
    code, words = ended(start_cli())
    assert (code, "6 promoted" in words) == (0, True)
    assert list(server.sent.values()) == [1] * N_CALLS
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows.to_list() == expected


def test_cancel_stops_our_batches_and_the_run_that_waits_for_them(
    server: BatchServer, start_cli: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a cancelled batch had answered is used; nothing is asked again behind the user's back."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server.held_from, server.ends = 0, [End("completed", share=0.5)]
    process = start_cli()
    folder = BatchFolder(tmp_path / "cache")
    wait_until(lambda: [found.batch_id for found in folder.manifests()] == ["batch_0"])
    other = {"hf_relabel": "elsewhere", "cache": "another", "model": "m"}
    server.batches["foreign_1"] = {**server.batches["batch_0"], "id": "foreign_1", "metadata": {}}
    server.batches["theirs_1"] = {**server.batches["batch_0"], "id": "theirs_1", "metadata": other}

    def batches(*args: str) -> str:
        options = ["--base-url", server.base_url, "--cache", str(tmp_path / "cache")]
        done = CliRunner().invoke(app, ["batches", *args, *options])
        assert done.exit_code == 0, done.output
        return done.output

    listed = batches("list")
    assert "foreign_1" not in listed
    assert [line.split()[0] for line in listed.splitlines() if "in_progress" in line] == [
        "theirs_1", "batch_0"
    ]  # fmt: skip
    assert "batch_0: cancelling\n1 cancelled." in batches("cancel")

    code, words = ended(process)
    assert code == 2
    assert "batch batch_0 was cancelled" in words
    assert len(server.processed) == 6
    assert len(server.batches) == 3
    del server.batches["foreign_1"], server.batches["theirs_1"]
    server.held_from = None
    assert ended(start_cli())[0] == 0
    assert list(server.processed.values()) == [1] * N_CALLS


def test_after_a_cancel_of_several_batches_one_run_asks_for_all_that_is_missing(
    server: BatchServer, in_batches: Callable[..., Relabeler], rows: Dataset, expected: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server.held_from, server.ends = 0, [End("completed", share=0.5)] * 3
    cancelling = in_batches(max_requests=4)
    stopped: list[AccountError] = []

    def judge() -> None:
        try:
            cancelling.judge(rows)
        except AccountError as error:
            stopped.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    folder, endpoint = tmp_path / "cache", Endpoint(base_url=server.base_url)
    wait_until(lambda: sum(bool(m.batch_id) for m in BatchFolder(folder).manifests()) == 3)
    assert len(background.run(cancel_batches(endpoint, folder))) == 3
    thread.join()
    assert [error.reason for error in stopped] == ["cancelled"]

    server.held_from = None
    again = in_batches(max_requests=4)
    again.judge(rows)

    assert relabeled(again, rows) == expected
    assert list(server.processed.values()) == [1] * N_CALLS


def test_a_batch_that_is_not_ours_is_not_cancelled(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.batches["foreign_1"] = {
        "id": "foreign_1", "object": "batch", "status": "in_progress", "created_at": 1,
        "endpoint": "/v1/chat/completions", "input_file_id": "f", "completion_window": "24h",
        "metadata": {"whose": "not ours"},
    }  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    endpoint = Endpoint(base_url=server.base_url)

    with pytest.raises(SourceError, match="a batch that hf_relabel made, found 'foreign_1'"):
        background.run(cancel_batches(endpoint, tmp_path, "foreign_1"))

    assert statuses(server) == ["in_progress"]


# Lines


def test_a_line_with_half_an_emoji_can_be_written() -> None:
    line = request_line("k", {"messages": [{"role": "user", "content": "half \ud83d"}]})

    assert json.loads(line)["body"]["messages"][0]["content"] == "half \ud83d"


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        ({"response": None, "error": {"code": "batch_expired", "message": "late"}},
         "retry", "batch_expired"),
        ({"response": {"status_code": 400, "body": {"error": {"code": "content_filter"}}}},
         "row", "content_filter"),
        ({"response": {"status_code": 401, "body": {"error": {"message": "no"}}}},
         "stop", "unauthorized"),
        # vLLM's ways to say it
        ({"response": {"status_code": 400, "request_id": "r"},
          "error": {"message": "maximum context length is 4096", "code": 400}},
         "row", "context_length"),
        ({"response": None, "error": {"message": "maximum context length is 4096", "code": 400}},
         "row", "context_length"),
        ({"response": None, "error": {"code": "insufficient_quota", "message": "no"}},
         "stop", "quota"),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, "retry", "no_choices"),
        ({"response": {"status_code": 200, "body": {"choices": [
            {"finish_reason": "stop", "message": {"content": ""}}]}}}, "retry", "empty"),
        ({"response": None, "error": None}, "retry", "no_choices"),
        ({"error": "torn"}, "retry", "batch_error"),
    ],
)  # fmt: skip
def test_what_a_line_says_is_a_fault_of_the_same_table(
    line: dict[str, Any], kind: str, reason: str
) -> None:
    outcome = outcome_of_line(json.dumps({"custom_id": "k", **line}))

    assert outcome is not None
    assert outcome.fault is not None
    assert (outcome.fault.kind, outcome.fault.reason) == (kind, reason)


@pytest.mark.parametrize("line", ["", "{", "[]", '{"id": "x"}', '{"custom_id": 3}'])
def test_a_line_that_names_no_request_is_passed_over(line: str) -> None:
    assert outcome_of_line(line) is None


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(SettingError, match="max_bytes above 0"):
        BatchSettings(max_bytes=0)


def test_the_cache_is_unharmed_by_the_folder_in_it(
    in_batches: Callable[..., Relabeler], rows: Dataset
) -> None:
    relabeler = in_batches()
    relabeler.judge(rows)

    assert VerdictCache(relabeler.cache.directory).stats().n_calls == N_CALLS
    assert (relabeler.cache.directory / "batches").stat().st_mode & 0o077 == 0
