"""Masking: exact -inf masks in the losses of the MultipleNegativesRanking family.

The losses have no mask argument, but they compute every score through `similarity_fct`, which may
be replaced. Ids of texts travel as `batch["label"]`, which these losses do not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hf_relabel.callbacks.edits import N_HEAD
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

__all__ = ["MaskedSimilarity", "Scores", "find_ranking_loss", "gathers", "install"]

_ORDER = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
"""The order in which the losses call `similarity_fct`, whatever the order in `directions`."""

Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How the model scores a batch's own passages, as tensors that stay on their device.

    Attributes:
        queries: (B,) ids.
        docs: (B, D) ids of positive and negatives.
        scores: (B, D) similarities.
    """

    queries: Tensor
    docs: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ids:
    """What a batch's mask says; `all_*` are gathered from every rank where the loss gathers.

    Attributes:
        offset: Where this rank's rows start among all.
        queries: (W,) ids of all queries.
        silent: (W,) whether a row stands in for a dropped one.
        docs: (B, D) ids of this rank's passages.
        all_docs: (W, D) ids of all passages.
        excluded: (B, K) ids that are no negatives of this rank's queries.
        all_excluded: (W, K) those of all queries.
    """

    offset: int
    queries: Tensor
    silent: Tensor
    docs: Tensor
    all_docs: Tensor
    excluded: Tensor
    all_excluded: Tensor

    @classmethod
    def of(cls, mask: Tensor, *, is_gathered: bool) -> _Ids:
        n_docs = int(mask.shape[1]) if not len(mask) else int(mask[0, 0])
        offset, everything = 0, mask
        if is_gathered:
            everything, offset = _gathered(mask)
            everything = _joined(everything, N_HEAD + n_docs)
        return cls(
            offset=offset,
            queries=everything[:, 1],
            silent=everything[:, 2].bool(),
            docs=mask[:, N_HEAD : N_HEAD + n_docs],
            all_docs=everything[:, N_HEAD : N_HEAD + n_docs],
            excluded=everything[offset : offset + len(mask), N_HEAD + n_docs :],
            all_excluded=everything[:, N_HEAD + n_docs :],
        )


