"""The card: every number is the report's, every snippet runs, every file that it names is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from hf_relabel.hub_cards import insert_block, render_dataset_card, render_model_card_note
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from hf_relabel import Relabeler, ScriptedJudge
from hf_relabel.controls import run_controls
from hf_relabel.errors import MissingExtraError
from hf_relabel.files import read_report, write_report
from hf_relabel.hub.build import Built, build
from hf_relabel.hub.push import Pushed
from hf_relabel.hub.settings import BuildSettings
from tests.hub.conftest import REPO
from tests.hub.double import HubDouble
from tests.test_training import tiny_bert  # noqa: F401  a fixture

Build = Callable[..., Built]
Push = Callable[..., Pushed]
PLAIN = BuildSettings(license="cc-by-4.0", languages=["en"], has_plots=False)


def body(built: Built) -> str:
    return (built.folder / "README.md").read_text("utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its first two lines."""
    lines = text[text.index(f"## {heading}") :].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    first = lines.index(rows[0])
    end = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    cells = [line.strip("|").split("|") for line in lines[first + 2 : end]]
    return [[cell.strip() for cell in row] for row in cells]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_number_is_the_reports(build_rows: Build, make_run: Callable[..., Path]) -> None:
    text = body(build_rows())
    report = json.loads((make_run() / "report.json").read_text())

    sentence = text[text.index("# plants") :].split("\n\n")[1]
    counts = report["negatives"]
    found = [number(n) for n in re.findall(r"[\d,]*\d", sentence)]
    assert found == [counts["seen"], 12, counts["promoted"], counts["dropped"], counts["kept"]]
    rows = re.search(r"([\d,]+) in, ([\d,]+) added, ([\d,]+) out; ([\d,]+) changed", text)
    assert rows is not None
    names = ("rows_in", "rows_added", "rows_out", "rows_changed")
    assert [number(n) for n in rows.groups()] == [report[name] for name in names]
    columns = ("rows_asked", "rows_flagged", None, "better", "worse", "undecided")
    for cells, stage in zip(table(text, "How it was made"), report["stages"], strict=True):
        assert cells[:2] == [stage["name"], stage["model"]]
        for cell, name in zip(cells[2:8], columns, strict=True):
            assert name is None or number(cell) == stage[name]
        assert number(cells[8]) == stage["calls"] + stage["cached"]
        assert cells[9:] == []  # no tokens were counted: nothing, rather than 0
    (subset,) = table(text, "Before and after")
    assert [number(cell) for cell in subset[1:7]] == [12, 12, 12, 18, 60, 54]
    assert subset[7] == "6 (10.0%)"
    assert "confirmed 6 (85.7%)" in text


def test_row_counts_of_configs_are_those_of_the_files(build_rows: Build) -> None:
    built = build_rows()

    for name, _, rows in table(body(built), "Structure"):
        config = name.split("`")[1]
        assert number(rows) == sum(built.manifest["configs"][config].values())


def test_it_is_sound_markdown_and_names_only_files_that_are_there(build_rows: Build) -> None:
    built = build_rows(has_plots=True)
    text = body(built)

    html = (
        MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])
    )

    assert html.count("<table>") == 3
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    named = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert len([name for name in named if name.startswith("plots/")]) == 4
    assert [name for name in named if not (built.folder / name).is_file()] == []
    assert text.count("hf_relabel:start") == text.count("hf_relabel:end") == 1
    assert "None" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_plots_are_png_files_of_the_card_width(build_rows: Build) -> None:
    built = build_rows(has_plots=True)

    plots = sorted((built.folder / "plots").glob("*.png"))
    assert len(plots) == 4
    for plot in plots:
        data = plot.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 960
        assert b"Software" not in data


def test_without_matplotlib_the_extra_is_named(
    build_rows: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtraError, match=r"hf-relabel\[report\]"):
        build_rows(has_plots=True)


def test_a_field_without_a_fact_fails() -> None:
    with pytest.raises(UndefinedError):
        render_dataset_card({"repo_id": REPO})


