"""Estimates: calls, tokens and cost of a run, before any call is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hf_relabel.cascade import Cascade, Stage
from hf_relabel.errors import JudgeError
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.money import LOCAL, Prices
from hf_relabel.judges.protocol import Judge, LocalJudge
from hf_relabel.questions import Question
from hf_relabel.transform import Relabeler
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Estimate", "StageEstimate", "estimate"]

_CHARS_PER_TOKEN = 4.4
"""English prose in the paper's fixture: papers' prompts and replies, counted by gpt-4o's table."""
_REPLY_TOKENS = 1300
"""Mean length of the recorded gpt-4o-mini and gpt-4o replies to rows of 15 to 25 passages."""
_PASSED_ON = 0.66
"""Share of rows that gpt-4o-mini passed on: Thakur et al. (2025), arXiv:2505.16967, table 1."""
_MIN_MEASURED = 20
"""Fewer calls, or rows, of earlier runs are no better guide than the paper."""
_MAX_MEASURED = 20_000


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
        passages: Passages that it is asked about, over the whole dataset.
        cost_usd: What the calls will cost; None where the price is unknown.
        price_source: Where the price comes from, and its date; "local" for a judge without one.
    """

    name: str
    model: str
    calls: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    share_of_rows: float = 1.0
    passages: int = 0
    cost_usd: float | None = None
    price_source: str | None = None


@dataclass(slots=True, kw_only=True)
class Estimate:
    """Calls, tokens and cost of a run, scaled up from a sample.

    Attributes:
        n_rows: Rows of the dataset.
        n_sampled: Rows that were looked at.
        share_known: Share of the sampled rows whose verdicts are in the cache: they cost nothing.
        stages: One estimate for each stage.
        assumptions: What was assumed or measured, in words.
    """

    n_rows: int
    n_sampled: int
    share_known: float
    stages: list[StageEstimate]
    assumptions: list[str] = field(default_factory=list)

    @property
    def cost_usd(self) -> float | None:
        """What the run will cost; None where a stage's price is unknown."""
        costs = [stage.cost_usd for stage in self.stages]
        return None if None in costs else sum(cost or 0.0 for cost in costs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    relabeler: Relabeler,
    splits: Mapping[str, Dataset],
    *,
    sample_rows: int = 200,
    ask_screen: bool = False,
    n_controls: int = 0,
) -> Estimate:
    """Estimate what judging a dataset takes; no call is made.

    Replies are taken to be as long as those of the same judges in the cache, and as many rows to be
    passed on, where the cache holds some; else as in the paper.

    Args:
        relabeler: Whose cascade is asked; its cache tells what is known already.
        splits: Split name → rows.
        sample_rows: Rows to look at, spread evenly over every split.
        ask_screen: Whether judges of this process that stand first, such as a cross-encoder, are
            asked about the sample, so that what they settle is known and not assumed.
        n_controls: Passages of each kind that are planted to test the judges.
    """
    n_rows = sum(len(part) for part in splits.values())
    sampled = [part.select(_spread(len(part), sample_rows)) for part in splits.values()]
    n_sampled = sum(len(part) for part in sampled)
    rows = [row for part in sampled for row in relabeler.rows(part)]
    asked = [(row, question) for row in rows if (question := relabeler.question(row)) is not None]
    unknown = [question for row, question in asked if relabeler.known(row) is None]
    scale = n_rows / n_sampled if n_sampled else 0.0
    measured = _measure(relabeler)
    flow, stages = _Flow(questions=unknown), []
    assumptions = [f"{_CHARS_PER_TOKEN} characters a token"]
    for index, stage in enumerate(relabeler.cascade.stages):
        if index:
            asks = ask_screen and _is_screen(relabeler.cascade, index)
            pass_on = _asked if asks else measured.passed_on
            flow, words = pass_on(flow, index, relabeler.cascade)
            assumptions.append(words)
        found = _stage(stage, flow, scale, len(unknown))
        _add_controls(found, stage.judge, [question for _, question in asked], n_controls)
        if found.prompt_tokens is not None:
            tokens, words = measured.reply_tokens(stage.judge)
            found.completion_tokens = round(found.calls * tokens)
            _add_cost(found, relabeler.prices)
            assumptions.append(words)
        stages.append(found)
    if n_controls:
        assumptions.append(f"{2 * n_controls:,} questions with a planted passage reach every stage")
    return Estimate(
        n_rows=n_rows,
        n_sampled=n_sampled,
        share_known=1 - len(unknown) / len(asked) if asked else 0.0,
        stages=stages,
        assumptions=list(dict.fromkeys(assumptions)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flow:
    """What of the sample reaches a stage.

    Attributes:
        questions: What is known to reach it, or to have been there before a share was taken.
        rows: Which share of these questions does.
        passages: Which share of their passages does.
    """

    questions: Sequence[Question]
    rows: float = 1.0
    passages: float = 1.0


def _is_screen(cascade: Cascade, index: int) -> bool:
    """Whether all stages before this one judge in this process."""
    return all(isinstance(stage.judge, LocalJudge) for stage in cascade.stages[:index])


def _has_local(cascade: Cascade, index: int) -> bool:
    return any(isinstance(stage.judge, LocalJudge) for stage in cascade.stages[:index])


def _asked(flow: _Flow, index: int, cascade: Cascade) -> tuple[_Flow, str]:
    """Ask a judge of this process about the sample, and return what it passes on."""
    judge = cascade.stages[index - 1].judge
    assert isinstance(judge, LocalJudge)  # noqa: S101  as `_is_screen` found
    left = [cascade.passed_on(question, _answers(judge, question)) for question in flow.questions]
    questions = [question for question in left if question.passages]
    before, after = (sum(len(q.passages) for q in each) for each in (flow.questions, questions))
    words = (
        f"{after:,} of the sample's {before:,} passages, in {len(questions):,} of its "
        f"{len(flow.questions):,} rows, passed on by {judge.name}, which was asked"
    )
    return _Flow(questions=questions), words


def _answers(judge: LocalJudge, question: Question) -> list[Verdict]:
    try:
        parts = [judge.judge(part) for part in question.split(judge.max_passages)]
    except JudgeError as error:
        undecided = Verdict(relevance=Relevance.UNDECIDED, judge=judge.name, reason=error.reason)
        return [undecided] * len(question.passages)
    return [verdict for part in parts for verdict in part]


def _stage(stage: Stage, flow: _Flow, scale: float, n_sampled: int) -> StageEstimate:
    judge, questions = stage.judge, flow.questions
    parts = [part for question in questions for part in question.split(judge.max_passages)]
    share_asked = len(questions) / n_sampled if n_sampled else 0.0
    result = StageEstimate(
        name=stage.title, model=judge.model, share_of_rows=share_asked * flow.rows
    )
    n_passages = sum(len(question.passages) for question in questions)
    result.passages = round(n_passages * scale * flow.passages)
    # A row with few passages left still takes a call.
    result.calls = round(max(len(questions) * flow.rows, len(parts) * flow.passages) * scale)
    if isinstance(judge, ChatJudge):
        shown = sum(len(passage) for part in parts for passage in part.passages)
        around = sum(_prompt_chars(judge, part) for part in parts) - shown
        chars = around * flow.rows + shown * flow.passages
        result.prompt_tokens = round(chars / _CHARS_PER_TOKEN * scale)
    elif isinstance(judge, LocalJudge):
        result.cost_usd, result.price_source = 0.0, LOCAL
    return result


def _add_controls(
    stage: StageEstimate, judge: Judge, questions: Sequence[Question], n_controls: int
) -> None:
    """Add the questions of both kinds of planted passages, each one call about as many passages."""
    firsts = [question.split(judge.max_passages)[0] for question in questions]
    if not firsts or not n_controls:
        return
    stage.calls += 2 * n_controls
    if isinstance(judge, ChatJudge) and stage.prompt_tokens is not None:
        mean_chars = sum(_prompt_chars(judge, first) for first in firsts) / len(firsts)
        stage.prompt_tokens += round(2 * n_controls * mean_chars / _CHARS_PER_TOKEN)


def _add_cost(stage: StageEstimate, prices: Prices) -> None:
    price = prices.price_of(stage.model)
    if price is None:
        return
    # The price of a call of the mean length: long prompts can have a price of their own.
    n_calls = max(1, stage.calls)
    mean = {
        "prompt_tokens": round((stage.prompt_tokens or 0) / n_calls),
        "completion_tokens": round((stage.completion_tokens or 0) / n_calls),
    }
    stage.cost_usd = stage.calls * (price.cost_usd(mean) or 0.0)
    stage.price_source = price.origin


@dataclass(slots=True)
class _Measured:
    """What the cache tells of earlier runs.

    Attributes:
        reply_lengths: Judge's name → completion tokens of its replies.
        n_asked: For each stage, how many queries the one before it was asked, by the same judges.
        n_passed_on: How many of them got to the stage.
        passages_asked: As n_asked, of passages.
        passages_passed_on: As n_passed_on, of passages.
    """

    reply_lengths: dict[str, list[int]]
    n_asked: list[int]
    n_passed_on: list[int]
    passages_asked: list[int]
    passages_passed_on: list[int]

    def reply_tokens(self, judge: Judge) -> tuple[float, str]:
        """Return the mean length of a judge's replies, and where that comes from."""
        lengths = self.reply_lengths.get(judge.name, [])
        if len(lengths) < _MIN_MEASURED:
            return _REPLY_TOKENS, f"{_REPLY_TOKENS:,} tokens a reply"
        mean = sum(lengths) / len(lengths)
        words = f"{mean:,.0f} tokens a reply of {judge.name}, as {len(lengths):,} in the cache"
        return mean, words

    def passed_on(self, flow: _Flow, index: int, cascade: Cascade) -> tuple[_Flow, str]:
        """Return what a stage gets from the one before it, and where that comes from."""
        n_asked, before = self.n_asked[index], cascade.stages[index - 1]
        if n_asked < _MIN_MEASURED:
            if isinstance(before.judge, LocalJudge):
                words = (
                    f"all passages passed on by {before.title}: what it settles is not known yet "
                    "(ask it with --ask-screen)"
                )
                return flow, words
            words = f"{_PASSED_ON:.0%} of rows passed on by each stage (arXiv:2505.16967, table 1)"
            return _shared(flow, _PASSED_ON, _PASSED_ON), words
        rows = self.n_passed_on[index] / n_asked
        if cascade.escalate == "row":
            words = f"{rows:.0%} of rows passed on, as of {n_asked:,} in the cache"
            return _shared(flow, rows, rows), words
        passages = self.passages_passed_on[index] / self.passages_asked[index]
        words = (
            f"{rows:.0%} of rows and {passages:.0%} of passages passed on by {before.title}, as of "
            f"{n_asked:,} rows in the cache"
        )
        return _shared(flow, rows, passages), words


def _shared(flow: _Flow, rows: float, passages: float) -> _Flow:
    return replace(flow, rows=flow.rows * rows, passages=flow.passages * passages)


def _measure(relabeler: Relabeler) -> _Measured:
    """Look at a part of the cache: its keys are hashes, so their first ones are a random sample."""
    cache, cascade = relabeler.cache, relabeler.cascade
    names = cascade.judge_names
    lengths: dict[str, list[int]] = {}
    for call in islice(cache.calls(), _MAX_MEASURED):
        tokens = call.reply.usage.get("completion_tokens")
        if isinstance(tokens, int) and call.judge in names:
            lengths.setdefault(call.judge, []).append(tokens)
    asked, passed_on, passages, suspects = ([0] * len(names) for _ in range(4))
    for pairs in islice(cache.pairs(), _MAX_MEASURED):
        n_stages = max((len(trace) for trace in pairs.traces.values()), default=0)
        for index in range(1, min(len(names), len(pairs.judges), n_stages + 1)):
            # Pairs of another cascade count as far as its judges are the same; a screen's name does
            # not tell its threshold.
            is_same = pairs.cascade == cascade.fingerprint or not _has_local(cascade, index)
            if is_same and pairs.judges[:index] == names[:index]:
                asked[index] += 1
                passed_on[index] += n_stages > index
                traces = pairs.traces.values()
                passages[index] += sum(len(trace) >= index for trace in traces)
                suspects[index] += sum(len(trace) > index for trace in traces)
    return _Measured(
        reply_lengths=lengths,
        n_asked=asked,
        n_passed_on=passed_on,
        passages_asked=passages,
        passages_passed_on=suspects,
    )


def _prompt_chars(judge: ChatJudge, question: Question) -> int:
    return sum(len(message["content"]) for message in judge.prompt_for(question).messages(question))


def _spread(length: int, count: int) -> list[int]:
    """Return up to `count` indices, evenly spread: the head of a joined dataset is one source."""
    if length <= count:
        return list(range(length))
    return [index * length // count for index in range(count)]
