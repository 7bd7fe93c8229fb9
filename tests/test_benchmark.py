"""Benchmarks: read from BEIR's layout, and refused where they could only mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_relabel.benchmark import Benchmark, judged_queries, load_benchmark
from hf_relabel.errors import SettingError, SourceError
from tests.retrieval import own, write_beir


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = load_benchmark(write_beir(own(), tmp_path / "own"))

    assert found == own()


def test_title_and_text_are_joined_and_either_may_be_missing(tmp_path: Path) -> None:
    write_beir(own(), tmp_path / "own")
    lines = ['{"_id": 1, "title": "T", "text": "x"}', '{"_id": "p01", "text": "y"}', "",
             '{"_id": "3", "title": "", "text": "z"}']  # fmt: skip
    (tmp_path / "own/corpus.jsonl").write_text("\n".join(lines))

    assert load_benchmark(tmp_path / "own").corpus == {"1": "T x", "p01": "y", "3": "z"}


def test_another_split_and_name(tmp_path: Path) -> None:
    folder = write_beir(own(), tmp_path / "own", split="dev")

    assert load_benchmark(folder, split="dev", name="mine").name == "mine"
    with pytest.raises(SourceError, match=r"expected test\.tsv .*found \['dev\.tsv'\]"):
        load_benchmark(folder)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("corpus.jsonl", '{"_id": "p01"}', "line 1 of corpus.jsonl"),
        ("queries.jsonl", "\nnot json", "line 2 of queries.jsonl"),
        ("queries.jsonl", '["q1", "text"]', "line 1 of queries.jsonl"),
        ("qrels/test.tsv", "q1\tp01\t1\nq1\tp02\thigh", "line 2 of test.tsv"),
        ("qrels/test.tsv", "q1 0 p01 1", "line 1 of test.tsv"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    folder = write_beir(own(), tmp_path / "own")
    (folder / file).write_text(text)

    with pytest.raises(SourceError, match=complaint):
        load_benchmark(folder)


def test_qrels_need_no_header(tmp_path: Path) -> None:
    folder = write_beir(own(), tmp_path / "own")
    (folder / "qrels/test.tsv").write_text("q1\tp01\t2\n")

    assert load_benchmark(folder).qrels == {"q1": {"p01": 2}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"corpus": {}}, "found none"),
        ({"qrels": {"q1": {"p01": 0}}}, "a grade above 0"),
        ({"qrels": {}}, "a grade above 0"),
        ({"queries": {"q1": "text"}}, "found none for 4, the first 'q2'"),
        ({"corpus": {"1": "text"}}, "not one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], complaint: str) -> None:
    whole = own()
    parts = {"queries": whole.queries, "corpus": whole.corpus, "qrels": whole.qrels}

    with pytest.raises(SettingError, match=complaint):
        Benchmark(name="x", **{**parts, **changes})


def test_a_query_without_a_relevant_passage_does_not_count() -> None:
    assert judged_queries(own().qrels) == ["q1", "q2", "q3", "q4", "q5"]
