"""BatchFolder: what is known of batches on their way, kept where it survives kill -9.

One JSON file for each batch, written whole before it is uploaded, again when the server has named
it, and again when its replies are here; beside it the files themselves. It lies in the cache's
folder, for the replies end up there.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hf_relabel.errors import CacheError
from hf_relabel.judges.batch_costs import BatchReserve

__all__ = ["REPLY_FILES", "BatchFolder", "Manifest"]

FileKind = Literal["input", "output", "errors"]
REPLY_FILES: tuple[FileKind, ...] = ("output", "errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One batch: what it asks, and how far it is.

    Attributes:
        id: Ours, made before the server knows of the batch; the batch carries it as metadata.
        host: Whose Batch API.
        model: The model asked.
        keys: The requests' `custom_id`, in the order of their lines.
        tokens: Input tokens, estimated.
        created: Seconds since the epoch.
        attempts: `custom_id` → how often it was sent before, where it was.
        batch_id: The server's name of it; None while it may not have been submitted.
        end: The state that it ended in, once its files are here.
        files: The server's names of its files, as far as they are known.
        reserve: What was set aside for it under a cap; None where there is none.
        spent: What it cost, in picodollars, once it has ended; 0 without a reserve.
    """

    id: str
    host: str
    model: str
    keys: tuple[str, ...]
    tokens: int
    created: float
    attempts: Mapping[str, int] = field(default_factory=dict)
    batch_id: str | None = None
    end: str | None = None
    files: tuple[str, ...] = ()
    reserve: BatchReserve | None = None
    spent: int = 0

    @classmethod
    def load(cls, text: str) -> Manifest:
        values = json.loads(text)
        values["keys"] = tuple(values["keys"])
        values["files"] = tuple(values.get("files", ()))
        if values.get("reserve") is not None:
            values["reserve"] = BatchReserve.from_json(values["reserve"])
        return cls(**values)


class BatchFolder:
    """The folder `batches` of a cache.

    Args:
        cache: The cache's folder.
    """

    def __init__(self, cache: Path) -> None:
        self.directory = cache / "batches"

    @property
    def id(self) -> str:
        """A name of this folder that its batches carry; made when it is first asked for."""
        path = self.directory / "id"
        if not path.exists():
            _write(path, uuid.uuid4().hex)
        return path.read_text("utf-8").strip()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one run: two would wait for, and settle, the same batches.

        Raises:
            CacheError: Another process holds it, or it cannot be written to.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise CacheError(
                f"the folder {self.directory} cannot be used: {error}. Mend its permissions, or "
                "use another cache folder."
            ) from error
        with lock:
            _lock(lock.fileno(), self.directory)
            yield

    def manifests(self) -> list[Manifest]:
        """Return what is on its way or waits to be used, oldest first."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                found.append(Manifest.load(path.read_text("utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise CacheError(
                    f"expected the state of a batch in {path}, found something else ({error}). Put "
                    "the file aside; `hf-relabel batches list` shows what the server has."
                ) from error
        return sorted(found, key=lambda manifest: manifest.created)

    def save(self, manifest: Manifest) -> None:
        """Write a batch's state; it is on disk, whole, when this returns."""
        _write(self._state(manifest.id), json.dumps(asdict(manifest)))

    def drop(self, manifest: Manifest) -> None:
        """Forget a batch and its files."""
        for kind in ("input", *REPLY_FILES):
            self.file(manifest.id, kind).unlink(missing_ok=True)
        self._cancelled(manifest.id).unlink(missing_ok=True)
        self._state(manifest.id).unlink(missing_ok=True)

    def file(self, manifest_id: str, kind: FileKind) -> Path:
        """Return where a file of a batch lies, or will."""
        return self.directory / f"{manifest_id}.{kind}.jsonl"

    def reply_files(self, manifest: Manifest) -> list[Path]:
        """Return the files that came back, which may be none."""
        paths = (self.file(manifest.id, kind) for kind in REPLY_FILES)
        return [path for path in paths if path.exists()]

    def remove_leftovers(self) -> None:
        """Delete what a killed process left half done: requests are written anew from their rows."""
        for pattern in ("*.input.jsonl", "*.part"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    def note_cancelled(self, manifest_id: str) -> None:
        """Remember that the user cancelled a batch, so that no run asks its requests again."""
        if self._state(manifest_id).exists():
            self._cancelled(manifest_id).touch()

    def is_cancelled(self, manifest: Manifest) -> bool:
        return self._cancelled(manifest.id).exists()

    def _state(self, manifest_id: str) -> Path:
        return self.directory / f"{manifest_id}.json"

    def _cancelled(self, manifest_id: str) -> Path:
        return self.directory / f"{manifest_id}.cancelled"


def _lock(file: int, directory: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs there are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CacheError(
            f"another process runs batches of the cache in {directory.parent}. Wait for it, or use "
            "another cache folder."
        ) from error


def _write(path: Path, text: str) -> None:
    """Write a file whole, and have the disk say so: a machine may die, not only a process."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
