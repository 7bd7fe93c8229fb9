"""Estimates: calls and tokens of a run, before any call is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_relabel.judges.chat import ChatJudge
from hf_relabel.questions import Question
from hf_relabel.transform import Relabeler

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Estimate", "StageEstimate", "estimate"]

_CHARS_PER_TOKEN = 4.4
"""English prose in the paper's fixture: papers' prompts and replies, counted by gpt-4o's table."""
_REPLY_TOKENS = 1300
"""Mean length of the recorded gpt-4o-mini and gpt-4o replies to rows of 15 to 25 passages."""
_PASSED_ON = 0.66
"""Share of rows that gpt-4o-mini passed on: Thakur et al. (2025), arXiv:2505.16967, table 1."""


@dataclass(slots=True, kw_only=True)
class StageEstimate:
    """What one stage will be asked.

    Attributes:
        name: The stage's name.
        model: The judge's model.
        calls: Calls over the whole dataset.
        prompt_tokens: Tokens sent; None for a judge without tokens.
        completion_tokens: Tokens that come back; None likewise.
        share_of_rows: Share of the rows that reach this stage.
    """

    name: str
    model: str
    calls: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    share_of_rows: float = 1.0


@dataclass(slots=True, kw_only=True)
class Estimate:
    """Calls and tokens of a run, scaled up from a sample.

    Attributes:
        n_rows: Rows of the dataset.
        n_sampled: Rows that were looked at.
        share_known: Share of the sampled rows whose verdicts are in the cache: they cost nothing.
        stages: One estimate for each stage.
        assumptions: What was assumed, in words.
    """

    n_rows: int
    n_sampled: int
    share_known: float
    stages: list[StageEstimate]
    assumptions: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    relabeler: Relabeler, splits: Mapping[str, Dataset], *, sample_rows: int = 200
) -> Estimate:
    """Estimate what judging a dataset takes; no call is made.

    Args:
        relabeler: Whose cascade is asked; its cache tells what is known already.
        splits: Split name → rows.
        sample_rows: Rows to look at, spread evenly over every split.
    """
    n_rows = sum(len(part) for part in splits.values())
    sampled = [part.select(_spread(len(part), sample_rows)) for part in splits.values()]
    n_sampled = sum(len(part) for part in sampled)
    rows = [row for part in sampled for row in relabeler.rows(part)]
    asked = [(row, question) for row in rows if (question := relabeler.question(row)) is not None]
    unknown = [question for row, question in asked if relabeler.known(row) is None]
    scale = n_rows / n_sampled if n_sampled else 0.0
    stages = [
        _stage(stage.title, stage.judge, unknown, scale, _PASSED_ON**index)
        for index, stage in enumerate(relabeler.cascade.stages)
    ]
    return Estimate(
        n_rows=n_rows,
        n_sampled=n_sampled,
        share_known=1 - len(unknown) / len(asked) if asked else 0.0,
        stages=stages,
        assumptions=[
            f"{_CHARS_PER_TOKEN} characters a token, {_REPLY_TOKENS} tokens a reply",
            f"{_PASSED_ON:.0%} of rows passed on by each stage (arXiv:2505.16967, table 1)",
        ],
    )


def _stage(
    name: str, judge: Any, questions: Sequence[Question], scale: float, share: float
) -> StageEstimate:
    parts = [part for question in questions for part in question.split(judge.max_passages)]
    result = StageEstimate(name=name, model=judge.model, share_of_rows=share)
    result.calls = round(len(parts) * scale * share)
    if isinstance(judge, ChatJudge):
        chars = sum(_prompt_chars(judge, part) for part in parts)
        result.prompt_tokens = round(chars / _CHARS_PER_TOKEN * scale * share)
        result.completion_tokens = result.calls * _REPLY_TOKENS
    return result


def _prompt_chars(judge: ChatJudge, question: Question) -> int:
    return sum(len(message["content"]) for message in judge.prompt_for(question).messages(question))


def _spread(length: int, count: int) -> list[int]:
    """Return up to `count` indices, evenly spread: the head of a joined dataset is one source."""
    if length <= count:
        return list(range(length))
    return [index * length // count for index in range(count)]
