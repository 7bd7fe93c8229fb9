"""Refills: which passage takes the slot of a dropped or promoted one, where rows have a width."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable

from hf_relabel.formats.rows import Passage

__all__ = ["Refills"]


class Refills:
    """The kept negatives of a batch, as refills for the rows of other queries.

    A refill is a negative of another query: an easy negative, but one that nobody called relevant
    to this query. hooks.md measured what else could stand there: a copy of the row's own positive
    ruins the loss, a copy of a sibling counts that sibling twice.
    """

    def __init__(
        self,
        kept: Iterable[tuple[str, Passage]],
        *,
        excluded: Callable[[str], Collection[str]],
        seed: int,
    ) -> None:
        """Collect what may be handed out.

        Args:
            kept: (normalized query, passage) for each kept negative of the batch.
            excluded: Normalized query to the keys of passages that must never be its negatives:
                known positives, and negatives that lost their label. Asked only when needed.
            seed: Chooses among the candidates, with the query and the slot.
        """
        self._excluded = excluded
        self._seed = seed
        self._own: dict[str, list[Passage]] = {}
        for query, passage in kept:
            self._own.setdefault(query, []).append(passage)
        self._pool, self._spans = self._pooled()

    def _pooled(self) -> tuple[list[Passage], dict[str, tuple[int, int]]]:
        # Grouped by query, so that a query's own negatives are one span to step over; each text
        # once, so that a frequent one is not the refill of every slot.
        pool: list[Passage] = []
        spans = {}
        seen: set[str] = set()
        for query, passages in self._own.items():
            start = len(pool)
            for passage in passages:
                if passage.text not in seen:
                    seen.add(passage.text)
                    pool.append(passage)
            spans[query] = (start, len(pool))
        return pool, spans

    def own(self, query: str) -> list[Passage]:
        """Return the query's own kept negatives that are not excluded, in order."""
        excluded = self._excluded(query)
        return [p for p in self._own.get(query, []) if p.key not in excluded]

    def pick(
        self, query: str, slot: str, *, in_row: Collection[str], used: Collection[str] = ()
    ) -> Passage | None:
        """Choose a passage for one slot.

        Args:
            query: The row's query, normalized.
            slot: Names the slot; another slot starts at another candidate.
            in_row: Keys of the row's other negatives.
            used: Keys that would better not come again, such as the query's other rows' negatives.

        Returns:
            In order of preference: another query's negative that is neither in the row nor used;
            one that is used; the query's own kept negative, not in the row; any own kept negative.
            None if there is none at all.
        """
        excluded = self._excluded(query)
        for avoided in (used, ()) if used else ((),):
            for passage in self._foreign(query, slot):
                key = passage.key
                if key not in excluded and key not in in_row and key not in avoided:
                    return passage
        own = self.own(query)
        fresh = [p for p in own if p.key not in in_row] or own
        return fresh[self._draw(query, slot) % len(fresh)] if fresh else None

    def _foreign(self, query: str, slot: str) -> Iterable[Passage]:
        start, end = self._spans.get(query, (0, 0))
        n_foreign = len(self._pool) - (end - start)
        first = self._draw(query, slot) % n_foreign if n_foreign else 0
        for step in range(n_foreign):
            position = (first + step) % n_foreign
            yield self._pool[position if position < start else position + end - start]

    def _draw(self, query: str, slot: str) -> int:
        # blake2b, because Python's own hash of a string differs from one process to the next.
        name = f"{self._seed}\0{query}\0{slot}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
