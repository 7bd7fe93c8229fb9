"""Evaluation: the values are those of other implementations, and of the published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_relabel.benchmark import Benchmark, load_benchmark
from hf_relabel.errors import SettingError
from hf_relabel.evaluate import METRICS, Evaluation, evaluate, score
from hf_relabel.search import SearchSettings, load_model, ranked, retrieve
from tests.retrieval import COLLECTIONS, SHARED, own, tiny_cross_encoder

MINILM = "all-MiniLM-L6-v2"
# What all-MiniLM-L6-v2 is published to reach on SciFact's test split, at 256 tokens.
SCIFACT_NDCG = 0.64508


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load_model(MINILM, device="cpu")


@pytest.mark.parametrize("collection", COLLECTIONS.values(), ids=COLLECTIONS.keys())
def test_values_are_those_of_sentence_transformers_own_evaluator(
    minilm: Any, collection: Callable[[], Benchmark]
) -> None:
    """Its evaluator takes sets of relevant passages, so grades are made 0 or 1 for it."""
    benchmark = _binary(collection())

    found = evaluate(minilm, benchmark, max_seq_length=48)

    minilm.max_seq_length = 48
    theirs = _evaluator(benchmark)(minilm)
    minilm.max_seq_length = 256
    assert found.n_queries == len(_relevant(benchmark))
    assert found.mean("nDCG@10") == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-6)
    assert found.mean("R@100") == pytest.approx(theirs["cosine_recall@100"], abs=1e-6)
    assert found.mean("RR@10") == pytest.approx(theirs["cosine_mrr@10"], abs=1e-6)
    assert 0.3 < found.mean("nDCG@10") < 1


@pytest.mark.slow
def test_scifact_gives_the_published_figure(minilm: Any) -> None:
    """Minutes on a CPU. Where SciFact is not at hand, the comparison runs on passages of ours."""
    is_there = SHARED.is_dir()
    benchmark = load_benchmark(SHARED / "scifact") if is_there else own()

    run = retrieve(minilm, benchmark, SearchSettings(batch_size=64))

    values = score(benchmark.qrels, run)
    means = {metric: math.fsum(each.values()) / len(each) for metric, each in values.items()}
    if is_there:
        assert means["nDCG@10"] == pytest.approx(SCIFACT_NDCG, abs=0.0005)
    binary = _binary(benchmark)
    values = score(binary.qrels, run)
    means = {metric: math.fsum(each.values()) / len(each) for metric, each in values.items()}
    theirs = _evaluator(binary).compute_metrics(
        [
            [{"corpus_id": id_, "score": run[query_id][id_]} for id_ in ranked(run[query_id])]
            for query_id in _relevant(binary)
        ]
    )
    assert means["nDCG@10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-6)
    assert means["R@100"] == pytest.approx(theirs["recall@k"][100], abs=1e-6)
    assert means["RR@10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-6)


def _binary(benchmark: Benchmark) -> Benchmark:
    qrels = {
        query_id: {id_: int(grade > 0) for id_, grade in grades.items()}
        for query_id, grades in benchmark.qrels.items()
    }
    return Benchmark(
        name=benchmark.name, queries=benchmark.queries, corpus=benchmark.corpus, qrels=qrels
    )


def _relevant(benchmark: Benchmark) -> dict[str, set[str]]:
    found = {
        query_id: {id_ for id_, grade in grades.items() if grade > 0}
        for query_id, grades in sorted(benchmark.qrels.items())
    }
    return {query_id: ids for query_id, ids in found.items() if ids}


def _evaluator(benchmark: Benchmark) -> Any:
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    relevant = _relevant(benchmark)
    queries = {query_id: benchmark.queries[query_id] for query_id in relevant}
    return InformationRetrievalEvaluator(
        queries, dict(benchmark.corpus), relevant,
        ndcg_at_k=[10], mrr_at_k=[10], precision_recall_at_k=[100], accuracy_at_k=[10],
        map_at_k=[10], write_csv=False,
    )  # fmt: skip


def test_grades_count_as_they_are() -> None:
    """By hand: gains 1 and 2 at ranks 1 and 3, against the ideal 2 and 1."""
    qrels = {"q": {"a": 1, "b": 2, "c": 0}}

    found = score(qrels, {"q": {"a": 3.0, "x": 2.0, "b": 1.0}})

    expected = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert found["nDCG@10"]["q"] == pytest.approx(expected, abs=1e-12)
    assert found["R@100"]["q"] == 1
    assert found["RR@10"]["q"] == 1


def test_equal_scores_are_ordered_by_id_and_close_ones_are_not_equal() -> None:
    """trec_eval itself would put b first in the tie, and see a tie in the second run too."""
    qrels = {"q": {"a": 1}}

    assert score(qrels, {"q": {"b": 1.0, "a": 1.0}}, ["RR@10"])["RR@10"]["q"] == 1
    assert score(qrels, {"q": {"b": 1.0 + 1e-12, "a": 1.0}}, ["RR@10"])["RR@10"]["q"] == 0.5


def test_a_query_without_results_counts_as_nothing_and_one_without_answers_not_at_all() -> None:
    qrels = {"found": {"a": 1}, "lost": {"a": 1}, "open": {"a": 0}}

    found = score(qrels, {"found": {"a": 1.0}, "open": {"a": 1.0}})

    assert found == {metric: {"found": 1.0, "lost": 0.0} for metric in METRICS}


def test_a_model_by_name_and_one_at_hand_are_measured_alike(minilm: Any) -> None:
    named = evaluate(MINILM, own(), device="cpu", batch_size=4)
    at_hand = evaluate(minilm, own(), batch_size=4, name="mine")

    assert named.per_query == at_hand.per_query
    assert (named.model, at_hand.model) == (MINILM, "mine")
    assert named.settings == {"top_k": 100}


def test_an_evaluation_comes_back_from_json() -> None:
    found = Evaluation(
        model="m", benchmark="b", per_query={"RR@10": {"q1": 0.5, "q2": 1.0}}, settings={"top_k": 9}
    )

    saved = json.loads(json.dumps(found.to_json()))

    assert Evaluation.from_json(saved) == found
    assert saved["means"] == {"RR@10": 0.75}
    with pytest.raises(SettingError, match="without 'model'"):
        Evaluation.from_json({"benchmark": "b"})


def test_a_metric_that_was_not_measured_is_refused() -> None:
    found = Evaluation(model="m", benchmark="b", per_query={"RR@10": {"q": 1.0}})

    with pytest.raises(SettingError, match=r"found 'nDCG@10'\. On 'b' there are: RR@10"):
        found.mean("nDCG@10")


def test_a_reranker_reorders_a_model_or_its_run(minilm: Any, tmp_path: Path) -> None:
    folder = tiny_cross_encoder(tmp_path / "reranker")
    run = retrieve(minilm, own(), SearchSettings(top_k=3))

    by_model = evaluate(folder, own(), first_stage=minilm, top_k=3, metrics=["nDCG@3"])
    by_run = evaluate(folder, own(), first_stage=run, top_k=3, metrics=["nDCG@3"])
    alone = evaluate(minilm, own(), top_k=3, metrics=["nDCG@3"])

    assert by_model.per_query == by_run.per_query != alone.per_query
    assert by_model.model == "reranker"
    assert by_run.settings["first_stage"] == "a run"


def test_each_kind_of_model_is_asked_for_what_it_can(minilm: Any, tmp_path: Path) -> None:
    reranker = load_model(tiny_cross_encoder(tmp_path / "reranker"), is_reranker=True)

    with pytest.raises(SettingError, match="expected first_stage for the cross-encoder"):
        evaluate(reranker, own())
    with pytest.raises(SettingError, match="searches by itself"):
        evaluate(minilm, own(), first_stage={"q1": {"p01": 1.0}})


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        (["nDCG10"], "metric of ir-measures such as nDCG@10, R@100, RR@10, found 'nDCG10'"),
        (["R@1000"], "Raise top_k to 1000"),
        ([], "found none"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused_at_once(metrics: list[str], complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint):
        evaluate("never loaded", own(), metrics=metrics)
