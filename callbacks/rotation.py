"""Rotation: rows with several positives and many negatives, as one training tuple each, anew each epoch.

    train = rotate(rows, n_negatives=7, seed=42)
    trainer = SentenceTransformerTrainer(
        ..., train_dataset=train, callbacks=[RotationCallback(train)]
    )

A relabeled row has more than one positive, and the losses of sentence-transformers take one. A row's
epochs go through its positives in turn, from one that the query's hash chooses, and through its
negatives in a shuffled order, `n_negatives` at a time: what is seen follows from the seed, the epoch
and the query alone, on every rank, in every worker and after a resume.

References:
    One positive a query and epoch: Tevatron, as Thakur et al. (2025), arXiv:2505.16967, trained.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from hf_relabel.callbacks.identity import id_of_hash, seeded_draw

from hf_relabel.errors import MissingExtraError, RowError, SettingError
from hf_relabel.formats import Row, content_hash, convert, get_format, normalize

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

__all__ = ["SHAPES", "Rotation", "rotate"]

logger = logging.getLogger("hf_relabel")

AnyDataset = TypeVar("AnyDataset", "Dataset", "DatasetDict")

SHAPES = ("n-tuple", "labeled-list")
"""What a row can become: a tuple for retrievers, a list with labels for rerankers."""

_MAX_TRIES = 64  # rows looked into for one refill; all of them refused means a dataset of one topic
_TEVATRON = get_format("tevatron")


def rotate(
    dataset: AnyDataset,
    *,
    to: str = "n-tuple",
    n_negatives: int = 7,
    seed: int = 0,
    format: str | None = None,  # noqa: A002 (what the user calls it, everywhere)
    columns: Mapping[str, str] | None = None,
) -> AnyDataset:
    """Return a dataset that holds one training tuple a row, another one in each epoch.

    - n-tuple: anchor, positive, negative_1 … negative_n.
    - labeled-list: anchor, documents (the positive first), labels (1, then zeros).

    Rows are read where they lie, when they are trained on; rows without a positive are left out, and
    said. A row with fewer distinct negatives than `n_negatives` gets all of its own, and for the rest
    negatives of other queries, other ones in each epoch; never a text that is a positive of its own.
    Only where no other row has any left are its own repeated.

    Args:
        dataset: Rows in any format; several rows of one query stay several in tuple formats.
        to: One of `SHAPES`.
        n_negatives: Negatives in each tuple.
        seed: Chooses where each query begins.
        format: The rows' format, where its columns do not tell.
        columns: Role → column name, where columns have names of their own.

    Returns:
        As many rows as have a positive, in order. Its transform is a `Rotation`, whose `epoch` a
        `RotationCallback` moves; without one it stays at epoch 0.

    Raises:
        ColumnError: The columns fit no format.
        RowError: A row does not hold what its format promises, or there is no negative anywhere.
        SettingError: A setting cannot work.
        MissingExtraError: torch is not installed.
    """
    from datasets import DatasetDict

    _check(to, n_negatives)
    rows = convert(dataset, to="tevatron", format=format, columns=columns)
    if isinstance(rows, DatasetDict):
        return DatasetDict({k: _rotated(part, to, n_negatives, seed) for k, part in rows.items()})
    return _rotated(rows, to, n_negatives, seed)


def _check(to: str, n_negatives: int) -> None:
    if to not in SHAPES:
        raise SettingError(f"expected to be one of {list(SHAPES)}, found {to!r}.")
    if n_negatives < (to == "labeled-list"):
        raise SettingError(
            f"expected n_negatives of at least 1 (0 for n-tuples), found {n_negatives}."
        )


def _rotated(rows: Dataset, to: str, n_negatives: int, seed: int) -> Dataset:
    n_positives, n_own = (_lengths(rows, f"{kind}_passages") for kind in ("positive", "negative"))
    kept = [number for number, n in enumerate(n_positives) if n]
    if len(kept) < len(rows):
        logger.warning("%d of %d rows have no positive and are left out.", len(rows) - len(kept), len(rows))  # fmt: skip
    donors = [number for number in kept if n_own[number]]
    if n_negatives and kept and not donors:
        raise RowError(
            f"expected negatives, found none in {len(rows)} rows. Mine some, or train on in-batch "
            "negatives alone with n_negatives=0."
        )
    rotation = Rotation(rows, donors=donors, to=to, n_negatives=n_negatives, seed=seed)
    rotated = _numbered(kept, rotation.features())
    rotated.set_transform(rotation)
    return rotated


def _lengths(rows: Dataset, column: str) -> list[int]:
    """Return how many passages each row has, without reading a text."""
    import pyarrow.compute as pc

    table = rows.with_format("arrow").select_columns([column])
    lengths: list[int] = []
    for batch in table.iter(batch_size=10_000):
        lengths += pc.fill_null(pc.list_value_length(batch[column]), 0).to_pylist()
    return lengths


def _numbered(numbers: Sequence[int], features: Features) -> Dataset:
    """Return a dataset that holds in every column no more than the number of its source row.

    The trainers read a dataset's columns and types off what is stored, and its values through the
    transform; and a single column is handed to the transform alone.
    """
    from datasets import Dataset

    texts = [str(number) for number in numbers]
    as_stored: dict[str, list[Any]] = {
        "documents": [[text] for text in texts],
        "labels": [[number] for number in numbers],
    }
    columns = {name: as_stored.get(name, texts) for name in features}
    return Dataset.from_dict(columns, features=features)


class Rotation:
    """The transform of a rotated dataset: numbers of rows in, this epoch's tuples out.

    Args:
        rows: Tevatron rows.
        donors: Numbers of the rows with a negative, which refills are taken from.
        to: One of `SHAPES`.
        n_negatives: Negatives in each tuple.
        seed: Chooses where each query begins.
    """

    def __init__(
        self, rows: Dataset, *, donors: Sequence[int], to: str, n_negatives: int, seed: int
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError.of("torch", "train", "rotating positives") from error
        self.to = to
        self.n_negatives = n_negatives
        self.seed = seed
        self._rows = rows.with_format(None)
        self._donors = torch.tensor(donors, dtype=torch.int64)
        # Shared: the workers of a data loader may outlive an epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """Whose tuples are given out; workers of this process see a change at once."""
        return int(self._epoch.item())

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def features(self) -> Features:
        """Return the columns of a rotated dataset, in the order that the trainers go by."""
        from datasets import Features, List, Value

        text = Value("string")
        if self.to == "labeled-list":
            return Features(
                {"anchor": text, "documents": List(text), "labels": List(Value("int64"))}
            )
        slots = [f"negative_{slot}" for slot in range(1, self.n_negatives + 1)]
        return Features(dict.fromkeys(["anchor", "positive", *slots], text))

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return this epoch's tuples of some rows, in the columns that were asked for."""
        stored = next(iter(batch.values()))
        numbers = [int(value[0] if isinstance(value, list) else value) for value in stored]
        epoch = self.epoch
        made = [self._columns(row, epoch) for row in self._read(numbers)]
        return {name: [columns[name] for columns in made] for name in batch}

    def _read(self, numbers: Sequence[int]) -> list[Row]:
        return _TEVATRON.read_numbered(self._rows[list(numbers)], numbers)

    def _columns(self, row: Row, epoch: int) -> dict[str, Any]:
        positive, negatives = self.pick(row, epoch)
        if self.to == "labeled-list":
            labels = [1, *[0] * len(negatives)]
            return {"anchor": row.query, "documents": [positive, *negatives], "labels": labels}
        slots = {f"negative_{slot}": text for slot, text in enumerate(negatives, start=1)}
        return {"anchor": row.query, "positive": positive, **slots}

    def pick(self, row: Row, epoch: int) -> tuple[str, list[str]]:
        """Choose one positive and the negatives that stand beside it in an epoch."""
        draw = seeded_draw(self.seed, id_of_hash(content_hash(row.query)))
        positive = row.positives[(draw + epoch) % len(row.positives)].shown
        own = _own_negatives(row)
        random.Random(draw).shuffle(own)
        n = self.n_negatives
        if len(own) >= n:
            start = epoch * n
            return positive, [own[(start + slot) % len(own)] for slot in range(n)]
        return positive, self._refilled(row, own, seeded_draw(draw, epoch))

    def _refilled(self, row: Row, own: Sequence[str], draw: int) -> list[str]:
        chosen = list(own)
        taken = {*own, *(passage.shown for passage in row.positives)}
        for slot in range(len(own), self.n_negatives):
            candidates = self._of_others(row, seeded_draw(draw, slot))
            text = next((text for text in candidates if text not in taken), None)
            if text is None:
                return self._repeated(row, chosen)
            taken.add(text)
            chosen.append(text)
        return chosen

    def _of_others(self, row: Row, draw: int) -> Iterator[str]:
        """Yield negatives of other queries, from a row that the draw chooses on."""
        n_donors, query = len(self._donors), normalize(row.query)
        for step in range(min(n_donors, _MAX_TRIES)):
            [other] = self._read([int(self._donors[(draw + step) % n_donors])])
            if normalize(other.query) != query:
                negatives = other.negatives
                first = draw % len(negatives)
                yield from (passage.shown for passage in (*negatives[first:], *negatives[:first]))

    def _repeated(self, row: Row, chosen: Sequence[str]) -> list[str]:
        if not chosen:
            raise RowError(
                f"expected a negative for the query {row.query[:80]!r}, found none, and none in "
                f"{min(len(self._donors), _MAX_TRIES)} other rows that is not a positive of it. Leave "
                "the row out, or train with n_negatives=0."
            )
        return list(islice(_cycle(chosen), self.n_negatives))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self  # a copy of the dataset goes through the same epochs


def _own_negatives(row: Row) -> list[str]:
    """Return a row's distinct negatives that are no positives of it."""
    positives = {passage.shown for passage in row.positives}
    texts = dict.fromkeys(passage.shown for passage in row.negatives)
    return [text for text in texts if text not in positives]


def _cycle(texts: Sequence[str]) -> Iterator[str]:
    while True:
        yield from texts
