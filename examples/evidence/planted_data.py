"""Collections with planted noise: training rows whose negatives hide passages known to be relevant.

A collection is a folder in BEIR's layout. One of two ways to plant follows from it:

- "known": it has test qrels alone (Cranfield: several graded positives per query). Queries are split
  2:1 into train and test, in three folds: seeds 0, 1 and 2 test another third each. A row hides some
  of its query's known positives among its negatives; the others are its positives.
- "halves": it has train qrels too (SciFact: one positive abstract, mostly). Every abstract is cut in
  two at the sentence nearest its middle; both halves carry the title, as in chunked collections. One
  half of a positive abstract is the row's positive, the other is hidden among its negatives.

All other negatives are hard ones: drawn from the best of the untrained model's ranking that the qrels
do not name (of "halves", one half of each).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from hf_relabel.benchmark import Benchmark, judged_queries, load_benchmark
from hf_relabel.formats import content_hash, resolve

__all__ = ["Collection", "Planted", "load_collection", "plant"]

N_FOLDS = 3
POOL = range(2, 40)
"""Ranks that hard negatives are drawn from, as some of the very first are unjudged positives."""

Run = Mapping[str, Mapping[str, float]]
Passage = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """One folder's passages, and its queries with their grades, to train on and to test.

    Attributes:
        name: The folder's name.
        planting: How noise is planted, see above.
        passages: Passage id → docid, title and text.
        everything: All queries as one benchmark.
        train: The ids of the queries to train on; in "known", of all folds.
        test: Likewise.
        n_train: At most so many are trained on, others for each seed; None for all.
    """

    name: str
    planting: Literal["known", "halves"]
    passages: Mapping[str, Passage]
    everything: Benchmark
    train: Sequence[str]
    test: Sequence[str]
    n_train: int | None = None

    def split(self, seed: int, *, is_development: bool = False) -> tuple[list[str], Benchmark]:
        """Return the queries to train on, and the benchmark of the others.

        Args:
            seed: Chooses the fold in "known".
            is_development: Whether to test on a third of the training queries instead.
        """
        train, test = list(self.train), list(self.test)
        if self.planting == "known":
            names = list(self.train)
            random.Random(seed // N_FOLDS).shuffle(names)
            test = names[seed % N_FOLDS :: N_FOLDS]
            train = sorted(set(names) - set(test))
        if is_development:
            random.Random(f"development {seed}").shuffle(train)
            train, test = train[len(train) // 3 :], train[: len(train) // 3]
        if self.n_train is not None and self.n_train < len(train):
            train = random.Random(f"train {seed}").sample(sorted(train), self.n_train)
        return sorted(train), self.benchmark(test)

    def benchmark(self, query_ids: Sequence[str]) -> Benchmark:
        """Return the benchmark of some queries, over the whole corpus."""
        return replace(
            self.everything, qrels={q: self.everything.qrels[q] for q in sorted(query_ids)}
        )

    def relevant(self, query_id: str) -> list[str]:
        """Return the ids of a query's relevant passages that have a text, sorted."""
        grades = self.everything.qrels[query_id]
        return sorted(p for p, grade in grades.items() if grade > 0 and self.passages[p]["text"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """Training rows, noisy and clean, and the key to what is hidden in the noisy ones.

    Attributes:
        rows: In Tevatron's format.
        clean: The same rows with mined negatives in the places of the hidden positives.
        key: (query, passage) of the hidden ones, each as its `content_hash`.
    """

    rows: Dataset
    clean: Dataset
    key: frozenset[tuple[str, str]]


def load_collection(folder: Path, *, n_train: int | None = None) -> Collection:
    """Read a folder in BEIR's layout.

    Args:
        folder: Its name becomes the collection's.
        n_train: At most this many queries to train on; None for all there are.
    """
    test = load_benchmark(folder, "test")
    has_train = (folder / "qrels" / "train.tsv").exists()
    train = load_benchmark(folder, "train") if has_train else test
    lines = (folder / "corpus.jsonl").read_text("utf-8").splitlines()
    corpus = [json.loads(line) for line in lines if line.strip()]
    return Collection(
        name=test.name,
        planting="halves" if has_train else "known",
        passages={
            row["_id"]: {"docid": row["_id"], "title": row.get("title") or "", "text": row["text"]}
            for row in corpus
        },
        everything=replace(
            test,
            queries={**train.queries, **test.queries},
            qrels={**train.qrels, **test.qrels},
        ),
        train=judged_queries(train.qrels),
        test=judged_queries(test.qrels),
        n_train=n_train,
    )


def plant(
    collection: Collection,
    query_ids: Sequence[str],
    run: Run,
    *,
    seed: int,
    n_negatives: int,
    n_hidden: int,
    noisy_share: float,
) -> Planted:
    """Build the training rows of some queries.

    Args:
        collection: Where the passages come from.
        query_ids: One row each; queries without a relevant passage that has a text are left out.
        run: The untrained model's ranking, of which hard negatives are drawn.
        seed: Of what is hidden where, and of the negatives drawn.
        n_negatives: Per row, hidden ones included.
        n_hidden: Per noisy row in "known", as far as one positive is left; in "halves" it is one
            for each positive abstract.
        noisy_share: The share of rows that hide something.
    """
    rows: list[dict[str, Any]] = []
    clean: list[dict[str, Any]] = []
    hiding: set[tuple[int, int]] = set()
    for query_id in query_ids:
        draw = random.Random(f"{seed}:{query_id}")
        parts = _parts(collection, query_id, draw, n_hidden=n_hidden)
        if parts is None:
            continue
        positives, hidden = parts
        hidden = hidden[: n_negatives - 1] if draw.random() < noisy_share else []
        mined = _mined(collection, query_id, run, draw)[:n_negatives]
        places = draw.sample(range(len(mined)), min(len(hidden), len(mined)))
        noisy = list(mined)
        for place, passage in zip(places, hidden, strict=False):
            noisy[place] = passage
        query = collection.everything.queries[query_id]
        frame = {"query_id": query_id, "query": query, "positive_passages": positives}
        hiding.update((len(rows), place) for place in places)
        rows.append({**frame, "negative_passages": noisy})
        clean.append({**frame, "negative_passages": mined})
    return Planted(
        rows=Dataset.from_list(rows),
        clean=Dataset.from_list(clean),
        key=_key(Dataset.from_list(rows), hiding),
    )


def _key(rows: Dataset, hiding: Set[tuple[int, int]]) -> frozenset[tuple[str, str]]:
    """Return the key of what is hidden, given rows and places among their negatives."""
    read = resolve(rows.column_names).read(rows[:])
    return frozenset(
        (content_hash(read[number].query), read[number].negatives[place].key)
        for number, place in hiding
    )


def _parts(
    collection: Collection, query_id: str, draw: random.Random, *, n_hidden: int
) -> tuple[list[Passage], list[Passage]] | None:
    """Return what a row shows as positives and what it hides; None if the query has neither."""
    passages = [collection.passages[p] for p in collection.relevant(query_id)]
    if not passages:
        return None
    draw.shuffle(passages)
    if collection.planting == "known":
        n_hidden = min(n_hidden, len(passages) - 1)
        return passages[n_hidden:], passages[:n_hidden]
    halves = [draw.sample(_halves(passage), 2) for passage in passages]
    return [shown for shown, _ in halves], [hidden for _, hidden in halves]


def _mined(collection: Collection, query_id: str, run: Run, draw: random.Random) -> list[Passage]:
    judged = collection.everything.qrels[query_id]
    ranked = sorted(run[query_id], key=lambda p: (-run[query_id][p], p))
    pool = [p for p in ranked if p not in judged and collection.passages[p]["text"]]
    chosen = [collection.passages[p] for p in pool[POOL.start : POOL.stop]]
    draw.shuffle(chosen)
    if collection.planting == "known":
        return chosen
    return [draw.choice(_halves(passage)) for passage in chosen]


def _halves(passage: Passage) -> list[Passage]:
    """Cut a passage in two where a sentence ends, as near its middle as may be."""
    text = passage["text"].strip()
    ends = [found.end() for found in re.finditer(r"[.!?]\s+", text[:-1])]
    ends = ends or [found.end() for found in re.finditer(r"\s+", text)] or [len(text) // 2]
    cut = min(ends, key=lambda end: abs(2 * end - len(text)))
    return [
        {**passage, "docid": f"{passage['docid']}#{number}", "text": half.strip()}
        for number, half in enumerate((text[:cut], text[cut:]), start=1)
    ]
