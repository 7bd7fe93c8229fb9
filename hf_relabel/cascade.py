"""Cascades: who is asked next, and who has the last word.

Stages run from cheap to strong. Each passes on what it does not settle; the last one asked has the
last word. Replies come from the cache where they are there, and go there when they are bought.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from hf_relabel import background
from hf_relabel.cache import Call, Entry, Failure, Pairs, VerdictCache
from hf_relabel.errors import AccountError, JudgeError, SettingError, UnusableReplyError
from hf_relabel.formats import content_hash
from hf_relabel.judges.money import Prices
from hf_relabel.judges.protocol import Judge, Stoppable, quick_parse
from hf_relabel.prompts import PARSER_VERSION
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance, Trace, Verdict

__all__ = ["Cascade", "Counts", "Escalation", "Stage"]

Escalation = Literal["row", "passage"]
NOT_ASKED = "not asked"
"""The reason of a passage that no judge was asked about yet."""

_CLAIM_POLL_S = 0.2

_Ask = Callable[[Judge, Question], Awaitable[list[Verdict]]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A judge at its place in a cascade.

    Attributes:
        judge: Who is asked.
        name: Shown in reports; the judge's name when empty.
    """

    judge: Judge
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.judge.name


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a cascade did in this process, for progress bars; reports count from the cache."""

    n_calls: int = 0
    n_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    priced_usd: float = 0.0
    n_priced: int = 0
    n_unpriced: int = 0

    @property
    def cost_usd(self) -> float | None:
        """What the calls cost; None while no cost, or not every price, is known."""
        return self.priced_usd if self.n_priced and not self.n_unpriced else None

    def add(
        self, entries: Sequence[Entry], *, model: str = "", prices: Prices | None = None
    ) -> None:
        """Count the calls behind some new records; `prices` None counts no cost."""
        for entry in entries:
            if isinstance(entry, (Call, Failure)):
                self.n_calls += 1
                usage = entry.reply.usage if entry.reply else {}
                self.prompt_tokens += usage.get("prompt_tokens") or 0
                self.completion_tokens += usage.get("completion_tokens") or 0
                if prices is not None and usage:
                    self._add_cost(prices.cost_usd(model, usage))

    def _add_cost(self, cost_usd: float | None) -> None:
        self.n_priced += cost_usd is not None
        self.n_unpriced += cost_usd is None
        self.priced_usd += cost_usd or 0.0

    def since(self, before: Counts) -> Counts:
        """Return what was counted after an earlier copy."""
        values = {name: getattr(self, name) - getattr(before, name) for name in self.__slots__}
        return Counts(**values)


class Cascade:
    """Stages from cheap to strong.

    Args:
        stages: One or more, in the order in which they are asked.
        escalate: What goes to the next stage when a passage is flagged, or no usable reply came:
            "row", all passages again (the paper's way), or "passage", only those, which is cheaper.

    References:
        A cheap screen before a strong judge: Thakur et al. (2025), arXiv:2505.16967.
    """

    def __init__(self, stages: Sequence[Stage], *, escalate: Escalation = "passage") -> None:
        if not stages:
            raise SettingError("expected one stage or more, found none.")
        if escalate not in ("row", "passage"):
            raise SettingError(f"expected escalate to be 'row' or 'passage', found {escalate!r}.")
        self.stages = tuple(stages)
        self.escalate: Escalation = escalate
        self._forget()

    def _forget(self) -> None:
        self.counts = Counts()
        self._prices: Prices | None = None
        self._fingerprint: str | None = None
        self._asked_in_vain: set[str] = set()
        self._turns: dict[str, _Turn] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of all that could change a final verdict: judges, their order, escalation, parser."""
        if self._fingerprint is None:
            judges = [stage.judge.fingerprint for stage in self.stages]
            parts = json.dumps([PARSER_VERSION, self.escalate, judges])
            self._fingerprint = hashlib.sha256(parts.encode()).hexdigest()
        return self._fingerprint

    @property
    def judge_names(self) -> tuple[str, ...]:
        return tuple(stage.judge.name for stage in self.stages)

    def judge(
        self,
        query: str,
        passages: Sequence[str],
        *,
        positives: Sequence[str] = (),
        subset: str | None = None,
        cache: VerdictCache | None = None,
    ) -> list[Verdict]:
        """Judge passages for one query, asking each stage only about what is still open.

        Args:
            query: The search text, as the retriever would see it.
            passages: N distinct texts in any order; N may be 0.
            positives: The texts labeled relevant.
            subset: The dataset's named part; may choose the prompt.
            cache: Where replies are looked up and kept; None keeps none.

        Returns:
            N verdicts aligned with `passages`, each from the last stage that was asked.

        Raises:
            AccountError: The run cannot go on; replies that came are in the cache.
        """
        question = Question(
            query=query, passages=tuple(passages), positives=tuple(positives), subset=subset
        )
        traces = background.run(self.judge_question(question, cache))
        if cache is None:
            return [trace[-1] for trace in traces]
        keys = [content_hash(passage) for passage in question.passages]
        reasons = self.reasons(dict(zip(keys, traces, strict=True)), cache, subset=subset)
        return [
            replace(trace[-1], reason=reasons.get(key))
            for key, trace in zip(keys, traces, strict=True)
        ]

    async def judge_question(self, question: Question, cache: VerdictCache | None) -> list[Trace]:
        """Judge the passages of one row, and keep every reply and final verdict.

        Args:
            question: N distinct passages, any number; long rows are cut into several calls.
            cache: Where replies are looked up and kept; None keeps none.

        Returns:
            N traces aligned with the passages, one verdict for each stage that was asked.

        Raises:
            AccountError: As `judge` does.
        """
        if cache is None:
            return await self._climb(question, _ask_uncached)

        # One row of a query at a time: the next one finds the pairs that this one buys.
        async with self._turn(content_hash(question.query)):
            return await self._judge_open(question, cache, self._asking(cache))

    async def probe(self, question: Question, cache: VerdictCache) -> list[Trace]:
        """Judge passages as `judge_question` does, and keep no final verdict.

        Final verdicts are not looked up either: every passage is asked about. Replies are kept, so
        that the same question is paid for once.

        Args:
            question: As for `judge_question`; its verdicts are about it alone.
            cache: Where replies are looked up and kept.

        Raises:
            AccountError: As `judge` does.
        """
        return await self._climb(question, self._asking(cache))

    def _asking(self, cache: VerdictCache) -> _Ask:
        async def ask(judge: Judge, whole: Question) -> list[Verdict]:
            return await _at_once(lambda part: self._ask(judge, part, cache), judge, whole)

        return ask

    def recall(self, question: Question, cache: VerdictCache) -> list[Trace]:
        """Return what the cache holds of a row, without a call.

        Passages that nobody was asked about come back undecided, with the reason `not asked`.
        """
        known = cache.traces(self.fingerprint, content_hash(question.query))
        keys = [content_hash(passage) for passage in question.passages]
        if all(key in known for key in keys):  # the common case needs no coroutine
            return [known[key] for key in keys]

        async def ask(judge: Judge, whole: Question) -> list[Verdict]:
            parts = whole.split(judge.max_passages)
            return [verdict for part in parts for verdict in _recalled(judge, part, cache)]

        return _run_without_waiting(self._merge_known(question, known, cache, ask))

    def known(
        self, query: str, keys: Sequence[str], cache: VerdictCache
    ) -> dict[str, Trace] | None:
        """Return the final verdicts of passages by `content_hash`, or None if one is missing."""
        if not keys:
            return {}
        traces = cache.traces(self.fingerprint, content_hash(query))
        if any(key not in traces for key in keys):
            return None
        return {key: traces[key] for key in keys}

    def reasons(
        self, traces: Mapping[str, Trace], cache: VerdictCache, *, subset: str | None = None
    ) -> dict[str, str]:
        """Return the last judge's words on each passage, read again from the kept replies.

        Args:
            traces: What each stage said, by `content_hash` of the passage.
            cache: Where the replies are.
            subset: The row's subset, as when it was asked.
        """
        reasons = {key: trace[-1].reason for key, trace in traces.items() if trace[-1].reason}
        asked = {(len(trace) - 1, trace[-1].call) for trace in traces.values()}
        for index, key in asked:
            call = None if key is None else cache.call(key)
            if call is not None:
                judge = self.stages[index].judge
                question = Question(query="", passages=call.passages, subset=subset)
                verdicts = _read(judge, question, call.reply, call.key, has_reasons=True) or []
                pairs = zip(call.passages, verdicts, strict=False)
                # An earlier stage's call shows passages too on which a later one had the last word.
                reasons.update(
                    {
                        passage: verdict.reason
                        for passage, verdict in pairs
                        if verdict.reason and passage in traces and traces[passage][-1].call == key
                    }
                )
        return reasons

    def stop(self) -> None:
        """Send no call that still waits for its turn; those in flight come in."""
        for stage in self.stages:
            if isinstance(stage.judge, Stoppable):
                stage.judge.stop()

    def start_run(self, *, prices: Prices | None = None) -> None:
        """Forget which questions were asked in vain, so that this run asks them again.

        Args:
            prices: What calls cost, for `counts`; None counts no cost.
        """
        self._prices = prices
        self._asked_in_vain.clear()

    def passed_on(self, question: Question, verdicts: Sequence[Verdict]) -> Question:
        """Return what the next stage is asked, given what one said of each passage."""
        pending = self._passed_on(range(len(question.passages)), verdicts)
        return replace(question, passages=tuple(question.passages[index] for index in pending))

    async def _judge_open(self, question: Question, cache: VerdictCache, ask: _Ask) -> list[Trace]:
        query = content_hash(question.query)
        known = cache.traces(self.fingerprint, query)
        traces = await self._merge_known(question, known, cache, ask)
        fresh = {
            key: trace
            for passage, trace in zip(question.passages, traces, strict=True)
            if (key := content_hash(passage)) not in known and trace[-1].relevance.is_decided
        }
        if fresh:
            names = self.judge_names
            pairs = Pairs(cascade=self.fingerprint, query=query, judges=names, traces=fresh)
            await cache.commit([pairs])
            if pairs.late:  # another process was first: its verdict stays, here as well
                stored = cache.traces(self.fingerprint, query)
                keys = [content_hash(passage) for passage in question.passages]
                return [stored.get(key, own) for key, own in zip(keys, traces, strict=True)]
        return traces

    async def _merge_known(
        self, question: Question, known: Mapping[str, Trace], cache: VerdictCache, ask: _Ask
    ) -> list[Trace]:
        keys = [content_hash(passage) for passage in question.passages]
        asked = self._asked_about(question, keys, known, cache)
        fresh = dict(zip(asked.passages, await self._climb(asked, ask), strict=True))
        return [
            known[key] if key in known else fresh[passage]
            for key, passage in zip(keys, question.passages, strict=True)
        ]

    def _asked_about(
        self,
        question: Question,
        keys: Sequence[str],
        known: Mapping[str, Trace],
        cache: VerdictCache,
    ) -> Question:
        """Return the whole row where its replies are there already, else its open passages."""
        is_open = [key not in known for key in keys]
        if all(is_open) or not any(is_open):
            return question if any(is_open) else replace(question, passages=())
        first = self.stages[0].judge
        if all(cache.has_call(first.key(part)) for part in question.split(first.max_passages)):
            return question
        passages = zip(question.passages, is_open, strict=True)
        return replace(question, passages=tuple(text for text, open_ in passages if open_))

    async def _climb(self, question: Question, ask: _Ask) -> list[Trace]:
        traces: list[list[Verdict]] = [[] for _ in question.passages]
        pending = list(range(len(question.passages)))
        for stage in self.stages:
            if not pending:
                break
            passages = tuple(question.passages[index] for index in pending)
            verdicts = await ask(stage.judge, replace(question, passages=passages))
            # strict: a judge that skipped a passage would shift every later verdict by one.
            for index, verdict in zip(pending, verdicts, strict=True):
                traces[index].append(verdict)
            pending = self._passed_on(pending, verdicts)
        return [tuple(trace) for trace in traces]

    def _passed_on(self, asked: Sequence[int], verdicts: Sequence[Verdict]) -> list[int]:
        suspects = [
            index
            for index, verdict in zip(asked, verdicts, strict=True)
            if verdict.relevance is not Relevance.NOT_RELEVANT
        ]
        return list(asked) if suspects and self.escalate == "row" else suspects

    async def _ask(self, judge: Judge, question: Question, cache: VerdictCache) -> list[Verdict]:
        key = judge.key(question)
        call = cache.call(key)
        if call is not None and (verdicts := _read(judge, question, call.reply, key)) is not None:
            self.counts.n_cached += 1
            return verdicts
        if key in self._asked_in_vain:
            return _recalled(judge, question, cache)
        if cache.has_failures and _is_too_long(question, cache.failures(key)):
            return await self._ask_halves(judge, question, cache)
        async with _claimed(cache, key, is_known=call is not None) as is_mine:
            if not is_mine:  # bought by another process while we waited
                return await self._ask(judge, question, cache)
            return await self._buy(judge, question, key, cache, supersedes=call is not None)

    async def _buy(
        self, judge: Judge, question: Question, key: str, cache: VerdictCache, *, supersedes: bool
    ) -> list[Verdict]:
        entries: list[Entry] = []
        try:
            verdicts = await _buy(judge, question, key, entries, supersedes=supersedes)
        finally:  # a run that stops at the repair question has paid for the first reply
            self.counts.add(entries, model=judge.model, prices=self._prices)
            if entries:
                await cache.commit(entries)
        if _is_too_long(question, entries):
            return await self._ask_halves(judge, question, cache)
        if any(not verdict.relevance.is_decided for verdict in verdicts):
            self._asked_in_vain.add(key)
        return verdicts

    async def _ask_halves(
        self, judge: Judge, question: Question, cache: VerdictCache
    ) -> list[Verdict]:
        halves = [await self._ask(judge, half, cache) for half in _halves(question)]
        return [verdict for verdicts in halves for verdict in verdicts]

    def _turn(self, query: str) -> AbstractAsyncContextManager[None]:
        turn = self._turns.get(query)
        if turn is None:
            turn = self._turns[query] = _Turn(self._turns, query)
        return turn

    def __getstate__(self) -> dict[str, Any]:
        return {"stages": self.stages, "escalate": self.escalate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Turn(AbstractAsyncContextManager[None]):
    """A lock on one query that leaves the table when the last one in line is done."""

    def __init__(self, table: dict[str, _Turn], query: str) -> None:
        self._table = table
        self._query = query
        self._lock = asyncio.Lock()
        self._n_in_line = 0

    async def __aenter__(self) -> None:
        self._n_in_line += 1
        await self._lock.acquire()

    async def __aexit__(self, *exc: object) -> None:
        self._lock.release()
        self._n_in_line -= 1
        if not self._n_in_line:
            self._table.pop(self._query, None)


async def _at_once(
    ask_part: Callable[[Question], Awaitable[list[Verdict]]], judge: Judge, question: Question
) -> list[Verdict]:
    """Ask about all passages, in as many calls as the judge needs, all at the same time."""
    parts = question.split(judge.max_passages)
    if len(parts) == 1:
        return await ask_part(parts[0])
    answers = await asyncio.gather(*(ask_part(part) for part in parts))
    return [verdict for verdicts in answers for verdict in verdicts]


async def _ask_uncached(judge: Judge, question: Question) -> list[Verdict]:
    async def buy(part: Question) -> list[Verdict]:
        return await _buy(judge, part, judge.key(part), [], has_reasons=True)

    return await _at_once(buy, judge, question)


async def _buy(
    judge: Judge,
    question: Question,
    key: str,
    entries: list[Entry],
    *,
    supersedes: bool = False,
    has_reasons: bool = False,
) -> list[Verdict]:
    """Ask, and once more with a repair question when the reply cannot be read.

    Args:
        judge: Who is asked.
        question: What.
        key: The call's key.
        entries: Takes what the cache must keep, also when this raises.
        supersedes: Whether a kept reply gives way.
        has_reasons: Whether verdicts bring the judge's words.

    Returns:
        The verdicts, undecided when neither reply held any.
    """
    parse = judge.parse if has_reasons else quick_parse(judge)
    unusable: tuple[Reply, UnusableReplyError] | None = None
    for _ in range(2):
        try:
            reply = await judge.ask(question, unusable=unusable)
            verdicts = _tagged(parse(question, reply), key)
        except AccountError:
            raise
        except JudgeError as error:
            entries.append(_failure(judge, key, error))
            break
        except UnusableReplyError as error:
            entries.append(_failure(judge, key, error, reply))
            unusable = reply, error
        else:
            entries.append(_call(judge, question, key, reply, supersedes=supersedes))
            return verdicts
    return _undecided(judge, question, key, entries)


def _call(judge: Judge, question: Question, key: str, reply: Reply, *, supersedes: bool) -> Call:
    return Call(
        key=key,
        judge=judge.name,
        reply=reply,
        query=content_hash(question.query),
        passages=tuple(content_hash(passage) for passage in question.passages),
        time=time.time(),
        supersedes=supersedes,
    )


def _failure(
    judge: Judge, key: str, error: JudgeError | UnusableReplyError, reply: Reply | None = None
) -> Failure:
    return Failure(
        key=key,
        judge=judge.name,
        reason=error.reason,
        message=str(error),
        time=time.time(),
        reply=reply,
    )


def _read(
    judge: Judge, question: Question, reply: Reply, key: str, *, has_reasons: bool = False
) -> list[Verdict] | None:
    """Read a kept reply; None when today's parser finds no verdict in it, so that it is asked."""
    try:
        parse = judge.parse if has_reasons else quick_parse(judge)
        return _tagged(parse(question, reply), key)
    except UnusableReplyError:
        return None


def _recalled(judge: Judge, question: Question, cache: VerdictCache) -> list[Verdict]:
    key = judge.key(question)
    call = cache.call(key)
    if call is not None and (verdicts := _read(judge, question, call.reply, key)) is not None:
        return verdicts
    failures = cache.failures(key)
    if _is_too_long(question, failures):
        halves = [_recalled(judge, half, cache) for half in _halves(question)]
        return [verdict for verdicts in halves for verdict in verdicts]
    return _undecided(judge, question, key, failures)


def _is_too_long(question: Question, entries: Sequence[Entry]) -> bool:
    """Whether the server found the prompt too long, and fewer passages may still fit."""
    last = entries[-1] if entries else None
    return (
        isinstance(last, Failure) and last.reason == "context_length" and len(question.passages) > 1
    )


def _halves(question: Question) -> list[Question]:
    return question.split((len(question.passages) + 1) // 2)


@asynccontextmanager
async def _claimed(cache: VerdictCache, key: str, *, is_known: bool) -> AsyncIterator[bool]:
    """Hold the right to buy a call; False if another process that is at work bought it meanwhile.

    Args:
        cache: Where claims are kept, once more than one process is at work there.
        key: The call's key.
        is_known: Whether the cache held a reply before, one that can no longer be read.
    """
    if cache.presence.count() > 1:
        if (wait_s := cache.presence.unnoticed_s()) > 0:
            await asyncio.sleep(wait_s)
        while not await asyncio.to_thread(cache.claim, key):
            await asyncio.sleep(_CLAIM_POLL_S)
        # Looked for only now: it may have come, and its claim gone, since the cache was asked.
        if not is_known and cache.has_call(key):
            await asyncio.to_thread(cache.unclaim, key)
            yield False
            return
    cache.buying.add(key)
    try:
        yield True
    finally:
        cache.buying.discard(key)
        if cache.presence.count() > 1:
            await asyncio.to_thread(cache.unclaim, key)


def _undecided(
    judge: Judge, question: Question, key: str, entries: Sequence[Entry]
) -> list[Verdict]:
    failures = [entry for entry in entries if isinstance(entry, Failure)]
    reason = failures[-1].reason if failures else NOT_ASKED
    verdict = Verdict(
        relevance=Relevance.UNDECIDED,
        judge=judge.name,
        reason=reason,
        call=key if failures else None,
    )
    return [verdict] * len(question.passages)


def _tagged(verdicts: Sequence[Verdict], key: str) -> list[Verdict]:
    return [_with_call(verdict, key) for verdict in verdicts]


def _with_call(verdict: Verdict, key: str) -> Verdict:
    if verdict.call is not None:  # a judge that hands out one object for many passages
        return verdict if verdict.call == key else replace(verdict, call=key)
    # Fresh from the parser, as nearly all are: fifteen `replace` a row took a quarter of the time.
    object.__setattr__(verdict, "call", key)
    return verdict


def _run_without_waiting(work: Awaitable[list[Trace]]) -> list[Trace]:
    """Run a coroutine that never waits for anything, in any thread, loop or no loop."""
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as done:
        traces: list[Trace] = done.value
        return traces
    raise AssertionError("reading the cache waited for something")
