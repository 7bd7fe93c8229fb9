"""Presence: how many processes judge with the same cache folder right now.

Workers of `num_proc`, shards on one machine and a second terminal share an account's limits; each
takes its part. A process is present while it holds the lock on the file with its name, which ends
with it however it ends, and while that file is fresh: it is touched at work, and an idle process
leaves its part to others after a while.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there a process that was killed is present until its file is stale
    fcntl = None  # type: ignore[assignment]

__all__ = ["Presence"]

_LOOK_EVERY_S = 1.0
# With locks, only who idles has to go stale; a call may take as long as endpoints wait for one.
_STALE_AFTER_S = 15.0 if fcntl is None else 120.0


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
        self._noticed_at = float("-inf")
        self._present: frozenset[str] = frozenset()
        self._leave: Callable[[], object] = lambda: None

    def count(self) -> int:
        """Say that this process is at work, and return how many are; looks once a second."""
        self._look()
        return max(1, len(self._present))

    def is_present(self, name: str) -> bool:
        """Whether the process of this name was at work in the last seconds."""
        self._look()
        return name in self._present

    def unnoticed_s(self) -> float:
        """Return how long others who are at work may still not know of this process."""
        return max(0.0, self._noticed_at - time.monotonic())

    def leave(self) -> None:
        """Say that this process is no longer at work."""
        if self._pid == os.getpid():
            self._leave()
            self._looked_at = float("-inf")

    def _look(self) -> None:
        if self._pid != os.getpid():  # a forked worker is somebody else
            self._reset()
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        is_new = self._looked_at == float("-inf")
        if is_new:
            self._join()
        self._looked_at = now
        (self._folder / self.name).touch()
        self._present = frozenset(self._names())
        if is_new and len(self._present) > 1:
            self._noticed_at = now + 1.5 * _LOOK_EVERY_S

    def _join(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Locked before it has its name: others take an unlocked file for that of a dead process.
        path, unnamed = self._folder / self.name, self._folder / f".{self.name}"
        descriptor = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        unnamed.replace(path)
        self._leave = weakref.finalize(self, _unlink_and_close, path, descriptor, self._pid)

    def _names(self) -> list[str]:
        names, oldest = [], time.time() - _STALE_AFTER_S
        for entry in os.scandir(self._folder):
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # it has just left
                is_fresh = entry.stat().st_mtime >= oldest
                if not (is_fresh if fcntl is None else _is_locked(entry.path)):
                    Path(entry.path).unlink()
                elif is_fresh:
                    names.append(entry.name)
        return names


def _is_locked(path: str) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _unlink_and_close(path: Path, descriptor: int, pid: int) -> None:
    if pid == os.getpid():  # a forked worker inherits the file, but it is not its own
        path.unlink(missing_ok=True)
    os.close(descriptor)
