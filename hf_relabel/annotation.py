"""Tasks for people, and their answers: Label Studio's JSON and CSV, out and in.

People see the query and its positives first, then the passage; no verdict, in shuffled order. What
they must not see is the key, a file of its own, which scoring needs.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_relabel.errors import SourceError
from hf_relabel.sampling import Pair, Sample, Stratum
from hf_relabel.verdicts import Relevance

__all__ = [
    "Answers",
    "TaskFiles",
    "read_answers",
    "read_sample",
    "shown",
    "write_table",
    "write_tasks",
]

LAYOUT = 1
"""Version of `key.json`."""

_CHOICES = {"Relevant": True, "Not relevant": False, "Cannot tell": None}
_WORDS: dict[str, bool | None] = {
    **{name.lower(): value for name, value in _CHOICES.items()},
    **dict.fromkeys(("yes", "y", "1", "true"), True),
    **dict.fromkeys(("no", "n", "0", "false", "irrelevant", "not-relevant"), False),
    **dict.fromkeys(("?", "skip", "unsure"), None),
}
_COLUMNS = ("task", "query", "positives", "passage", "answer")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_QUESTION = "Does the passage answer the query, as the passages known to answer it do?"
_LABELING = f"""\
<View>
  <Header value="Query" size="4"/>
  <Text name="query" value="$query"/>
  <Header value="Passages known to answer it" size="4"/>
  <Text name="positives" value="$positives"/>
  <Header value="{_QUESTION}" size="4"/>
  <Text name="passage" value="$passage"/>
  <Choices name="answer" toName="passage" choice="single-radio" required="true" showInline="true">
    <Choice value="Relevant" hotkey="1"/>
    <Choice value="Not relevant" hotkey="2"/>
    <Choice value="Cannot tell" hotkey="3"/>
  </Choices>
</View>
"""

Answers = dict[str, dict[str, bool | None]]
"""Task → annotator → whether the passage is relevant; None where the annotator could not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """Where the tasks of a sample lie.

    Attributes:
        tasks: For Label Studio's import.
        labeling: Its labeling interface, for the project's settings.
        table: The same tasks as CSV: each annotator fills the column `answer` of a copy.
        key: Verdicts and weights; not for annotators.
    """

    tasks: Path
    labeling: Path
    table: Path
    key: Path

    @classmethod
    def in_folder(cls, folder: Path) -> TaskFiles:
        names = {"tasks": "tasks.json", "labeling": "labeling.xml"}
        names.update(table="tasks.csv", key="key.json")
        return cls(**{role: folder / name for role, name in names.items()})


