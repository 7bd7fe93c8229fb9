"""Identity: 64-bit ids of texts and of (query, passage) pairs, as the verdict cache tells them apart.

A text's id is the first eight bytes of its `content_hash`, so that ids can be read off the cache
without a text at hand, and equal ids mean what equal keys mean to the transform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hf_relabel.formats import content_hash

__all__ = ["Ids", "TextIds", "id_of_hash", "pair_ids", "seeded_draw"]

Ids = npt.NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: keeps (a, b) and (b, a) apart
_MAX_REMEMBERED = 200_000  # about 30 MB


def id_of_hash(content: str) -> int:
    """Return the id of the text with this `content_hash`."""
    return int(content[:16], 16)


def pair_ids(queries: Ids, passages: Ids) -> Ids:
    """Return one id for each pair; both arguments broadcast.

    Ids of texts are uniform already, being cut from a sha256, so one multiplication is enough: two
    pairs collide with probability 2^-64, about 3e-4 for a billion look-ups in five million pairs.
    """
    with np.errstate(over="ignore"):
        return queries * _ODD + passages


def seeded_draw(*parts: int) -> int:
    """Return 64 bits that follow from some numbers alone, in every process."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class TextIds:
    """Computes ids of texts, and remembers them by Python's own hash of the string.

    `content_hash` costs 2 to 5 µs a passage, Python's hash a tenth of that; from the second epoch
    on nearly every passage is remembered. Two strings share a Python hash with probability 2^-64.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def __call__(self, text: str) -> int:
        """Return one text's id."""
        short = hash(text)
        found = self._known.get(short)
        if found is None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            found = self._known[short] = id_of_hash(content_hash(text))
        return found

    def of(self, texts: Sequence[str]) -> Ids:
        """Return the ids of N texts, in order."""
        return np.fromiter((self(text) for text in texts), dtype=np.uint64, count=len(texts))

    def __getstate__(self) -> dict[str, object]:
        return {}  # Python salts its hash anew in every process

    def __setstate__(self, state: dict[str, object]) -> None:
        self._known = {}
