"""The planted-noise experiment: what it hides, how its judges err, what its arms make of the rows."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_relabel.formats import content_hash
from hf_relabel.questions import Question
from tests.conftest import ROOT

SCRIPTS = ROOT / "examples/evidence"
TOPICS = ("bread", "rivers", "clocks", "violins", "bees", "glass", "tides", "maps", "wool", "salt")
N_PASSAGES = 5


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the experiment by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def write_collection(folder: Path, *, has_train: bool) -> Path:
    """Write a collection of ten topics in BEIR's layout: a query and five passages on each."""
    (folder / "qrels").mkdir(parents=True)
    corpus, queries, qrels = [], [], []
    for topic in TOPICS:
        queries.append({"_id": f"q-{topic}", "text": f"what is known about {topic}"})
        for number in range(N_PASSAGES):
            text = f"{topic.title()} were studied in report {number}. The {topic} came out well."
            corpus.append({"_id": f"{topic}-{number}", "title": f"On {topic}", "text": text})
            if number < (1 if has_train else 4):
                qrels.append(f"q-{topic}\t{topic}-{number}\t{1 + number % 3}")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    parts = {"train": qrels[:7], "test": qrels[7:]} if has_train else {"test": qrels}
    for split, lines_of in parts.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines_of])
        (folder / "qrels" / f"{split}.tsv").write_text(text + "\n", "utf-8")
    return folder


def ranking(collection: Any) -> dict[str, dict[str, float]]:
    """Return a run over everything, in an order drawn for each query."""
    ids = sorted(collection.passages)
    return {
        query: {p: -float(i) for i, p in enumerate(random.Random(query).sample(ids, len(ids)))}
        for query in collection.everything.queries
    }


def planted(script: Callable[[str], ModuleType], folder: Path, **changes: Any) -> tuple[Any, Any]:
    data = script("planted_data")
    collection = data.load_collection(folder)
    train, _ = collection.split(0)
    settings = {"seed": 0, "n_negatives": 5, "n_hidden": 2, "noisy_share": 1.0, **changes}
    return collection, data.plant(collection, train, ranking(collection), **settings)


def texts(passages: list[dict[str, str]]) -> list[str]:
    return [f"{passage['title']}\n{passage['text']}" for passage in passages]


def hidden_in(row: dict[str, Any], noise: Any) -> list[str]:
    query = content_hash(row["query"])
    negatives = texts(row["negative_passages"])
    return [text for text in negatives if (query, content_hash(text)) in noise.key]