class MaskedSimilarity:
    """Stands in for a loss's `similarity_fct`, and masks what a batch's ids say.

    Args:
        inner: The similarity function.
        loss: The loss that calls it.
        masks_in_batch: Whether known positives are masked in other rows' places too.

    Attributes:
        n_masked: A tensor on the loss's device: cells of other rows' passages masked so far. Reading
            it waits for the device, so it is read only when logs are written.
        on_scores: Called with a batch's scores, where someone wants them.
    """

    def __init__(
        self, inner: Similarity, loss: MultipleNegativesRankingLoss, *, masks_in_batch: bool
    ) -> None:
        self.inner = inner
        self.n_masked: Tensor | None = None
        self.on_scores: Callable[[Scores], None] | None = None
        self._loss = loss
        self._masks_in_batch = masks_in_batch
        self._ids: _Ids | None = None
        self._n_calls = 0
        self._row = 0
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._own: list[Tensor] = []
        self._has_passed = False

    @property
    def __name__(self) -> str:
        return getattr(self.inner, "__name__", type(self.inner).__name__)

    def is_inside(self, loss: nn.Module) -> bool:
        """Whether this is the similarity function that a loss uses."""
        return find_ranking_loss(loss) is self._loss

    def begin(self, mask: object) -> None:
        """Take the mask of the batch that comes; anything else (evaluation) masks nothing."""
        self._ids, self._n_calls, self._row, self._own = None, 0, 0, []
        self._has_passed = False
        if isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.ndim == 2:
            is_gathered = self._loss.gather_across_devices and _is_distributed()
            self._ids = _Ids.of(mask, is_gathered=is_gathered)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the similarities, -inf where a cell is masked."""
        scores = self.inner(left, right)
        if self._ids is None:
            return scores
        kinds = [kind for kind in _ORDER if kind in self._loss.directions]
        kind = kinds[self._n_calls % len(kinds)]
        if kind == "query_to_doc":  # the gradient-cached losses call once for each chunk of rows
            self._rows = torch.arange(self._row, self._row + len(scores), device=scores.device)
            self._see(scores, self._ids)
        cells = getattr(self, f"_{kind}")(self._ids)
        self._n_calls += 1
        if self._n_calls % len(kinds) == 0:  # Matryoshka losses begin again for each dimension
            self._row = (self._row + len(self._rows)) % len(self._ids.docs)
            self._has_passed |= self._row == 0
        return scores.masked_fill(cells, -torch.inf)

    # In what follows n are the rows of this chunk, W the rows of all ranks, D passages of a row.

    def _query_to_doc(self, ids: _Ids) -> Tensor:
        """Return (n, D * W) cells, in the columns' order: all positives, then all first negatives."""
        columns = ids.all_docs.T.reshape(-1)
        cells = _among(columns, ids.excluded[self._rows])
        own = self._own_rows(ids).repeat(1, ids.all_docs.shape[1])
        others = cells & ~own
        if self._masks_in_batch:
            self._count(others)
        else:
            cells = cells & own
        cells = cells | self._silenced(ids).repeat(1, ids.all_docs.shape[1])
        cells[:, : len(ids.queries)] &= ~self._own_rows(ids)  # never the own positive
        return cells

    def _query_to_query(self, ids: _Ids) -> Tensor:
        """Return (n, W) cells: the same query in another row is no negative of itself."""
        mine = ids.queries[self._mine(ids)]
        same = (ids.queries[None, :] == mine[:, None]) & self._masks_in_batch
        return same | self._silenced(ids) | ids.silent[self._mine(ids)][:, None]

    def _doc_to_query(self, ids: _Ids) -> Tensor:
        """Return (W, n) cells: queries to which this row's positive is a known one."""
        positives = ids.docs[self._rows, 0]
        cells = torch.zeros(
            len(ids.queries), len(positives), dtype=torch.bool, device=positives.device
        )
        if self._masks_in_batch:
            for excluded in ids.all_excluded.T:
                cells |= excluded[:, None] == positives[None, :]
        return (cells | self._silenced(ids).T) & ~self._own_rows(ids).T

    def _doc_to_doc(self, ids: _Ids) -> Tensor:
        """Return (D * W, n) cells: passages that the row's query knows as positives."""
        columns = ids.all_docs.T.reshape(-1)
        cells = _among(columns, ids.excluded[self._rows]) & self._masks_in_batch
        silenced = self._silenced(ids) | ids.silent[self._mine(ids)][:, None]
        return (cells | silenced.repeat(1, ids.all_docs.shape[1])).T

    def _mine(self, ids: _Ids) -> Tensor:
        return ids.offset + self._rows

    def _own_rows(self, ids: _Ids) -> Tensor:
        """Return (n, W): where a row meets itself."""
        numbers = torch.arange(len(ids.queries), device=self._rows.device)
        return numbers[None, :] == self._mine(ids)[:, None]

    def _silenced(self, ids: _Ids) -> Tensor:
        """Return (n, W): silent rows against all, and all against silent rows."""
        return ids.silent[None, :] | ids.silent[self._mine(ids)][:, None]

    def _count(self, cells: Tensor) -> None:
        if not self._has_passed:
            n_masked = cells.sum()
            self.n_masked = n_masked if self.n_masked is None else self.n_masked + n_masked

    def _see(self, scores: Tensor, ids: _Ids) -> None:
        """Hand the scores of the batch's own passages on, when the last chunk is there."""
        if self.on_scores is None or self._has_passed:
            return
        n_rows, n_docs = len(ids.queries), ids.all_docs.shape[1]
        columns = torch.arange(n_docs, device=scores.device) * n_rows
        own = columns[None, :] + self._mine(ids)[:, None]
        self._own.append(scores.detach().gather(1, own))
        if self._row + len(scores) >= len(ids.docs):
            mine = ids.queries[ids.offset : ids.offset + len(ids.docs)]
            self.on_scores(Scores(queries=mine, docs=ids.docs, scores=torch.cat(self._own)))


