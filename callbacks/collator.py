"""RelabelCollator: edits rows where batches are made, before they are tokenised.

For a training loop of your own:

    index = VerdictIndex.build(relabeler)
    loader = DataLoader(rows, collate_fn=RelabelCollator(collate, index), …)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hf_relabel.callbacks.counts import Counts
from hf_relabel.callbacks.edits import BatchEditor, KnownPositives
from hf_relabel.callbacks.index import VerdictIndex
from hf_relabel.callbacks.shapes import ASIDE, TrainingRow

from hf_relabel.errors import MissingExtraError

__all__ = ["RelabelCollator", "relabel_batch"]

logger = logging.getLogger("hf_relabel")

_MAX_AHEAD = 256  # batches of one worker that may wait: many times what loaders prefetch

Collate = Callable[[list[TrainingRow]], Any]


def relabel_batch(
    batch: Sequence[TrainingRow],
    index: VerdictIndex,
    *,
    epoch: int = 0,
    known_positives: KnownPositives | None = None,
) -> list[TrainingRow]:
    """Relabel the rows of one batch by verdicts that are known, without a call.

    Args:
        batch: Rows of one dataset: triplets, n-tuples, labeled pairs or lists, Tevatron or
            FlagEmbedding rows.
        index: The verdicts, and what becomes of them.
        epoch: Chooses, with the index's seed, which positive of a query stands in its place.
        known_positives: Query → passages that are relevant to it beyond what the rows say.

    Returns:
        One row or more; rows that nothing touched are the objects that came in. In a tuple, the
        text of a freed slot is a negative of another row.

    Raises:
        ColumnError, RowError: A row does not hold what its columns promise.
    """
    edited = BatchEditor(index, known_positives=known_positives).edit(batch, epoch=epoch)
    return list(batch) if edited is None else edited.rows


class RelabelCollator:
    """A collate function that relabels rows and hands them to another.

    Safe in the workers of a data loader: they map the same index, and count in shared memory.

    Args:
        inner: What makes a batch of rows.
        index: The verdicts, and what becomes of them.
        known_positives: Query → passages that are relevant to it beyond what the rows say.
        masked: Names of the datasets ("" where there is one without a name) whose loss masks what
            `batch["label"]` then says; in all others the texts of freed slots are replaced.
        keeps_size: Whether batches keep their number of rows, because ranks gather them.
        n_workers: Workers of the loader that will count.

    Attributes:
        epoch: Set at the start of each epoch; workers see it at once.
    """

    def __init__(
        self,
        inner: Collate,
        index: VerdictIndex,
        *,
        known_positives: KnownPositives | None = None,
        masked: frozenset[str] = frozenset(),
        keeps_size: bool = False,
        n_workers: int = 0,
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError.of("torch", "train", "relabeling while training") from error
        self.inner = inner
        self.index = index
        self.masked = masked
        self.keeps_size = keeps_size
        self._editor = BatchEditor(index, known_positives=known_positives)
        shape = (n_workers + 1, _MAX_AHEAD, len(Counts.names()))
        self._log = torch.zeros(shape, dtype=torch.int64)
        self._n_made = torch.zeros(n_workers + 1, dtype=torch.int64)
        self._epoch = torch.zeros(1, dtype=torch.int64)
        for shared in (self._log, self._n_made, self._epoch):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        self._has_warned = False

    def __call__(self, rows: Sequence[TrainingRow]) -> Any:
        """Relabel rows and make a batch of them."""
        name = rows[0].get(ASIDE, "") if rows else ""
        edited = self._editor.edit(
            rows, epoch=self.epoch, is_masked=name in self.masked, keeps_size=self.keeps_size
        )
        if edited is None:
            self._warn_once(rows)
            self._count(Counts())
            return self.inner(list(rows))
        self._count(edited.counts)
        batch = self.inner(edited.rows)
        if edited.mask is not None:
            import torch

            batch["label"] = torch.from_numpy(edited.mask)
        return batch

    @property
    def epoch(self) -> int:
        return int(self._epoch.item())

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def counts(self) -> Counts:
        """What was done to all batches made so far, by this process and its workers."""
        return self._sum(self._n_made.tolist())

    @property
    def n_made(self) -> list[int]:
        """How many batches this process made, and then each of its workers."""
        made: list[int] = self._n_made.tolist()
        return made

    def counts_after(self, n_batches: int, since: Sequence[int]) -> Counts:
        """Return what was done up to a batch, without those made ahead of it.

        Args:
            n_batches: How many the training took in this epoch.
            since: `n_made` when the epoch began; a loader then asks its workers in turns.
        """
        made, n_workers = self.n_made, len(since) - 1
        taken = [n_batches] if not n_workers else [0]
        taken += [(n_batches - worker + n_workers - 1) // n_workers for worker in range(n_workers)]
        until = [min(all_, before + n) for all_, before, n in zip(made, since, taken, strict=True)]
        return self._sum(until)

    def _sum(self, until: Sequence[int]) -> Counts:
        """Add up what each line had counted after so many of its batches."""
        total = Counts()
        for line, n in zip(self._log, until, strict=True):
            total.add(Counts.of(line[n % _MAX_AHEAD].tolist()))
        return total

    def _count(self, counts: Counts) -> None:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        line = 0 if info is None else info.id + 1
        if line >= len(self._log):  # a loader with workers that nobody announced
            return
        n = int(self._n_made[line])
        for place, value in enumerate(counts.values):
            before = self._log[line, n % _MAX_AHEAD, place]
            self._log[line, (n + 1) % _MAX_AHEAD, place] = before + value
        self._n_made[line] = n + 1

    def _warn_once(self, rows: Sequence[TrainingRow]) -> None:
        if self._has_warned or not rows:
            return
        self._has_warned = True
        logger.warning(
            "expected batches of (query, positive, negatives), (query, passage, label) or (query, "
            "passages, labels), found the columns %s. They are trained on as they are: a column of "
            "scores beside several negatives would go out of step with them.",
            list(rows[0]),
        )

    def __getattr__(self, name: str) -> Any:
        # The trainers read settings off their collator.
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
