"""Published verdicts: those that others paid for, read from the Hub and applied without a call.

The tables name queries and passages by `content_hash`; whoever holds the same texts finds them. They
are read as data, checked, and put into an ordinary `VerdictCache` under their cascade's fingerprint.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_relabel.cache import Pairs, VerdictCache, default_directory
from hf_relabel.cascade import Cascade, Stage
from hf_relabel.errors import JudgeError, SourceError
from hf_relabel.formats import NORMALIZATION
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.questions import Question
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import HfApi

__all__ = ["PublishedCascade", "PublishedVerdicts", "pull_verdicts"]

T = TypeVar("T")
_MANIFEST = "hf_relabel.json"
_LAYOUT = 1
_SCHEMA_VERSION = 1
_HASH = re.compile(r"[0-9a-f]{64}")
_COLUMNS = (
    "query_sha256", "doc_sha256", "stage", "judge", "verdict", "rank", "grade", "confidence",
    "error_type", "call_id",
)  # fmt: skip
_BATCH = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVerdicts:
    """Verdicts that were pulled, and the cascade that they stand for.

    Attributes:
        repo_id: Where they come from.
        sha: At which commit.
        cascade: Answers from the cache; whatever is not in it stays undecided.
        cache: Where they are.
        policy: The policy that they were published with, in JSON values.
        n_pairs: Pairs of a query and a passage that were read.
    """

    repo_id: str
    sha: str
    cascade: PublishedCascade
    cache: VerdictCache
    policy: Mapping[str, Any]
    n_pairs: int


class PublishedCascade(Cascade):
    """A cascade known by its fingerprint and the names of its judges alone.

    Args:
        judges: Name and model of each stage's judge, and the stage's name.
        fingerprint: The cascade's own: the cache keeps verdicts under it.
        escalate: "row" or "passage".
    """

    def __init__(
        self, judges: Sequence[Mapping[str, str]], *, fingerprint: str, escalate: Any
    ) -> None:
        stages = [
            Stage(_PublishedJudge(judge["judge"], judge["model"], fingerprint), judge["name"])
            for judge in judges
        ]
        super().__init__(stages, escalate=escalate)
        self._known_fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        return self._known_fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known_fingerprint": self._known_fingerprint}


class _PublishedJudge(LocalJudge):
    """Stands for a judge that is not here: what it said is in the cache, and it says no more."""

    def __init__(self, name: str, model: str, cascade: str) -> None:
        self.name = name
        self._model = model
        # Not that of the true judge: a question it is asked here must not count as its failure.
        self.fingerprint = f"published:{cascade}:{name}"

    @property
    def model(self) -> str:
        return self._model

    def judge(self, question: Question) -> list[Verdict]:
        raise JudgeError(
            f"expected a published verdict on {len(question.passages)} passages of the query "
            f"{question.query!r}, found none.",
            reason="not_published",
        )


def pull_verdicts(
    repo_id: str,
    *,
    revision: str | None = None,
    cache: str | Path | VerdictCache | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> PublishedVerdicts:
    """Read the verdicts of a published dataset into a cache.

    Args:
        repo_id: The dataset, as owner/name.
        revision: A tag, branch or commit.
        cache: Where they go; what is there already stays. None is a folder of their own, so that
            the verdicts of others never mix with yours.
        endpoint: The Hub's address; None is the client's own.
        token: A token; None is the one logged in with.

    Raises:
        SourceError: Nothing can be read there, or its tables are not ours.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="hf_relabel")
    with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
        sha = _read(lambda: str(api.dataset_info(repo_id, revision=revision).sha), repo_id)
        manifest = _manifest(_read(lambda: _fetch(api, repo_id, sha, _MANIFEST, scratch), repo_id))
        names = sorted(name for name in manifest["files"] if name.startswith("verdicts/"))
        if not names:
            raise SourceError(f"expected verdicts in {repo_id}, found a dataset without them.")
        opened = _open(cache, repo_id, sha)
        n_pairs = 0
        for name in names:
            path = _read(lambda name=name: _fetch(api, repo_id, sha, name, scratch), repo_id)  # type: ignore[misc]
            n_pairs += _import(path, manifest["cascade_fingerprint"], opened)
            path.unlink(missing_ok=True)
    return PublishedVerdicts(
        repo_id=repo_id,
        sha=sha,
        cascade=PublishedCascade(
            manifest["stages"],
            fingerprint=manifest["cascade_fingerprint"],
            escalate=manifest["escalate"],
        ),
        cache=opened,
        policy=manifest["policy"],
        n_pairs=n_pairs,
    )


