"""Sweeps: every run a process of its own, a result each; what was interrupted goes on.

Most trainings here only pretend, for what they come to has to be known; real ones are below, and in
test_prune_commands.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from hf_relabel.errors import ColumnError, RowError, SettingError, StoppedError
from hf_relabel.prune import Progress, PruneReport, Sweep, TrainCommand, prune
from hf_relabel.prune.runs import Run
from tests.conftest import ROOT
from tests.prune.trainings import (
    count_training,
    evaluate,
    evaluate_when_mended,
    kill_own_process,
    note_device,
    train,
    train_but_not_without_bad,
    train_nothing,
    train_to_nan,
    train_words,
    word_ndcg,
    word_rows,
)

WAIT_S = 90.0


def rows(names: tuple[str, ...] = ("good", "bad", "fine")) -> Dataset:
    return Dataset.from_list(
        [
            {"anchor": f"q{i}", "positive": "p", "negative": "n", "subset": names[i % len(names)]}
            for i in range(12)
        ]
    )


def sweep(folder: Path, **changes: object) -> PruneReport:
    settings = {"train": train, "evaluate": evaluate, "output": folder, "jobs": 2}
    settings |= {"file_type": "jsonl", **changes}
    dataset = settings.pop("dataset", rows())
    return prune(dataset, **settings)  # type: ignore[arg-type]


def test_the_harmful_subset_is_dropped_and_no_other(tmp_path: Path) -> None:
    news: list[Progress] = []

    report = sweep(tmp_path / "prune", progress=news.append)

    assert report.drop == ("bad",)
    assert report.keep == ("fine", "good")
    kept = json.loads((tmp_path / "prune/keep.json").read_text())
    assert kept["keep"] == ["fine", "good"]
    assert (tmp_path / "prune/table.md").read_text() == report.table()
    assert sum(n.state == "done" for n in news) == 12  # four arms, three seeds


def test_a_second_call_trains_nothing_and_more_seeds_add_to_those_there(tmp_path: Path) -> None:
    news: list[Progress] = []
    first = sweep(tmp_path, seeds=2)

    again = sweep(tmp_path, seeds=2, progress=news.append)
    assert news == []
    assert again.table() == first.table()

    sweep(tmp_path, seeds=3, progress=news.append)
    assert {n.run.seed for n in news} == {2}


def test_rows_and_models_do_not_stay_on_disk(tmp_path: Path) -> None:
    sweep(tmp_path, seeds=1)

    left = {path.name for path in (tmp_path / "runs/all/seed-0").iterdir()}
    assert left - {"lock"} == {"result.json", "log.txt"}


def test_models_stay_when_asked_for(tmp_path: Path) -> None:
    sweep(tmp_path, seeds=1, keep_models=True)

    assert (tmp_path / "runs/without-bad/seed-0/model/model.json").is_file()


def test_a_greedy_sweep_removes_the_worst_until_none_is_marked(tmp_path: Path) -> None:
    report = sweep(tmp_path, dataset=rows(("good", "bad", "fine", "worse")), greedy=True)

    assert report.drop == ("worse", "bad")
    assert report.keep == ("fine", "good")
    assert [round_.removed for round_ in report.rounds] == [(), ("worse",), ("worse", "bad")]
    assert report.is_tested
    assert "Round 3, without worse, bad" in report.table()


def test_one_seed_marks_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    report = sweep(tmp_path, seeds=1)

    assert report.drop == ()
    assert "Nothing can be marked: one seed" in report.table()
    assert "more seeds" in report.table()


def test_a_failing_run_leaves_the_others_alone_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "prune"
    news: list[Progress] = []

    with pytest.raises(StoppedError, match=r"found 9; 3 failed") as caught:
        sweep(folder, train=train_but_not_without_bad, seeds=3, jobs=1, progress=news.append)

    message = str(caught.value)
    assert "MemoryError: no room" in message
    assert "the last words of the training" in message
    assert str(folder / "runs/without-bad/seed-0/log.txt") in message
    assert sum(n.state == "done" for n in news) == 9
    (tmp_path / "mended").touch()
    report = sweep(folder, train=train_but_not_without_bad, seeds=3)
    assert report.drop == ("bad",)


def test_what_was_trained_is_not_trained_again_when_the_evaluation_failed(tmp_path: Path) -> None:
    folder = tmp_path / "prune"
    functions = {"train": count_training, "evaluate": evaluate_when_mended}

    with pytest.raises(StoppedError, match="the benchmark is not there"):
        sweep(folder, seeds=1, **functions)
    (tmp_path / "mended").touch()
    sweep(folder, seeds=1, **functions)

    trained = list((tmp_path / "prune/runs").glob("*/trained"))
    assert [path.read_text() for path in trained] == ["."] * 4


@pytest.mark.parametrize(
    ("function", "message"), [(train_to_nan, "finite score"), (train_nothing, "expected a model")]
)
def test_a_training_without_a_usable_model_is_a_failure(
    tmp_path: Path, function: Callable[..., None], message: str
) -> None:
    with pytest.raises(StoppedError, match=message):
        sweep(tmp_path, train=function, seeds=1)


def test_a_killed_process_is_a_failure_that_names_the_signal(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="killed by signal 9"):
        sweep(tmp_path, train=kill_own_process, seeds=1)


def test_devices_are_handed_round(tmp_path: Path) -> None:
    sweep(tmp_path, train=note_device, seeds=2, jobs=None, devices=[4, "MIG-7"], keep_models=True)

    found = [path.read_text() for path in tmp_path.glob("runs/*/*/model/device")]
    assert len(found) == 8
    assert set(found) == {"4", "MIG-7"}


def test_a_function_of_this_very_test_travels_to_its_process(tmp_path: Path) -> None:
    """As those of a notebook do, which no module holds."""
    worth = {"bad": -0.1}

    def train_here(data: str, output: str, seed: int) -> str:  # noqa: ARG001
        path = Path(output + "-of-mine")
        path.write_text(json.dumps(worth))
        return str(path)

    report = sweep(
        tmp_path,
        train=train_here,
        evaluate=lambda model: {"x": 0.5 + json.loads(Path(model).read_text())["bad"]},
        seeds=1,
    )

    assert report.rounds[0].effects.mean == pytest.approx(0.4)


def test_another_process_at_the_same_run_is_waited_for(tmp_path: Path) -> None:
    from filelock import FileLock

    folder = tmp_path / "prune"
    held = folder / "runs/all/seed-0"
    held.mkdir(parents=True)
    lock = FileLock(held / "lock", thread_local=False)  # let go by the thread that tells
    lock.acquire()
    states: list[str] = []

    def progress(news: Progress) -> None:
        states.append(news.state)
        if news.state == "elsewhere":
            # The other process comes to its result.
            scores = {"easy": 0.5, "hard": 0.25}
            (held / "result.json").write_text(json.dumps({"scores": scores}))
            lock.release()

    report = sweep(folder, seeds=1, progress=progress)

    assert "elsewhere" in states
    assert report.rounds[0].effects.mean == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"column": "source"}, ColumnError, "expected a 'source' column, found"),
        ({"dataset": rows(("one",))}, SettingError, "two subsets or more"),
        ({"dataset": rows(("one", ""))}, RowError, "in row 1"),
        ({"dataset": {"train": rows()}}, SettingError, "expected one dataset"),
        ({"seeds": 0}, SettingError, "one seed or more"),
        ({"seeds": [1, 1]}, SettingError, "each once"),
        ({"alpha": 0}, SettingError, "alpha"),
        ({"file_type": "csv"}, SettingError, "file type"),
        (
            {"train": TrainCommand(template="t {data} {output}")},
            SettingError,
            r"expected \{seed\}",
        ),
    ],
)
def test_a_mistake_shows_before_anything_is_trained(
    tmp_path: Path, changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sweep(tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("template", ["train {data}", "train {output}", "train '{data} {output}"])
def test_a_command_that_cannot_work_is_refused(template: str) -> None:
    with pytest.raises(SettingError, match="expected"):
        TrainCommand(template=template)


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path, seeds=1)
    changed = rows().map(lambda row: {"positive": row["positive"] + "!"})

    with pytest.raises(SettingError, match="another rows"):
        sweep(tmp_path, dataset=changed, seeds=1)
    with pytest.raises(SettingError, match="another train"):
        sweep(tmp_path, train=train_to_nan, seeds=1)


def test_a_run_by_name_is_that_run_alone(tmp_path: Path) -> None:
    settings = {"output": tmp_path, "seeds": 2, "file_type": "jsonl"}
    arms = Sweep(rows(), train=train, evaluate=evaluate, **settings)  # type: ignore[arg-type]
    chosen = arms.find("without-fine/seed-1")

    arms.execute([chosen])

    assert chosen == Run(left_out=("fine",), seed=1)
    assert chosen not in arms.missing()
    assert len(arms.missing()) == 7
    with pytest.raises(SettingError, match="expected a run out of"):
        arms.find("without-nli/seed-0")


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a+b",), ("a", "b")), (("A",), ("a",)), (("a/b",), ("a-b",)), (("x" * 300,), ("x" * 301,))],
)
def test_runs_that_differ_have_folders_that_differ(
    one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    names = [Run(left_out=left_out, seed=0).name for left_out in (one, other)]

    assert names[0].lower() != names[1].lower()
    assert all(len(name) < 120 and name.count("/") == 1 for name in names)


def test_time_does_not_show_in_the_table(tmp_path: Path) -> None:
    """The same scores give the same bytes, whenever and wherever."""
    first = sweep(tmp_path / "one", jobs=1).table()

    assert sweep(tmp_path / "two", jobs=3).table() == first


def test_a_poisoned_subset_is_marked_and_no_other_by_real_training(tmp_path: Path) -> None:
    """Subset c has its positives and negatives swapped; held-out queries tell, over three seeds."""
    report = prune(
        Dataset.from_list(word_rows(1)),
        train=train_words,
        evaluate=word_ndcg,
        output=tmp_path,
        jobs=2,
        file_type="jsonl",
    )

    assert report.drop == ("c",)
    assert report.keep == ("a", "b", "d")


def test_killed_and_interrupted_sweeps_go_on_and_give_the_same_table(
    tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    """SIGKILL in the middle of a run, then Ctrl-C in another; no training outlives either."""

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.prune.interrupted", str(tmp_path / name)],
            env=subprocess_env(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    whole = start("whole").communicate(timeout=WAIT_S)[0]
    for how in (signal.SIGKILL, signal.SIGINT):
        process = start("broken")
        _wait_for_one_more_run(tmp_path / "broken")
        process.send_signal(how)
        process.communicate(timeout=WAIT_S)
        assert process.returncode != 0
        n_done = len(list((tmp_path / "broken").glob("runs/*/*/result.json")))
        assert 0 < n_done < 10
    resumed = start("broken").communicate(timeout=WAIT_S)[0]

    assert b"| c | 360 |" in whole
    assert resumed == whole
    assert _bytes(tmp_path / "broken") == _bytes(tmp_path / "whole")
    assert not list(tmp_path.glob("broken/runs/*/*/attempt-*"))


def _wait_for_one_more_run(folder: Path) -> None:
    """Wait until one more run is done, and another one is in its training."""
    before = len(list(folder.glob("runs/*/*/result.json")))
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        done = list(folder.glob("runs/*/*/result.json"))
        begun = list(folder.glob("runs/*/*/attempt-*/model-begun"))
        if len(done) > before and begun:
            return
        time.sleep(0.01)
    raise AssertionError("no run came to its end")


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("table.md", "keep.json")]


def test_a_command_may_leave_its_model_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write = "import pathlib, sys; (pathlib.Path(sys.argv[2]) / 'final').mkdir(parents=True)"
    command = TrainCommand(
        template=f'{sys.executable} -c "{write}" {{data}} {{output}}', model_in="final"
    )

    found = command("rows.jsonl", str(tmp_path / "model"), 0)

    assert found == tmp_path / "model/final"
    assert found.is_dir()
