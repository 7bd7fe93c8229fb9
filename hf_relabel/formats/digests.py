"""Digests: one hash of all that decides what becomes of a row, of `Row` values or inside Arrow.

The query, the subset, and the texts and titles of positives and negatives, each in order: exactly
what the cascade's verdicts and the policy hang on. Ids, scores and other columns are not in it.
`digest_of` reads a `Row`, `digests_of` the bytes of many rows where they lie; both hash this:

    prefix | numbers as little-endian int32 | query | subset
           | texts of the positives | their titles | texts of the negatives | their titles

The numbers are how many positives and negatives there are, whether there is a subset, and then the
lengths of all that follows, in that order: they make the bytes unambiguous.

The hash is XXH3 with 128 bits, a twentieth of SHA-256's time: `map` computes one of every row that it
passes, and nothing else of most. It tells apart what nobody built to collide (among a billion rows
two would share a digest with a chance of 1e-21), and no digest leaves the machine's own cache.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import TYPE_CHECKING, TypeAlias

from xxhash import xxh3_128

from hf_relabel.formats.rows import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]

__all__ = ["PassageLists", "RowTexts", "Texts", "digest_of", "digests_of"]

_HEAD = 5  # numbers before the lengths of the passages


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """N texts as Arrow holds them.

    Attributes:
        data: UTF-8 bytes, one text after another.
        bounds: N + 1 places in `data`: where each text begins, and where the last one ends.
    """

    data: memoryview
    bounds: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageLists:
    """A list of passages for each of N rows.

    Attributes:
        bounds: N + 1 places among the passages: where each row's begin, and where the last ends.
        texts: Of all passages of all rows.
        titles: Likewise; None where no passage has one.
    """

    bounds: Ints
    texts: Texts
    titles: Texts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTexts:
    """What N rows say.

    Attributes:
        queries: N texts.
        subsets: N names; None where no row has one.
        has_subset: For each row whether it has a name, though it may be empty.
        positives: N lists.
        negatives: N lists.
    """

    queries: Texts
    subsets: Texts | None
    has_subset: NDArray[np.bool_]
    positives: PassageLists
    negatives: PassageLists


def digest_of(row: Row, prefix: bytes) -> str:
    """Return the digest of one row, in hex."""
    texts = [row.query, row.subset or ""]
    for passages in (row.positives, row.negatives):
        texts += [passage.text for passage in passages]
        texts += [passage.title for passage in passages]
    whole = "".join(texts)
    sizes = map(len, texts) if whole.isascii() else (len(_utf8(text)) for text in texts)
    numbers = (len(row.positives), len(row.negatives), row.subset is not None, *sizes)
    packed = struct.pack(f"<{len(numbers)}i", *numbers)
    return xxh3_128(b"".join((prefix, packed, _utf8(whole)))).hexdigest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def digests_of(rows: RowTexts, prefix: bytes) -> list[str]:
    """Return the digests of many rows, without making a Python object of any passage."""
    # A list of parts for each row, hashed one after another: nothing but slices of buffers.
    columns = [_slices(*_numbers(rows)), _slices_of(rows.queries)]
    if rows.subsets is not None:
        columns.append(_slices_of(rows.subsets))
    for lists in (rows.positives, rows.negatives):
        columns.append(_slices(lists.texts.data, lists.texts.bounds[lists.bounds]))
        if lists.titles is not None:
            columns.append(_slices(lists.titles.data, lists.titles.bounds[lists.bounds]))
    begun = xxh3_128(prefix)
    return [_hashed(begun.copy(), parts) for parts in zip(*columns, strict=True)]


def _hashed(hasher: xxh3_128, parts: tuple[memoryview, ...]) -> str:
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _slices_of(texts: Texts) -> Iterator[memoryview]:
    return _slices(texts.data, texts.bounds)


def _slices(data: memoryview, bounds: Ints) -> Iterator[memoryview]:
    return map(data.__getitem__, starmap(slice, pairwise(bounds.tolist())))


def _numbers(rows: RowTexts) -> tuple[memoryview, Ints]:
    """Return the numbers of all rows as bytes, and the bounds of each row's."""
    import numpy as np

    lists = (rows.positives, rows.negatives)
    counts = [np.diff(one.bounds) for one in lists]
    starts = np.concatenate([[0], np.cumsum(_HEAD + 2 * sum(counts))])
    numbers = np.zeros(starts[-1], dtype="<i4")
    place = starts[:-1]
    numbers[place], numbers[place + 1] = counts
    numbers[place + 2] = rows.has_subset
    numbers[place + 3] = np.diff(rows.queries.bounds)
    if rows.subsets is not None:
        numbers[place + 4] = np.diff(rows.subsets.bounds)
    place = place + _HEAD
    for one, count in zip(lists, counts, strict=True):
        for texts in (one.texts, one.titles):
            if texts is not None:
                numbers[_spread(place, one.bounds, count)] = np.diff(texts.bounds)
            place = place + count
    return memoryview(numbers.tobytes()), 4 * starts


def _spread(places: Ints, bounds: Ints, counts: Ints) -> Ints:
    """Return a place for each passage: its row's, and those after it for the row's next ones."""
    import numpy as np

    spread: Ints = np.repeat(places - bounds[:-1], counts) + np.arange(bounds[-1])
    return spread
