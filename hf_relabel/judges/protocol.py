"""The Judge protocol: anything that can tell whether passages answer a query.

A judge is asked a question and returns a raw reply; reading verdicts from a reply is a step of its
own, so that a reply once paid for can be read again by a better parser. A judge that computes its
verdicts in this process derives from `LocalJudge` and writes one method.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from typing import Any, Protocol, runtime_checkable

from hf_relabel.errors import JudgeError, UnusableReplyError
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Verdict

__all__ = ["Judge", "LocalJudge", "Stoppable", "question_key"]


@runtime_checkable
class Judge(Protocol):
    """What a stage needs of its judge.

    Attributes:
        name: Shown in reports and in every verdict.
        model: The model behind it, or the name again.
        max_passages: The most passages that one call may show; longer rows take several calls.
        fingerprint: A hash of all that could change an answer: model, prompts, decoding.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def max_passages(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def key(self, question: Question) -> str:
        """Return the hash that the cache keeps this call's reply under."""
        ...

    async def ask(
        self, question: Question, *, unusable: tuple[Reply, UnusableReplyError] | None = None
    ) -> Reply:
        """Ask once and return the raw reply.

        Args:
            question: At most `max_passages` passages.
            unusable: The reply that could not be read, and why, when this is the repair question.

        Raises:
            JudgeError: No reply came for this question; the row ends undecided.
            AccountError: None will come for any other either; the run stops.
        """
        ...

    def parse(self, question: Question, reply: Reply) -> list[Verdict]:
        """Read one verdict for every passage of the question, in order.

        Raises:
            UnusableReplyError: A passage has no clear verdict in the reply.
        """
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A judge whose calls wait for a turn, and can be told not to take it."""

    def stop(self) -> None:
        """End the calls that were not sent yet with an `AccountError`; those in flight come in."""
        ...


def question_key(fingerprint: str, question: Question) -> str:
    """Hash a judge's fingerprint and all that a call shows, in the order shown.

    The subset is not hashed: where it chooses a prompt, give that prompt's fingerprint.
    """
    texts = [fingerprint, question.query, *question.positives, *question.passages]
    # Lengths say where each text ends, so that no two questions look alike when joined.
    head = f"{len(question.positives)}:{','.join([str(len(text)) for text in texts])}:"
    # Half an emoji, cut by whoever made the dataset, has no bytes of its own in UTF-8.
    joined = (head + "".join(texts)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()


class LocalJudge(ABC):
    """A judge that computes verdicts in this process: derive from it to bring your own.

    Questions that wait at the same time are handed over together, so that a model can work on a
    batch; override `judge_many` to use that. A subclass sets `name` and `fingerprint`.
    """

    max_passages: int = 1_000
    batch_size: int = 32
    """The most questions that one call of `judge_many` gets."""

    name: str
    fingerprint: str

    @property
    def model(self) -> str:
        return self.name

    @abstractmethod
    def judge(self, question: Question) -> list[Verdict]:
        """Judge the passages of one question, in order; may raise `JudgeError`."""

    def judge_many(self, questions: Sequence[Question]) -> Sequence[list[Verdict] | JudgeError]:
        """Judge several questions; runs in a worker thread, one batch at a time.

        Returns:
            One answer for every question, in order. A `JudgeError` in the place of verdicts fails
            its question alone; one that is raised fails the whole batch.
        """
        return [self._judge_alone(question) for question in questions]

    def reply_many(self, questions: Sequence[Question]) -> Sequence[str | JudgeError]:
        """Answer several questions with the texts that the cache keeps and `parse` reads.

        The texts are the verdicts of `judge_many`. A judge whose verdicts follow from something
        dearer, such as scores, keeps that instead and overrides `parse` too.

        Raises:
            JudgeError: `judge_many` left a question out.
        """
        answers = self.judge_many(questions)
        _check_number(self.name, answers, questions)
        return [
            answer
            if isinstance(answer, JudgeError)
            else json.dumps([verdict.to_json() for verdict in answer])
            for answer in answers
        ]

    def _judge_alone(self, question: Question) -> list[Verdict] | JudgeError:
        # Which questions share a batch is chance: one that fails must not take others along.
        try:
            return self.judge(question)
        except JudgeError as error:
            return error

    def key(self, question: Question) -> str:
        return question_key(self.fingerprint, question)

    async def ask(
        self, question: Question, *, unusable: tuple[Reply, UnusableReplyError] | None = None
    ) -> Reply:
        if unusable is not None:  # the same computation would say the same again
            raise JudgeError(str(unusable[1]), reason=unusable[1].reason)
        return Reply(text=await self._batches().reply(question), model=self.model)

    def parse(self, question: Question, reply: Reply) -> list[Verdict]:
        verdicts = [Verdict.from_json(values) for values in json.loads(reply.text)]
        if len(verdicts) != len(question.passages):
            raise UnusableReplyError(
                f"expected {len(question.passages)} verdicts of judge {self.name!r}, found "
                f"{len(verdicts)}. Its judge() must return one verdict for every passage.",
                reason="missing_ids",
            )
        return verdicts

    def _batches(self) -> _Batches:
        loop = asyncio.get_running_loop()
        batches: _Batches | None = self.__dict__.get("_waiting")
        if batches is None or batches.loop is not loop:
            batches = self.__dict__["_waiting"] = _Batches(self, loop)
        return batches

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_waiting"}


class _Batches:
    """The questions of one event loop that wait for a local judge."""

    def __init__(self, judge: LocalJudge, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._judge = judge
        self._waiting: list[tuple[Question, asyncio.Future[str]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def reply(self, question: Question) -> str:
        future: asyncio.Future[str] = self.loop.create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = self.loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # lets every question of this moment join the first batch
        while self._waiting:
            batch = self._waiting[: self._judge.batch_size]
            del self._waiting[: len(batch)]
            await self._settle(batch)

    async def _settle(self, batch: list[tuple[Question, asyncio.Future[str]]]) -> None:
        questions = [question for question, _ in batch]
        try:
            answers = await asyncio.to_thread(self._judge.reply_many, questions)
        except Exception as error:  # handed to every asker, who decides what it means
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, JudgeError):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def _check_number(judge: str, answers: Sized, questions: Sized) -> None:
    if len(answers) != len(questions):
        raise JudgeError(
            f"expected {len(questions)} answers of judge {judge!r}, found {len(answers)}. Its "
            "judge_many() must return one for every question.",
            reason="missing_answers",
        )
