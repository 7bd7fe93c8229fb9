"""Push: a built folder goes up in one commit, onto whatever is there, and nothing else changes.

Never `push_to_hub`: it is not atomic, leaves features of earlier columns, and its retries never run
(hub.md, A5 and C). Each attempt reads the head, merges, and commits onto that head alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import HubError
from hf_relabel.hub.build import MANIFEST, Built
from hf_relabel.hub.check import read_card
from hf_relabel.hub.merge import merge_card
from hf_relabel.hub.retries import Retries

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["PushSettings", "Pushed", "push"]

_README = "README.md"
_DATA = (".parquet", ".arrow", ".jsonl", ".csv")
_TITLE = "hf_relabel "
"""Titles of our commits and pull requests begin so; by this a later push finds its pull request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushSettings:
    """Where to push, and how.

    Attributes:
        endpoint: The Hub's address; None is the client's own.
        token: A token; None is the one logged in with.
        revision: The branch; made from main where there is none.
        create_pr: Open a pull request, or add to the one opened before.
        tag: A tag for the commit. A tag that exists is never moved.
        private: Make a new repository private.
        discards: Whether large files are deleted once they are uploaded, so that the disk holds
            no more than is still to go.
        retries: What to do when the Hub does not answer.
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    private: bool = False
    discards: bool = False
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        if self.create_pr and (self.tag or self.revision):
            raise HubError(
                "expected a pull request or a tag and branch, found both: tag the commit when the "
                "pull request is merged.",
                reason="refused",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push left behind.

    Attributes:
        repo_id: The repository.
        sha: The commit that holds what was built; the head's, when nothing had to change.
        revision: The branch, or refs/pr/N.
        url: The page to look at.
        pr_url: The pull request's page, or empty text.
        tag: The tag on it, or empty text.
        n_added: Files added or changed.
        n_deleted: Stale files deleted.
    """

    repo_id: str
    sha: str
    revision: str
    url: str
    pr_url: str = ""
    tag: str = ""
    n_added: int = 0
    n_deleted: int = 0

    @property
    def is_unchanged(self) -> bool:
        """Whether everything was there already."""
        return not self.n_added and not self.n_deleted

    @property
    def pin(self) -> str:
        """The revision to load what was pushed by: a tag, or the commit."""
        return self.tag or self.sha


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remote:
    """A revision as it is: its commit, its files, and the two of them that we read."""

    sha: str
    hashes: Mapping[str, str]
    readme: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What one commit adds and deletes."""

    contents: Mapping[str, Path | bytes]
    deleted: tuple[str, ...]


def push(built: Built, settings: PushSettings | None = None) -> Pushed:
    """Push a built folder in one commit.

    Pushing the same again changes nothing; pushing after a failure sends what is missing. Files of
    earlier pushes that are not built any more are deleted, other files are never touched.

    Raises:
        HubError: The token may not do this, files of somebody else's are in the way, or the Hub
            did not answer in all attempts. The repository is as it was, or has the whole commit.
    """
    return _Pusher(built, settings or PushSettings()).push()


class _Pusher:
    """The steps of one push."""

    def __init__(self, built: Built, settings: PushSettings) -> None:
        from huggingface_hub import HfApi

        self.built, self.settings = built, settings
        self.repo_id = built.repo_id
        self.api = HfApi(
            endpoint=settings.endpoint, token=settings.token, library_name="hf_relabel"
        )
        self._user = ""
        self._uploaded: dict[str, CommitOperationAdd] = {}

    def push(self) -> Pushed:
        self._retried(self._prepare_repo)
        if self.settings.tag:
            self._retried(self._check_tag)
        pushed: Pushed = self._retried(self._commit_onto_head)
        if self.settings.tag:
            self._retried(lambda: self._set_tag(pushed.sha))
        return pushed

    def _retried(self, step: Callable[[], Any]) -> Any:
        return self.settings.retries.run(step, explain=self._explain)

    # Repository ------------------------------------------------------------------------------

    def _prepare_repo(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        self._user = self._user or self.api.whoami()["name"]
        try:
            info = self.api.dataset_info(self.repo_id)
        except RepositoryNotFoundError:
            if self.settings.create_pr:
                raise
            # Where somebody made it this moment, the conflict starts this step again.
            private = self.settings.private or None
            self.api.create_repo(self.repo_id, repo_type="dataset", private=private)
        else:
            if self.settings.private and not info.private:
                raise HubError(
                    f"expected {self.repo_id} to be private, found it public: visibility is set "
                    "when a repository is made. Change it in its settings, or leave --private out.",
                    reason="refused",
                )
        if self.settings.revision:
            self.api.create_branch(
                self.repo_id, repo_type="dataset", branch=self.settings.revision, exist_ok=True
            )

    def _explain(self, status: int) -> str:
        """Say whose token it is and what it may do; never the token."""
        if status == 401:
            return "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
        try:
            who = self.api.whoami()
            token = who.get("auth", {}).get("accessToken", {})
            name = f"The token {token.get('displayName', '')!r} of {who['name']}"
            found = f"{name} has the role {token.get('role', 'unknown')!r}."
        except Exception:  # the answer only makes the message better
            found = ""
        return (
            f"{found} Use a token that may write to {self.repo_id}, or propose the change to its "
            "owner with create_pr=True (--pr)."
        ).strip()

    # Tag -------------------------------------------------------------------------------------

    def _tag_target(self) -> str | None:
        refs = self.api.list_repo_refs(self.repo_id, repo_type="dataset")
        found = [tag.target_commit for tag in refs.tags if tag.name == self.settings.tag]
        return found[0] if found else None

    def _check_tag(self) -> None:
        """See before anything is sent whether the tag would have to move."""
        target = self._tag_target()
        if target is None:
            return
        remote = self._read(self.settings.revision or "main")
        plan = self._plan(remote)
        if target != remote.sha or plan.contents or plan.deleted:
            raise self._taken_tag(target)

    def _set_tag(self, sha: str) -> None:
        target = self._tag_target()
        if target is None:
            tag = str(self.settings.tag)
            self.api.create_tag(self.repo_id, repo_type="dataset", tag=tag, revision=sha)
        elif target != sha:
            raise self._taken_tag(target)

    def _taken_tag(self, target: str) -> HubError:
        return HubError(
            f"expected a tag that is free, found {self.settings.tag!r} on commit {target[:8]} of "
            f"{self.repo_id}. A tag is never moved: choose the next version.",
            reason="refused",
        )

    # Commit ----------------------------------------------------------------------------------

    def _commit_onto_head(self) -> Pushed:
        """Read the head, merge, and commit; run again from the start when the head has moved."""
        revision, pr_url = self.settings.revision or "main", ""
        opens_pr = False
        if self.settings.create_pr:
            number = self._open_pr()
            opens_pr = number is None
            revision = "main" if opens_pr else f"refs/pr/{number}"
            pr_url = "" if opens_pr else f"{self._url}/discussions/{number}"
        remote = self._read(revision)
        plan = self._plan(remote)
        if not plan.contents and not plan.deleted:
            return self._pushed(remote.sha, revision, pr_url, plan)
        info = self.api.create_commit(
            self.repo_id,
            self._operations(plan, revision, opens_pr=opens_pr),
            repo_type="dataset",
            commit_message=self.built.title,
            commit_description=self.built.description,
            revision=revision,
            create_pr=opens_pr,
            parent_commit=remote.sha,
        )
        if opens_pr:
            revision, pr_url = str(info.pr_revision), str(info.pr_url)
        return self._pushed(info.oid, revision, pr_url, plan)

    @property
    def _url(self) -> str:
        return f"{self.api.endpoint}/datasets/{self.repo_id}"

    def _pushed(self, sha: str, revision: str, pr_url: str, plan: _Plan) -> Pushed:
        return Pushed(
            repo_id=self.repo_id,
            sha=sha,
            revision=revision,
            url=pr_url or f"{self._url}/tree/{sha}",
            pr_url=pr_url,
            tag=self.settings.tag or "",
            n_added=len(plan.contents),
            n_deleted=len(plan.deleted),
        )

    def _open_pr(self) -> int | None:
        """Return the number of the pull request that an earlier push of this user opened."""
        found = self.api.get_repo_discussions(
            self.repo_id, repo_type="dataset", discussion_type="pull_request"
        )
        numbers = [
            pr.num
            for pr in found
            if pr.status in ("open", "draft")
            and pr.author == self._user
            and pr.title.startswith(_TITLE)
        ]
        return max(numbers, default=None)

    def _read(self, revision: str) -> _Remote:
        from huggingface_hub.hf_api import RepoFile

        sha = str(self.api.dataset_info(self.repo_id, revision=revision).sha)
        tree = self.api.list_repo_tree(
            self.repo_id, repo_type="dataset", revision=sha, recursive=True
        )
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
        manifest = self._text(sha, MANIFEST, hashes)
        return _Remote(
            sha=sha,
            hashes=hashes,
            readme=self._text(sha, _README, hashes),
            manifest=_parsed(manifest),
        )

    def _text(self, sha: str, name: str, hashes: Mapping[str, str]) -> str:
        if name not in hashes:
            return ""
        with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
            path = self.api.hf_hub_download(
                self.repo_id, name, repo_type="dataset", revision=sha, cache_dir=scratch
            )
            return Path(path).read_text("utf-8")

    def _plan(self, remote: _Remote) -> _Plan:
        """Compare what was built with what is there."""
        files = self.built.manifest["files"]
        earlier = remote.manifest.get("files", {})
        self._check_foreign(remote, files, earlier)
        self._check_readable(remote, files)
        contents: dict[str, Path | bytes] = {
            name: self.built.folder / name
            for name, known in files.items()
            if remote.hashes.get(name, "") not in _hashes(self.built.folder / name, known)
        }
        for name, data in self._texts(remote).items():
            if remote.hashes.get(name) != _git_hash(data):
                contents[name] = data
        stale = [name for name in earlier if name not in files and name in remote.hashes]
        return _Plan(contents=contents, deleted=tuple(sorted(stale)))

    def _texts(self, remote: _Remote) -> dict[str, bytes]:
        built = (self.built.folder / _README).read_text("utf-8")
        earlier = remote.manifest.get("configs", {})
        readme = merge_card(remote.readme, built, earlier=earlier)
        manifest = (self.built.folder / MANIFEST).read_bytes()
        return {_README: readme.encode(), MANIFEST: manifest}

    def _check_foreign(
        self, remote: _Remote, files: Mapping[str, Any], earlier: Mapping[str, Any]
    ) -> None:
        """Refuse to overwrite files that we did not push, or to mix ours with them."""
        folders = tuple(f"{name}/" for name in self.built.manifest["configs"])
        foreign = [
            name
            for name, found in remote.hashes.items()
            if (name in files or name.startswith(folders))
            and name not in earlier
            and found not in _hashes(self.built.folder / name, files.get(name, {}))
        ]
        if foreign:
            raise HubError(
                f"expected no files of others in the folders of our configs, found {foreign[:5]} in "
                f"{self.repo_id}. Move or delete them there, choose other configs (--configs), or "
                "another repository.",
                reason="foreign",
            )

    def _check_readable(self, remote: _Remote, files: Mapping[str, Any]) -> None:
        """Refuse where our card would keep other data from loading, or theirs ours.

        `datasets` reads all configs of a repository with the reader of the first one, and sees no
        data outside the configs that a card names.
        """
        header, _ = read_card(remote.readme)
        ours = {*self.built.manifest["configs"], *remote.manifest.get("configs", {})}
        foreign = [c for c in header.get("configs") or [] if c.get("config_name") not in ours]
        theirs = [name for name in remote.hashes if name.endswith(_DATA) and name not in files]
        theirs = [name for name in theirs if name not in remote.manifest.get("files", {})]
        named = [name for name in theirs if any(fnmatch(name, p) for p in _patterns(foreign))]
        others = [name for name in named if not name.endswith(".parquet")]
        others += [] if foreign else theirs
        if others:
            raise HubError(
                f"expected other data of {self.repo_id} to be Parquet files of configs that its "
                f"card names, found {others[:5]}: they could not be loaded any more. Convert them, "
                "name them under `configs`, or publish to another repository.",
                reason="foreign",
            )

    def _operations(self, plan: _Plan, revision: str, *, opens_pr: bool) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = []
        for name, content in plan.contents.items():
            if isinstance(content, bytes):
                operations.append(CommitOperationAdd(name, content))
            else:
                operations.append(self._uploaded_file(name, content, revision, opens_pr=opens_pr))
        return [*operations, *(CommitOperationDelete(name) for name in plan.deleted)]

    def _uploaded_file(
        self, name: str, path: Path, revision: str, *, opens_pr: bool
    ) -> CommitOperationAdd:
        """Upload one file ahead of the commit, once: a later attempt only names it."""
        from huggingface_hub import CommitOperationAdd

        if name not in self._uploaded:
            operation = CommitOperationAdd(name, path)
            self.api.preupload_lfs_files(
                self.repo_id, [operation], repo_type="dataset", revision=revision,
                create_pr=opens_pr, free_memory=self.settings.discards,
            )  # fmt: skip
            if not operation._is_uploaded:  # a small text file: goes into the commit itself
                return operation
            self._uploaded[name] = operation
            if self.settings.discards:
                path.unlink(missing_ok=True)
        return self._uploaded[name]


def _patterns(configs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Return the patterns of some configs' files, in all the ways that YAML may hold them."""
    for config in configs:
        entries = config.get("data_files", [])
        for entry in entries if isinstance(entries, list) else [entries]:
            path = entry.get("path", []) if isinstance(entry, Mapping) else entry
            yield from path if isinstance(path, list) else [str(path)]


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = {}
    return values if isinstance(values, dict) else {}


def _hashes(path: Path, known: Mapping[str, Any]) -> Iterator[str]:
    """Return the hashes under which the Hub may list a file: as LFS, and as a git blob."""
    if known:
        yield known["sha256"]
        if path.is_file():
            yield _git_hash(path.read_bytes())


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
