"""RowIndex: what was decided on whole rows, so that `map` need not look into those it knows.

A record says what a cascade found on each negative of a row, under the digest of the row's texts
(see `formats.digests`). From it any policy decides: it holds relevances and ranks, no action. It is
made of verdicts that the index of pairs holds: the first final verdict of a pair stays, and so a
record stays true. Rows with an undecided passage have none.

Records are derived, and dispensable: without them `map` reads rows and pairs, and writes them anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_relabel import __version__
from hf_relabel.cache import Entry, VerdictCache
from hf_relabel.formats import NORMALIZATION, Edit, Passage, Row
from hf_relabel.formats.digests import digest_of
from hf_relabel.policy import Policy
from hf_relabel.verdicts import Relevance, Trace, Verdict

__all__ = ["UNCHANGED", "Notes", "RowIndex", "RowRecord"]

_LAYOUT = 1
_CODES = {"b": Relevance.BETTER, "w": Relevance.WORSE, "n": Relevance.NOT_RELEVANT}
_CODE_OF = {relevance: code for code, relevance in _CODES.items()}
_IS_POSITIVE = "="
UNCHANGED = Edit(actions=())
"""The edit of every known row that stays as it is, however many negatives it has."""

_NOTED_AT_A_TIME = 200
_MAX_EDITS = 10_000  # distinct records whose edits are remembered; most rows share a few


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRecord:
    """What was decided on one row, without any of its texts.

    Attributes:
        subset: The row's subset.
        codes: For each negative: what the last judge found, or that its text is a positive's. None
            where nobody judged the row, for its subset is skipped.
        ranks: Of relevant negatives that have one, by their index.
        repeats: Negative to an earlier one that has the same text.
    """

    subset: str | None
    codes: str | None = None
    ranks: Mapping[int, int]
    repeats: Mapping[int, int]

    @classmethod
    def of(cls, row: Row, traces: Mapping[str, Trace]) -> RowRecord | None:
        """Describe a row by its final verdicts; None where one is missing or undecided."""
        positives = {passage.key for passage in row.positives}
        first: dict[str, int] = {}
        codes, ranks, repeats = [], {}, {}
        for index, passage in enumerate(row.negatives):
            key = passage.key
            trace = traces.get(key)
            if key in positives:
                codes.append(_IS_POSITIVE)
            elif trace is None or not trace[-1].relevance.is_decided:
                return None
            else:
                verdict = trace[-1]
                codes.append(_CODE_OF[verdict.relevance])
                if verdict.rank is not None and verdict.relevance.is_relevant:
                    ranks[index] = verdict.rank
                if first.setdefault(key, index) != index:
                    repeats[index] = first[key]
        return cls(subset=row.subset, codes="".join(codes), ranks=ranks, repeats=repeats)

    @classmethod
    def unjudged(cls, row: Row) -> RowRecord:
        return cls(subset=row.subset, ranks={}, repeats={})

    @classmethod
    def is_wanted(cls, stored: str | None, *, is_skipped: bool) -> bool:
        """Whether a record could say more than the stored one does."""
        return stored is None or (not is_skipped and cls.load(stored).codes is None)

    def dump(self) -> str:
        return json.dumps([self.subset, self.codes, *map(_items, (self.ranks, self.repeats))])

    @classmethod
    def load(cls, text: str) -> RowRecord:
        subset, codes, ranks, repeats = json.loads(text)
        return cls(subset=subset, codes=codes, ranks=dict(ranks), repeats=dict(repeats))

    def edit(self, policy: Policy, *, can_run_out: bool) -> Edit | None:
        """Return what a policy makes of the row, or None if it needs verdicts that are not here."""
        row, verdicts = self._stand_in()
        if self.codes is None and not policy.skips(row):
            return None
        return policy.edit(row, verdicts, can_run_out=can_run_out)

    def _stand_in(self) -> tuple[Row, dict[str, Verdict]]:
        """Return a row of numbers for texts, alike in all that a policy looks at."""
        codes = self.codes or ""
        negatives = tuple(
            Passage(text=_IS_POSITIVE if code == _IS_POSITIVE else str(self.repeats.get(i, i)))
            for i, code in enumerate(codes)
        )
        verdicts = {
            passage.key: Verdict(relevance=_CODES[code], judge="", rank=self.ranks.get(i))
            for i, (passage, code) in enumerate(zip(negatives, codes, strict=True))
            if code != _IS_POSITIVE and i not in self.repeats
        }
        positives = (Passage(text=_IS_POSITIVE),)
        row = Row(
            query="", positives=positives, negatives=negatives, subset=self.subset, indices=(0,)
        )
        return row, verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A record on its way into the cache."""

    digest: str
    record: RowRecord

    @property
    def row_key(self) -> str:
        return _row_key(self.digest)

    def merged(self, stored: str | None) -> str | None:
        # One without verdicts gives way to one with them; two with verdicts are the same.
        return self.record.dump() if stored is None or self.record.codes is not None else None


