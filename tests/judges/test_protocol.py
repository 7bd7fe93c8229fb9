"""The Judge protocol: what a judge of a user's own needs, and what it gets for it."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_relabel import background
from hf_relabel.errors import AccountError, JudgeError, UnusableReplyError
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.protocol import Judge, LocalJudge, question_key
from hf_relabel.judges.scripted import ScriptedJudge
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance, Verdict

WAIT_S = 30
TEXTS = st.lists(st.text(max_size=4), max_size=3).map(tuple)
QUESTIONS = st.builds(Question, query=st.text(max_size=4), passages=TEXTS, positives=TEXTS)


class WordJudge(LocalJudge):
    """Calls a passage relevant when it holds the query; what a user would write."""

    name = "word"
    fingerprint = "word-1"

    def judge(self, question: Question) -> list[Verdict]:
        if question.query == "broken":
            raise JudgeError("expected a query, found 'broken'.", reason="broken")
        if question.query == "bug":
            raise ZeroDivisionError("a bug of the user's")
        return [
            Verdict(
                relevance=Relevance.WORSE if question.query in passage else Relevance.NOT_RELEVANT,
                judge=self.name,
                reason=f"looked for {question.query!r}",
                confidence=0.5,
            )
            for passage in question.passages
        ]


class BatchJudge(WordJudge):
    """Judges batches, and remembers them."""

    batch_size = 4

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def judge_many(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        self.batches.append(len(questions))
        self.threads.add(threading.current_thread().name)
        return [self.judge(question) for question in questions]


class ForgetfulJudge(WordJudge):
    """Leaves out the first question of a batch."""

    def judge_many(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        return [self.judge(question) for question in questions[1:]]


def question_of(query: str, *passages: str) -> Question:
    return Question(query=query, passages=passages)


def ask_all(judge: LocalJudge, questions: Sequence[Question]) -> list[Reply | BaseException]:
    """Ask everything at once, as a cascade does; errors in place of replies."""

    async def gather() -> list[Reply | BaseException]:
        asking = asyncio.gather(*map(judge.ask, questions), return_exceptions=True)
        return await asyncio.wait_for(asking, WAIT_S)

    return background.run(gather())


@pytest.mark.parametrize(
    "judge", [WordJudge(), ChatJudge("m"), ScriptedJudge("s", answers={})], ids=lambda j: j.name
)
def test_every_kind_of_judge_fits_the_protocol(judge: Judge) -> None:
    assert isinstance(judge, Judge)
    assert judge.max_passages >= 1
    assert judge.model
    assert judge.key(question_of("q", "a")) != judge.key(question_of("q", "b"))


def test_a_users_judge_answers_through_its_reply() -> None:
    """What was computed is cached as text, so a reply must hold all that the verdicts said."""
    judge, question = WordJudge(), question_of("cat", "a cat", "a dog")

    reply = background.run(judge.ask(question))

    assert judge.parse(question, reply) == judge.judge(question)
    assert (reply.model, reply.finish_reason) == ("word", "stop")


def test_a_judge_that_skips_a_passage_is_unusable() -> None:
    judge = WordJudge()
    reply = background.run(judge.ask(question_of("cat", "a cat")))

    with pytest.raises(UnusableReplyError, match="expected 2 verdicts of judge 'word', found 1"):
        judge.parse(question_of("cat", "a cat", "a dog"), reply)


def test_a_computed_answer_is_not_asked_to_repair_itself() -> None:
    error = UnusableReplyError("one verdict is missing", reason="missing_ids")

    with pytest.raises(JudgeError, match="one verdict is missing") as found:
        background.run(WordJudge().ask(question_of("q", "a"), unusable=(Reply(text=""), error)))

    assert found.value.reason == "missing_ids"


def test_questions_that_wait_together_are_judged_in_batches() -> None:
    judge = BatchJudge()
    questions = [question_of(f"{i}", f"has {i}", "none") for i in range(10)]

    replies = ask_all(judge, questions)

    assert judge.batches == [4, 4, 2]
    for question, reply in zip(questions, replies, strict=True):
        assert isinstance(reply, Reply)
        assert [v.relevance.is_relevant for v in judge.parse(question, reply)] == [True, False]


def test_judging_does_not_block_the_loop() -> None:
    """A model that computes for seconds must not hold up the calls of other judges."""
    judge = BatchJudge()

    ask_all(judge, [question_of("q", "a")])

    assert judge.threads.isdisjoint({"hf_relabel-loop", "MainThread"})


def test_a_question_that_fails_takes_no_other_of_its_batch_along() -> None:
    """Which questions share a batch is chance; an answer that depends on it could not be repeated."""
    good, broken = question_of("cat", "a cat"), question_of("broken", "a")

    replies = ask_all(WordJudge(), [good, broken, good])

    assert [type(reply) for reply in replies] == [Reply, JudgeError, Reply]
    assert isinstance(replies[1], JudgeError)
    assert replies[1].reason == "broken"


def test_an_error_of_the_batch_reaches_every_asker() -> None:
    replies = ask_all(BatchJudge(), [question_of("cat", "a"), question_of("broken", "a")])

    assert [type(reply) for reply in replies] == [JudgeError, JudgeError]


def test_a_bug_in_a_users_judge_reaches_the_asker_as_it_is() -> None:
    """Not an undecided row: the run stops, and the traceback names the user's line."""
    with pytest.raises(ZeroDivisionError, match="a bug of the user's"):
        background.run(WordJudge().ask(question_of("bug", "a")))


