"""Each epoch trains on another positive and other negatives of a row, the same ones everywhere."""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hf_relabel.callbacks import RelabelCallback, RotationCallback, rotate
from hf_relabel.callbacks.rotation import Rotation
from transformers import TrainerCallback

from hf_relabel import RelabelError
from tests.callbacks.models import N_ROWS, relabeler, rows_as, tiny_bert, trainer_of
from tests.callbacks.rotating import BATCH_SIZE, N_NEGATIVES, Recorder, many_sided, seen
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
Env = Callable[..., dict[str, str]]


def _rotation(dataset: Any) -> Rotation:
    return dataset.format["format_kwargs"]["transform"]  # type: ignore[no-any-return]


def _epochs(dataset: Dataset, n_epochs: int) -> list[list[dict[str, Any]]]:
    """Return what a rotated dataset holds in each epoch."""
    found = []
    for epoch in range(n_epochs):
        _rotation(dataset).epoch = epoch
        found.append(list(dataset))
    return found


def test_the_positives_come_in_turn_and_the_negatives_all_before_any_comes_again() -> None:
    """Three positives in three epochs; ten negatives at two a time in five."""
    rows = many_sided()
    epochs = _epochs(rotate(rows, n_negatives=2, seed=1), 5)

    for number, row in enumerate(rows):
        positives = [epoch[number]["positive"] for epoch in epochs]
        negatives = [epoch[number][f"negative_{slot}"] for epoch in epochs for slot in (1, 2)]
        assert sorted(positives[:3]) == sorted(row["pos"])
        assert positives[3:] == positives[:2]
        assert sorted(negatives) == sorted(row["neg"])
    firsts = {rows[n]["pos"].index(epochs[0][n]["positive"]) for n in range(len(rows))}
    assert firsts == {0, 1, 2}  # queries do not all begin with the first


def test_the_seed_chooses_and_nothing_else() -> None:
    rows = many_sided()
    one, again, other = (_epochs(rotate(rows, seed=seed), 2) for seed in (1, 1, 2))

    assert one == again
    assert one != other
    turned = rows.select(range(len(rows))[::-1])
    assert _epochs(rotate(turned, seed=1), 2) == [epoch[::-1] for epoch in one]


def test_missing_negatives_are_those_of_other_queries_and_never_an_own_positive() -> None:
    rows = Dataset.from_dict(
        {
            "query": ["a", "b", "c"],
            "pos": [["pa"], ["n1"], ["pc"]],
            "neg": [["na", "pa", "na"], [], ["n1", "n2", "n3", "n4"]],
        }
    )
    for a, b, c in _epochs(rotate(rows, n_negatives=3), 20):
        of_a, of_b, of_c = ([row[f"negative_{slot}"] for slot in (1, 2, 3)] for row in (a, b, c))
        assert of_a[0] == "na"
        assert len({*of_a}) == 3
        assert {*of_a[1:]} < {"n1", "n2", "n3", "n4"}
        assert len({*of_b}) == 3
        assert {*of_b} <= {"na", "pa", "n2", "n3", "n4"}  # n1 is b's positive
        assert {*of_c} < {"n1", "n2", "n3", "n4"}


def test_where_nothing_else_is_left_a_row_repeats_its_own() -> None:
    rows = Dataset.from_dict({"query": ["a"], "pos": [["p"]], "neg": [["n1", "n2"]]})

    [row] = rotate(rows, n_negatives=5)

    texts = [row[f"negative_{slot}"] for slot in range(1, 6)]
    assert texts[:2] == texts[2:4]
    assert sorted(texts[:2]) == ["n1", "n2"]


def test_rows_without_a_positive_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"query": ["a", "b"], "pos": [[], ["p"]], "neg": [["n1"], ["n2"]]})
    rotated = rotate(rows, n_negatives=1)

    assert rotated[0] == {"anchor": "b", "positive": "p", "negative_1": "n2"}
    assert len(rotated) == 1
    assert "1 of 2 rows have no positive" in caplog.text


