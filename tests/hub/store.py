"""What the Hub double holds: repositories with commits, branches, tags and pull requests."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

__all__ = ["LFS_SUFFIXES", "Blob", "Commit", "Refusal", "Repo", "git_oid", "now"]

LFS_SUFFIXES = (".parquet", ".arrow", ".png", ".jpg", ".zip", ".gz", ".bin", ".safetensors")
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class Refusal(Exception):  # noqa: N818  an answer of the server, not a fault of the test
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        *,
        headers: dict[str, str] | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = headers or {}, body


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  git's own


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True, slots=True)
class Blob:
    """One file of a tree: its bytes, or the hash and size of an LFS object."""

    data: bytes | None = None
    sha256: str = ""
    size: int = 0

    @property
    def oid(self) -> str:
        return git_oid(self.pointer if self.data is None else self.data)

    @property
    def pointer(self) -> bytes:
        lines = f"oid sha256:{self.sha256}\nsize {self.size}\n"
        return f"version https://git-lfs.github.com/spec/v1\n{lines}".encode()

    def info(self, path: str) -> dict[str, Any]:
        size = self.size if self.data is None else len(self.data)
        values = {"type": "file", "path": path, "oid": self.oid, "size": size}
        if self.data is None:
            lfs = {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}
            return {**values, "lfs": lfs}
        return values


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository."""

    parent: str | None
    tree: dict[str, Blob]
    title: str
    message: str
    author: str
    oid: str = field(default_factory=lambda: uuid.uuid4().hex + uuid.uuid4().hex[:8])


class Repo:
    """One dataset repository."""

    def __init__(self, repo_id: str, author: str, *, private: bool) -> None:
        self.id, self.private = repo_id, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.prs: dict[int, dict[str, Any]] = {}
        self.lfs: set[str] = set()
        first = Commit(
            None, {".gitattributes": Blob(_ATTRIBUTES.encode())}, "initial commit", "", author
        )
        self.branches["main"] = self.add(first)

    def add(self, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        return commit.oid

    def resolve(self, revision: str | None) -> Commit:
        name = revision if revision not in (None, "", "HEAD") else "main"
        assert name is not None
        if pr := self._pr(name):
            return self.commits[pr["head"]]
        oid = self.branches.get(name) or self.tags.get(name) or name
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.commits[oid]

    def move(self, revision: str, oid: str) -> None:
        if pr := self._pr(revision):
            pr["head"] = oid
        elif revision in self.branches:
            self.branches[revision] = oid
        else:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def open_pr(self, title: str, author: str, oid: str) -> int:
        number = len(self.prs) + 1
        self.prs[number] = {
            "num": number, "title": title, "author": {"name": author}, "createdAt": now(),
            "status": "open", "repo": {"name": self.id, "type": "dataset"}, "isPullRequest": True,
            "head": oid,
        }  # fmt: skip
        return number

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        found, oid = [], self.resolve(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent  # type: ignore[assignment]
        return found

    def _pr(self, revision: str) -> dict[str, Any] | None:
        number = re.fullmatch(r"refs/pr/(\d+)", revision)
        return self.prs.get(int(number[1])) if number else None
