"""Rows with several positives, what a trainer saw of them, and a rank that trains on its share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

__all__ = ["BATCH_SIZE", "N_NEGATIVES", "Recorder", "many_sided", "seen"]

BATCH_SIZE = 4
N_NEGATIVES = 3


def many_sided() -> Dataset:
    """Return twelve rows of three positives and ten negatives, in FlagEmbedding's format."""
    return Dataset.from_dict(
        {
            "query": [f"query {row}" for row in range(12)],
            "pos": [[f"right {row} {n}" for n in range(3)] for row in range(12)],
            "neg": [[f"wrong {row} {n}" for n in range(10)] for row in range(12)],
        }
    )


def seen(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return tuples in an order that does not depend on the batches that they came in."""
    return sorted(tuple(row.values()) for row in rows)


class Recorder:
    """A collator that writes down the rows of every batch, in whichever process makes it."""

    def __init__(self, inner: Any, log: Path) -> None:
        self.inner = inner
        self.log = log

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps(rows) + "\n")
        return self.inner(rows)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def main(bert: str, folder: str) -> None:
    """Train two epochs on this rank's share of the rows."""
    import os

    import torch
    from hf_relabel.callbacks import RotationCallback, rotate

    from tests.callbacks.models import trainer_of

    torch.set_num_threads(1)
    train = rotate(many_sided(), n_negatives=N_NEGATIVES, seed=3)
    trainer = trainer_of(
        "bi", bert, train, Path(folder) / "run", callbacks=[RotationCallback(train)],
        num_train_epochs=2, per_device_train_batch_size=2,
    )  # fmt: skip
    log = Path(folder) / f"rank{os.environ['RANK']}.jsonl"
    trainer.data_collator = Recorder(trainer.data_collator, log)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:3])
