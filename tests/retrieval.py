"""Small collections to search, and models small enough to search them in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_relabel.benchmark import Benchmark, load_benchmark

__all__ = ["COLLECTIONS", "SHARED", "own", "tiny_cross_encoder", "write_beir"]

SHARED = Path(__file__).resolve().parents[2] / "shared/data"

_PASSAGES = {
    "p01": "Canberra Canberra is the capital of Australia and the seat of its parliament.",
    "p02": "Sydney Sydney is the largest city of Australia, on its east coast.",
    "p03": "Parliament The Australian parliament opened its new house in Canberra in 1988.",
    "p04": "Cats Cats sleep for most of the day and hunt at dusk.",
    "p05": "Dogs Dogs need a walk twice a day and company for most of it.",
    "p06": "Sleep Adults need seven to nine hours of sleep a night.",
    "p07": "Bread Bread rises because yeast turns sugar into carbon dioxide.",
    "p08": "Beer Beer is brewed from malt, hops, water and yeast.",
    "p09": "Yeast Yeast is a fungus of one cell, used for bread, beer and wine.",
    "p10": "Tides The moon's gravity raises the tides twice a day.",
    "p11": "Moon The moon turns once around the earth in about 27 days.",
    "p12": "Eclipse In a solar eclipse the moon stands between sun and earth.",
    "p13": "Copy The moon turns once around the earth in about 27 days.",
}
_QUERIES = {
    "q1": "what is the capital of australia",
    "q2": "when do cats sleep",
    "q3": "what makes bread rise",
    "q4": "why are there tides",
    "q5": "what does yeast do in beer",
    "q6": "who won the cup",
}
_QRELS = {
    "q1": {"p01": 2, "p03": 1, "p02": 0},
    "q2": {"p04": 2, "p06": 1},
    "q3": {"p07": 2, "p09": 1},
    "q4": {"p10": 2, "p11": 1, "p12": 0},
    "q5": {"p08": 2, "p09": 2, "p07": 1},
    "q6": {"p01": 0},
}


def own() -> Benchmark:
    """Return thirteen passages and six queries, of which the last has no answer."""
    return Benchmark(name="own", queries=_QUERIES, corpus=_PASSAGES, qrels=_QRELS)


def cranfield() -> Benchmark:
    """Return the first twelve queries of Cranfield, and the passages that are judged for them."""
    whole = load_benchmark(SHARED / "cranfield")
    qrels = {query_id: whole.qrels[query_id] for query_id in map(str, range(1, 13))}
    judged = {id_ for grades in qrels.values() for id_ in grades if id_ in whole.corpus}
    return Benchmark(
        name="cranfield",
        queries=whole.queries,
        corpus={id_: whole.corpus[id_] for id_ in judged},
        qrels=qrels,
    )


# The real one lies beside the project, where it is at hand; ours runs everywhere.
COLLECTIONS = {"own": own} | ({"cranfield": cranfield} if SHARED.is_dir() else {})


def write_beir(benchmark: Benchmark, folder: Path, split: str = "test") -> Path:
    """Write a benchmark in BEIR's layout, the first word of a passage as its title."""
    (folder / "qrels").mkdir(parents=True)
    corpus = []
    for id_, passage in benchmark.corpus.items():
        title, _, text = passage.partition(" ")
        corpus.append({"_id": id_, "title": title, "text": text})
    queries = [{"_id": id_, "text": text} for id_, text in benchmark.queries.items()]
    (folder / "corpus.jsonl").write_text(_lines(corpus), "utf-8")
    (folder / "queries.jsonl").write_text(_lines(queries), "utf-8")
    rows = ["query-id\tcorpus-id\tscore"] + [
        f"{query_id}\t{id_}\t{grade}"
        for query_id, grades in benchmark.qrels.items()
        for id_, grade in grades.items()
    ]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tiny_cross_encoder(folder: Path, *, n_labels: int = 1) -> str:
    """Write a random BERT of one layer that scores pairs, with the words of `own`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    texts = [*_PASSAGES.values(), *_QUERIES.values()]
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=n_labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)
