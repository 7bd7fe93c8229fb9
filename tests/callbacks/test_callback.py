"""RelabelCallback in the real trainers, on tiny models with planted false negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_relabel.callbacks import RelabelCallback
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