def _open(cache: str | Path | VerdictCache | None, repo_id: str, sha: str) -> VerdictCache:
    if isinstance(cache, VerdictCache):
        return cache
    own = default_directory() / "published" / repo_id.replace("/", "--") / sha
    return VerdictCache(cache or own)


def _fetch(api: HfApi, repo_id: str, sha: str, name: str, folder: str) -> Path:
    # A local folder, not the client's cache: the tables go into a cache of our own at once.
    path = api.hf_hub_download(repo_id, name, repo_type="dataset", revision=sha, local_dir=folder)
    return Path(path)


def _read(fetch: Callable[[], T], repo_id: str) -> T:
    try:
        return fetch()
    except (OSError, ValueError) as error:  # the clients' errors are of these two kinds
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise SourceError(
            f"expected a dataset with published verdicts on the Hub, found {repo_id!r}, which "
            f"cannot be read: {first.strip()}"
        ) from error


def _manifest(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text("utf-8"))
    expected = {"layout": _LAYOUT, "schema_version": _SCHEMA_VERSION}
    expected["normalization"] = NORMALIZATION  # type: ignore[assignment]
    wrong = {
        name: values.get(name) for name, value in expected.items() if values.get(name) != value
    }
    if wrong:
        raise SourceError(
            f"expected published verdicts with {expected}, found {wrong}: another version of "
            "hf_relabel wrote them. Use that version."
        )
    stages = values["stages"]
    is_text = [
        isinstance(stage.get(name), str) for stage in stages for name in ("name", "judge", "model")
    ]
    if not is_text or not all(is_text) or not _HASH.fullmatch(values["cascade_fingerprint"]):
        raise SourceError(f"expected the stages of a cascade in {_MANIFEST}, found {stages!r}.")
    return dict(values)


def _import(path: Path, cascade: str, cache: VerdictCache) -> int:
    n_pairs = 0
    for query, pairs in _by_query(path):
        found = {key: trace for key, trace in pairs.items() if trace[-1].relevance.is_decided}
        if found:
            judges = tuple(verdict.judge for verdict in max(found.values(), key=len))
            cache.write([Pairs(cascade=cascade, query=query, judges=judges, traces=found)])
            n_pairs += len(found)
    return n_pairs


def _by_query(path: Path) -> Iterator[tuple[str, dict[str, tuple[Verdict, ...]]]]:
    """Join the verdicts of each query; they lie together, stage after stage."""
    query, pairs = "", dict[str, tuple[Verdict, ...]]()
    for row in _rows(path):
        if row["query_sha256"] != query:
            if pairs:
                yield query, pairs
            query, pairs = row["query_sha256"], {}
        before = pairs.get(row["doc_sha256"], ())
        if row["stage"] == len(before):
            pairs[row["doc_sha256"]] = (*before, _verdict(row))
        elif row["stage"] != 0:  # stage 0 again: the same passage in another row of the query
            raise _foreign(f"stage {row['stage']} after {len(before)} stages")
    if pairs:
        yield query, pairs


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise _foreign(f"no columns {missing}")
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(_COLUMNS)):
                yield from _checked(batch)
    except pa.ArrowInvalid as error:
        raise _foreign(str(error)) from error


def _checked(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for row in batch.to_pylist():
        for name in ("query_sha256", "doc_sha256"):
            if not _HASH.fullmatch(row[name] or ""):
                raise _foreign(f"the {name} {row[name]!r}")
        if not isinstance(row["judge"], str) or not isinstance(row["stage"], int):
            raise _foreign(f"the judge {row['judge']!r} at stage {row['stage']!r}")
        yield row


def _verdict(row: Mapping[str, Any]) -> Verdict:
    try:
        relevance = Relevance(row["verdict"])
    except ValueError as error:
        raise _foreign(f"the verdict {row['verdict']!r}") from error
    return Verdict(
        relevance=relevance,
        judge=row["judge"],
        rank=row["rank"],
        grade=row["grade"],
        confidence=row["confidence"],
        reason=row["error_type"],
        call=row["call_id"],
    )


def _foreign(found: str) -> SourceError:
    return SourceError(
        f"expected the verdicts of a dataset that hf_relabel published, found {found} in them."
    )
