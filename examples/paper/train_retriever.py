"""Train a retriever as the RLHN paper did: E5-base or Qwen2.5-7B.

    python examples/paper/train_retriever.py --recipe e5-base --smoke
    torchrun --nproc-per-node 4 examples/paper/train_retriever.py --recipe e5-base --data ROWS
    torchrun --nproc-per-node 2 examples/paper/train_retriever.py --recipe qwen2.5-7b --data ROWS

InfoNCE at temperature 0.01 over one positive, seven hard negatives and the batch, with another
positive of each row and other negatives in every epoch. Embeddings are cached, so that a batch need
not fit the device. ROWS is a file, a folder or a Hub id, and --resume goes on after a break.
"""

from __future__ import annotations

import argparse

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
from datasets import Dataset
from hf_relabel.callbacks import RotationCallback, rotate
from recipes import RETRIEVERS, Recipe
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from tokenizers.processors import TemplateProcessing

PROMPTS = {"query": "query: ", "document": "passage: "}
_SCALE = 100.0  # 1 / temperature
# Said, for a tokenizer with a chat template would have every text rendered as a chat.
_TEXT_ALONE = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def build_model(args: argparse.Namespace, recipe: Recipe) -> SentenceTransformer:
    """Load the backbone, with the pooling of its kind on top."""
    transformer = Transformer(
        recipe.model,
        max_seq_length=recipe.max_length,
        model_kwargs=model_settings(args, recipe),
        modality_config=_TEXT_ALONE,
        module_output_name="token_embeddings",
    )
    if recipe.is_decoder:
        _end_texts(transformer.tokenizer)
    elif (unused := getattr(transformer.model, "pooler", None)) is not None:
        unused.requires_grad_(False)  # BERT brings it along; DDP waits for its gradients in vain
    pooling = Pooling(
        transformer.get_embedding_dimension(), "lasttoken" if recipe.is_decoder else "mean"
    )
    if recipe.is_decoder:
        transformer.model = with_adapters(transformer.model, task="FEATURE_EXTRACTION")
    return SentenceTransformer(
        modules=[transformer, pooling, Normalize()],
        prompts=PROMPTS,
        device="cpu" if args.smoke else None,
    )


def _end_texts(tokenizer: object) -> None:
    """Have the tokenizer end every text with EOS, cut or not: its embedding is the text's."""
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}",
        pair=f"$A $B {eos}",
        special_tokens=[(eos, tokenizer.eos_token_id)],
    )


def prompts_of(train: Dataset) -> dict[str, str]:
    """Return each column's prompt."""
    query, *passages = train.column_names
    return {query: PROMPTS["query"], **dict.fromkeys(passages, PROMPTS["document"])}


class Trainer(ResumesAdapters, SentenceTransformerTrainer):
    """The trainer of sentence-transformers, with adapters."""


def main() -> None:
    """Train, and save."""
    args, recipe = parse(__doc__, RETRIEVERS)
    training = SentenceTransformerTrainingArguments(**settings(args, recipe))
    train = rotate(load_rows(args), n_negatives=recipe.n_negatives, seed=args.seed)
    training.prompts = prompts_of(train)
    model = build_model(args, recipe)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        loss=CachedMultipleNegativesRankingLoss(
            model,
            scale=_SCALE,
            gather_across_devices=args.gather,
            mini_batch_size=recipe.mini_batch,
        ),
        callbacks=[RotationCallback(train)],
    )
    run(trainer, args)
    finish(trainer, args, recipe, then="--benchmark beir")


if __name__ == "__main__":
    start(main)
