"""RelabelCallback in the real trainers, on tiny models with planted false negatives."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hf_relabel.callbacks import RelabelCallback
from transformers import TrainerCallback

from hf_relabel.errors import SettingError
from tests.callbacks.models import (
    N_NEGATIVES,
    N_ROWS,
    key,
    relabeler,
    rows_as,
    tiny_bert,
    trainer_of,
)

# transformers and torch warn of their own futures while they train; none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

N_FALSE = len(key())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 2}], ids=["0", "2"])
@pytest.mark.parametrize("action", ["drop", "promote"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("bi", "triplet"),
        ("bi", "n-tuple"),
        ("sparse", "n-tuple"),
        ("multi", "n-tuple"),
        ("cross", "labeled-pair"),
        ("cross", "labeled-list"),
    ],
)
def test_counts_are_those_of_the_data(
    kind: str, shape: str, action: str, workers: dict[str, Any], bert: str, tmp_path: Path
) -> None:
    callback = RelabelCallback(relabeler(tmp_path, action=action))
    loss = _list_loss if shape == "labeled-list" else None
    trainer = trainer_of(
        kind, bert, rows_as(shape), tmp_path / "run", callbacks=[callback], loss=loss,
        logging_steps=2, num_train_epochs=2, **workers,
    )  # fmt: skip

    trainer.train()

    counts = callback.counts
    assert counts["seen"] == 2 * N_ROWS * N_NEGATIVES
    assert counts["known"] == counts["seen"]
    assert counts["dropped"] == (2 * N_FALSE if action == "drop" else 0)
    assert counts["promoted"] == (2 * N_FALSE if action == "promote" else 0)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged[-1]["relabel/dropped"] == counts["dropped"]
    assert logged[-1]["relabel/coverage"] == 1.0


def _list_loss(model: Any) -> Any:
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    return ListNetLoss(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"gradient_accumulation_steps": 2},
        {"batch_sampler": "no_duplicates"},
        {"prompts": {"anchor": "query: ", "positive": "passage: "}},
        {"eval_strategy": "epoch"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_counts_hold_under_settings_of_the_trainer(
    settings: dict[str, Any], bert: str, tmp_path: Path
) -> None:
    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    trainer = trainer_of(
        "bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[callback],
        num_train_epochs=2, eval_rows=rows_as("n-tuple"), **settings,
    )  # fmt: skip

    trainer.train()

    assert callback.counts["seen"] == 2 * N_ROWS * N_NEGATIVES
    assert callback.counts["dropped"] == 2 * N_FALSE


@pytest.mark.parametrize("is_named", [False, True])
def test_counts_hold_for_several_datasets(is_named: bool, bert: str, tmp_path: Path) -> None:
    """The trainer names a row's dataset where losses differ: then subsets can be skipped."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    def losses(model: Any) -> Any:
        if not is_named:
            return MultipleNegativesRankingLoss(model)
        cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
        return {"first": MultipleNegativesRankingLoss(model), "arguana": cached}

    rows = rows_as("n-tuple")
    halves = DatasetDict(first=rows.select(range(12)), arguana=rows.select(range(12, 24)))
    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    trainer = trainer_of("bi", bert, halves, tmp_path / "run", callbacks=[callback], loss=losses)

    trainer.train()

    first = [pair for pair in key() if int(pair[0].split()[3]) < 12]
    assert callback.counts["seen"] == N_ROWS * N_NEGATIVES
    assert callback.counts["dropped"] == (len(first) if is_named else N_FALSE)


def test_counts_hold_for_a_stream(bert: str, tmp_path: Path) -> None:
    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    stream = rows_as("n-tuple").to_iterable_dataset()
    trainer = trainer_of(
        "bi", bert, stream, tmp_path / "run", callbacks=[callback], max_steps=N_ROWS // 8
    )

    trainer.train()

    assert callback.counts["seen"] == N_ROWS * N_NEGATIVES
    assert callback.counts["dropped"] == N_FALSE


def test_counts_are_those_of_the_transforms_report(bert: str, tmp_path: Path) -> None:
    """`map` and the callback agree, with a limit, two actions and a row that is dropped."""
    made = relabeler(tmp_path, action={"better": "promote", "worse": "drop"}, max_false_negatives=1)
    report = made.report(rows_as("n-tuple"))
    callback = RelabelCallback(made)
    trainer = trainer_of("bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[callback])

    trainer.train()

    assert callback.counts["dropped"] == report.negatives.dropped > 0
    assert callback.counts["promoted"] == report.negatives.promoted > 0
    assert callback.counts["rows_dropped"] == report.rows_dropped["too_many_false_negatives"] == 4


def test_masked_cells_are_those_of_the_data(bert: str, tmp_path: Path) -> None:
    """One batch of all rows, in which two queries are the same."""
    rows = [dict(row) for row in rows_as("n-tuple")]
    rows[1]["anchor"] = rows[0]["anchor"]
    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    trainer = trainer_of(
        "bi", bert, Dataset.from_list(rows), tmp_path / "run", callbacks=[callback],
        per_device_train_batch_size=N_ROWS,
    )  # fmt: skip

    trainer.train()

    # Each of the two masks the other's positive; row 1 also row 0's two false negatives.
    assert callback.counts["masked_in_batch"] == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("bi", "n-tuple"), ("sparse", "n-tuple"), ("multi", "n-tuple"), ("cross", "labeled-pair")],
)
def test_without_verdicts_nothing_changes(
    kind: str, shape: str, workers: int, bert: str, tmp_path: Path
) -> None:
    """Bit for bit: the same losses, and the same weights."""
    found = []
    for name in ("with", "without"):
        callback = RelabelCallback(relabeler(tmp_path, judged=False))
        trainer = trainer_of(
            kind, bert, rows_as(shape), tmp_path / name, callbacks=[callback][: name == "with"],
            logging_steps=1, dataloader_num_workers=workers,
        )  # fmt: skip
        trainer.train()
        found.append((_losses(trainer), _weights(trainer)))

    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("action", ["drop", "promote"])
