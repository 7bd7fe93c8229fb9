"""CrossEncoderJudge: a reranker as a judge, to which a passage that scores high is relevant.

A cheap screen before a language model, or by itself the score-based filters that retrievers are
trained with. It reads query and passage together, so it sees more than an embedding does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from hf_relabel.errors import JudgeError, SettingError, UnusableReplyError
from hf_relabel.judges.pair_scorer import PairScorer, probability
from hf_relabel.judges.protocol import LocalJudge, question_key
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

__all__ = ["CrossEncoderJudge", "ReferencePositive", "reference_score"]

ReferencePositive = Literal["lowest", "highest"]
"""Which of several positives a passage is compared with."""


def reference_score(scores: Sequence[float], which: ReferencePositive) -> float | None:
    """Return the score of the positive that others are compared with; None without positives."""
    if not scores:
        return None
    return min(scores) if which == "lowest" else max(scores)


class CrossEncoderJudge(LocalJudge):
    """Call a passage relevant when a cross-encoder scores it high, or nearly as high as a positive.

    The score is the sigmoid of the model's logit, which lies in (0, 1) for every model: a share of
    a logit, which can be negative, would mean nothing. A passage is

    - BETTER with a score above `share_of_positive` of the positive's;
    - else WORSE with a score of at least `threshold`;
    - else NOT_RELEVANT, which as the first stage of a cascade is final when passages escalate: no
      later stage sees the passage. With `escalate="row"` one suspect takes the whole row along.

    Where only the positive could tell and the row has none, the passage is undecided.

    Scores are what the cache keeps. Other thresholds are free: the model does not run again.

    Args:
        model: A model's name on the Hub, its folder, or a loaded CrossEncoder, which must not be
            trained on afterward and cannot be pickled. There is no default: no package carries a
            trained cross-encoder. `Alibaba-NLP/gte-reranker-modernbert-base` is a public one.
        threshold: The lowest relevant score, in [0, 1]; None leaves it to the positive alone. 0.5
            is even odds to a model trained with binary cross-entropy, and an arbitrary point to one
            trained to rank. Thresholds do not transfer: `fit_threshold` finds one for your data. A
            screen wants it low, since what it settles is never looked at again.
        share_of_positive: The share of the positive's score, in (0, 1]; None leaves it to the
            threshold alone, and nothing is BETTER. 0.95 is the rule of NV-Retriever.
        reference: Which positive, where a row has several: "lowest" flags more, and is how
            sentence-transformers mines; "highest" asks a negative to outdo the best. Papers have
            one positive.
        name: Shown in verdicts and reports.
        batch_size: The most pairs scored at once, and the most questions in one `judge_many`.
        max_length: The most tokens of a pair, longer ones are cut; None is the model's own.
        device: Where the model runs, as torch names it; None lets sentence-transformers choose.
        dtype: "float16" or "bfloat16" for speed on a GPU, "float32"; None is the checkpoint's own.

    Raises:
        SettingError: A setting has a value that cannot work.
        MissingExtraError: sentence-transformers is missing.

    References:
        TopK-PercPos: Moreira et al. (2024), arXiv:2407.15831. Cross-encoders as judges of false
        negatives: Thakur et al. (2025), arXiv:2505.16967, table 7.
    """

    def __init__(
        self,
        model: str | CrossEncoder,
        *,
        threshold: float | None = 0.5,
        share_of_positive: float | None = 0.95,
        reference: ReferencePositive = "lowest",
        name: str = "cross-encoder",
        batch_size: int = 32,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        scorer = PairScorer(
            model, batch_size=batch_size, max_length=max_length, device=device, dtype=dtype
        )
        self._set(scorer, threshold, share_of_positive, reference, name)

    def _set(
        self,
        scorer: PairScorer,
        threshold: float | None,
        share_of_positive: float | None,
        reference: ReferencePositive,
        name: str,
    ) -> None:
        _check(threshold, share_of_positive, reference, name)
        self.scorer = scorer
        self.threshold = threshold
        self.share_of_positive = share_of_positive
        self.reference: ReferencePositive = reference
        self.name = name
        self.batch_size = scorer.batch_size

    @classmethod
    def perc_pos(
        cls,
        model: str | CrossEncoder,
        *,
        share: float = 0.95,
        reference: ReferencePositive = "lowest",
        **settings: Any,
    ) -> CrossEncoderJudge:
        """Build the judge of TopK-PercPos: false is what scores above a share of the positive.

            Relabeler(CrossEncoderJudge.perc_pos(model), action="drop", max_false_negatives=None)

        Args:
            model: As for the class.
            share: The share of the positive's score.
            reference: Which positive, where a row has several.
            settings: Others of the class: name, batch_size, max_length, device, dtype.

        References:
            Moreira et al. (2024), arXiv:2407.15831, with a share of 0.95.
        """
        return cls(model, threshold=None, share_of_positive=share, reference=reference, **settings)

    @property
    def model(self) -> str:
        return self.scorer.model

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # an attribute of the base, read-only here
        """A hash of the scores' fingerprint and of what makes verdicts of them."""
        # 1 is the version of the rule in `_verdicts`: raise it when the rule changes.
        rule = [self.threshold, self.share_of_positive, self.reference]
        numbers = [float(value) if isinstance(value, int) else value for value in rule]
        parts = ["CrossEncoderJudge", 1, self.scorer.fingerprint, *numbers]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def key(self, question: Question) -> str:
        """Hash what the scores depend on, which is not the threshold."""
        return question_key(self.scorer.fingerprint, question)

    def judge(self, question: Question) -> list[Verdict]:
        (answer,) = self.judge_many([question])
        if isinstance(answer, JudgeError):
            raise answer
        return answer

    def judge_many(self, questions: Sequence[Question]) -> list[list[Verdict] | JudgeError]:
        """Judge several questions, scoring each distinct pair once.

        Returns:
            For every question, one verdict for every passage, in order; or a `JudgeError` where a
            score is no number. `rank` counts the relevant ones by score, highest first.
        """
        return [
            found if isinstance(found, JudgeError) else self._verdicts(found)
            for found in self._scores(questions)
        ]

    def reply_many(self, questions: Sequence[Question]) -> list[str | JudgeError]:
        return [
            found if isinstance(found, JudgeError) else found.to_text()
            for found in self._scores(questions)
        ]

    def parse(self, question: Question, reply: Reply) -> list[Verdict]:
        scores = _Scores.from_text(reply.text)
        if len(scores.passages) != len(question.passages):
            raise UnusableReplyError(
                f"expected {len(question.passages)} scores of judge {self.name!r}, found "
                f"{len(scores.passages)}. The reply belongs to another question.",
                reason="missing_ids",
            )
        return self._verdicts(scores)

    def fit_threshold(
        self,
        questions: Sequence[Question],
        relevant: Sequence[Sequence[bool]],
        *,
        min_recall: float | None = None,
    ) -> CrossEncoderJudge:
        """Return a copy with the threshold that serves a labelled sample best.

        What `share_of_positive` flags is flagged at every threshold, and counted so.

        Args:
            questions: Any number of questions, from the data that the copy will judge.
            relevant: For every question, whether each of its passages is relevant in truth.
            min_recall: The highest threshold that finds this share of the relevant passages, as a
                screen needs; None maximises F1.

        Returns:
            A judge with all other settings alike. Of equally good thresholds, the highest. What it
            reaches on the sample itself flatters: measure the copy on other rows.

        Raises:
            SettingError: The labels do not align with the passages, or none is relevant.
            JudgeError: A score is no number.
        """
        _check_labels(questions, relevant, min_recall)
        labeled = [
            (score, bool(label))
            for scores, labels in zip(self._all_scores(questions), relevant, strict=True)
            for score, label in zip(self._with_share(scores), labels, strict=True)
        ]
        threshold = _fit(labeled, min_recall)
        fitted = CrossEncoderJudge.__new__(CrossEncoderJudge)
        # The same scorer, so that one model stays loaded, under one lock.
        fitted._set(self.scorer, threshold, self.share_of_positive, self.reference, self.name)
        return fitted

    def _all_scores(self, questions: Sequence[Question]) -> list[_Scores]:
        found = self._scores(questions)
        for scores in found:
            if isinstance(scores, JudgeError):
                raise scores
        return [scores for scores in found if not isinstance(scores, JudgeError)]

    def _with_share(self, scores: _Scores) -> list[float]:
        """Return the passages' scores, 1 where the share alone makes them relevant."""
        bar = self._bar(scores)
        return [1.0 if score > bar else score for score in map(probability, scores.passages)]

    def _bar(self, scores: _Scores) -> float:
        """Return the score above which a passage is as good as the positive."""
        positive = reference_score([*map(probability, scores.positives)], self.reference)
        if positive is None or self.share_of_positive is None:
            return math.inf
        return self.share_of_positive * positive

    def _verdicts(self, scores: _Scores) -> list[Verdict]:
        if self.threshold is None and not scores.positives:
            undecided = Verdict(
                relevance=Relevance.UNDECIDED, judge=self.name, reason="no_positive"
            )
            return [undecided] * len(scores.passages)
        bar, found = self._bar(scores), [*map(probability, scores.passages)]
        relevances = [self._relevance(score, bar) for score in found]
        flagged = [index for index, relevance in enumerate(relevances) if relevance.is_relevant]
        flagged.sort(key=lambda index: -found[index])  # stable: ties stay in order
        ranks = {index: rank for rank, index in enumerate(flagged)}
        return [
            Verdict(
                relevance=relevance,
                judge=self.name,
                rank=ranks.get(index),
                confidence=round(score if relevance.is_relevant else 1 - score, 6),
                reason=self._reason(score, bar),
            )
            for index, (score, relevance) in enumerate(zip(found, relevances, strict=True))
        ]

    def _relevance(self, score: float, bar: float) -> Relevance:
        if score > bar:
            return Relevance.BETTER
        is_high = self.threshold is not None and score >= self.threshold
        return Relevance.WORSE if is_high else Relevance.NOT_RELEVANT

    def _reason(self, score: float, bar: float) -> str:
        parts = []
        if bar != math.inf:
            sign = ">" if score > bar else "≤"
            parts.append(f"{sign} {bar:.3g}, {self.share_of_positive:g} of the positive's")
        if self.threshold is not None:
            parts.append(f"{'≥' if score >= self.threshold else '<'} {self.threshold:g}")
        return f"score {score:.3g} {'; '.join(parts)}"

    def _scores(self, questions: Sequence[Question]) -> list[_Scores | JudgeError]:
        asked = [question if question.passages else _NOTHING for question in questions]
        logits = iter(
            self.scorer.logits(
                [
                    (question.query, text)
                    for question in asked
                    for text in (*question.positives, *question.passages)
                ]
            )
        )
        return [
            _checked(
                _Scores(
                    positives=[next(logits) for _ in question.positives],
                    passages=[next(logits) for _ in question.passages],
                ),
                self.name,
            )
            for question in asked
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {
            "scorer": self.scorer.__getstate__(),
            "threshold": self.threshold,
            "share_of_positive": self.share_of_positive,
            "reference": self.reference,
            "name": self.name,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(**{**state, "scorer": PairScorer(**state["scorer"])})


_NOTHING = Question(query="", passages=())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """The logits of a question's positives and passages, aligned with them."""

    positives: Sequence[float]
    passages: Sequence[float]

    def to_text(self) -> str:
        return json.dumps({"positives": self.positives, "passages": self.passages})

    @classmethod
    def from_text(cls, text: str) -> _Scores:
        return cls(**json.loads(text))


def _checked(scores: _Scores, judge: str) -> _Scores | JudgeError:
    # Read as a number, a NaN would be below every threshold: a failure taken for "not relevant".
    if not any(map(math.isnan, (*scores.positives, *scores.passages))):
        return scores
    return JudgeError(
        f"expected a score for every passage, found NaN from the model of judge {judge!r}. "
        "float16 overflows in some models: try dtype='bfloat16' or 'float32'.",
        reason="not_a_number",
    )


def _fit(labeled: Sequence[tuple[float, bool]], min_recall: float | None) -> float:
    """Return the best threshold for scores with labels, at least one of them true."""
    n_relevant = sum(label for _, label in labeled)
    best, threshold, n_found, n_flagged = 0.0, 1.0, 0, 0
    for score, group in groupby(sorted(labeled, reverse=True), key=lambda pair: pair[0]):
        labels = [label for _, label in group]
        n_flagged += len(labels)
        n_found += sum(labels)
        if min_recall is not None and n_found >= min_recall * n_relevant:
            return float(score)
        # Strictly better only: on the way down, the first of equals is the highest.
        if (f1 := 2 * n_found / (n_flagged + n_relevant)) > best:
            best, threshold = f1, score
    return threshold


def _check_labels(
    questions: Sequence[Question], relevant: Sequence[Sequence[bool]], min_recall: float | None
) -> None:
    if [len(labels) for labels in relevant] != [len(each.passages) for each in questions]:
        raise SettingError(
            "expected one label for every passage of every question, found other lengths. "
            "Give `relevant` one sequence per question, aligned with its passages."
        )
    if not any(map(any, relevant)):
        raise SettingError(
            f"expected a passage labeled relevant, found none in {len(questions)} questions. "
            "Label more rows: a threshold cannot be fitted without an example."
        )
    if min_recall is not None and not 0 < min_recall <= 1:
        raise SettingError(f"expected min_recall in (0, 1], found {min_recall!r}.")


def _check(
    threshold: float | None, share_of_positive: float | None, reference: str, name: str
) -> None:
    for setting, value in (("threshold", threshold), ("share_of_positive", share_of_positive)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not is_number:
            raise SettingError(f"expected {setting} to be a number or None, found {value!r}.")
    if threshold is not None and not 0 <= threshold <= 1:  # false for nan too
        raise SettingError(
            f"expected threshold to be a probability, from 0 to 1, found {threshold!r}. A logit's "
            "is 1 / (1 + exp(-logit)); fit_threshold finds one for your data."
        )
    if share_of_positive is not None and not 0 < share_of_positive <= 1:
        raise SettingError(
            f"expected share_of_positive in (0, 1], found {share_of_positive!r}. 0.95 is 95 %."
        )
    if threshold is None and share_of_positive is None:
        raise SettingError(
            "expected threshold or share_of_positive, found neither: nothing would be relevant."
        )
    if reference not in ("lowest", "highest"):
        raise SettingError(f"expected reference 'lowest' or 'highest', found {reference!r}.")
    if not isinstance(name, str) or not name:
        raise SettingError(f"expected name to be a string with at least one sign, found {name!r}.")
