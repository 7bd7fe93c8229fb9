"""The settings of the paper's trainings, as a table.

What Thakur et al. (2025, arXiv:2505.16967) and their scripts state is taken as it stands; what they
leave open carries a comment. Tevatron, which they trained with, has the defaults that are named so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["RERANKERS", "RETRIEVERS", "Recipe", "shrunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is trained.

    Attributes:
        model: Where it starts from.
        learning_rate: At its height; linear after a warm-up.
        n_epochs: Times that every row is seen, with another positive and other negatives each time.
        batch_size: Rows on one device at once.
        accumulation: Batches to a step of the optimizer.
        max_length: Tokens of a text (of a pair, for rerankers) while training.
        max_length_used: Tokens that the saved model reads.
        is_decoder: Whether texts are read at their last token, and adapters (LoRA on all linear
            projections) are trained in the place of all weights; they are merged at the end.
        mini_batch: Texts that pass through the model at once. It bounds memory and not the batch:
            what comes out is cached (Gao et al., 2021, arXiv:2101.06983).
        dtype: Of the weights that are loaded.
        warmup: Share of the steps.
        n_negatives: Beside one positive.
    """

    model: str
    learning_rate: float
    n_epochs: float
    batch_size: int
    accumulation: int
    max_length: int
    max_length_used: int
    mini_batch: int
    is_decoder: bool = False
    dtype: str = "float32"
    warmup: float = 0.1  # Tevatron's default
    n_negatives: int = 7


RETRIEVERS = {
    "e5-base": Recipe(
        model="intfloat/e5-base-unsupervised",
        learning_rate=2e-5,
        n_epochs=5,
        batch_size=128,  # on each of 4 GPUs
        accumulation=4,
        max_length=350,
        max_length_used=512,
        mini_batch=64,  # ours, as all of them are
    ),
    "qwen2.5-7b": Recipe(
        model="Qwen/Qwen2.5-7B",
        learning_rate=5e-6,  # of the script; the paper's text has 2e-5
        n_epochs=1,
        batch_size=64,  # on each of 2 GPUs
        accumulation=4,
        max_length=350,  # stated for E5 alone
        max_length_used=512,
        mini_batch=16,
        is_decoder=True,
        dtype="bfloat16",
    ),
}

RERANKERS = {
    # The paper names the model and the first stage, and neither loss, epochs nor batch: rate and
    # epochs are those of the retriever of the same family.
    "qwen2.5-3b": Recipe(
        model="Qwen/Qwen2.5-3B",
        learning_rate=5e-6,
        n_epochs=1,
        batch_size=8,
        accumulation=8,
        max_length=512,
        max_length_used=512,
        mini_batch=16,
        is_decoder=True,
        dtype="bfloat16",
    ),
    # Not in the paper, which tried ModernBERT as a retriever alone.
    "modernbert": Recipe(
        model="answerdotai/ModernBERT-base",
        learning_rate=2e-5,
        n_epochs=1,
        batch_size=16,
        accumulation=4,
        max_length=512,
        max_length_used=512,
        mini_batch=64,
    ),
}

# Random weights learn from few steps at rates that would ruin trained ones; MiniLM's are trained.
# Learning rate and epochs.
_SMOKE = {
    "e5-base": (1e-4, 2),
    "qwen2.5-7b": (3e-3, 3),
    "qwen2.5-3b": (3e-3, 6),
    "modernbert": (5e-3, 4),
}


def shrunk(recipe: Recipe, name: str, model: str) -> Recipe:
    """Return a recipe for a tiny model on a CPU, of the same shape: seconds instead of days."""
    learning_rate, n_epochs = _SMOKE[name]
    return replace(
        recipe,
        model=model,
        learning_rate=learning_rate,
        n_epochs=n_epochs,
        batch_size=6,
        accumulation=1,
        max_length=32,
        max_length_used=64,
        mini_batch=16,
        dtype="float32",
        n_negatives=3,
    )
