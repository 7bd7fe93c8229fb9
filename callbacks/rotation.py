"""Rotation: a row of several positives and many negatives is one tuple, another in each epoch.

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
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeVar

from hf_relabel.callbacks.identity import id_of_hash, seeded_draw

from hf_relabel.errors import MissingExtraError, RowError, SettingError
from hf_relabel.formats import Format, Passage, content_hash, convert, normalize, resolve

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

__all__ = ["SHAPES", "Rotation", "rotate"]

logger = logging.getLogger("hf_relabel")

AnyDataset = TypeVar("AnyDataset", "Dataset", "DatasetDict")

SHAPES = ("n-tuple", "labeled-list")
"""What a row can become: a tuple for retrievers, a list with labels for rerankers."""

_MAX_TRIES = 64  # rows looked into for one refill; all of them refused means a dataset of one topic
_LIST_FORMATS = {
    "tevatron": ("positive_passages", "negative_passages"),
    "flagembedding": ("pos", "neg"),
}
"""Formats that hold all passages of a query in one row, with the roles of the two lists."""


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
    if isinstance(dataset, DatasetDict):
        return DatasetDict(
            {
                name: rotate(
                    part, to=to, n_negatives=n_negatives, seed=seed, format=format, columns=columns
                )
                for name, part in dataset.items()
            }
        )
    return _rotated(*_as_lists(dataset, format, columns), to, n_negatives, seed)


def _check(to: str, n_negatives: int) -> None:
    if to not in SHAPES:
        raise SettingError(f"expected `to` to be one of {list(SHAPES)}, found {to!r}.")
    if n_negatives < (to == "labeled-list"):
        raise SettingError(
            f"expected n_negatives of at least 1 (0 for n-tuples), found {n_negatives}."
        )


def _as_lists(
    dataset: Dataset, format_: str | None, columns: Mapping[str, str] | None
) -> tuple[Dataset, Format]:
    """Return rows that hold all passages of a query, and their format: as they are, where they do."""
    dataset = dataset.with_format(None)
    sample = dataset[0] if len(dataset) else None
    source = resolve(dataset.column_names, format_, columns, sample=sample)
    if source.name in _LIST_FORMATS:
        return dataset, source
    rows = convert(dataset, to="tevatron", format=format_, columns=columns)
    return rows, resolve(rows.column_names, "tevatron")


def _rotated(rows: Dataset, source: Format, to: str, n_negatives: int, seed: int) -> Dataset:
    names = [source.columns[role] for role in _LIST_FORMATS[source.name]]
    n_positives, n_own = (_lengths(rows, name) for name in names)
    kept = [number for number, n in enumerate(n_positives) if n]
    if len(kept) < len(rows):
        n_left_out = len(rows) - len(kept)
        logger.warning("%d of %d rows have no positive and are left out.", n_left_out, len(rows))
    donors = [number for number in kept if n_own[number]]
    if n_negatives and kept and not donors:
        raise RowError(
            f"expected negatives, found none in {len(rows)} rows. Mine some, or train on in-batch "
            "negatives alone with n_negatives=0."
        )
    sides = Sides(rows=rows, query=source.query_column, positives=names[0], negatives=names[1])
    rotation = Rotation(sides, donors=donors, to=to, n_negatives=n_negatives, seed=seed)
    rotated = _numbered(kept, rotation.features())
    rotated.set_transform(rotation)
    return rotated


def _lengths(rows: Dataset, column: str) -> list[int]:
    """Return how many passages each row has, from the offsets alone.

    Raises:
        RowError: A passage has no text; found now, and not in the middle of a training.
    """
    import pyarrow.compute as pc

    lengths: list[int] = []
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        values = batch[column]
        counts = pc.fill_null(pc.list_value_length(values), 0)
        flat = pc.list_flatten(values)
        texts = pc.struct_field(flat, "text") if hasattr(flat.type, "fields") else flat
        if texts.null_count:
            raise RowError(
                f"expected a text for every passage in column {column!r}, found {texts.null_count} "
                f"without one among the rows {len(lengths)} to {len(lengths) + len(counts) - 1}. "
                "Leave the passages out, or store their texts as strings."
            )
        lengths += counts.to_pylist()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One row: a query, and the texts of either side of it, as they are shown."""

    query: str
    positives: list[str]
    negatives: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Rows that hold lists of passages, read by their numbers.

    Attributes:
        rows: Where they lie.
        query: The column of the query.
        positives: The column of its positives.
        negatives: The column of its negatives.
    """

    rows: Dataset
    query: str
    positives: str
    negatives: str

    def read(self, numbers: Sequence[int]) -> list[Side]:
        """Return some rows, in the order asked for."""
        batch = self.rows[list(numbers)]
        columns = (batch[self.query], batch[self.positives], batch[self.negatives])
        return [
            Side(query=query, positives=_shown(positives), negatives=_shown(negatives))
            for query, positives, negatives in zip(*columns, strict=True)
        ]


def _shown(passages: Sequence[Any] | None) -> list[str]:
    return [
        passage
        if isinstance(passage, str)
        else Passage(text=passage["text"], title=passage.get("title") or "").shown
        for passage in passages or ()
    ]


class Rotation:
    """The transform of a rotated dataset: numbers of rows in, this epoch's tuples out.

    Args:
        sides: The rows.
        donors: Numbers of the rows with a negative, which refills are taken from.
        to: One of `SHAPES`.
        n_negatives: Negatives in each tuple.
        seed: Chooses where each query begins.
    """

    def __init__(
        self, sides: Sides, *, donors: Sequence[int], to: str, n_negatives: int, seed: int
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError.of("torch", "train", "rotating positives") from error
        self.to = to
        self.n_negatives = n_negatives
        self.seed = seed
        self._sides = sides
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
        made = [self._columns(row, epoch) for row in self._sides.read(numbers)]
        return {name: [columns[name] for columns in made] for name in batch}

    def _columns(self, row: Side, epoch: int) -> dict[str, Any]:
        positive, negatives = self.pick(row, epoch)
        if self.to == "labeled-list":
            labels = [1, *[0] * len(negatives)]
            return {"anchor": row.query, "documents": [positive, *negatives], "labels": labels}
        slots = {f"negative_{slot}": text for slot, text in enumerate(negatives, start=1)}
        return {"anchor": row.query, "positive": positive, **slots}

    def pick(self, row: Side, epoch: int) -> tuple[str, list[str]]:
        """Choose one positive and the negatives that stand beside it in an epoch."""
        draw = seeded_draw(self.seed, id_of_hash(content_hash(row.query)))
        positive = row.positives[(draw + epoch) % len(row.positives)]
        own = _own_negatives(row)
        random.Random(draw).shuffle(own)
        n = self.n_negatives
        if len(own) >= n:
            start = epoch * n
            return positive, [own[(start + slot) % len(own)] for slot in range(n)]
        return positive, self._refilled(row, own, seeded_draw(draw, epoch))

    def _refilled(self, row: Side, own: Sequence[str], draw: int) -> list[str]:
        chosen = list(own)
        taken = {*own, *row.positives}
        for slot in range(len(own), self.n_negatives):
            candidates = self._of_others(row, seeded_draw(draw, slot))
            text = next((text for text in candidates if text not in taken), None)
            if text is None:
                return self._repeated(row, chosen)
            taken.add(text)
            chosen.append(text)
        return chosen

    def _of_others(self, row: Side, draw: int) -> Iterator[str]:
        """Yield negatives of other queries, from a row that the draw chooses on."""
        n_donors, query = len(self._donors), normalize(row.query)
        for step in range(min(n_donors, _MAX_TRIES)):
            [other] = self._sides.read([int(self._donors[(draw + step) % n_donors])])
            if normalize(other.query) != query:
                negatives = other.negatives
                first = draw % len(negatives)
                yield from (*negatives[first:], *negatives[:first])

    def _repeated(self, row: Side, chosen: Sequence[str]) -> list[str]:
        if not chosen:
            raise RowError(
                f"expected a negative for the query {row.query[:80]!r}, found none of its own, and "
                f"none in {min(len(self._donors), _MAX_TRIES)} other rows that is no positive of it. "
                "Leave the row out, or train with n_negatives=0."
            )
        return list(islice(cycle(chosen), self.n_negatives))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self  # a copy of the dataset goes through the same epochs


def _own_negatives(row: Side) -> list[str]:
    """Return a row's distinct negatives that are no positives of it."""
    positives = set(row.positives)
    return [text for text in dict.fromkeys(row.negatives) if text not in positives]
