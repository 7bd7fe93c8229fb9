"""A file of requests, taken as a whole or in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_relabel.judges.batch_spool import Spool, SpooledLine

TEXTS = [b'{"n": 0}\n', '{"n": "é"}\n'.encode(), b'{"n": 2, "x": 0}\n', b'{"n": 3}\n']


def filled(folder: Path) -> Spool:
    spool = Spool(folder / "spool")
    for index, text in enumerate(TEXTS):
        spool.write(text, SpooledLine(f"id{index}", len(text), 10 + index, 100 + index))
    spool.close()
    return spool


@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1], [3, 1]])
def test_parts_join_to_the_whole(tmp_path: Path, sizes: list[int]) -> None:
    spool, paths, taken = filled(tmp_path), [], []
    assert (spool.n_bytes, spool.tokens) == (len(b"".join(TEXTS)), 46)

    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"part{number}")
        lines = spool.take(size, paths[-1])
        assert len(paths[-1].read_bytes().splitlines()) == len(lines) == size
        taken += lines
        assert spool.n_bytes == sum(line.n_bytes for line in spool.lines)

    assert b"".join(path.read_bytes() for path in paths) == b"".join(TEXTS)
    assert [line.custom_id for line in taken] == ["id0", "id1", "id2", "id3"]
    assert (spool.lines, spool.n_bytes, spool.tokens) == ([], 0, 0)
    assert sorted(tmp_path.iterdir()) == paths  # nothing else is left
