"""Relabeled rows train: one real step of the real trainers, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge, convert
from tests.rows import KEY, tevatron_rows

# transformers and torch warn of their own futures while they train; none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def clean(tmp_path: Path) -> Dataset:
    script: Any = {pair: Relevance(name) for pair, name in KEY.items()}
    judge = ScriptedJudge("scripted", answers=script, default=Relevance.NOT_RELEVANT)
    rows = Dataset.from_list(tevatron_rows())
    return rows.map(Relabeler(judge, cache=tmp_path / "cache"), batched=True)


@pytest.fixture
def tiny_bert(tmp_path: Path) -> str:
    """Write a random BERT of one layer with a word tokenizer; return its folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for row in tevatron_rows() for word in row["query"].split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ".", "text", "beside"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_bi_encoder_trains_on_the_n_tuples(
    clean: Dataset, tiny_bert: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )

    rows = convert(clean, to="n-tuple")
    model = SentenceTransformer(tiny_bert, device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=8,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip

    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
    )

    assert len(rows) == 12 + len(KEY)
    assert trainer.train().training_loss > 0


def test_a_cross_encoder_trains_on_the_labeled_lists(
    clean: Dataset, tiny_bert: str, tmp_path: Path
) -> None:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    rows = convert(clean, to="labeled-list")
    model = CrossEncoder(tiny_bert, num_labels=1, device="cpu")
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip

    trainer = CrossEncoderTrainer(
        model=model, args=args, train_dataset=rows, loss=LambdaLoss(model)
    )

    assert sum(map(sum, rows["labels"])) == 12 + len(KEY)
    assert trainer.train().training_loss > 0
