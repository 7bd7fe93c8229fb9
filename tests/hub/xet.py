"""The Xet hashes of files that hf_xet stored in a `local://` folder, read from its shard files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["xet_hashes"]

_END = b"\xff" * 32
_RECORD = 48
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30


def xet_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each stored file → its Xet hash."""
    return dict(pair for path in folder.rglob("shards/*.mdb") for pair in _of_shard(path))


def _of_shard(path: Path) -> Iterator[tuple[str, str]]:
    data, place = path.read_bytes(), _RECORD  # after the shard's own header
    while data[place : place + 32] != _END and place + _RECORD <= len(data):
        xet = _hex(data[place : place + 32])
        flags, n_segments = struct.unpack("<II", data[place + 32 : place + 40])
        place += _RECORD + _RECORD * n_segments * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_METADATA:
            yield _hex(data[place : place + 32]), xet
            place += _RECORD


def _hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
