"""A double of the Hub for datasets, over real HTTP on loopback: what the clients send and accept.

    with HubDouble() as hub:
        hub.fail("POST", "/commit/", 503, times=2)     # the next two commits
        hub.fail("POST", "/commit/", 504, after=True)  # done, but the reply is lost

Large files go over LFS, as with HF_HUB_DISABLE_XET=1; with `xet_cas="local://FOLDER"` over Xet. What
only the real server decides (quotas, licence ids, the viewer) is not here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.hub.store import LFS_SUFFIXES, Blob, Commit, Refusal, Repo
from tests.hub.xet import xet_hashes

__all__ = ["Fault", "HubDouble", "Request"]

TOKENS: dict[str, dict[str, Any]] = {
    "hf_me": {"name": "me"},
    "hf_reader": {"name": "me", "role": "read"},
    "hf_other": {"name": "other"},
}
_PAGE = 1000
_REGULAR_BYTES = 10 * 1024 * 1024


@dataclass(slots=True)
class Fault:
    """An answer to give in the place of the true one."""

    method: str
    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was answered."""

    method: str
    path: str
    status: int
    has_token: bool


class HubDouble:
    """Serves the Hub's API; a second port is the CDN, which must never see a token."""

    def __init__(self, *, xet_cas: str = "") -> None:
        self.tokens = dict(TOKENS)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Request] = []
        self.faults: list[Fault] = []
        self.before_commit: Callable[[Repo], None] | None = None
        self.xet_cas = xet_cas
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def __enter__(self) -> HubDouble:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(
        self,
        method: str,
        pattern: str,
        status: int,
        *,
        times: int = 1,
        headers: dict[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """Answer the next matching requests with a fault; `after` does the work first."""
        self.faults.append(Fault(method, pattern, status, times, headers or {}, after))

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False
    ) -> Repo:
        """Make a repository of somebody else's making."""
        repo = self.repos[repo_id] = Repo(repo_id, repo_id.split("/")[0], private=private)
        if files:
            self.commit(repo, files)
        return repo

    def commit(self, repo: Repo, files: dict[str, bytes], *, revision: str = "main") -> str:
        """Commit files past the API, as somebody else would; large kinds become LFS objects."""
        base = repo.resolve(revision)
        tree = dict(base.tree)
        for path, data in files.items():
            tree[path] = self._blob(path, data)
        oid = repo.add(Commit(base.oid, tree, "by hand", "", "somebody"))
        repo.move(revision, oid)
        return oid

    def _blob(self, path: str, data: bytes) -> Blob:
        if not path.endswith(LFS_SUFFIXES):
            return Blob(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return Blob(None, sha256, len(data))

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return a file's bytes."""
        return self.content(self.repos[repo_id].resolve(revision).tree[path])

    def paths(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repos[repo_id].resolve(revision).tree) - {".gitattributes"}

    def content(self, blob: Blob) -> bytes:
        if blob.data is not None:
            return blob.data
        if blob.sha256 not in self.blobs and (xet := self.xet_hash(blob.sha256)):
            return _read_xet(self.xet_cas, xet)
        return self.blobs[blob.sha256]

    def xet_hash(self, sha256: str) -> str | None:
        if not self.xet_cas or sha256 in self.blobs:
            return None
        return xet_hashes(Path(self.xet_cas.removeprefix("local://"))).get(sha256)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


def _read_xet(cas: str, xet: str) -> bytes:
    """Read an object for a client that knows nothing of Xet."""
    import hf_xet

    with tempfile.NamedTemporaryFile() as file:
        session = hf_xet.XetSession()
        expiry = int(time.time()) + 3600
        with session.new_file_download_group(
            endpoint=cas, token="x", token_expiry_unix_secs=expiry
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet, None), file.name)
        return Path(file.name).read_bytes()


class _Handler(BaseHTTPRequestHandler):
    """One request: find its route, answer in JSON, note it down."""

    hub: HubDouble
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every reply waits 40 ms for a delayed ACK

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _run(self) -> None:
        address = urlsplit(self.path)
        self.route, self.query = address.path, parse_qs(address.query, keep_blank_values=True)
        self.body = self._read_body()
        fault = self.hub.take_fault(self.command, self.path)
        try:
            if fault and not fault.after:
                raise Refusal(fault.status, "injected fault", headers=fault.headers)
            self.user = self._authenticate()
            self._dispatch(fault)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json(refusal.body or {"error": refusal.message}, refusal.status, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _run  # noqa: N815

    def _dispatch(self, fault: Fault | None) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in _ROUTES:
            found = pattern.fullmatch(self.route) if wanted == method else None
            if found is None:
                continue
            with self.hub.lock:
                values = {k: unquote(v or "") for k, v in found.groupdict().items()}
                answer = action(self, **values)
            if fault:
                raise Refusal(fault.status, "injected fault", headers=fault.headers)
            if answer is not None:
                self._json(answer)
            return
        raise Refusal(404, f"the double has no route for {self.command} {self.route}")

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(values).encode(), kind)

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        # Noted before it is sent: the client may go on the moment that it has the answer.
        has_token = bool(self.headers.get("Authorization"))
        self.hub.seen.append(Request(self.command, unquote(self.path), status, has_token))
        self.send_response(status)
        sent = {
            "X-Request-Id": uuid.uuid4().hex,
            "Content-Length": str(len(data)),
            **(headers or {}),
        }
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _authenticate(self) -> dict[str, Any] | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if scheme.lower() == "basic":
            token = base64.b64decode(token).decode().partition(":")[2]
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return {"role": "write", **self.hub.tokens[token]}

    def _sent(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")  # type: ignore[no-any-return]

    def _owns(self, repo_id: str) -> bool:
        return self.user is not None and repo_id.split("/")[0] == self.user["name"]

    def _repo(self, repo_id: str, *, write: bool = False, pr: bool = False) -> Repo:
        """Return a repository that the user may read, write, or open a pull request in."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._owns(repo_id)):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write or pr:
            if self.user is None:
                raise Refusal(401, "Invalid username or password.")
            if self.user["role"] != "write" or not (pr or self._owns(repo_id)):
                raise Refusal(403, "Forbidden: you don't have the necessary rights to write here")
        return repo

    # Account and repositories ------------------------------------------------------------------

    def whoami(self) -> Any:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.user["role"]}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": "1", "name": self.user["name"], "orgs": [], "auth": auth}

    def validate_yaml(self) -> Any:
        header = re.match(r"\A---\r?\n(.*?\n)?---", self._sent()["content"], re.DOTALL)
        try:
            values = yaml.safe_load(header[1] or "") if header else {}
        except yaml.YAMLError as error:
            faults = {"errors": [{"message": str(error)}], "warnings": []}
            raise Refusal(400, "Invalid metadata", body=faults) from error
        names = ("language", "task_categories", "tags", "size_categories", "source_datasets")
        wrong = [name for name in names if not _is_texts(values.get(name, []))]
        if wrong:
            faults = {"errors": [{"message": f"{wrong} must be arrays of strings"}], "warnings": []}
            raise Refusal(400, "Invalid metadata", body=faults)
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        sent = self._sent()
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{sent.get('organization') or self.user['name']}/{sent['name']}"
        if not self._owns(repo_id) or self.user["role"] != "write":
            raise Refusal(403, "You don't have the rights to create a dataset here")
        url = f"{self.hub.url}/datasets/{repo_id}"
        if repo_id in self.hub.repos:
            taken = "You already created this dataset repo"
            raise Refusal(409, taken, body={"error": taken, "url": url})
        private = sent.get("visibility") == "private" or bool(sent.get("private"))
        self.hub.repos[repo_id] = Repo(repo_id, self.user["name"], private=private)
        return {"url": url, "name": repo_id, "id": "1"}

    def repo_info(self, id: str, revision: str = "") -> Any:  # noqa: A002
        repo = self._repo(id)
        commit = repo.resolve(revision)
        readme = commit.tree.get("README.md", Blob(b"")).data or b""
        header = re.match(rb"\A---\r?\n(.*?)\n---", readme, re.DOTALL)
        card = json.loads(json.dumps(yaml.safe_load(header[1]), default=str)) if header else None
        return {
            "_id": "1", "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid,
            "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "tags": [], "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }  # fmt: skip

    # Reading -------------------------------------------------------------------------------------

    def tree(self, id: str, revision: str, path: str = "") -> None:  # noqa: A002
        tree = self._repo(id).resolve(revision).tree
        prefix = f"{path.strip('/')}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found: dict[str, Any] = {}
        for name in sorted(n for n in tree if n.startswith(prefix)):
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    folder = prefix + "/".join(parts[:depth])
                    oid = hashlib.sha1(folder.encode()).hexdigest()  # noqa: S324
                    found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                found[name] = tree[name].info(name)
        if path and not found:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self._paged(list(found.values()))

    def _paged(self, items: list[Any]) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + _PAGE < len(items):
            kept = [f"{quote(k)}={quote(v[0])}" for k, v in self.query.items() if k != "cursor"]
            after = "&".join([*kept, f"cursor={start + _PAGE}"])
            headers["Link"] = f'<{self.hub.url}{self.route}?{after}>; rel="next"'
        self._json(items[start : start + _PAGE], headers=headers)

    def paths_info(self, id: str, revision: str) -> Any:  # noqa: A002
        tree = self._repo(id).resolve(revision).tree
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = self._sent() if is_json else parse_qs(self.body.decode())
        return [tree[path].info(path) for path in asked.get("paths", []) if path in tree]

    def refs(self, id: str) -> Any:  # noqa: A002
        repo = self._repo(id)

        def rows(kind: str, values: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                for name, oid in values.items()
            ]

        return {
            "branches": rows("heads", repo.branches), "tags": rows("tags", repo.tags), "converts": []
        }  # fmt: skip

    def resolve_file(self, id: str, revision: str, path: str) -> None:  # noqa: A002
        commit = self._repo(id).resolve(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.tree.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        if blob.data is not None:
            self._ranged(blob.data, {**headers, "ETag": f'"{blob.oid}"'})
            return
        if xet := self.hub.xet_hash(blob.sha256):
            route = f"{self.hub.url}/api/datasets/{id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": route}
        # Another origin, as the Hub's CDN is: the client must leave its token behind.
        headers |= {
            "X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"',
            "ETag": f'"{blob.sha256}"', "Location": f"{self.hub.cdn_url}/_cdn/{blob.sha256}",
        }  # fmt: skip
        self._send(302, b"", headers)

    def cdn(self, sha256: str) -> None:
        data = self.hub.content(Blob(None, sha256))
        self._ranged(data, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data, headers)
            return
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        end = min(int(asked[2]) + 1 if asked[1] and asked[2] else len(data), len(data))
        if start >= len(data):
            raise Refusal(416, "Range", headers={"Content-Range": f"bytes */{len(data)}"})
        place = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        self._send(206, data[start:end], {**headers, **place})

    # Writing -------------------------------------------------------------------------------------

    def preupload(self, id: str, revision: str) -> Any:  # noqa: A002
        opens_pr = bool(self.query.get("create_pr")) or revision.startswith("refs/pr/")
        commit = self._repo(id, write=not opens_pr, pr=opens_pr).resolve(revision)
        files = []
        for file in self._sent()["files"]:
            path, old = file["path"], commit.tree.get(file["path"])
            sample = base64.b64decode(file.get("sample") or "")
            is_large = path.endswith(LFS_SUFFIXES) or file["size"] > _REGULAR_BYTES
            mode = "lfs" if is_large or b"\0" in sample else "regular"
            oid = {"oid": old.sha256 or old.oid} if old else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files, "commitOid": commit.oid}

    def lfs_batch(self, id: str) -> None:  # noqa: A002
        repo, objects = self._repo(id, pr=True), []
        for asked in self._sent()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.hub.blobs or asked["oid"] not in repo.lfs:
                upload = {"href": f"{self.hub.url}/_lfs/{asked['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/_lfs/{id}/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self._json({"transfer": "basic", "objects": objects}, headers=kind)

    def lfs_put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "checksum mismatch")
        self.hub.blobs[sha256] = self.body
        self._send(200)

    def lfs_verify(self, id: str) -> Any:  # noqa: A002
        sent = self._sent()
        if len(self.hub.blobs.get(sent["oid"], b"")) != sent["size"]:
            raise Refusal(404, "LFS object not found")
        self._repo(id, pr=True).lfs.add(sent["oid"])
        return {}

    def xet_token(self, id: str, mode: str, revision: str = "") -> None:  # noqa: A002, ARG002
        self._repo(id, pr=mode == "write")
        if not self.hub.xet_cas:
            raise Refusal(404, "no Xet storage here; set HF_HUB_DISABLE_XET=1 in the client")
        expiry = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.xet_cas, "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(expiry),
        }  # fmt: skip
        values = {"casUrl": self.hub.xet_cas, "exp": expiry, "accessToken": "xet"}
        self._json(values, headers=headers)

    def commit(self, id: str, revision: str) -> Any:  # noqa: A002
        creates = self.query.get("create_pr", [""])[0] in ("1", "true")
        pr = creates or revision.startswith("refs/pr/")
        repo = self._repo(id, write=not pr, pr=pr)
        if self.hub.before_commit is not None:
            before, self.hub.before_commit = self.hub.before_commit, None
            before(repo)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header, base = lines[0]["value"], repo.resolve(revision)
        parent = header.get("parentCommit")
        if parent and base.oid != parent:
            if not creates:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            base = repo.resolve(parent)
        tree = self._applied(dict(base.tree), lines[1:])
        title, author = header["summary"], (self.user or {})["name"]
        oid = repo.add(Commit(base.oid, tree, title, header.get("description", ""), author))
        page = f"{self.hub.url}/datasets/{id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"}
        if creates:
            number = repo.open_pr(title, author, oid)
            return {**answer, "pullRequestUrl": f"{page}/discussions/{number}"}
        repo.move(revision, oid)
        return answer

    def _applied(self, tree: dict[str, Blob], operations: list[dict[str, Any]]) -> dict[str, Blob]:
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                if path.endswith(LFS_SUFFIXES):
                    raise Refusal(400, f"Use LFS or Xet for {path}")
                tree[path] = Blob(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs and not self.hub.xet_hash(value["oid"]):
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = Blob(None, value["oid"], value["size"])
            elif kind == "deletedFile":
                if path not in tree:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            else:
                raise Refusal(400, f"unknown operation {kind}")
        return tree

    def create_branch(self, id: str, name: str) -> Any:  # noqa: A002
        repo = self._repo(id, write=True)
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve(self._sent().get("startingPoint")).oid
        return {}

    def create_tag(self, id: str, revision: str) -> Any:  # noqa: A002
        repo, tag = self._repo(id, write=True), self._sent()["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.resolve(revision).oid
        return {}

    def discussions(self, id: str) -> Any:  # noqa: A002
        found = list(self._repo(id).prs.values())[::-1]
        return {"discussions": found, "count": len(found), "start": 0}


def _is_texts(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_API = r"/api/datasets/(?P<id>[^/]+/[^/]+)"
_WEB = r"/datasets/(?P<id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_H: Any = _Handler
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = [
    (method, re.compile(pattern), action)
    for method, pattern, action in [
        ("GET", "/api/whoami-v2", _H.whoami),
        ("POST", "/api/validate-yaml", _H.validate_yaml),
        ("POST", "/api/repos/create", _H.create_repo),
        ("GET", _API, _H.repo_info),
        ("GET", f"{_API}/revision/(?P<revision>.+)", _H.repo_info),
        ("GET", f"{_API}/refs", _H.refs),
        ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.*))?", _H.tree),
        ("POST", f"{_API}/paths-info/(?P<revision>.+)", _H.paths_info),
        ("POST", f"{_API}/preupload/(?P<revision>.+)", _H.preupload),
        ("POST", f"{_API}/commit/(?P<revision>.+)", _H.commit),
        ("POST", f"{_API}/branch/(?P<name>.+)", _H.create_branch),
        ("POST", f"{_API}/tag/(?P<revision>.+)", _H.create_tag),
        ("GET", f"{_API}/discussions", _H.discussions),
        ("GET", f"{_API}/xet-(?P<mode>read|write)-token(?:/(?P<revision>.+))?", _H.xet_token),
        ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _H.lfs_batch),
        ("PUT", "/_lfs/(?P<sha256>[0-9a-f]{64})", _H.lfs_put),
        ("POST", "/_lfs/(?P<id>[^/]+/[^/]+)/verify", _H.lfs_verify),
        ("GET", "/_cdn/(?P<sha256>[0-9a-f]{64})", _H.cdn),
        ("GET", f"{_WEB}/(?:resolve|raw)/{_REVISION}/(?P<path>.+)", _H.resolve_file),
    ]
]
