"""Annotation: what people see, what they do not, and every form in which answers come back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_relabel.annotation import read_answers, read_sample, write_table, write_tasks
from hf_relabel.cli import run_app
from hf_relabel.errors import SourceError
from hf_relabel.sampling import Sample, draw_sample
from tests.rows import KEY, tevatron_rows
from tests.test_sampling import run_folder


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    rows = tevatron_rows()
    rows[3]["positive_passages"][0]["text"] = "=HYPERLINK(1)"
    return draw_sample(run_folder(tmp_path, rows), 20)


def export(sample: Sample, path: Path, *annotations: dict[str, Any]) -> Path:
    """Write what Label Studio 1.23.2 exports as JSON: one task, as was seen there."""
    pair = sample.pairs[0]
    task = {
        "id": 1,
        "annotations": [
            {
                "id": number,
                "completed_by": 1,
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2026-11-25T10:42:52.716069Z",
                "updated_at": f"2026-11-25T10:42:5{number}.716096Z",
                "draft_created_at": None,
                "lead_time": 3.2,
                "prediction": {},
                "result_count": 1,
                "task": 1,
                "project": 1,
                "parent_annotation": None,
                **annotation,
            }
            for number, annotation in enumerate(annotations)
        ],
        "drafts": [],
        "predictions": [],
        "data": {"task": pair.task, "query": pair.query, "positives": "", "passage": pair.passage},
        "meta": {},
        "allow_skip": True,
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "project": 1,
    }
    path.write_text(json.dumps([task]))
    return path


def choice(name: str) -> list[dict[str, Any]]:
    value = {"choices": [name]}
    return [{"from_name": "answer", "to_name": "passage", "type": "choices", "value": value}]


def table(sample: Sample, path: Path, answers: list[str], *, delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["task", "query", "answer"])
        for pair, answer in zip(sample.pairs, answers, strict=False):
            writer.writerow([pair.task, f'{pair.query}, "quoted"', answer])
    return path


def test_people_see_the_query_the_positives_and_the_passage_and_no_verdict(
    sample: Sample, tmp_path: Path
) -> None:
    files = write_tasks(sample, tmp_path / "tasks")

    tasks = json.loads(files.tasks.read_text("utf-8"))
    assert [set(task) for task in tasks] == [{"data"}] * 20
    assert [set(task["data"]) for task in tasks] == [{"task", "query", "positives", "passage"}] * 20
    shown = files.tasks.read_text("utf-8") + files.table.read_text("utf-8")
    for hidden in ("worse", "better", "not-relevant", "eager", "flagged", "subset", "-of-"):
        assert hidden not in shown
    with files.table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "query", "positives", "passage", "answer"]
    assert [row["task"] for row in rows] == [task["data"]["task"] for task in tasks]
    assert read_sample(tmp_path / "tasks") == sample


def test_the_labeling_interface_shows_the_fields_of_the_tasks(
    sample: Sample, tmp_path: Path
) -> None:
    files = write_tasks(sample, tmp_path / "tasks")

    tree = ElementTree.parse(files.labeling)  # noqa: S314  our own file
    names = [(text.get("name"), text.get("value")) for text in tree.iter("Text")]
    assert names == [(name, f"${name}") for name in ("query", "positives", "passage")]
    choices = next(tree.iter("Choices"))
    assert (choices.get("name"), choices.get("toName")) == ("answer", "passage")


def test_texts_that_a_spreadsheet_would_run_are_made_harmless(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["a", "b"], [{"a": "=HYPERLINK(1)", "b": "plain = text"}])

    assert (tmp_path / "t.csv").read_text("utf-8-sig").splitlines()[
        1
    ] == "'=HYPERLINK(1),plain = text"


def test_tasks_are_never_written_over(sample: Sample, tmp_path: Path) -> None:
    write_tasks(sample, tmp_path / "tasks")

    with pytest.raises(SourceError, match="Choose another folder"):
        write_tasks(sample, tmp_path / "tasks")


def test_an_export_holds_several_people_and_the_latest_word_of_each(
    sample: Sample, tmp_path: Path
) -> None:
    file = export(
        sample, tmp_path / "export.json",
        {"result": choice("Not relevant")},
        {"result": choice("Relevant")},
        {"result": choice("Cannot tell"), "completed_by": {"id": 2, "email": "b@example.org"}},
        {"result": choice("Relevant"), "completed_by": 3, "was_cancelled": True},
        {"result": [], "completed_by": 4},
    )  # fmt: skip

    answers = read_answers([file], sample)

    assert answers == {sample.pairs[0].task: {"1": True, "b@example.org": None}}


def test_one_number_in_two_exports_is_two_people(sample: Sample, tmp_path: Path) -> None:
    files = [export(sample, tmp_path / f"{name}.json", {"result": choice("Relevant")})
             for name in ("north", "south")]  # fmt: skip

    answers = read_answers(files, sample)

    assert answers == {sample.pairs[0].task: {"north:1": True, "south:1": True}}


def test_the_flat_exports_are_read_too(sample: Sample, tmp_path: Path) -> None:
    """JSON_MIN and CSV: one entry for each answer, with who gave it."""
    task = sample.pairs[0].task
    entry = {"task": task, "id": 1, "answer": "Relevant", "annotator": 7, "updated_at": "2026"}
    (tmp_path / "min.json").write_text(json.dumps([entry, {**entry, "annotator": 8}]))
    (tmp_path / "e.csv").write_text(
        f"annotator,answer,task\n7,Relevant,{task}\n8,Relevant,{task}\n"
    )

    for name in ("min.json", "e.csv"):
        assert read_answers([tmp_path / name], sample) == {task: {"7": True, "8": True}}


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_filled_table_is_one_person_named_by_the_file(
    sample: Sample, tmp_path: Path, delimiter: str
) -> None:
    words = ["Relevant", " yes ", "1", "not  relevant", "NO", "0", "Cannot tell", "?", ""]
    file = table(sample, tmp_path / "alice.csv", words, delimiter=delimiter)

    answers = read_answers([file], sample)

    expected = [True, True, True, False, False, False, None, None]
    assert [answers[pair.task] for pair in sample.pairs[:8]] == [
        {"alice": answer} for answer in expected
    ]
    assert len(answers) == 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "task,answer\nTASK,maybe\n", "found 'maybe' in row 1 of"),
        ("a.csv", "task,label\nTASK,yes\n", "the columns 'task' and 'answer'"),
        ("a.csv", "task,answer\nt-0,yes\n", "found the task 't-0'"),
        ("a.csv", "task,answer\nTASK,\n", "expected answers, found none"),
        ("a.json", "{}", "expected answers, found none"),
        ("a.json", '[{"data": {"text": "x"}}]', "a Label Studio export"),
        ("a.json", "nonsense", "a Label Studio export"),
        ("a.txt", "", "a .json export of Label Studio or a .csv table"),
    ],
)
def test_files_that_are_no_answers_are_refused(
    sample: Sample, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content.replace("TASK", sample.pairs[0].task))

    with pytest.raises(SourceError) as caught:
        read_answers([tmp_path / name], sample)
    assert words in str(caught.value)


def test_a_file_given_twice_is_refused(sample: Sample, tmp_path: Path) -> None:
    file = table(sample, tmp_path / "alice.csv", ["yes"])

    with pytest.raises(SourceError, match="Give each file once"):
        read_answers([file, file], sample)


def test_the_commands_go_from_a_run_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two people who know the key, but for one pair that one of them gets wrong."""
    folder = run_folder(tmp_path, tevatron_rows())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert run_app(["agreement", "sample", str(folder), "--n", "60", "--output", "tasks"]) == 0
    assert "60 tasks written" in " ".join(capsys.readouterr().out.split())
    for name in ("alice", "bob"):
        with Path("tasks/tasks.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["answer"] = "yes" if (row["query"], row["passage"]) in KEY else "no"
        if name == "bob":
            wrong = next(row for row in rows if row["answer"] == "no")
            wrong["answer"] = "yes"
        with Path(f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    assert run_app(["agreement", "score", "tasks", "alice.csv", "bob.csv"]) == 0

    printed = " ".join(capsys.readouterr().out.split())
    assert "the cascade 60 0.96 (" in printed
    assert "people (Cohen) 60 0.91 (" in printed
    assert "60 of 60 tasks have an answer" in printed
    figures = json.loads(Path("tasks/agreement.json").read_text())
    cascade = figures["judges"][-1]
    # One tie among the 54 that it passed over, which counts as half a pair missed.
    assert cascade["precision"]["value"] == 1
    assert cascade["recall"]["value"] == pytest.approx(6 / 6.5)
    assert run_app(["agreement", "score", "out", "alice.csv"]) == 1
    assert "found no key.json" in " ".join(capsys.readouterr().err.split())
