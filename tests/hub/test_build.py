"""Building and checking: every shape loads, every number is the report's, and no secret is in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from hf_relabel import Relabeler, convert
from hf_relabel.errors import CheckError, SettingError, SourceError
from hf_relabel.files import write_relabeled
from hf_relabel.formats import content_hash
from hf_relabel.hub.build import Built, build
from hf_relabel.hub.check import check, read_card
from hf_relabel.hub.settings import CONFIGS, BuildSettings
from tests.hub.conftest import REPO
from tests.rows import KEY, tevatron_rows

Build = Callable[..., Built]
SETTINGS = BuildSettings(license="cc-by-4.0", languages=["en"], has_plots=False)


def load(built: Built, config: str, split: str = "train") -> Dataset:
    return load_dataset(str(built.folder), config, split=split)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def card(built: Built) -> tuple[dict[str, Any], str]:
    return read_card((built.folder / "README.md").read_text("utf-8"))


def as_rows(relabeler: Relabeler, kind: str) -> Any:
    rows = Dataset.from_list(tevatron_rows())
    relabeler.judge(rows)
    if kind == "stream":
        return {"train": rows.to_iterable_dataset()}
    if kind == "splits":
        return DatasetDict({"train": rows.select(range(8)), "dev": rows.select(range(8, 12))})
    return {"train": rows if kind == "tevatron" else convert(rows, to=kind)}


def test_the_same_run_gives_the_same_bytes(build_rows: Build) -> None:
    first = contents(build_rows(has_plots=True).folder)

    again = contents(build_rows(has_plots=True).folder)

    assert [name for name in first if first[name] != again.get(name)] == []
    assert first.keys() == again.keys()
    assert {name.split("/")[0] for name in first} >= {*CONFIGS, "plots", "runs", "README.md"}


@pytest.mark.parametrize("config", ["triplet", "labeled-list", "tevatron"])
def test_rows_are_what_convert_makes_of_them(
    build_rows: Build, relabeler: Relabeler, config: str
) -> None:
    built = build_rows()

    rows = Dataset.from_list(tevatron_rows())
    clean = rows.map(relabeler, batched=True)
    assert load(built, config).to_list() == convert(clean, to=config).to_list()
    assert load(built, "bge").to_list() == [
        {name: row[name] for name in ("query", "pos", "neg")}
        for row in convert(clean, to="bge").to_list()
    ]


@pytest.mark.parametrize("kind", ["tevatron", "bge", "labeled-list", "triplet", "stream", "splits"])
def test_every_format_and_kind_of_dataset_builds_the_same_shapes(
    relabeler: Relabeler, tmp_path: Path, kind: str
) -> None:
    splits = as_rows(relabeler, kind)
    write_relabeled(relabeler, splits, tmp_path / "run")

    built = build(tmp_path / "run", tmp_path / "built", REPO, SETTINGS)

    check(built.folder)
    parts = [load(built, "labeled-list", split).to_list() for split in splits]
    found = {row["anchor"]: set(zip(row["documents"], row["labels"], strict=True))
             for part in parts for row in part}  # fmt: skip
    n_positives = 12 + len(KEY)
    assert sum(label for pairs in found.values() for _, label in pairs) == n_positives
    n_refills = len(KEY) if kind == "triplet" else 0  # freed slots
    assert sum(map(len, found.values())) == 12 * 6 + n_refills
    promoted = {(q, text) for q, pairs in found.items() for text, label in pairs if label}
    assert set(KEY) <= promoted


def test_short_n_tuples_are_filled_with_negatives_of_other_queries(build_rows: Build) -> None:
    built = build_rows(n_negatives=5)

    rows = load(built, "n-tuple").to_list()
    assert len(rows) == 12 + len(KEY)
    for row in rows:
        negatives = [row[f"negative_{number}"] for number in range(1, 6)]
        assert len(set(negatives)) == 5
        assert row["positive"] not in negatives
        assert not any((row["anchor"], negative) in KEY for negative in negatives)


def test_qrels_grade_all_that_is_known(build_rows: Build) -> None:
    built = build_rows()

    grades = {(r["query-id"], r["corpus-id"]): r["score"] for r in load(built, "qrels")}
    assert len(grades) == load(built, "qrels").num_rows == 12 * 6
    assert grades["q0", "p0-of-0"] == 2
    assert grades["q0", "n1-of-0"] == 2
    assert grades["q0", "n2-of-0"] == 1
    assert grades["q0", "n3-of-0"] == 0


def test_verdicts_hold_every_stage_and_no_text(build_rows: Build) -> None:
    built = build_rows()

    verdicts = load(built, "verdicts")
    words = [value for row in verdicts for value in row.values() if isinstance(value, str)]
    assert not any("beside plant" in word for word in words)
    of = {(row["query_id"], row["doc_id"], row["stage"]): row for row in verdicts}
    assert of["q4", "n1-of-4", 0]["verdict"] == "worse"
    assert not of["q4", "n1-of-4", 0]["is_final"]
    assert of["q4", "n1-of-4", 1]["verdict"] == "not-relevant"
    assert of["q4", "n1-of-4", 1]["is_final"]
    assert of["q0", "n1-of-0", 0]["doc_sha256"] == content_hash("Text 1 beside plant 0.")
    calls = load(built, "calls")
    assert set(calls["call_id"]) == set(verdicts["call_id"])
    assert len(calls) == built.manifest["configs"]["calls"]["train"] == 12 + 5


def test_a_text_free_build_has_no_word_of_the_source(build_rows: Build) -> None:
    built = build_rows(text_free=True, license="cc-by-nd-4.0")

    check(built.folder)
    assert set(built.manifest["configs"]) == {"decisions", "verdicts", "calls"}
    assert "passage" not in load(built, "decisions").column_names
    texts = b"".join(contents(built.folder).values())
    assert b"beside plant" not in texts
    assert "joins them on the hashes" in card(built)[1]


# Licence ---------------------------------------------------------------------------------------


def test_the_licence_is_inherited(build_rows: Build) -> None:
    built = build_rows(license="", source_card={"license": "cc-by-sa-3.0", "language": ["de"]})

    header, body = card(built)
    assert header["license"] == "cc-by-sa-3.0"
    assert "as the source's card says" in body
    assert not (built.folder / "LICENSE").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "expected a licence in the source's card, found none"),
        ({"source_card": {"license": "unknown"}}, "found none"),
        ({"source_card": {"license": ["mit", "odbl"]}}, "which subset"),
        ({"license": "cc-by-5"}, "found 'cc-by-5'"),
        ({"license": "cc-by-nd-4.0"}, "allows changed copies"),
        ({"license": {"other": "mit"}}, "for every subset"),
    ],
)
def test_a_licence_that_is_unknown_is_refused(
    build_rows: Build, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        build_rows(**{"license": "", **settings})


def test_mixed_sources_get_a_table_and_a_file(relabeler: Relabeler, tmp_path: Path) -> None:
    rows = tevatron_rows()
    for index, row in enumerate(rows):
        row["subset"] = "trees" if index % 2 else "weeds"
    dataset = Dataset.from_list(rows)
    relabeler.judge(dataset)
    write_relabeled(relabeler, {"train": dataset}, tmp_path / "run")
    licences = {"trees": "cc-by-4.0", "weeds": "odc-by"}
    settings = BuildSettings(license=licences, languages=["en"], has_plots=False)

    built = build(tmp_path / "run", tmp_path / "built", REPO, settings)

    check(built.folder)
    header, body = card(built)
    names = ("license", "license_name", "license_link")
    assert [header[name] for name in names] == ["other", "mixed-by-subset", "LICENSE"]
    assert "| weeds | odc-by |" in body
    assert "- trees: cc-by-4.0" in (built.folder / "LICENSE").read_text()
    assert "| **all** | 12 | 12 | 12 | 18 | 60 | 54 |" in body


# Check -----------------------------------------------------------------------------------------

SECRETS = {
    "a Hugging Face token": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "an API key": "sk-proj-" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "a path of this machine": "/home/somebody/data/rows.jsonl",
    "a password in an address": "https://me:secret@proxy.example.org",
    "an address of a local server": "http://127.0.0.1:8000/v1",
}


@pytest.mark.parametrize("what", SECRETS)
@pytest.mark.parametrize("place", ["README.md", "runs", "croissant.json", "verdicts", "metadata"])
def test_planted_secrets_and_paths_are_found(build_rows: Build, what: str, place: str) -> None:
    built = build_rows(configs=["triplet", "verdicts"])
    plant(built, place, SECRETS[what])

    with pytest.raises(CheckError, match=what) as caught:
        check(built.folder)

    assert SECRETS[what] not in str(caught.value)


def plant(built: Built, place: str, secret: str) -> None:
    """Put a secret into a file, and make the manifest agree, as if it had been built so."""
    if place in ("verdicts", "metadata"):
        _plant_in_parquet(next((built.folder / "verdicts").glob("*.parquet")), place, secret)
    else:
        path = next((built.folder / "runs").glob("*")) if place == "runs" else built.folder / place
        text = path.read_text("utf-8")
        path.write_text(text.replace("cheap", secret, 1) if place == "runs" else text + secret)
    manifest = built.manifest
    for name in manifest["files"]:
        data = (built.folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (built.folder / "hf_relabel.json").write_text(json.dumps(manifest))


def _plant_in_parquet(path: Path, place: str, secret: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if place == "metadata":
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), "from": secret})
    else:
        index = table.schema.get_field_index("judge")
        values = [secret, *table["judge"].to_pylist()[1:]]
        table = table.set_column(index, table.schema.field("judge"), pa.array(values, pa.string()))
    pq.write_table(table, path)


def test_a_key_in_a_passage_is_found_and_a_path_in_one_is_the_sources_own_word(
    relabeler: Relabeler, tmp_path: Path
) -> None:
    rows = tevatron_rows()
    rows[0]["positive_passages"][0]["text"] = "Logs lie in /home/user/logs on every machine."
    write_judged(relabeler, rows, tmp_path / "run")
    check(build(tmp_path / "run", tmp_path / "built", REPO, SETTINGS).folder)

    rows[1]["positive_passages"][0]["text"] = f"Use {SECRETS['an API key']} here."
    write_judged(relabeler, rows, tmp_path / "run")
    with pytest.raises(CheckError, match="an API key in column"):
        check(build(tmp_path / "run", tmp_path / "built", REPO, SETTINGS).folder)


def write_judged(relabeler: Relabeler, rows: list[dict[str, Any]], folder: Path) -> None:
    dataset = Dataset.from_list(rows)
    relabeler.judge(dataset)
    write_relabeled(relabeler, {"train": dataset}, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("num_examples: 54", "num_examples: 55"), "rows in dataset_info"),
        (lambda text: text.replace("license: cc-by-4.0", "license: nonsense"), "licence id"),
        (lambda text: text.replace("  default: true\n", ""), "one default config"),
        (lambda text: text + "\n{{ totals.queries }}\n", "unresolved field"),
        (lambda text: text.replace("---\n", "---\n a: b: c\n", 1), "no YAML"),
        (lambda text: text.replace("name: positive", "name: positives"), "does not load"),
    ],
)
def test_a_card_that_is_wrong_is_found(
    build_rows: Build, change: Callable[[str], str], words: str
) -> None:
    built = build_rows(configs=["triplet"])
    path = built.folder / "README.md"
    path.write_text(change(path.read_text()))

    with pytest.raises(CheckError, match=words):
        check(built.folder)


def test_files_that_changed_went_or_came_are_found(build_rows: Build) -> None:
    built = build_rows(configs=["triplet", "calls", "qrels"])
    next((built.folder / "calls").glob("*")).unlink()
    (built.folder / "croissant.json").write_text("{}")
    (built.folder / "notes.txt").write_text("mine")

    with pytest.raises(CheckError) as caught:
        check(built.folder)

    for words in ("calls/train-00000-of-00001.parquet: missing", "croissant.json: changed",
                  "notes.txt: not built by us"):  # fmt: skip
        assert words in str(caught.value)


def test_row_accounting_that_differs_from_the_report_is_found(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run()
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "rows_out": 11}))
    built = build(run, tmp_path / "built", REPO, SETTINGS)

    with pytest.raises(CheckError, match="expected 12 rows out by its own counts, found 11"):
        check(built.folder)


def test_mistakes_are_said_before_anything_is_built(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="owner/name"):
        build(make_run(), tmp_path / "built", "plants", SETTINGS)
    with pytest.raises(SourceError, match=r"found no report\.json, run\.json"):
        build(tmp_path / "cache", tmp_path / "built", REPO, SETTINGS)
    n_files = len(list((tmp_path / "cache").iterdir()))
    with pytest.raises(SourceError, match="found other files"):
        build(make_run(), tmp_path / "cache", REPO, SETTINGS)
    assert len(list((tmp_path / "cache").iterdir())) == n_files
    with pytest.raises(SettingError, match=r"configs out of .*'triplets'"):
        BuildSettings(configs=["triplets"])
    with pytest.raises(SettingError, match="in a text-free dataset"):
        BuildSettings(configs=["triplet"], text_free=True)


def test_a_split_name_that_would_not_load_is_refused(relabeler: Relabeler, tmp_path: Path) -> None:
    rows = Dataset.from_list(tevatron_rows())
    relabeler.judge(rows)
    write_relabeled(relabeler, {"my-split": rows}, tmp_path / "run")

    with pytest.raises(SettingError, match="Rename it: 'my_split'"):
        build(tmp_path / "run", tmp_path / "built", REPO, SETTINGS)


def test_a_stream_is_read_once(relabeler: Relabeler, tmp_path: Path) -> None:
    relabeler.judge(Dataset.from_list(tevatron_rows()))
    reads = []

    def rows() -> Any:
        reads.append(1)
        yield from tevatron_rows()

    features = Dataset.from_list(tevatron_rows()).features
    stream = IterableDataset.from_generator(rows, features=features)
    write_relabeled(relabeler, {"train": stream}, tmp_path / "run")

    assert len(reads) == 1