class RowIndex:
    """The records of one cascade in one cache.

    Args:
        cache: Where they are, beside the pairs that they are made of.
        cascade: The cascade's fingerprint.
    """

    def __init__(self, cache: VerdictCache, cascade: str) -> None:
        self._cache = cache
        self._cascade = cascade
        # The version, too: it decides how a passage is shown, and so which pairs are a row's.
        parts = [_LAYOUT, __version__, NORMALIZATION, cascade]
        self.prefix = hashlib.sha256(json.dumps(parts).encode()).digest()
        self._edits: dict[str, Edit | None] = {}
        self._decided_by: tuple[Policy, bool] | None = None

    def edits(
        self, digests: Sequence[str], policy: Policy, *, can_run_out: bool
    ) -> list[Edit | None]:
        """Return what a policy makes of rows: None for one that is not known, UNCHANGED for most.

        Args:
            digests: Of the rows, made with `prefix`.
            policy: Who decides.
            can_run_out: As `Policy.edit` takes it.
        """
        if self._decided_by != (policy, can_run_out) or len(self._edits) > _MAX_EDITS:
            self._decided_by, self._edits = (policy, can_run_out), {}
        row_keys = [_row_key(digest) for digest in digests]
        texts, edits = self._cache.texts(row_keys), self._edits
        for text in set(texts.values()) - edits.keys():
            edit = RowRecord.load(text).edit(policy, can_run_out=can_run_out)
            is_unchanged = edit is not None and edit.changes_nothing
            edits[text] = UNCHANGED if is_unchanged else edit
        found = map(texts.get, row_keys)
        return [None if text is None else edits[text] for text in found]

    def entries(
        self,
        rows: Sequence[Row],
        traces: Sequence[Mapping[str, Trace]],
        *,
        skips: Callable[[Row], bool],
    ) -> list[Entry]:
        """Return records of those rows that are decided, to be written to the cache.

        Args:
            rows: N rows.
            traces: For each, the verdicts that the cache holds as final, by `Passage.key`.
            skips: Whether a row passes through unjudged.
        """
        digests = [digest_of(row, self.prefix) for row in rows]
        stored = self._cache.texts([_row_key(digest) for digest in digests])
        entries: dict[str, Entry] = {}
        for digest, row, found in zip(digests, rows, traces, strict=True):
            is_skipped = skips(row)
            if RowRecord.is_wanted(stored.get(_row_key(digest)), is_skipped=is_skipped):
                record = RowRecord.of(row, found)
                if record is None and is_skipped:
                    record = RowRecord.unjudged(row)
                if record is not None:
                    entries[digest] = _Entry(digest=digest, record=record)
        return list(entries.values())


class Notes:
    """Records of rows that were judged, written many at a time.

    Args:
        index: Where they go.
        cache: The index's own.
        skips: Whether a row passes through unjudged.
    """

    def __init__(
        self, index: RowIndex, cache: VerdictCache, *, skips: Callable[[Row], bool]
    ) -> None:
        self._index = index
        self._cache = cache
        self._skips = skips
        self._judged: list[tuple[Row, Mapping[str, Trace]]] = []

    async def add(self, row: Row, traces: Mapping[str, Trace]) -> None:
        """Take a row and its final verdicts, and write what came if it is much."""
        self._judged.append((row, traces))
        if len(self._judged) >= _NOTED_AT_A_TIME:
            await self.write()

    async def write(self) -> None:
        """Write the records of the rows that came so far."""
        if not self._judged:
            return
        rows, traces = zip(*self._judged, strict=True)
        self._judged = []
        entries = await asyncio.to_thread(self._index.entries, rows, traces, skips=self._skips)
        if entries:
            await self._cache.commit(entries)


def _row_key(digest: str) -> str:
    return f"row:{digest}"


def _items(values: Mapping[int, int]) -> list[tuple[int, int]]:
    return list(values.items())
