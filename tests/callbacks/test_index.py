"""VerdictIndex: what the data path knows, in sorted arrays that processes share."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hf_relabel.callbacks import VerdictIndex
from hf_relabel.callbacks.identity import TextIds, pair_ids
from hf_relabel.callbacks.index import _Table

from hf_relabel import Policy, Relevance, Verdict
from hf_relabel.cache import Pairs
from hf_relabel.formats import content_hash
from tests.callbacks.models import N_NEGATIVES, N_ROWS, key, relabeler, rows_as

pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_knows_what_the_cache_knows(tmp_path: Path) -> None:
    index = VerdictIndex.build(relabeler(tmp_path))
    ids, rows = TextIds(), rows_as("n-tuple")

    queries = ids.of(rows["anchor"])
    for slot in range(1, N_NEGATIVES + 1):
        assert index.has(queries, ids.of(rows[f"negative_{slot}"])).all()
    assert not index.has(queries, ids.of(rows["positive"])).any()
    assert index.n_pairs == N_ROWS * N_NEGATIVES
    found = {
        (int(query), passage): verdict.relevance
        for query, known in zip(queries, index.known(queries), strict=True)
        for passage, verdict in known.relevant.items()
    }
    assert found == {(ids(query), ids(text)): value for (query, text), value in key().items()}


def test_white_space_and_composition_do_not_tell_texts_apart() -> None:
    """The same passage as the transform's: `content_hash` normalizes."""
    ids = TextIds()

    assert ids("caf\u00e9  au\nlait ") == ids("cafe\u0301 au lait")
    assert ids("Paris") != ids("paris")


def test_new_verdicts_are_seen_by_other_processes(tmp_path: Path) -> None:
    made = relabeler(tmp_path, judged=False)
    index = VerdictIndex.build(made)
    other: VerdictIndex = pickle.loads(pickle.dumps(index))  # noqa: S301  as a worker gets it
    assert other.n_pairs == 0

    made.judge(rows_as("n-tuple").select(range(4)))
    assert index.refresh() == 4
    assert index.refresh() == 0

    assert other.reload()
    assert not other.reload()
    assert other.n_pairs == 4 * N_NEGATIVES
    assert other.writer is None


def test_a_query_that_gets_more_verdicts_is_replaced_whole(tmp_path: Path) -> None:
    """A record of the cache holds all of its query's pairs: old and new ones are not mixed up."""
    made = relabeler(tmp_path, judged=False)
    query = "what does plant 0 need"
    made.cascade.judge(query, ["text 1 stands beside plant 0"], cache=made.cache)
    index = VerdictIndex.build(made)
    made.cascade.judge(query, ["text 2 stands beside plant 0"], cache=made.cache)
    index.refresh()

    (known,) = index.known(TextIds().of([query]))

    assert known.n_judged == 2
    found = {verdict.relevance for verdict in known.relevant.values()}
    assert found == {Relevance.BETTER, Relevance.WORSE}


def test_verdicts_of_another_cascade_are_not_ours(tmp_path: Path) -> None:
    relabeler(tmp_path)
    other = relabeler(tmp_path, judged=False, answers={})

    assert VerdictIndex.build(other).n_pairs == 0


def test_undecided_passages_are_unknown(tmp_path: Path) -> None:
    answers = {"text 1 stands beside plant 0": Relevance.UNDECIDED}
    index = VerdictIndex.build(relabeler(tmp_path, answers=answers))
    ids = TextIds()

    query = ids.of(["what does plant 0 need"])
    assert not index.has(query, ids.of(["text 1 stands beside plant 0"])).any()


def test_a_folder_of_its_own_goes_with_the_index(tmp_path: Path) -> None:
    index = VerdictIndex.build(relabeler(tmp_path))
    folder = index.directory
    assert folder.exists()

    del index

    assert not folder.exists()


def test_records_and_arrays_agree_on_ids() -> None:
    record = Pairs(
        cascade="c", query=content_hash("q"), judges=("j",),
        traces={
            content_hash("p"): (Verdict(relevance=Relevance.BETTER, judge="j", rank=400),),
            content_hash("n"): (Verdict(relevance=Relevance.NOT_RELEVANT, judge="j"),),
        },
    )  # fmt: skip
    table, ids = _Table.of([record]), TextIds()

    assert table.has(pair_ids(ids.of(["q", "q"]), ids.of(["p", "n"]))).all()
    assert table.known(0, 1).relevant[ids("p")].rank is None  # beyond what a byte holds
    assert len(table.query) == 1


def test_five_million_pairs_fit_in_a_hundred_megabytes(tmp_path: Path) -> None:
    """A fifth of them relevant, 15 a query; look-ups as the data path does them, in batches."""
    random = np.random.default_rng(0)
    n_pairs, n_relevant = 5_000_000, 1_000_000
    queries = random.integers(0, 2**64, n_pairs // 15, dtype=np.uint64)
    of_pair = random.choice(queries, n_pairs)
    passages = random.integers(0, 2**64, n_pairs, dtype=np.uint64)
    table = _Table._sorted(
        pair_ids(of_pair, passages),
        [
            of_pair[:n_relevant], passages[:n_relevant], np.full(n_relevant, 15, np.uint16),
            np.zeros(n_relevant, np.uint8), np.zeros(n_relevant, np.uint8),
        ],
    )  # fmt: skip
    table.save(tmp_path / "all.index")
    _Table.of([]).save(tmp_path / "recent.index")
    index = VerdictIndex(tmp_path, policy=Policy())

    asked = random.permutation(n_pairs)[:1_000_000]
    index.has(of_pair[asked[:1000]], passages[asked[:1000]])
    started = time.perf_counter()
    assert index.has(of_pair[asked], passages[asked]).all()
    rate = len(asked) / (time.perf_counter() - started)

    assert not index.has(of_pair[asked[:10_000]], passages[asked[:10_000]] + np.uint64(1)).any()
    assert index.n_bytes <= 100e6
    print(f"{index.n_bytes / 1e6:.1f} MB, {rate / 1e6:.2f} M look-ups/s")
    assert rate >= 0.3e6  # 1 M/s and more on a quiet machine; `make bench` measures it
