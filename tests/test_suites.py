"""Suites: names become benchmarks, by way of mteb or the Hub, and results outlive a crash."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_relabel.benchmark import Benchmark
from hf_relabel.errors import SettingError, SourceError
from hf_relabel.evaluate import Evaluation, evaluate
from hf_relabel.search import SearchSettings
from hf_relabel.suites import (
    GROUPS,
    average,
    evaluate_all,
    from_mteb,
    load,
    members,
    read_evaluations,
    weights,
)
from tests.hub.double import HubDouble
from tests.retrieval import own, tiny_cross_encoder, write_beir

MINILM = "all-MiniLM-L6-v2"
SHORT = SearchSettings(max_seq_length=16)
PRIVATE = ("trec-news", "robust04", "signal-1m", "bioasq")


def test_the_groups_are_the_papers() -> None:
    assert [len(members(group)) for group in ("beir", "beir-public", "beir-ood", "air-bench")] == [
        16, 12, 7, 5,
    ]  # fmt: skip
    assert set(GROUPS["beir-ood"]) < set(GROUPS["beir"])
    assert len(GROUPS["beir-14"]) == 14
    assert len(members("beir-14")) == 13 + 12


def test_a_group_within_a_group_counts_as_one() -> None:
    found = weights("beir-14")

    assert math.fsum(found.values()) == pytest.approx(1)
    assert found["scifact"] == pytest.approx(1 / 14)
    assert found["cqadupstack-unix"] == pytest.approx(1 / 14 / 12)


def test_the_papers_own_averages_come_out() -> None:
    """E5-base, Default, in the order of `GROUPS`: table 3 gives 0.508 and 0.425, table 4 0.368."""
    beir = [.783, .378, .595, .737, .439, .701, .256, .438, .242, .878, .391, .735,
            .465, .442, .275, .378]  # fmt: skip
    found = [_evaluation(name, v) for name, v in zip(GROUPS["beir"], beir, strict=True)]
    air = zip(GROUPS["air-bench"], [0.345, 0.401, 0.521, 0.117, 0.455], strict=True)

    assert round(average("beir", found), 3) == 0.508
    assert round(average("beir-ood", found), 3) == 0.425
    assert round(average("air-bench", [_evaluation(*pair) for pair in air]), 3) == 0.368


def test_an_average_of_fewer_benchmarks_is_refused() -> None:
    found = [_evaluation(name, 0.5) for name in GROUPS["air-bench"][1:]]

    with pytest.raises(SettingError, match=r"all 5 .* found none on air-bench-arxiv"):
        average("air-bench", found)


def _evaluation(benchmark: str, value: float) -> Evaluation:
    return Evaluation(model="m", benchmark=benchmark, per_query={"nDCG@10": {"q": value}})


def test_mteb_knows_every_task_and_what_is_said_of_identical_ids() -> None:
    """And it has none of the four private sets, which the error for them says."""
    import mteb

    from hf_relabel.suites import _IDENTICAL_IDS, _TASKS

    tasks = {name: mteb.get_task(task) for name, task in _TASKS.items()}

    assert {name for name, task in tasks.items() if task.ignore_identical_ids} == _IDENTICAL_IDS
    assert {tuple(task.metadata.eval_splits) for task in tasks.values()} == {("test",)}
    assert set(members("beir-14")) == set(tasks)
    letters = {_letters(task.metadata.name) for task in mteb.get_tasks(languages=["eng"])}
    assert not {_letters(name) for name in PRIVATE} & letters
    assert "scifact" in letters


def _letters(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum()).removesuffix("retrieval")


def test_a_task_of_mteb_comes_down_from_the_hub(on_hub: HubDouble) -> None:
    """The SciFact of mteb itself, at the commit that it names, with passages of ours in it."""
    import mteb

    task = mteb.get_task("SciFact")
    _put(
        on_hub,
        task.metadata.dataset["path"],
        {"corpus": {"corpus": _corpus()}, "queries": {"queries": _queries()},
         "default": {"test": _qrels("query-id", "corpus-id", "score")}},
        tag=task.metadata.dataset["revision"],
    )  # fmt: skip

    found = load("scifact")

    assert found.name == "scifact"
    assert dict(found.corpus) == own().corpus
    assert found.queries == own().queries
    assert found.qrels == own().qrels
    assert not found.ignores_identical_ids


def test_a_domain_of_air_bench_comes_down_from_the_hub(on_hub: HubDouble) -> None:
    version = "AIR-Bench_24.05"
    corpus = [{"id": id_, "text": text} for id_, text in own().corpus.items()]
    queries = [{"id": id_, "text": text} for id_, text in own().queries.items()]
    _put(on_hub, "AIR-Bench/qa_law_en",
         {version: {"corpus_default": corpus, "queries_default_dev": queries,
                    "queries_default_test": queries[:1]}})  # fmt: skip
    _put(on_hub, "AIR-Bench/qrels-qa_law_en-dev",
         {version: {"qrels_default_dev": _qrels("qid", "docid", "relevance")}})  # fmt: skip

    found = load("air-bench-law")

    assert (dict(found.corpus), found.queries, found.qrels) == (
        own().corpus, own().queries, own().qrels,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["nfcorpus", "air-bench-news", "NFCorpus"])
@pytest.mark.usefixtures("on_hub")
def test_what_cannot_be_downloaded_says_how_to_do_without(name: str) -> None:
    with pytest.raises(SourceError, match=f"download '{name}'.* --local {name}=FOLDER"):
        load(name)


def _corpus() -> list[dict[str, str]]:
    parts = [(id_, text.partition(" ")) for id_, text in own().corpus.items()]
    return [{"_id": id_, "title": title, "text": text} for id_, (title, _, text) in parts]


def _queries() -> list[dict[str, str]]:
    return [{"_id": id_, "text": text} for id_, text in own().queries.items()]


def _qrels(query: str, passage: str, grade: str) -> list[dict[str, Any]]:
    return [
        {query: query_id, passage: id_, grade: value}
        for query_id, grades in own().qrels.items()
        for id_, value in grades.items()
    ]


def _put(
    hub: HubDouble, repo_id: str, configs: dict[str, dict[str, list[Any]]], *, tag: str = "v1"
) -> None:
    """Make a dataset: config → split → rows."""
    files, described = {}, []
    for config, splits in configs.items():
        paths = {split: f"{config}/{split}.jsonl" for split in splits}
        for split, rows in splits.items():
            files[paths[split]] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        data_files = [{"split": split, "path": path} for split, path in paths.items()]
        described.append({"config_name": config, "data_files": data_files})
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': described})}---\n".encode()
    repo = hub.add_repo(repo_id)
    repo.tags[tag] = hub.commit(repo, files)


def _task(**changes: Any) -> Any:
    """Return a task of mteb with the passages of `own`, loaded without the Hub."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    corpus = Dataset.from_list([{**row, "id": row["_id"]} for row in _corpus()])
    queries = Dataset.from_list([{**row, "id": row["_id"]} for row in _queries()])
    part = {
        "corpus": corpus, "queries": queries, "top_ranked": None,
        "relevant_docs": {key: dict(grades) for key, grades in own().qrels.items() if key != "q6"},
    }  # fmt: skip

    class Own(AbsTaskRetrieval):
        ignore_identical_ids = changes.get("ignore_identical_ids", False)
        metadata = TaskMetadata(
            name="Own", dataset={"path": "me/own", "revision": "main"}, description="Ours.",
            reference=None, type="Retrieval", category="t2t", modalities=["text"],
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10", date=None,
            domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = changes.get("dataset", {"default": {"test": part}})
            self.data_loaded = True

    return Own()


# What mteb calls of its own and of sentence-transformers in an old way; nothing of ours to mend.
@pytest.mark.filterwarnings("ignore:The fill_missing:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension`:FutureWarning")
def test_our_values_are_those_of_mteb_itself() -> None:
    """The same task, evaluated by mteb and by us."""
    import mteb

    from hf_relabel.search import load_model

    model = load_model(MINILM, device="cpu")

    found = evaluate(model, from_mteb(_task()))
    theirs = mteb.evaluate(
        mteb.SentenceTransformerEncoderWrapper(model), _task(), cache=None, show_progress_bar=False,
        encode_kwargs={"batch_size": 32},
    )[0].scores["test"][0]  # fmt: skip

    assert found.mean("nDCG@10") == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)
    assert found.mean("R@100") == pytest.approx(theirs["recall_at_100"], abs=1e-5)
    assert found.mean("RR@10") == pytest.approx(theirs["mrr_at_10"], abs=1e-5)