def test_rows_without_any_negative_say_so() -> None:
    rows = Dataset.from_dict(
        {"query": ["a"], "pos": [["p"]], "neg": [[]]}, features=many_sided().features
    )
    with pytest.raises(RelabelError, match="expected negatives, found none in 1 rows"):
        rotate(rows)
    assert rotate(rows, n_negatives=0)[0] == {"anchor": "a", "positive": "p"}


def test_a_passage_without_a_text_is_found_before_the_training() -> None:
    rows = Dataset.from_dict({"query": ["a"], "pos": [["p"]], "neg": [["n", None]]})

    with pytest.raises(RelabelError, match="expected a text for every passage in column 'neg'"):
        rotate(rows)


def test_titles_are_shown_with_the_texts() -> None:
    passage = {"docid": "1", "title": "Plants", "text": "They need light."}
    sides = {"positive_passages": [passage], "negative_passages": [{**passage, "text": "No."}]}
    rows = Dataset.from_list([{"query_id": "q", "query": "a", **sides}])

    assert rotate(rows, n_negatives=1)[0] == {
        "anchor": "a",
        "positive": "Plants\nThey need light.",
        "negative_1": "Plants\nNo.",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "triplet"}, "expected `to` to be one of"),
        ({"n_negatives": -1}, "n_negatives of at least 1"),
        ({"n_negatives": 0, "to": "labeled-list"}, "n_negatives of at least 1"),
    ],
)
def test_settings_that_cannot_work_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RelabelError, match=message):
        rotate(many_sided(), **settings)


@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_every_format_is_read(shape: str) -> None:
    rotated = rotate(rows_as(shape), n_negatives=2)

    assert len(rotated) == N_ROWS
    assert rotated.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert rotated[5]["positive"] == "plant 5 needs light of kind 5"
    assert "stands beside plant 5" in rotated["negative_2"][5]


def test_lists_hold_one_positive_first() -> None:
    rotated = rotate(many_sided(), to="labeled-list", n_negatives=4)

    assert rotated[0]["labels"] == [1, 0, 0, 0, 0]
    assert rotated["labels"][0] == [1, 0, 0, 0, 0]
    assert rotated[0]["documents"][0] in many_sided()[0]["pos"]


def test_a_part_of_the_rows_goes_through_the_same_epochs() -> None:
    rotated = rotate(many_sided())
    part = rotated.shuffle(seed=3).select(range(4))

    _rotation(rotated).epoch = 2

    by_query = {row["anchor"]: row for row in rotated}
    assert [by_query[row["anchor"]] for row in part] == list(part)


def test_a_dataset_that_is_not_rotated_is_refused() -> None:
    with pytest.raises(RelabelError, match="expected a dataset that `rotate` returned"):
        RotationCallback(rows_as("n-tuple"))


def test_a_spawned_process_follows_the_epoch() -> None:
    """Workers of a loader need not be forks."""
    rotated = rotate(many_sided())
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_tell_epoch, args=(rotated, theirs))
    worker.start()
    assert ours.recv() == 0
    _rotation(rotated).epoch = 7
    ours.send("again")

    assert ours.recv() == 7
    worker.join()


def _tell_epoch(dataset: Dataset, pipe: Any) -> None:
    pipe.send(_rotation(dataset).epoch)
    pipe.recv()
    pipe.send(_rotation(dataset).epoch)


# Through the trainers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [text for row in many_sided() for text in (row["query"], *row["pos"], *row["neg"])]
    return tiny_bert(tmp_path_factory.mktemp("bert"), texts=texts)


