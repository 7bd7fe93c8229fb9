"""Search: exact, in a fixed order, by bi-encoders and rerankers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_relabel.benchmark import Benchmark
from hf_relabel.errors import SettingError, SourceError
from hf_relabel.search import (
    SearchSettings,
    load_model,
    model_name,
    ranked,
    read_run,
    rerank,
    retrieve,
    write_run,
)
from tests.retrieval import own, tiny_cross_encoder

SHORT = SearchSettings(batch_size=1, top_k=5)


class Numbers:
    """A bi-encoder to which a text is the number in it, so that scores tie at will."""

    max_seq_length = 512

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, int]] = []

    def encode_query(self, texts: list[str], *, prompt: str | None, **_: Any) -> torch.Tensor:
        self.asked.append((prompt, self.max_seq_length))
        return torch.tensor([[float(text)] for text in texts])

    encode_document = encode_query

    def similarity(self, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        return queries @ passages.T


def _numbers(n_passages: int, n_values: int) -> Benchmark:
    draw = random.Random(n_passages)
    ids = [f"p{number}" for number in range(n_passages)]
    draw.shuffle(ids)
    return Benchmark(
        name="numbers",
        queries={"up": "1", "down": "-1", "level": "0"},
        corpus={id_: str(draw.randrange(n_values)) for id_ in ids},
        qrels={query_id: {ids[0]: 1} for query_id in ("up", "down", "level")},
    )


@pytest.mark.parametrize("n_values", [1, 3, 1000])
@pytest.mark.parametrize("n_passages", [1, 5, 31, 32, 33, 200])
def test_the_best_are_found_across_chunks_and_ties_go_by_id(n_passages: int, n_values: int) -> None:
    """A chunk is 32 passages here; 200 passages of 3 values tie at every cut."""
    benchmark = _numbers(n_passages, n_values)

    run = retrieve(Numbers(), benchmark, SHORT)  # type: ignore[arg-type]

    for query_id, sign in (("up", 1.0), ("down", -1.0), ("level", 0.0)):
        scores = {id_: sign * float(text) for id_, text in benchmark.corpus.items()}
        expected = sorted(scores, key=lambda id_: (-scores[id_], id_))[:5]
        assert list(run[query_id].items()) == [(id_, scores[id_]) for id_ in expected]


def test_a_passage_with_the_querys_own_id_is_no_result_where_the_set_says_so() -> None:
    benchmark = Benchmark(
        name="x", queries={"a": "1"}, corpus={"a": "9", "b": "8", "c": "7"}, qrels={"a": {"b": 1}}
    )
    top_two = SearchSettings(top_k=2)

    as_it_is = retrieve(Numbers(), benchmark, top_two)  # type: ignore[arg-type]
    without = retrieve(Numbers(), replace(benchmark, ignores_identical_ids=True), top_two)  # type: ignore[arg-type]

    assert list(as_it_is["a"]) == ["a", "b"]
    assert list(without["a"]) == ["b", "c"]


def test_prompts_and_length_reach_the_model_and_the_length_is_put_back() -> None:
    model = Numbers()
    settings = SearchSettings(max_seq_length=7, query_prompt="query: ", passage_prompt="passage: ")

    retrieve(model, _numbers(3, 3), settings)  # type: ignore[arg-type]

    assert model.asked == [("query: ", 7), ("passage: ", 7)]
    assert model.max_seq_length == 512


def test_it_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []

    retrieve(Numbers(), _numbers(70, 9), SHORT, progress=lambda *now: told.append(now))  # type: ignore[arg-type]

    assert told == [("passages", done, 70) for done in (0, 32, 64, 70)]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_cross_encoder(tmp_path_factory.mktemp("models") / "reranker")
    return load_model(folder, is_reranker=True, device="cpu")


def _first_stage() -> dict[str, dict[str, float]]:
    """Rank passages backwards by id, for every query alike."""
    ids = sorted(own().corpus)
    return {query_id: {id_: float(i) for i, id_ in enumerate(ids)} for query_id in own().queries}


def test_a_reranker_scores_the_first_of_the_first_stage_and_no_others(reranker: Any) -> None:
    run = rerank(reranker, own(), _first_stage(), SearchSettings(top_k=4))

    first = ["p13", "p12", "p11", "p10"]
    assert sorted(run) == ["q1", "q2", "q3", "q4", "q5"]
    for query_id, scores in run.items():
        pairs = [(own().queries[query_id], own().corpus[id_]) for id_ in first]
        assert [scores[id_] for id_ in first] == pytest.approx(reranker.predict(pairs), abs=1e-6)


def test_a_query_that_the_first_stage_lacks_gets_nothing(reranker: Any) -> None:
    run = rerank(reranker, own(), {"q1": {"p01": 1.0}})

    assert list(run["q1"]) == ["p01"]
    assert run["q2"] == {}


@pytest.mark.parametrize(
    ("first_stage", "complaint"),
    [({"other": {"p01": 1.0}}, "none of its 5 queries"), ({"q1": {"new": 1.0}}, "passage 'new'")],
)
def test_a_run_of_something_else_is_refused(
    reranker: Any, first_stage: dict[str, dict[str, float]], complaint: str
) -> None:
    with pytest.raises(SettingError, match=complaint):
        rerank(reranker, own(), first_stage)


def test_a_model_with_two_labels_is_no_reranker(tmp_path: Path) -> None:
    model = load_model(tiny_cross_encoder(tmp_path / "two", n_labels=2), is_reranker=True)

    with pytest.raises(SettingError, match="one label, found 2"):
        rerank(model, own(), _first_stage())


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    run = {"q1": {"p2": 0.1 + 0.2, "p1": -1e-9}, "q2": {"p3": 1.0}}

    write_run(run, tmp_path / "a.run", "some model")

    assert read_run(tmp_path / "a.run") == run
    assert (tmp_path / "a.run").read_text().splitlines()[0].split()[:4] == ["q1", "Q0", "p2", "1"]


def test_a_file_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.run").write_text("q1 p1 0.5\n")

    with pytest.raises(SourceError, match="TREC's format"):
        read_run(tmp_path / "a.run")


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_bundled_model_loads_by_its_name_without_a_network(name: str) -> None:
    assert load_model(name, device="cpu").max_seq_length == 256


def test_a_model_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"of a SentenceTransformer, found '.*nothing'"):
        load_model(str(tmp_path / "nothing"))


def test_a_model_in_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    assert model_name(str(tmp_path)) == tmp_path.name
    assert model_name("me/model") == "me/model"


@pytest.mark.parametrize("name", ["batch_size", "top_k", "max_seq_length"])
@pytest.mark.parametrize("value", [0, True, 1.5])
def test_sizes_are_integers_from_one(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=name):
        SearchSettings(**{name: value})  # type: ignore[arg-type]


def test_equal_scores_are_ranked_by_id() -> None:
    assert ranked({"b": 1.0, "a": 1.0, "c": 2.0}) == ["c", "a", "b"]