def test_names_that_would_break_a_table_are_escaped(tmp_path: Path) -> None:
    from hf_relabel.hub_cards.rendering import _cell

    assert _cell("a|b\n<i>c") == "a\\|b &lt;i>c"
    assert tmp_path.is_dir()


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_every_snippet_of_the_card_runs(
    build_rows: Build, push_built: Push, on_hub: HubDouble, monkeypatch: pytest.MonkeyPatch,
    tiny_bert: str, tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    """As they stand, but for the models: a tiny one trains on what the Hub serves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    push_built(build_rows())
    text = on_hub.read(REPO, "README.md").decode()
    for model in ("microsoft/mpnet-base", "microsoft/MiniLM-L12-H384-uncased"):
        assert model in text
        text = text.replace(model, tiny_bert)

    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102  our own text

    assert len(blocks) == 6
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert lines == load_dataset(REPO, "bge", split="train").to_list()
    assert names["rows"].column_names[:2] == ["query_id", "query"]
    assert isinstance(names["relabeler"], Relabeler)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # rdflib's own
def test_croissant_is_read_without_errors(build_rows: Build) -> None:
    import mlcroissant as croissant

    built = build_rows()

    dataset = croissant.Dataset(jsonld=str(built.folder / "croissant.json"))

    assert dataset.metadata.ctx.issues.errors == set()
    names = {record.name for record in dataset.metadata.record_sets}
    assert names == set(built.manifest["configs"])
    values = json.loads((built.folder / "croissant.json").read_text())
    assert "cheap as judge 'cheap'" in values["rai:machineAnnotationTools"]


def test_a_model_card_says_what_its_rows_went_through(make_run: Callable[..., Path]) -> None:
    report = json.loads((make_run() / "report.json").read_text())

    note = render_model_card_note({"report": report, "dataset": REPO, "revision": "v1"})
    card = insert_block("# My model\n\n## Citation\nMe.\n", note, before="## Citation")
    again = insert_block(card, note.replace("12 rows in", "13 rows in"))

    assert f"[{REPO}](https://huggingface.co/datasets/{REPO}) at `v1`" in note
    assert "Of 60 negatives 54 stayed, 0 were dropped, 6 became positives" in note
    assert card.index("# My model") < card.index("Relabeled training data") < card.index("Me.")
    assert again.count("Relabeled training data") == 1
    assert "13 rows in" in again


def test_a_run_that_found_nothing_still_has_a_card(tmp_path: Path) -> None:
    from datasets import Dataset

    from hf_relabel import Relevance
    from hf_relabel.files import write_relabeled
    from hf_relabel.hub.build import build
    from hf_relabel.hub.check import check
    from hf_relabel.hub.settings import BuildSettings
    from tests.rows import tevatron_rows

    rows = Dataset.from_list(tevatron_rows(2))
    relabeler = Relabeler(
        ScriptedJudge("only", answers={}, default=Relevance.NOT_RELEVANT), cache=tmp_path / "cache"
    )
    relabeler.judge(rows)
    write_relabeled(relabeler, {"train": rows}, tmp_path / "run")

    built = build(tmp_path / "run", tmp_path / "built", REPO, BuildSettings(license="mit"))

    check(built.folder)
    assert "0 became positives" in body(built)


def test_rates_of_planted_passages_are_those_of_the_report(
    relabeler: Relabeler, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run()
    without = body(build(folder, tmp_path / "without", REPO, PLAIN))
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "loaded"))
    report = read_report(folder)
    report.controls = run_controls(relabeler, rows, n=4)
    write_report(folder, report)

    text = body(build(folder, tmp_path / "with", REPO, PLAIN))

    found = report.controls
    assert found.positives is not None
    assert found.random is not None
    rates = [
        rate
        for planted in (found.positives, found.random)
        for rate in (*planted.stages, planted.acted_on)
        if rate.share is not None
    ]
    cells = table(text, "How good the judges are")
    assert [row[1] for row in cells] == [f"{rate.count} of {rate.total}" for rate in rates]
    assert [row[2] for row in cells] == [f"{rate.share:.3f}" for rate in rates]
    assert len(rates) >= 4
    assert "How good the judges are" not in without