def _train(
    bert: str, folder: Path, *, stop_at: int | None = None, resume: bool = False, **settings: Any
) -> list[list[dict[str, Any]]]:
    """Train three epochs, and return the batches that were made."""
    train = rotate(many_sided(), n_negatives=N_NEGATIVES, seed=3)
    trainer = trainer_of(
        "bi", bert, train, folder / "run",
        callbacks=[RotationCallback(train), _Stop(stop_at)], num_train_epochs=3,
        per_device_train_batch_size=BATCH_SIZE, save_strategy="steps", save_steps=5, **settings,
    )  # fmt: skip
    log = folder / f"{len(list(folder.glob('*.jsonl')))}.jsonl"
    trainer.data_collator = Recorder(trainer.data_collator, log)
    trainer.train(resume_from_checkpoint=resume or None)
    return [json.loads(line) for line in log.read_text().splitlines()]


class _Stop(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_training_stop = state.global_step == self._step


@pytest.mark.parametrize(
    "settings",
    [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}],
    ids=["no workers", "persistent workers"],
)
def test_the_trainer_sees_each_epochs_own_tuples(
    bert: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also in workers that outlive an epoch, whose copies of the dataset were made in the first."""
    batches = _train(bert, tmp_path, **settings)

    expected = _epochs(rotate(many_sided(), n_negatives=N_NEGATIVES, seed=3), 3)
    n = len(expected[0]) // BATCH_SIZE
    assert len(batches) == 3 * n
    for epoch in range(3):
        rows = [row for batch in batches[epoch * n : (epoch + 1) * n] for row in batch]
        assert seen(rows) == seen(expected[epoch])
    assert seen(expected[0]) != seen(expected[1]) != seen(expected[2])


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(bert: str, tmp_path: Path) -> None:
    """Stopped after two of the second epoch's three batches: the other four are the same."""
    whole = _train(bert, tmp_path / "whole")
    _train(bert, tmp_path / "cut", stop_at=5)

    resumed = _train(bert, tmp_path / "cut", resume=True)

    assert len(resumed) == 4
    assert resumed == whole[5:]


def test_verdicts_apply_to_what_is_rotated(tmp_path: Path) -> None:
    """Both callbacks on one trainer: the tuples are made first, and masked then."""
    train = rotate(rows_as("n-tuple"), n_negatives=3)
    made = relabeler(tmp_path, action="drop")
    trainer = trainer_of(
        "bi", tiny_bert(tmp_path / "bert"), train, tmp_path / "run",
        callbacks=[RotationCallback(train), RelabelCallback(made)], logging_steps=3,
    )  # fmt: skip
    trainer.train()

    [line] = [line for line in trainer.state.log_history if "relabel/dropped" in line]
    assert line["relabel/dropped"] == 12
    assert line["relabel/coverage"] == 1.0


def test_several_datasets_rotate_together(bert: str, tmp_path: Path) -> None:
    both = DatasetDict({"one": many_sided(), "two": many_sided()})
    train = rotate(both, n_negatives=N_NEGATIVES, seed=3)
    trainer = trainer_of(
        "bi", bert, train, tmp_path / "run", callbacks=[RotationCallback(train)],
        num_train_epochs=2, prompts={"one": {"anchor": "query: "}},
    )  # fmt: skip
    trainer.train()

    assert [_rotation_epoch(part) for part in train.values()] == [1, 1]


def _rotation_epoch(dataset: Dataset) -> int:
    transform = dataset.format["format_kwargs"]["transform"]
    return int(getattr(transform, "keywords", {"transform": transform})["transform"].epoch)


def test_two_ranks_share_the_same_tuples_out(
    bert: str, tmp_path: Path, subprocess_env: Env
) -> None:
    """Each process has a hash seed of its own; no row is seen twice, none with another tuple."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.callbacks.rotating", bert, str(tmp_path)],
            env=subprocess_env(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port, OMP_NUM_THREADS="1", PYTHONHASHSEED=str(rank + 1),
            ),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, output

    expected = _epochs(rotate(many_sided(), n_negatives=N_NEGATIVES, seed=3), 2)
    logs = [
        [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        for rank in range(2)
    ]
    assert [len(log) for log in logs] == [6, 6]
    for epoch in range(2):
        rows = [row for log in logs for batch in log[epoch * 3 : epoch * 3 + 3] for row in batch]
        assert seen(rows) == seen(expected[epoch])