def test_a_batch_with_answers_missing_fails_and_does_not_hang() -> None:
    replies = ask_all(ForgetfulJudge(), [question_of("cat", "a"), question_of("dog", "a")])

    assert [type(reply) for reply in replies] == [JudgeError, JudgeError]
    assert "expected 2 answers of judge 'word', found 1" in str(replies[0])


def test_a_judge_works_again_after_a_batch_that_failed() -> None:
    judge = BatchJudge()
    ask_all(judge, [question_of("bug", "a"), question_of("cat", "a cat")])

    (reply,) = ask_all(judge, [question_of("cat", "a cat")])

    assert isinstance(reply, Reply)


def test_a_cancelled_asker_takes_no_other_along() -> None:
    judge = BatchJudge()

    async def cancel_one() -> Reply:
        first, second = (asyncio.create_task(judge.ask(question_of("q", t))) for t in ("a", "b"))
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(second, WAIT_S)

    assert background.run(cancel_one()).text.startswith("[")


def test_a_judge_answers_on_one_loop_after_another() -> None:
    """`asyncio.run` in a script, then the library's own loop."""
    judge, question = WordJudge(), question_of("cat", "a cat")

    assert asyncio.run(judge.ask(question)) == background.run(judge.ask(question))


def test_a_judge_pickles_the_same_before_and_after_it_was_asked() -> None:
    """`Dataset.map` hashes the pickle: what moves makes it start over."""
    judge = WordJudge()
    before = pickle.dumps(judge)
    ask_all(judge, [question_of("cat", "a cat")])

    assert pickle.dumps(judge) == before
    copy = pickle.loads(before)  # noqa: S301
    assert ask_all(copy, [question_of("cat", "a cat")])[0] == background.run(
        judge.ask(question_of("cat", "a cat"))
    )


def test_an_account_error_in_a_local_judge_stays_one() -> None:
    """It stops the run where a JudgeError only leaves a row undecided."""

    class Unpaid(WordJudge):
        def judge(self, question: Question) -> list[Verdict]:
            raise AccountError(f"no credit for {question.query!r}", reason="quota")

    (reply,) = ask_all(Unpaid(), [question_of("q", "a")])

    assert isinstance(reply, AccountError)


@given(QUESTIONS, QUESTIONS)
def test_the_key_tells_questions_apart(one: Question, other: Question) -> None:
    assert (question_key("f", one) == question_key("f", other)) == (one == other)


def test_the_key_depends_on_the_fingerprint_and_on_the_order_shown() -> None:
    question = Question(query="q", passages=("a", "b"), positives=("p",))
    turned = Question(query="q", passages=("b", "a"), positives=("p",))
    moved = Question(query="q", passages=("b",), positives=("p", "a"))

    keys = [question_key("f", q) for q in (question, turned, moved)]
    assert len({*keys, question_key("g", question)}) == 4


def test_a_subset_alone_makes_no_other_key() -> None:
    """The same question in two subsets is bought once; a subset's own prompt has its fingerprint."""
    plain = Question(query="q", passages=("a",))

    assert question_key("f", plain) == question_key(
        "f", Question(query="q", passages=("a",), subset="fiqa")
    )


def test_half_an_emoji_has_a_key() -> None:
    """Datasets cut texts by length; such a row must not end the run."""
    keys = {question_key("f", question_of("q", text)) for text in ("\ud83d", "\ud83e", "")}

    assert len(keys) == 3
