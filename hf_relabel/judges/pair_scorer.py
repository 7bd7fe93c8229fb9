"""PairScorer: a cross-encoder that says how well a passage answers a query, as one number a pair.

The number is the model's logit: any real number, higher is more relevant. `probability` brings it
into (0, 1), where shares of a score make sense. torch and sentence-transformers load with the first
pair.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.judges.local_models import (
    digest_of_folder,
    digest_of_weights,
    no_progress_bar,
    require_local,
)

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

__all__ = ["PairScorer", "probability"]

_DECIMALS = 3
_DTYPES = ("float32", "float16", "bfloat16")


def probability(logit: float) -> float:
    """Return the sigmoid of a logit: a probability where binary cross-entropy trained the model."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    odds = math.exp(logit)  # the other form overflows far below zero
    return odds / (1 + odds)


class PairScorer:
    """Score (query, passage) pairs with a cross-encoder.

    Args:
        model: A model's name on the Hub, its folder, or a loaded CrossEncoder, which must not be
            trained on afterward and cannot be pickled. It has one output; a model without a trained
            head is refused, for a fresh one says nothing.
        batch_size: The most pairs that the model gets at once.
        max_length: The most tokens of a pair, longer ones are cut; None is the model's own.
        device: Where the model runs, as torch names it; None lets sentence-transformers choose.
        dtype: "float16" or "bfloat16" for speed on a GPU, "float32"; None is the checkpoint's own.

    Raises:
        SettingError: A setting has a value that cannot work.
        MissingExtraError: sentence-transformers is missing.
    """

    def __init__(
        self,
        model: str | CrossEncoder,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        _check(model, batch_size, max_length, dtype)
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self._source = model
        self._loaded = None if isinstance(model, str) else model
        self._lock = threading.Lock()
        if self._loaded is None:
            require_local("sentence_transformers", "A cross-encoder")
        elif (max_length, device, dtype) != (None, None, None):
            raise SettingError(
                "expected max_length, device and dtype with a model's name or folder only, found "
                "one with a loaded CrossEncoder. Set it there."
            )

    @property
    def model(self) -> str:
        """The model's name: the last part of a path, so that no machine's folders show."""
        if not isinstance(self._source, str):
            return type(self._source).__name__
        return Path(self._source).name if Path(self._source).is_dir() else self._source

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's files (of a Hub model: its name) and of what changes its scores."""
        if not isinstance(self._source, str):
            source = f"{digest_of_weights(self._source)}:{self._source.default_prompt_name}"
        elif Path(self._source).is_dir():
            source = digest_of_folder(Path(self._source))
        else:
            source = self._source
        # 1 is the version of `logits`: raise it when the same pair gets another number.
        parts = ["PairScorer", 1, source, self.max_length, self.dtype]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def logits(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score pairs of query and passage, each distinct pair once, long pairs first.

        Args:
            pairs: Any number; those of many rows in one call waste the least on padding.

        Returns:
            One logit for each pair, in order, rounded to three decimals: what else is in a batch
            moves a logit in full precision by about 1e-6. NaN where the model gave none.

        Raises:
            SettingError: The model cannot be loaded, or has not one trained output.
        """
        if not pairs:
            return []
        distinct = list(dict.fromkeys(pairs))
        # Threads that share a tokenizer can fail ("Already borrowed"); loading twice is slow.
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            _expect_one_output(self._loaded, self.model)
            found = _predict(self._loaded, distinct, self.batch_size)
        by_pair = dict(zip(distinct, found, strict=True))
        return [by_pair[pair] for pair in pairs]

    def _load(self) -> CrossEncoder:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise MissingExtraError.of(
                error.name or "sentence_transformers", "local", "A cross-encoder"
            ) from error
        with no_progress_bar():
            try:
                loaded: CrossEncoder = CrossEncoder(
                    self._source,
                    device=self.device,
                    max_length=self.max_length,
                    model_kwargs={"dtype": self.dtype} if self.dtype else None,
                )
            except (OSError, ValueError) as error:
                raise SettingError(
                    f"expected a cross-encoder that sentence-transformers can load, found "
                    f"{self._source!r}: {error}"
                ) from error
        _expect_trained_head(loaded, self.model)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._source, str):
            raise SettingError(
                "expected a cross-encoder given by name or folder, found a loaded CrossEncoder, "
                "which would have to be pickled whole. Save it with model.save_pretrained(folder) "
                "and give the folder."
            )
        return {
            "model": self._source,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "device": self.device,
            "dtype": self.dtype,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        PairScorer.__init__(self, **state)


def _predict(model: CrossEncoder, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
    from torch import nn

    found = model.predict(
        list(pairs),
        batch_size=batch_size,
        show_progress_bar=False,
        # Models differ in whether a sigmoid is on top; a logit is the same for all of them.
        activation_fn=nn.Identity(),
    )
    return [round(float(score), _DECIMALS) for score in found]


def _expect_one_output(model: CrossEncoder, name: str) -> None:
    if model.num_labels != 1:
        raise SettingError(
            f"expected a cross-encoder with one output, a reranker, found {name!r} with "
            f"{model.num_labels}. Take a model that was trained to rerank."
        )


def _expect_trained_head(model: CrossEncoder, name: str) -> None:
    """Refuse a checkpoint without a head: the one that transformers adds scores at random."""
    architectures = getattr(model.config, "architectures", None) or []
    is_bare = len(model) == 1 and not any(
        architecture.endswith("ForSequenceClassification") for architecture in architectures
    )
    if is_bare:
        raise SettingError(
            f"expected a trained cross-encoder, found {name!r} of {architectures}, whose head would "
            "be random. Train one on it (examples/train_cross_encoder.py), or take a reranker."
        )


def _check(model: object, batch_size: int, max_length: int | None, dtype: str | None) -> None:
    if not (isinstance(model, str) or hasattr(model, "predict")):
        raise SettingError(
            f"expected model to be a name, a folder or a CrossEncoder, found "
            f"{type(model).__name__}. Pass a folder as a string."
        )
    if model == "":
        raise SettingError("expected model to be a name or a folder, found ''.")
    for name, number in (("batch_size", batch_size), ("max_length", max_length)):
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if not is_count and (number is not None or name == "batch_size"):
            raise SettingError(f"expected {name} to be an integer from 1, found {number!r}.")
    if dtype is not None and dtype not in _DTYPES:
        raise SettingError(f"expected dtype to be one of {list(_DTYPES)}, found {dtype!r}.")
