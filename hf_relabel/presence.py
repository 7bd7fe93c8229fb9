"""Presence: how many processes judge with the same cache folder right now.

Workers of `num_proc`, shards on one machine and a second terminal share an account's limits; each
takes its part. A process is present while the file with its name is fresh: it is touched at work,
removed at the end, and after a kill it goes stale within seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import uuid
from pathlib import Path

__all__ = ["Presence"]

_LOOK_EVERY_S = 1.0
_STALE_AFTER_S = 15.0


class Presence:
    """A process among those that work in a folder.

    Args:
        folder: Where processes meet; made on first use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self.name = f"{self._pid}-{uuid.uuid4().hex[:12]}"
        self._looked_at = float("-inf")
        self._present: frozenset[str] = frozenset()

    def count(self) -> int:
        """Say that this process is at work, and return how many are; looks once a second."""
        self._look()
        return max(1, len(self._present))

    def is_present(self, name: str) -> bool:
        """Whether the process of this name was at work in the last seconds."""
        self._look()
        return name in self._present

    def leave(self) -> None:
        """Say that this process is no longer at work."""
        self._looked_at = float("-inf")
        (self._folder / self.name).unlink(missing_ok=True)

    def _look(self) -> None:
        if self._pid != os.getpid():  # a forked worker is somebody else
            self._reset()
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        if self._looked_at == float("-inf"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            atexit.register(self.leave)
        self._looked_at = now
        (self._folder / self.name).touch()
        self._present = frozenset(self._fresh_names())

    def _fresh_names(self) -> list[str]:
        fresh, oldest = [], time.time() - _STALE_AFTER_S
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # it has just left
                if entry.stat().st_mtime >= oldest:
                    fresh.append(entry.name)
                else:
                    Path(entry.path).unlink()
        return fresh