def test_known_positives_are_hidden_and_the_others_stay(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    collection, noise = planted(script, write_collection(tmp_path / "c", has_train=False))

    for row, clean in zip(noise.rows, noise.clean, strict=True):
        relevant = set(collection.relevant(row["query_id"]))
        shown = {passage["docid"] for passage in row["positive_passages"]}
        below = [passage["docid"] for passage in row["negative_passages"]]
        assert len(below) == 5
        assert relevant & set(below) == relevant - shown
        assert len(hidden_in(row, noise)) == 2
        assert not relevant & {passage["docid"] for passage in clean["negative_passages"]}
        assert clean["positive_passages"] == row["positive_passages"]


def test_three_seeds_test_every_query_once(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    folder = write_collection(tmp_path / "c", has_train=False)
    collection = script("planted_data").load_collection(folder)

    tested = []
    for seed in range(3):
        train, benchmark = collection.split(seed)
        assert not set(train) & set(benchmark.qrels)
        tested += list(benchmark.qrels)

    assert sorted(tested) == sorted(f"q-{topic}" for topic in TOPICS)


def test_the_halves_of_a_positive_are_shown_and_hidden(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    collection, noise = planted(script, write_collection(tmp_path / "c", has_train=True))

    for row in noise.rows:
        (shown,) = row["positive_passages"]
        (hidden,) = [p for p in row["negative_passages"] if texts([p])[0] in hidden_in(row, noise)]
        assert {shown["docid"][-2:], hidden["docid"][-2:]} == {"#1", "#2"}
        whole = collection.passages[shown["docid"][:-2]]["text"]
        first, second = sorted((shown, hidden), key=lambda passage: passage["docid"])
        assert f"{first['text']} {second['text']}" == whole


def test_only_a_share_of_the_rows_is_noisy(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    _, noise = planted(script, write_collection(tmp_path / "c", has_train=False), noisy_share=0.0)

    assert noise.key == frozenset()
    assert noise.rows[:] == noise.clean[:]


def test_the_rates_are_those_that_the_docstring_derives(
    script: Callable[[str], ModuleType],
) -> None:
    module = script("simulated_judges")
    rates = module.paper_rates()

    for number in (*rates.misses, rates.agreement):
        assert f"{100 * number:.0f} %" in (module.__doc__ or "").replace("73 % of", "73 %")
    for number in rates.false_flags:
        assert f"{100 * number:.1f} %" in (module.__doc__ or "")


def test_judges_err_as_often_as_they_are_told(script: Callable[[str], ModuleType]) -> None:
    module = script("simulated_judges")
    passages = tuple(f"passage {number}" for number in range(4000))
    key = frozenset((content_hash("q"), content_hash(text)) for text in passages[:2000])
    rates = module.Rates(misses=(0.3, 0.5), false_flags=(0.2, 0.1), agreement=1.0)
    question = Question(query="q", passages=passages)

    flags = []
    for name in ("stage 1", "stage 2"):
        judge = module.SimulatedJudge(name, key, rates=rates, seed=0)
        verdicts = judge.judge(question)
        assert verdicts == module.SimulatedJudge(name, key, rates=rates, seed=0).judge(question)
        flags.append([verdict.relevance.is_relevant for verdict in verdicts])

    assert [sum(of[:2000]) / 2000 for of in flags] == pytest.approx([0.7, 0.5], abs=0.03)
    assert [sum(of[2000:]) / 2000 for of in flags] == pytest.approx([0.2, 0.1], abs=0.03)
    # On one and the same draw, what the stricter stage flags the other one does too.
    assert not any(strict and not lenient for lenient, strict in zip(*flags, strict=True))


@pytest.fixture
def noise(script: Callable[[str], ModuleType], tmp_path: Path) -> Any:
    """One seed's noise with judges that do not err, and half of the rows noisy."""
    folder = write_collection(tmp_path / "topics", has_train=False)
    collection = script("planted_data").load_collection(folder)
    file = tmp_path / "topics-untrained-32.json"
    file.write_text(json.dumps(ranking(collection)), "utf-8")
    args = script("planted_noise").parsed(
        [
            *(str(folder), "--quick", "--noisy-share", "0.5"),
            *("--misses", "0", "0", "--false-flags", "0", "0"),
        ]
    )
    assert isinstance(args, argparse.Namespace)
    return script("planted_noise").Noise(collection, 0, tmp_path, args)


def test_arms_differ_in_what_becomes_of_the_hidden_alone(noise: Any) -> None:
    default, _ = noise.rows("default")
    dropped, found = noise.rows("HN remove")
    promoted, _ = noise.rows("RLHN")
    removed, _ = noise.rows("remove")
    noisy = {row["query_id"] for row in default if hidden_in(row, noise.planted)}

    assert 0 < len(noisy) < len(default)
    assert found["found"] == found["hidden"] == len(noise.planted.key)
    assert found["false_flags"] == 0
    for row, hn, rlhn in zip(default, dropped, promoted, strict=True):
        hidden = hidden_in(row, noise.planted)
        kept = [text for text in texts(row["negative_passages"]) if text not in hidden]
        assert texts(hn["negative_passages"]) == texts(rlhn["negative_passages"]) == kept
        assert hn["positive_passages"] == row["positive_passages"]
        assert texts(rlhn["positive_passages"]) == texts(row["positive_passages"]) + hidden
    assert [row for row in default if row["query_id"] not in noisy] == list(removed)


def test_training_goes_round_positives_and_negatives(
    script: Callable[[str], ModuleType], noise: Any
) -> None:
    training = script("planted_training")
    how = training.Training(
        model=None, epochs=4, learning_rate=1e-5, batch_size=4, n_negatives=2, max_seq_length=32,
        cross_steps=1, cross_learning_rate=1e-5, cross_max_length=32, bf16=False, device="cpu",
    )  # fmt: skip
    rows, _ = noise.rows("RLHN")

    tuples = training.rotated(rows, how, seed=0)

    assert len(tuples) == 4 * len(rows)
    for row in rows:
        shown = [each for each in tuples if each["anchor"] == row["query"]]
        assert {each["positive"] for each in shown} == set(texts(row["positive_passages"]))
        negatives = {each[name] for each in shown for name in ("negative_1", "negative_2")}
        assert negatives == set(texts(row["negative_passages"]))


def test_one_command_gives_the_tables_and_goes_on_where_it_was(
    tmp_path: Path, subprocess_env: Callable[..., dict[str, str]]
) -> None:
    folder = write_collection(tmp_path / "topics", has_train=False)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, str(SCRIPTS / "planted_noise.py"), str(folder), "--quick"),
                *("--output", "out", "--threads", "1", "--precision", "fp32"),
            ],
            cwd=tmp_path, env=subprocess_env(OMP_NUM_THREADS="1"), capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip

    first = run()
    assert first.returncode == 0, first.stderr
    assert "[9/9] topics, seed 0, PercPos by cosine" in first.stdout
    arms = ("not trained", "never noisy", "default", "remove", "HN remove", "RLHN")
    for arm in (*arms, "TopK-PercPos", "screened", "PercPos by cosine"):
        assert f"\n| {arm} | " in first.stdout

    again = run()
    assert again.stdout == first.stdout[first.stdout.index("\n**topics**") :]


def test_results_of_other_settings_are_not_mixed_in(noise: Any, tmp_path: Path) -> None:
    module = sys.modules["planted_noise"]
    job = module.Job(collection=noise.collection, seed=0, arm="default")
    module.Store(tmp_path, {"epochs": 2}).save(job, {"seed": 0})

    assert module.Store(tmp_path, {"epochs": 2}).load(job)["seed"] == 0
    with pytest.raises(SystemExit, match=r"epochs.*another --output"):
        module.Store(tmp_path, {"epochs": 3}).load(job)
