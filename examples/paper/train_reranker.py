"""Train a reranker on the rows of a retriever: Qwen2.5-3B as in the RLHN paper, or ModernBERT.

    python examples/paper/train_reranker.py --recipe modernbert --smoke
    torchrun --nproc-per-node 2 examples/paper/train_reranker.py --recipe qwen2.5-3b --data ROWS

A softmax over one positive and seven hard negatives of each row, other ones in every epoch; logits
are cached, so that a batch need not fit the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from common import (
    ResumesAdapters,
    finish,
    load_rows,
    model_settings,
    parse,
    run,
    settings,
    start,
    with_adapters,
)
from hf_relabel.callbacks import RotationCallback, rotate
from recipes import RERANKERS, Recipe
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import CachedMultipleNegativesRankingLoss
from torch import nn

# A decoder has no token between the texts of a pair. The score is read at the last token, which
# must not be the one that pads: <|im_end|> stands there, and stays when a passage is cut.
_TEXT = "messages | selectattr('role', 'eq', '{}') | map(attribute='content') | first"
PAIR = (
    "query: {{ " + _TEXT.format("query") + " }}\n"
    "document: {{ " + _TEXT.format("document") + " }}<|im_end|>"
)


def build_model(args: argparse.Namespace, recipe: Recipe) -> CrossEncoder:
    """Load the backbone with one score on top."""
    transformer = Transformer(
        recipe.model,
        transformer_task="sequence-classification",
        max_seq_length=recipe.max_length,
        model_kwargs=model_settings(args, recipe),
        config_kwargs={"num_labels": 1},
        processor_kwargs={"chat_template": PAIR} if recipe.is_decoder else {},
    )
    if recipe.is_decoder:
        transformer.model.config.pad_token_id = transformer.tokenizer.pad_token_id
    if recipe.is_decoder:
        transformer.model = with_adapters(transformer.model, task="SEQ_CLS", train_too=["score"])
    return CrossEncoder(modules=[transformer], device="cpu" if args.smoke else None)


class RowSoftmax(CachedMultipleNegativesRankingLoss):
    """Cross-entropy over each row's own passages, without those of other rows.

    `ListNetLoss` is not that: its target is a softmax too, which leaves a label of 1 among seven of 0
    no more than 0.28 of the probability.
    """

    def get_in_batch_negatives(
        self,
        anchors: list[str],  # noqa: ARG002
        candidates: list[list[str]],  # noqa: ARG002
    ) -> Iterator[list[str]]:
        return iter(())


class Trainer(ResumesAdapters, CrossEncoderTrainer):
    """The trainer of sentence-transformers, with adapters."""


def main() -> None:
    """Train, and save."""
    args, recipe = parse(__doc__, RERANKERS)
    training = CrossEncoderTrainingArguments(**settings(args, recipe))
    train = rotate(load_rows(args), n_negatives=recipe.n_negatives, seed=args.seed)
    model = build_model(args, recipe)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        loss=RowSoftmax(
            model, scale=1.0, activation_fn=nn.Identity(), mini_batch_size=recipe.mini_batch
        ),
        callbacks=[RotationCallback(train)],
    )
    run(trainer, args)
    finish(trainer, args, recipe, then="--benchmark beir --first-stage runs/e5-base-default/final")


if __name__ == "__main__":
    start(main)
