"""Rows: a query with its passages, what becomes of it, and when two texts are the same passage.

Values only. Nothing here knows column names.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hf_relabel.texts import has_no_controls, is_printable
from hf_relabel.verdicts import Action

__all__ = [
    "NORMALIZATION",
    "Batch",
    "Edit",
    "Passage",
    "Row",
    "Written",
    "content_hash",
    "normalize",
]

Batch = dict[str, list[Any]]
"""What `Dataset.map(batched=True)` hands over: column name to one value per row."""

NORMALIZATION = "nfc-ws-1"
"""Names what `normalize` does. Published hashes carry it, so it changes whenever the rule does."""


def normalize(text: str) -> str:
    """Return the text by which two passages are compared: NFC, single spaces, no outer space.

    White space is what `str.split` splits on: all of Unicode's, line ends and no-break space too.
    Case, punctuation and invisible characters are left as they are.
    """
    if _is_plain(text):
        return text
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_plain(text: str) -> bool:
    """Whether normalizing would change nothing, told without taking the text apart."""
    # Printable means that the one white space in it is the blank.
    return (
        is_printable(text)
        and "  " not in text
        and text[:1] != " " != text[-1:]
        and (text.isascii() or unicodedata.is_normalized("NFC", text))
    )


@lru_cache(maxsize=16_384)
def content_hash(text: str) -> str:
    """Return the sha256, in hex, of the normalized text's UTF-8: same hash, same passage.

    A lone surrogate, which UTF-8 has no bytes for, is hashed as its three would-be bytes. The
    latest hashes are remembered: a row in work asks for each of its texts' several times.
    """
    if text.isascii():  # most texts are, and plain too: their bytes are looked at once
        data = text.encode()
        if _is_plain_ascii(data):
            return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(normalize(text).encode("utf-8", "surrogatepass")).hexdigest()


def _is_plain_ascii(data: bytes) -> bool:
    return has_no_controls(data) and b"  " not in data and data[:1] != b" " != data[-1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One text searched for.

    Attributes:
        text: The text as stored.
        title: Its title, empty when there is none.
        docid: Its id in the collection, None when there is none.
        score: A retriever's or teacher's score, where the dataset has one beside the passage.
    """

    text: str
    title: str = ""
    docid: str | None = None
    score: float | None = None
    _key: str = field(default="", init=False, repr=False, compare=False)

    @property
    def shown(self) -> str:
        """The title on its own line, then the text; the text alone if it starts with the title."""
        title = self.title.strip()
        if not title or _starts_with(self.text.lstrip(), title):
            return self.text
        return f"{title}\n{self.text}"

    @property
    def key(self) -> str:
        """`content_hash` of what is shown; computed at the first use only."""
        if not self._key:
            object.__setattr__(self, "_key", content_hash(self.shown))
        return self._key


def _starts_with(text: str, title: str) -> bool:
    # "New" does not begin "Newton was born…": the title has to end where a word ends.
    return text.startswith(title) and not text[len(title) : len(title) + 1].isalnum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training example.

    Attributes:
        query: The search text.
        positives: The passages labeled relevant, in the dataset's order.
        negatives: The passages labeled not relevant, in the dataset's order.
        query_id: The query's id, where the dataset has one.
        subset: The named part of the dataset that the row comes from, where it says so.
        indices: The rows of the batch (from 0) that this was read from: one for formats that hold
            a query in one row, one or more, ascending, for triplets and pairs.
    """

    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    query_id: str | None = None
    subset: str | None = None
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What becomes of one row.

    Attributes:
        actions: One per negative of the row, aligned.
        promoted: Indices into the negatives, in the order in which they follow the positives.
            Each has `Action.PROMOTE`, and no passage is in it twice: a duplicate of a promoted
            passage is dropped. A negative with PROMOTE that is not listed is dropped as well.
        drop_row: Why the whole row leaves, as counted in reports; None if it stays.
    """

    actions: tuple[Action, ...]
    promoted: tuple[int, ...] = ()
    drop_row: str | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether the row stays, with all its negatives."""
        return self.drop_row is None and all(action is Action.KEEP for action in self.actions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A batch after its edits.

    `len(in) + rows_added == len(out) + sum(rows_dropped.values())`, counted in dataset rows.

    Attributes:
        batch: Every column of the batch that was read, in the same order, all of one length.
        rows_dropped: Reason to the number of dataset rows that left for it.
        rows_added: How many dataset rows hold a promoted passage as a positive of its own.
    """

    batch: Batch
    rows_dropped: dict[str, int]
    rows_added: int