def find_ranking_loss(loss: nn.Module) -> MultipleNegativesRankingLoss | None:
    """Return the loss that scores, inside the wrappers that hand labels through; None if none does.

    Wrappers are the library's own (Matryoshka, AdaptiveLayer, Splade, CSR, the gradient-cached):
    what others do with labels is not known.
    """
    found: object = loss
    while isinstance(found, nn.Module):
        if isinstance(found, MultipleNegativesRankingLoss):
            return found
        is_known = type(found).__module__.startswith("sentence_transformers.")
        found = getattr(found, "loss", None) if is_known else None
    return None


def gathers(loss: nn.Module) -> bool:
    """Whether ranks exchange their batches in this loss, so that their sizes must be equal."""
    found = find_ranking_loss(loss)
    return bool(getattr(found or loss, "gather_across_devices", False))


def install(
    loss: nn.Module, *, masks_in_batch: bool
) -> tuple[MaskedSimilarity, Callable[[], None]] | None:
    """Let a loss mask what its labels say.

    Args:
        loss: The whole loss, with its wrappers.
        masks_in_batch: Whether known positives are masked in other rows' places too.

    Returns:
        The similarity function now in place, and what puts the old one back; None where the loss
        is not of the MultipleNegativesRanking family.
    """
    ranking = find_ranking_loss(loss)
    if ranking is None:
        return None
    old = ranking.similarity_fct
    ranking._modules.pop("similarity_fct", None)  # torch refuses a function where a module was
    masked = MaskedSimilarity(old, ranking, masks_in_batch=masks_in_batch)
    ranking.similarity_fct = masked

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masked.begin(args[1] if len(args) > 1 else kwargs.get("labels"))

    handle = loss.register_forward_pre_hook(begin, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        ranking.__dict__.pop("similarity_fct", None)
        ranking.similarity_fct = old

    return masked, undo


def _among(columns: Tensor, excluded: Tensor) -> Tensor:
    """Return (n, C): whether a column's id is among a row's."""
    # One id after the other: all at once would take K times the memory.
    cells = torch.zeros(len(excluded), len(columns), dtype=torch.bool, device=columns.device)
    for ids in excluded.T:
        cells |= columns[None, :] == ids[:, None]
    return cells


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gathered(mask: Tensor) -> tuple[Tensor, int]:
    """Return all ranks' masks, one below the other, and where ours starts."""
    width = torch.tensor([mask.shape[1]], device=mask.device)
    torch.distributed.all_reduce(width, op=torch.distributed.ReduceOp.MAX)
    # Ids that are excluded stand last: filling up with 0 on the right adds none.
    filled = nn.functional.pad(mask, (0, int(width) - mask.shape[1])).contiguous()
    parts = [torch.empty_like(filled) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, filled)
    return torch.cat(parts), torch.distributed.get_rank() * len(mask)


def _joined(masks: Tensor, start: int) -> Tensor:
    """Let rows of one query, on whatever rank, exclude what any of them excludes.

    Args:
        masks: (W, …) the masks of all ranks.
        start: Where the excluded ids begin.
    """
    same = masks[:, 1][:, None] == masks[:, 1][None, :]
    n_same = int(same.sum(dim=1).max())
    if n_same == 1:
        return masks
    is_same, rows = same.long().topk(n_same, dim=1)
    excluded = masks[:, start:][rows] * is_same[:, :, None]
    return torch.cat([masks[:, :start], excluded.reshape(len(masks), -1)], dim=1)
