"""Spool: a file of requests that grows until it becomes a batch, or several."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

__all__ = ["Spool", "SpooledLine"]


class SpooledLine(NamedTuple):
    """What is known of a line in the file.

    Attributes:
        custom_id: The request's.
        n_bytes: Length of the line, its end included.
        tokens: Input tokens, estimated.
        pico: The most that the request can cost, in picodollars; 0 without a cap.
    """

    custom_id: str
    n_bytes: int
    tokens: int
    pico: int


class Spool:
    """A file of requests, and what is known of each.

    Args:
        path: The file, which is made.

    Attributes:
        lines: One entry for each request that is still to be taken, in order.
        n_bytes: Of those.
        tokens: Of those.
    """

    def __init__(self, path: Path) -> None:
        self.lines: list[SpooledLine] = []
        self.n_bytes = 0
        self.tokens = 0
        self._path = path
        self._file = path.open("wb")
        self._n_taken = 0  # bytes

    def write(self, text: bytes, line: SpooledLine) -> None:
        self._file.write(text)
        self.lines.append(line)
        self._count(1, [line])

    def close(self) -> None:
        """End the writing; what is in the file can be taken from now on."""
        self._file.close()

    def take(self, n_lines: int, path: Path) -> list[SpooledLine]:
        """Move the first requests into a file of their own; all of them are this file itself.

        Args:
            n_lines: How many.
            path: The file that they are in afterwards.
        """
        taken, self.lines = self.lines[:n_lines], self.lines[n_lines:]
        self._count(-1, taken)
        if self.lines or self._n_taken:
            self._copy(taken, path)
        else:
            self._path.replace(path)
        if not self.lines:
            self._path.unlink(missing_ok=True)
        return taken

    def _copy(self, taken: list[SpooledLine], path: Path) -> None:
        with self._path.open("rb") as source, path.open("wb") as target:
            source.seek(self._n_taken)
            target.writelines(islice(source, len(taken)))
        self._n_taken += sum(line.n_bytes for line in taken)

    def _count(self, sign: int, lines: list[SpooledLine]) -> None:
        self.n_bytes += sign * sum(line.n_bytes for line in lines)
        self.tokens += sign * sum(line.tokens for line in lines)