def write_tasks(sample: Sample, folder: Path) -> TaskFiles:
    """Write the tasks of a sample, and its key.

    Args:
        sample: What was drawn.
        folder: Made when it is not there.

    Raises:
        SourceError: The folder holds tasks already: answers to them would lose their key.
    """
    files = TaskFiles.in_folder(folder)
    if files.key.exists():
        raise SourceError(
            f"expected a folder without tasks, found {str(files.key)!r}: without it, answers to its "
            "tasks cannot be read. Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [{"data": shown(pair)} for pair in sample.pairs]
    files.tasks.write_text(json.dumps(tasks, ensure_ascii=False, indent=1) + "\n", "utf-8")
    files.labeling.write_text(_LABELING, "utf-8")
    rows = [{**shown(pair), "answer": ""} for pair in sample.pairs]
    write_table(files.table, _COLUMNS, rows)
    files.key.write_text(json.dumps(_key(sample), ensure_ascii=False, indent=1) + "\n", "utf-8")
    return files


def read_sample(folder: Path) -> Sample:
    """Read back the sample of a folder that `write_tasks` wrote.

    Raises:
        SourceError: It holds none, or another version of the library wrote it.
    """
    path = TaskFiles.in_folder(folder).key
    if not path.is_file():
        raise SourceError(
            f"expected the folder of `hf-relabel agreement sample --output`, found no key.json in "
            f"{str(folder)!r}."
        )
    values = json.loads(path.read_text("utf-8"))
    if values.get("layout") != LAYOUT:
        raise SourceError(
            f"expected a key.json of layout {LAYOUT}, found {values.get('layout')!r}. Score it with "
            "the version that drew the sample."
        )
    return Sample(
        seed=values["seed"],
        stages=values["stages"],
        strata=tuple(Stratum(**stratum) for stratum in values["strata"]),
        pairs=tuple(map(_pair, values["pairs"])),
        n_undecided=values["n_undecided"],
    )


def read_answers(files: Sequence[Path], sample: Sample) -> Answers:
    """Read what people answered.

    Args:
        files: Label Studio's exports (JSON, JSON_MIN, CSV), each of a project with any number of
            annotators, and filled copies of `tasks.csv`, each named after its annotator.
        sample: What they were asked about.

    Raises:
        SourceError: A file is of no such kind, or answers other tasks; or no task is answered.
    """
    known = {pair.task for pair in sample.pairs}
    answers: Answers = {}
    for path in files:
        for task, annotator, answer in _read_file(path, has_bare_names=len(files) == 1):
            if task not in known:
                raise SourceError(
                    f"expected answers to the tasks of this folder, found the task {task!r} in "
                    f"{str(path)!r}. Give the folder that the tasks come from."
                )
            of_task = answers.setdefault(task, {})
            if annotator in of_task:
                raise SourceError(
                    f"expected one answer of {annotator!r} to the task {task!r}, found a second in "
                    f"{str(path)!r}. Give each file once, and each annotator's a name of its own."
                )
            of_task[annotator] = answer
    if not answers:
        raise SourceError(f"expected answers, found none in {', '.join(map(str, files))}.")
    return answers


def shown(pair: Pair) -> dict[str, str]:
    """Return what people see of a pair."""
    numbered = [f"[{number}] {text}" for number, text in enumerate(pair.positives, 1)]
    return {
        "task": pair.task,
        "query": pair.query,
        "positives": "\n\n".join(numbered) or "(none)",
        "passage": pair.passage,
    }


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV file that spreadsheets read as text in UTF-8, whatever the texts begin with."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _harmless(text) for name, text in row.items()})


def _harmless(text: str) -> str:
    """Keep a spreadsheet from taking a text of the data for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _key(sample: Sample) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "seed": sample.seed,
        "stages": dict(sample.stages),
        "n_undecided": sample.n_undecided,
        "strata": [asdict(stratum) for stratum in sample.strata],
        "pairs": [
            {**asdict(pair), "relevances": [relevance.value for relevance in pair.relevances]}
            for pair in sample.pairs
        ],
    }


def _pair(values: Mapping[str, Any]) -> Pair:
    relevances = tuple(map(Relevance, values["relevances"]))
    positives = tuple(values["positives"])
    return Pair(**{**values, "relevances": relevances, "positives": positives})


_Answer = tuple[str, str | None, str, bool | None]
"""Task, annotator (None where the file names none), when, and what."""


def _read_file(path: Path, *, has_bare_names: bool) -> Iterator[tuple[str, str, bool | None]]:
    """Yield task, annotator and each annotator's latest answer."""
    readers = {".csv": _read_table, ".json": _read_export}
    if not path.is_file():
        raise SourceError(f"expected a file of answers, found none at {str(path)!r}.")
    if path.suffix.lower() not in readers:
        raise SourceError(
            f"expected a .json export of Label Studio or a .csv table, found {str(path)!r}."
        )
    # Numbers of people start anew in every Label Studio: two exports may mean two "1"s.
    prefix = "" if has_bare_names else f"{path.stem}:"
    latest: dict[tuple[str, str], tuple[str, bool | None]] = {}
    for task, annotator, time, answer in readers[path.suffix.lower()](path):
        key = task, path.stem if annotator is None else prefix + annotator
        if key not in latest or time >= latest[key][0]:
            latest[key] = time, answer
    for (task, annotator), (_, answer) in latest.items():
        yield task, annotator, answer


def _read_table(path: Path) -> Iterator[_Answer]:
    """Read a filled copy of the tasks, or Label Studio's export of the type CSV."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        # Spreadsheets write a semicolon where the comma is in numbers.
        rows = csv.DictReader(file, delimiter=";" if head.count(";") > head.count(",") else ",")
        if not {"task", "answer"} <= set(rows.fieldnames or ()):
            raise SourceError(
                f"expected the columns 'task' and 'answer' in {str(path)!r}, found "
                f"{list(rows.fieldnames or ())}. Fill a copy of tasks.csv."
            )
        for number, row in enumerate(rows, 1):
            if answer := (row["answer"] or "").strip():
                value = _as_answer(answer, f"row {number} of {path}")
                yield row["task"], row.get("annotator"), row.get("updated_at") or "", value


def _read_export(path: Path) -> Iterator[_Answer]:
    try:
        for task in json.loads(path.read_text("utf-8")):
            yield from _answers_to(task, path) if "data" in task else [_flat_answer(task, path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"expected a Label Studio export of the type JSON or JSON_MIN in {str(path)!r}, found "
            f"something else ({error!r})."
        ) from error


def _answers_to(task: Mapping[str, Any], path: Path) -> Iterator[_Answer]:
    """Yield the answers to one task; skipped and unfinished ones are none."""
    name = str(task["data"]["task"])
    for annotation in task["annotations"]:
        choices = [
            result["value"]["choices"]
            for result in annotation["result"]
            if result.get("from_name") == "answer"
        ]
        if choices and not annotation.get("was_cancelled"):
            value = _as_answer(choices[0][0], f"task {name} of {path}")
            time = str(annotation.get("updated_at") or "")
            yield name, _annotator(annotation["completed_by"]), time, value


def _flat_answer(entry: Mapping[str, Any], path: Path) -> _Answer:
    """Read an entry of JSON_MIN, which is one answer."""
    name = str(entry["task"])
    value = _as_answer(entry["answer"], f"task {name} of {path}")
    return name, _annotator(entry["annotator"]), str(entry.get("updated_at") or ""), value


def _annotator(completed_by: Any) -> str:
    """Name who answered: exports hold a number, or more of the person."""
    if isinstance(completed_by, Mapping):
        return str(completed_by.get("email") or completed_by["id"])
    return str(completed_by)


def _as_answer(text: str, place: str) -> bool | None:
    word = re.sub(r"\s+", " ", text.strip().lower())
    if word not in _WORDS:
        raise SourceError(
            f"expected an answer of {', '.join(map(repr, _CHOICES))}, found {text!r} in {place}."
        )
    return _WORDS[word]
