"""Samples of judged pairs for people to look at: stratified, so that rare verdicts are among them.

A stratum is a subset and an outcome: what each stage said, "flagged", "passed" or "undecided". The
pairs that the first stage passed over are a stratum like any other, so that what a cascade misses is
measured too. Every pair of a stratum has the same chance, and weighs as many pairs as it stands for.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_relabel.errors import SettingError, SourceError
from hf_relabel.files import iter_table
from hf_relabel.verdicts import Relevance

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.uint64]

__all__ = ["Pair", "Sample", "Stratum", "choose", "draw_sample", "outcome_of"]

K = TypeVar("K")

_TABLES = ("decisions", "verdicts", "positives")
_MIN_PER_STRATUM = 2  # of one alone, nothing could be said about how far it varies
_WORDS = {
    Relevance.BETTER: "flagged",
    Relevance.WORSE: "flagged",
    Relevance.NOT_RELEVANT: "passed",
    Relevance.UNDECIDED: "undecided",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """One subset's pairs with one outcome.

    Attributes:
        subset: The subset; empty where rows name none.
        outcome: What each stage said, from the first: "flagged > passed".
        size: How many distinct pairs it holds.
        drawn: How many of them are in the sample.
    """

    subset: str
    outcome: str
    size: int
    drawn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A (query, passage) of the sample, with all that people see and all that they must not see.

    Attributes:
        task: Its name in the task files; tells nothing of the verdicts.
        positives: The passages labeled relevant, as judges saw them.
        relevances: What each stage said that was asked, in order.
        reason: The last judge's words, where it gave some.
    """

    task: str
    query: str
    positives: tuple[str, ...]
    passage: str
    subset: str
    relevances: tuple[Relevance, ...]
    query_id: str | None = None
    docid: str | None = None
    split: str | None = None
    reason: str | None = None

    @property
    def outcome(self) -> str:
        return outcome_of(self.relevances)

    @property
    def stratum(self) -> tuple[str, str]:
        return self.subset, self.outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Pairs drawn from a run, in shuffled order.

    Attributes:
        seed: What it was drawn with.
        stages: Name of each stage's judge, by the stage's name, in order.
        strata: All strata of the run, also those that hold fewer than were wanted.
        pairs: The pairs.
        n_undecided: Pairs that the cascade left undecided: in no stratum.
    """

    seed: int
    stages: Mapping[str, str]
    strata: tuple[Stratum, ...]
    pairs: tuple[Pair, ...]
    n_undecided: int = 0


def outcome_of(relevances: Sequence[Relevance]) -> str:
    """Return what stages said, as the outcome that names a stratum."""
    return " > ".join(_WORDS[relevance] for relevance in relevances)


def draw_sample(folder: Path, n: int, *, seed: int = 0) -> Sample:
    """Draw pairs from a finished run: half of them flagged in the end, half of them not.

    Args:
        folder: What `write_relabeled` or `hf-relabel run --output` wrote.
        n: How many pairs; all, where the run has fewer.
        seed: Chooses pairs and their order.

    Raises:
        SourceError: The folder is not a run's, or lacks what people must see.
        SettingError: n is too small for two pairs of each stratum.
    """
    import json

    missing = [name for name in _TABLES if not (folder / f"{name}.parquet").is_file()]
    if missing or not (folder / "run.json").is_file():
        raise SourceError(
            f"expected the --output of `hf-relabel run` in {str(folder)!r}, found no "
            f"{', '.join(f'{name}.parquet' for name in missing) or 'run.json'}. Run again with the "
            "same cache: it asks nothing."
        )
    strata, n_undecided = _strata(folder)
    chosen = choose(strata, n, seed=seed)
    stages = json.loads((folder / "run.json").read_text("utf-8"))["stages"]
    return Sample(
        seed=seed,
        stages={stage["name"]: stage["judge"] for stage in stages},
        strata=tuple(
            Stratum(subset=subset, outcome=outcome, size=len(ids), drawn=len(chosen[key]))
            for key, ids in sorted(strata.items())
            for subset, outcome in [key]
        ),
        pairs=_pairs(folder, {int(id_) for ids in chosen.values() for id_ in ids}, seed),
        n_undecided=n_undecided,
    )


def choose(
    strata: Mapping[tuple[str, str], Ids], n: int, *, seed: int
) -> dict[tuple[str, str], Ids]:
    """Choose n ids, half of them from strata that end flagged, and few strata without two.

    Args:
        strata: (subset, outcome) → distinct ids, ascending.
        n: How many in all.
        seed: Chooses among the ids of each stratum.
    """
    import numpy as np

    sizes = {key: len(ids) for key, ids in strata.items()}
    flagged = {key: size for key, size in sizes.items() if key[1].endswith("flagged")}
    passed = {key: size for key, size in sizes.items() if key not in flagged}
    least = sum(min(_MIN_PER_STRATUM, size) for size in sizes.values())
    if n < least:
        raise SettingError(
            f"expected a sample of {least} pairs or more, two of each of the {len(sizes)} strata "
            f"(subset and outcome), found {n}."
        )
    n_flagged = min(sum(flagged.values()), max(n // 2, n - sum(passed.values())))
    shares = {**_allocate(flagged, n_flagged), **_allocate(passed, n - n_flagged)}
    return {
        key: np.sort(_generator(seed, *key).choice(ids, size=shares[key], replace=False))
        for key, ids in strata.items()
    }


def _allocate(sizes: Mapping[K, int], n: int) -> dict[K, int]:
    """Share n out by the square roots of sizes: large strata get more, small ones are not lost."""
    shares = {key: min(_MIN_PER_STRATUM, size) for key, size in sizes.items()}
    waiting = [
        (-sqrt(size) / (shares[key] + 1), place, key)
        for place, (key, size) in enumerate(sizes.items())
        if shares[key] < size
    ]
    heapq.heapify(waiting)
    for _ in range(n - sum(shares.values())):
        if not waiting:
            break
        _, place, key = heapq.heappop(waiting)
        shares[key] += 1
        if shares[key] < sizes[key]:
            heapq.heappush(waiting, (-sqrt(sizes[key]) / (shares[key] + 1), place, key))
    return shares


def _generator(seed: int, *name: str) -> np.random.Generator:
    import numpy as np

    digest = hashlib.blake2b("\0".join([str(seed), *name]).encode("utf-8", "surrogatepass"))
    return np.random.default_rng(int.from_bytes(digest.digest()[:16], "big"))


def _strata(folder: Path) -> tuple[dict[tuple[str, str], Ids], int]:
    """Return the distinct pairs of each stratum, and how many are left undecided.

    A pair is 64 bits of its hashes here: a run of 19 million pairs takes 150 MB.
    """
    import numpy as np

    found: dict[tuple[str, str], array[int]] = {}
    undecided = array("Q")
    for subset, id_, relevances in _judged(folder):
        if relevances[-1].is_decided:
            key = subset, outcome_of(relevances)
            found.setdefault(key, array("Q")).append(id_)
        else:
            undecided.append(id_)
    strata = {key: np.unique(np.frombuffer(ids, dtype=np.uint64)) for key, ids in found.items()}
    return strata, len(set(undecided))


def _judged(folder: Path) -> Iterator[tuple[str, int, tuple[Relevance, ...]]]:
    """Yield the subset, the id and the trace of every judged pair."""
    names = ["subset", "query_sha256", "doc_sha256", "verdict", "is_final"]
    relevances: tuple[Relevance, ...] = ()
    for batch in iter_table(folder, "verdicts", names):
        columns = [batch.column(name).to_pylist() for name in names]
        for subset, query, passage, verdict, is_final in zip(*columns, strict=True):
            relevances = (*relevances, Relevance(verdict))
            if is_final:
                yield subset or "", _id(query, passage), relevances
                relevances = ()


def _id(query_hash: str, passage_hash: str) -> int:
    return int(query_hash[:8] + passage_hash[:8], 16)


def _pairs(folder: Path, ids: set[int], seed: int) -> tuple[Pair, ...]:
    """Read the texts and verdicts of chosen pairs, and shuffle them."""
    judged = {id_: (subset, trace) for subset, id_, trace in _judged(folder) if id_ in ids}
    texts = _texts(folder, ids)
    positives = _positives(folder, {values["query_hash"] for values in texts.values()})
    order = sorted(ids)
    _generator(seed, "order").shuffle(order)
    return tuple(
        _pair(texts[id_], positives[texts[id_]["query_hash"]], *judged[id_], task=_task(seed, id_))
        for id_ in order
    )


def _pair(
    values: Mapping[str, Any],
    positives: Sequence[str],
    subset: str,
    relevances: tuple[Relevance, ...],
    *,
    task: str,
) -> Pair:
    names = ("query", "passage", "query_id", "docid", "split", "reason")
    return Pair(
        task=task,
        positives=tuple(positives),
        subset=subset,
        relevances=relevances,
        **{name: values[name] for name in names},
    )


def _task(seed: int, id_: int) -> str:
    digest = hashlib.blake2b(f"{seed}:{id_}".encode(), digest_size=5)
    return f"t-{digest.hexdigest()}"


def _texts(folder: Path, ids: set[int]) -> dict[int, dict[str, Any]]:
    """Return the decisions on chosen pairs: the first, where a pair is in several rows."""
    found: dict[int, dict[str, Any]] = {}
    for batch in iter_table(folder, "decisions"):
        hashes = (batch.column(name).to_pylist() for name in ("query_hash", "passage_hash"))
        for place, (query, passage) in enumerate(zip(*hashes, strict=True)):
            id_ = _id(query, passage)
            if id_ in ids and id_ not in found:
                found[id_] = batch.slice(place, 1).to_pylist()[0]
    return found


def _positives(folder: Path, queries: set[str]) -> dict[str, list[str]]:
    """Return the positives of queries, each text once, in whichever rows they are."""
    found: dict[str, list[str]] = {query: [] for query in queries}
    for batch in iter_table(folder, "positives", ["query_hash", "passage"]):
        columns = (batch.column(name).to_pylist() for name in ("query_hash", "passage"))
        for query, passage in zip(*columns, strict=True):
            if query in found and passage not in found[query]:
                found[query].append(passage)
    return found