def test_a_resumed_run_equals_an_undisturbed_one(
    action: str, workers: int, bert: str, tmp_path: Path
) -> None:
    """Killed in the middle of the second epoch; three batches an epoch, saved after each."""
    made = relabeler(tmp_path, action=action)
    settings: dict[str, Any] = {
        "logging_steps": 1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1,
        "dataloader_num_workers": workers,
    }  # fmt: skip

    def train(folder: str, *others: Any, resume: bool = False) -> tuple[Any, RelabelCallback]:
        callback = RelabelCallback(made)
        rows = rows_as("n-tuple")
        trainer = trainer_of(
            "bi", bert, rows, tmp_path / folder, callbacks=[callback, *others], **settings
        )
        with suppress(_KilledError):
            trainer.train(resume_from_checkpoint=resume or None)
        return trainer, callback

    whole, counted = train("whole")
    train("killed", _Killer(4))
    resumed, counted_again = train("killed", resume=True)

    assert _losses(resumed) == _losses(whole)
    assert all(torch.equal(*pair) for pair in zip(_weights(resumed), _weights(whole), strict=True))
    assert counted_again.counts == counted.counts
    saved = json.loads((tmp_path / "killed/checkpoint-9/relabel_state.json").read_text())
    assert saved == counted.counts


def test_everything_is_put_back_at_the_end_and_after_an_error(bert: str, tmp_path: Path) -> None:
    made = relabeler(tmp_path)
    for killers in ([], [_Killer(1)]):
        callback = RelabelCallback(made)
        trainer = trainer_of(
            "bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[*killers, callback]
        )
        before, collate = trainer.loss.similarity_fct, trainer.data_collator
        order = [type(each) for each in trainer.callback_handler.callbacks]
        with suppress(_KilledError):
            trainer.train()
        assert trainer.loss.similarity_fct is before
        assert not trainer.loss._forward_pre_hooks
        assert trainer._train_dataloader.base_dataloader.collate_fn is collate
        assert [type(each) for each in trainer.callback_handler.callbacks] == order


def test_a_loss_that_is_not_the_trainers_is_refused(bert: str, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def other(loss: Any) -> RelabelCallback:
        twin = MultipleNegativesRankingLoss(loss.model)
        return RelabelCallback(relabeler(tmp_path, judged=False), loss=twin)

    trainer = trainer_of("bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[other])

    with pytest.raises(SettingError, match="the trainer's own object"):
        trainer.train()


def test_metrics_reach_callbacks_that_send_them_elsewhere(bert: str, tmp_path: Path) -> None:
    """Reporting callbacks stand before those of users; ours goes before them."""
    sent: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            sent.append(dict(logs))

    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    trainer = trainer_of(
        "bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[Reporter(), callback],
        logging_steps=1,
    )  # fmt: skip

    trainer.train()

    names = {name for name in sent[0] if name.startswith("relabel/")}
    assert names == {
        f"relabel/{name}"
        for name in (
            "coverage", "dropped", "judged", "masked_in_batch", "pending", "promoted",
            "rows_dropped",
        )
    }  # fmt: skip
    assert [line["relabel/dropped"] for line in sent if "loss" in line][-1] == N_FALSE


def test_the_model_card_says_that_the_data_was_relabeled(bert: str, tmp_path: Path) -> None:
    callback = RelabelCallback(relabeler(tmp_path, action="drop"))
    trainer = trainer_of("bi", bert, rows_as("n-tuple"), tmp_path / "run", callbacks=[callback])

    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "model"))

    card = (tmp_path / "model/README.md").read_text("utf-8")
    assert "- hf_relabel\n" in card
    assert f"relabeled while training by hf_relabel: {N_FALSE} negatives dropped" in card


class _KilledError(Exception):
    pass


class _Killer(TrainerCallback):
    """Ends the training after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise _KilledError


def _losses(trainer: Any) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


def _weights(trainer: Any) -> list[torch.Tensor]:
    return [value.detach() for value in trainer.model.state_dict().values()]
