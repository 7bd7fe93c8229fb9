"""Tiny models, rows with planted false negatives, and trainers, for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge

__all__ = ["N_NEGATIVES", "N_ROWS", "key", "relabeler", "rows_as", "tiny_bert", "trainer_of"]

N_ROWS = 24
N_NEGATIVES = 3


def key() -> dict[tuple[str, str], Relevance]:
    """Return the planted false negatives: the first one of every third row, two in every sixth."""
    found = {}
    for index in range(0, N_ROWS, 3):
        found[_query(index), _negative(index, 1)] = Relevance.BETTER
        if index % 6 == 0:
            found[_query(index), _negative(index, 2)] = Relevance.WORSE
    return found


def _query(index: int) -> str:
    return f"what does plant {index} need"


def _positive(index: int) -> str:
    return f"plant {index} needs light of kind {index}"


def _negative(index: int, slot: int) -> str:
    return f"text {slot} stands beside plant {index}"


def rows_as(shape: str) -> Dataset:
    """Return the rows as "triplet", "n-tuple", "labeled-pair" or "labeled-list"."""
    slots = range(1, N_NEGATIVES + 1)
    rows: list[dict[str, Any]] = []
    for index in range(N_ROWS):
        query, positive = _query(index), _positive(index)
        negatives = [_negative(index, slot) for slot in slots]
        if shape == "triplet":
            rows += [{"anchor": query, "positive": positive, "negative": n} for n in negatives]
        elif shape == "n-tuple":
            named = {f"negative_{slot}": n for slot, n in zip(slots, negatives, strict=True)}
            rows.append({"anchor": query, "positive": positive, **named})
        elif shape == "labeled-pair":
            rows.append({"anchor": query, "document": positive, "label": 1})
            rows += [{"anchor": query, "document": n, "label": 0} for n in negatives]
        else:
            labels = [1] + [0] * N_NEGATIVES
            rows.append({"anchor": query, "documents": [positive, *negatives], "labels": labels})
    return Dataset.from_list(rows)


def relabeler(
    folder: Path, *, judged: bool = True, answers: Any = None, **settings: Any
) -> Relabeler:
    """Return a Relabeler with an answer key, its cache filled or empty."""
    script: Any = key() if answers is None else answers
    judge = ScriptedJudge("scripted", answers=script, default=Relevance.NOT_RELEVANT)
    made = Relabeler(judge, cache=folder / "cache", **settings)
    if judged:
        made.judge(rows_as("n-tuple"))
    return made


def tiny_bert(folder: Path, *, texts: Sequence[str] = ()) -> str:
    """Write a random BERT of one layer that knows the words of some texts; return its folder."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    texts = texts or [text for row in rows_as("n-tuple") for text in row.values()]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    import torch

    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def trainer_of(
    kind: str,
    bert: str,
    rows: Any,
    folder: Path,
    *,
    callbacks: list[Any],
    loss: Any = None,
    eval_rows: Any = None,
    **settings: Any,
) -> Any:
    """Build one of the trainers: "bi", "cross", "sparse" or "multi".

    Args:
        kind: Which.
        bert: The folder of `tiny_bert`.
        rows: What is trained on.
        folder: The output folder.
        callbacks: Given to the trainer; a callable is called with the loss first.
        eval_rows: What is evaluated on, if anything.
        loss: From a model to its loss; None takes the trainer's usual one.
        settings: More training arguments.
    """
    import torch

    torch.manual_seed(0)  # what a checkpoint lacks (a pooler, a head) is drawn at random
    model, trainer, arguments, usual = _KINDS[kind](bert)
    made = (loss or usual)(model)
    args = arguments(
        output_dir=str(folder), report_to="none", use_cpu=True, seed=7, disable_tqdm=True,
        **{"per_device_train_batch_size": 8, "save_strategy": "no", "num_train_epochs": 1} | settings,
    )  # fmt: skip
    ready = [each(made) if isinstance(each, type(lambda: 0)) else each for each in callbacks]
    return trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=eval_rows, loss=made,
        callbacks=ready,
    )  # fmt: skip


def _bi(bert: str) -> tuple[Any, ...]:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )

    model = SentenceTransformer(bert, device="cpu")
    usual = MultipleNegativesRankingLoss
    return model, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, usual


def _cross(bert: str) -> tuple[Any, ...]:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(bert, num_labels=1, device="cpu")
    return model, CrossEncoderTrainer, CrossEncoderTrainingArguments, BinaryCrossEntropyLoss


def _sparse(bert: str) -> tuple[Any, ...]:
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer
    from sentence_transformers.sparse_encoder.losses import (
        SparseMultipleNegativesRankingLoss,
        SpladeLoss,
    )
    from sentence_transformers.sparse_encoder.training_args import SparseEncoderTrainingArguments

    model = SparseEncoder(bert, device="cpu")

    def usual(model: Any) -> Any:
        return SpladeLoss(
            model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=3e-5,
            query_regularizer_weight=5e-5,
        )  # fmt: skip

    return model, SparseEncoderTrainer, SparseEncoderTrainingArguments, usual


def _multi(bert: str) -> tuple[Any, ...]:
    from sentence_transformers.multi_vector_encoder.losses import (
        MultiVectorMultipleNegativesRankingLoss,
    )
    from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.trainer import MultiVectorEncoderTrainer
    from sentence_transformers.multi_vector_encoder.training_args import (
        MultiVectorEncoderTrainingArguments,
    )

    model = MultiVectorEncoder(bert, device="cpu")
    usual = MultiVectorMultipleNegativesRankingLoss
    return model, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, usual


_KINDS = {"bi": _bi, "cross": _cross, "sparse": _sparse, "multi": _multi}