def test_a_task_says_whether_identical_ids_are_ignored() -> None:
    assert from_mteb(_task(ignore_identical_ids=True)).ignores_identical_ids


@pytest.mark.parametrize("dataset", [{}, {"default": {"a": {}, "b": {}}}, {"en": {}, "de": {}}])
def test_a_task_with_several_parts_or_none_is_refused(dataset: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="one language and split, found 'Own'"):
        from_mteb(_task(dataset=dataset))


def test_names_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(SettingError, match=r"found 'nonsense'\."):
        load("nonsense")
    with pytest.raises(SettingError, match="found the group 'beir'"):
        load("beir")


def test_private_sets_ask_for_their_folders_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--local robust04=FOLDER --local bioasq=FOLDER"):
        evaluate_all(
            "never loaded", ["beir"], folder=tmp_path,
            local={"trec-news": tmp_path, "signal-1m": tmp_path},
        )  # fmt: skip
    with pytest.raises(SettingError, match="'signal-1m', which is not asked for"):
        evaluate_all("never loaded", ["scifact"], local={"signal-1m": tmp_path})


def test_a_private_set_is_had_from_its_folder(tmp_path: Path) -> None:
    folder = write_beir(own(), tmp_path / "somewhere")

    found = load("robust04", local={"robust04": folder})

    assert (found.name, found.ignores_identical_ids) == ("robust04", False)
    assert load("arguana", local={"arguana": folder}).ignores_identical_ids
    assert load(str(folder)).name == "somewhere"


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Write two benchmarks; the second is half of the first."""
    whole = own()
    half = {query_id: whole.qrels[query_id] for query_id in ("q1", "q2")}
    other = Benchmark(name="two", queries=whole.queries, corpus=whole.corpus, qrels=half)
    return [str(write_beir(whole, tmp_path / "one")), str(write_beir(other, tmp_path / "two"))]


def test_what_was_measured_before_a_crash_is_not_measured_again(
    two: list[str], tmp_path: Path
) -> None:
    qrels = Path(two[1]) / "qrels/test.tsv"
    qrels.rename(tmp_path / "aside")
    with pytest.raises(SourceError, match=r"expected test\.tsv"):
        evaluate_all(MINILM, two, SHORT, folder=tmp_path / "out", device="cpu")
    (tmp_path / "aside").rename(qrels)
    first = tmp_path / "out/one.json"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one.json"]
    planted = json.loads(first.read_text())
    planted["per_query"]["nDCG@10"]["q1"] = 0.125
    first.write_text(json.dumps(planted))

    found = evaluate_all(MINILM, two, SHORT, folder=tmp_path / "out", device="cpu")

    assert [each.benchmark for each in found] == ["one", "two"]
    assert found[0].per_query["nDCG@10"]["q1"] == 0.125
    assert found[1].n_queries == 2
    assert read_evaluations(tmp_path / "out") == found
    assert read_evaluations(first) == found[:1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (SearchSettings(max_seq_length=8), "'max_seq_length': 8"),
        (SearchSettings(max_seq_length=16, query_prompt="query: "), "'query_prompt': 'query: '"),
    ],
)
def test_a_result_measured_otherwise_is_not_taken_for_this_one(
    two: list[str], tmp_path: Path, settings: SearchSettings, complaint: str
) -> None:
    evaluate_all(MINILM, two[:1], SHORT, folder=tmp_path / "out", device="cpu")

    with pytest.raises(SettingError, match=complaint):
        evaluate_all(MINILM, two[:1], settings, folder=tmp_path / "out", device="cpu")


def test_another_model_in_the_same_folder_is_another_model(two: list[str], tmp_path: Path) -> None:
    """The first stage is a run, which an earlier call saved for each benchmark."""
    evaluate_all(MINILM, two, SHORT, folder=tmp_path / "out", save_runs=True, device="cpu")
    reranker = tmp_path / "reranker"
    options: dict[str, Any] = {"first_stage": str(tmp_path / "out"), "folder": tmp_path / "second"}

    before = evaluate_all(tiny_cross_encoder(reranker), two, **options)
    (tmp_path / "out/three.run").write_text("")
    again = evaluate_all(str(reranker), two, **options)
    (reranker / "config.json").write_text((reranker / "config.json").read_text() + "\n")

    assert before == again
    with pytest.raises(SettingError, match="model_digest"):
        evaluate_all(str(reranker), two, **options)


def test_a_folder_of_runs_without_this_benchmarks_is_refused(
    two: list[str], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/two.run").write_text("")

    with pytest.raises(SourceError, match=r"expected one\.run in the folder runs"):
        evaluate_all(
            tiny_cross_encoder(tmp_path / "reranker"), two[:1], first_stage=str(tmp_path / "runs")
        )


def test_two_folders_of_one_name_cannot_be_saved_side_by_side(
    two: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(two[0], tmp_path / "elsewhere/one")

    with pytest.raises(SettingError, match="found 'one' more than once"):
        evaluate_all("never loaded", [two[0], str(copy)], folder=tmp_path / "out")


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    with pytest.raises(SourceError, match=r"found a\.json: .*without 'model'"):
        read_evaluations(tmp_path / "a.json")
    with pytest.raises(SourceError, match=r"found no \.json"):
        read_evaluations(tmp_path / "..")
