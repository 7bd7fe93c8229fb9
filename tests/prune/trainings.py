"""Trainings and evaluations for sweeps; light to import, as every run's process does it.

The real one here is a token table trained by gradient descent in numpy (`train_words`) on word
puzzles: queries and passages of a topic share no word, so that only training brings them together.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

HARM = {"good": 0.05, "fine": 0.03, "bad": -0.08, "worse": -0.2}
N_TOPICS = 40
WORDS_EACH = 6


# Pretended: a model is the number that its score will be ---------------------------------------


def train(data: str, output: str, seed: int) -> None:
    """Write a "model": what its subsets are worth together, and a seed's noise."""
    lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
    found = sorted({line["subset"] for line in lines})
    noise = random.Random(f"{found} {seed}").gauss(0, 0.003)
    worth = 0.5 + sum(HARM[name] for name in found) + noise
    write_model(output, worth)


def write_model(output: str, worth: float) -> None:
    Path(output).mkdir()
    (Path(output) / "model.json").write_text(json.dumps({"worth": worth}))


def evaluate(model: str) -> dict[str, float]:
    worth = json.loads((Path(model) / "model.json").read_text())["worth"]
    return {"easy": worth, "hard": worth / 2}


def _test_folder(path: str) -> Path:
    """Return the folder that holds the sweep's: of TEST/prune/runs/ARM/seed-N/attempt-X/model."""
    return Path(path).parents[5]


def train_but_not_without_bad(data: str, output: str, seed: int) -> None:
    if "without-bad" in output and not (_test_folder(output) / "mended").exists():
        print("the last words of the training")
        raise MemoryError("no room")
    train(data, output, seed)


def count_training(data: str, output: str, seed: int) -> None:
    with (Path(output).parents[2] / "trained").open("a") as file:
        file.write(".")
    train(data, output, seed)


def evaluate_when_mended(model: str) -> dict[str, float]:
    if not (_test_folder(model) / "mended").exists():
        raise OSError("the benchmark is not there")
    return evaluate(model)


def train_to_nan(data: str, output: str, seed: int) -> None:  # noqa: ARG001
    write_model(output, math.nan)


def train_nothing(data: str, output: str, seed: int) -> None:
    """Forget to write the model."""


def kill_own_process(data: str, output: str, seed: int) -> None:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGKILL)


def note_device(data: str, output: str, seed: int) -> None:
    train(data, output, seed)
    (Path(output) / "device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])


# Real: word puzzles ----------------------------------------------------------------------------


def word_rows(master: int, *, poisoned: str = "c", n_rows: int = 480) -> list[dict[str, str]]:
    """Make training rows of four subsets, one of them with positives and negatives swapped."""
    rng = random.Random(master)
    rows = []
    for index in range(n_rows):
        topic, other = rng.sample(range(N_TOPICS), 2)
        positive, negative = (_text(rng, "passage", found) for found in (topic, other))
        subset = "abcd"[index % 4]
        if subset == poisoned:
            positive, negative = negative, positive
        query = _text(rng, "query", topic)
        rows.append({"anchor": query, "positive": positive, "negative": negative, "subset": subset})
    return rows


def _text(rng: random.Random, kind: str, topic: int) -> str:
    chosen = rng.sample(range(WORDS_EACH), 3)
    return " ".join(f"{kind}-{topic}-{word}" for word in chosen)


def train_words(data: str, output: str, seed: int) -> None:
    """Train a table of word vectors with in-batch and hard negatives."""
    import numpy as np

    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    words = sorted(
        {w for r in rows for c in ("anchor", "positive", "negative") for w in r[c].split()}
    )
    place = {word: index for index, word in enumerate(words)}
    columns = {
        name: np.array([[place[word] for word in row[name].split()] for row in rows])
        for name in ("anchor", "positive", "negative")
    }
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 0.3, (len(words), 16))
    for _ in range(20):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), 32):
            _step(
                table, {name: column[order[start : start + 32]] for name, column in columns.items()}
            )
    Path(output).mkdir()
    vectors = {word: table[index].tolist() for word, index in place.items()}
    (Path(output) / "vectors.json").write_text(json.dumps(vectors))


def _step(table: Any, batch: dict[str, Any]) -> None:
    """Descend one step of the cross-entropy over the batch's passages, in place."""
    import numpy as np

    ids = np.concatenate([batch["positive"], batch["negative"]])
    queries, passages = table[batch["anchor"]].mean(1), table[ids].mean(1)
    scores = queries @ passages.T
    slope = np.exp(scores - scores.max(1, keepdims=True))
    slope /= slope.sum(1, keepdims=True)
    slope[np.arange(len(slope)), np.arange(len(slope))] -= 1
    for places, gradient in ((batch["anchor"], slope @ passages), (ids, slope.T @ queries)):
        for column in places.T:
            np.add.at(table, column, -0.05 * gradient)


def slow_train_words(data: str, output: str, seed: int) -> None:
    """Train after a moment in which a test can interrupt."""
    Path(f"{output}-begun").touch()
    time.sleep(0.3)
    train_words(data, output, seed)


def word_ndcg(model: str) -> dict[str, float]:
    """Return nDCG@10 of 80 queries that no training saw, over three passages of each topic."""
    import numpy as np

    vectors = json.loads((Path(model) / "vectors.json").read_text())

    def embed(text: str) -> Any:
        return np.mean([vectors.get(word, [0.0] * 16) for word in text.split()], axis=0)

    rng = random.Random("held out")
    topics = [topic for topic in range(N_TOPICS) for _ in range(3)]
    passages = np.array([embed(_text(rng, "passage", topic)) for topic in topics])
    ideal = sum(1 / math.log2(rank + 2) for rank in range(3))
    values = []
    for topic in [*range(N_TOPICS)] * 2:
        found = np.argsort(-(passages @ embed(_text(rng, "query", topic))), kind="stable")[:10]
        gains = (topics[place] == topic for place in found)
        values.append(sum(g / math.log2(rank + 2) for rank, g in enumerate(gains)) / ideal)
    return {"words": float(np.mean(values))}
