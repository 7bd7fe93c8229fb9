"""ScriptedJudge: says what it was told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from hf_relabel import background
from hf_relabel.errors import JudgeError
from hf_relabel.judges.scripted import ScriptedJudge
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance

BETTER, WORSE, NOT_RELEVANT = Relevance.BETTER, Relevance.WORSE, Relevance.NOT_RELEVANT
QUESTION = Question(query="q", passages=("a", "b", "c"))


def test_it_answers_from_the_table_and_ranks_better_before_worse() -> None:
    judge = ScriptedJudge("s", answers={"a": WORSE, "b": NOT_RELEVANT, "c": BETTER})

    reply = background.run(judge.ask(QUESTION))

    verdicts = judge.parse(QUESTION, reply)
    assert [verdict.relevance for verdict in verdicts] == [WORSE, NOT_RELEVANT, BETTER]
    assert [verdict.rank for verdict in verdicts] == [1, None, 0]
    assert {verdict.judge for verdict in verdicts} == {"s"}


def test_an_answer_for_the_query_and_passage_goes_first() -> None:
    judge = ScriptedJudge("s", answers={"a": WORSE, ("q", "a"): BETTER}, default=NOT_RELEVANT)

    of_q, of_other = (
        judge.judge(Question(query=query, passages=("a",)))[0] for query in ("q", "other")
    )

    assert (of_q.relevance, of_other.relevance) == (BETTER, WORSE)


def test_it_remembers_every_passage_in_order() -> None:
    judge = ScriptedJudge("s", answers={}, default=NOT_RELEVANT)

    background.run(judge.ask(QUESTION))
    background.run(judge.ask(Question(query="q", passages=("a",))))

    assert judge.asked == ["a", "b", "c", "a"]


@pytest.mark.parametrize("answers", [{}, {"a": Relevance.UNDECIDED}])
def test_it_fails_where_the_script_has_no_answer(answers: dict[str, Relevance]) -> None:
    judge = ScriptedJudge("s", answers=answers)

    with pytest.raises(JudgeError, match=r"for the passage 'a'.*Add it to `answers`") as found:
        background.run(judge.ask(QUESTION))

    assert found.value.reason == "scripted"


def test_a_question_that_it_fails_on_takes_no_other_along() -> None:
    judge = ScriptedJudge("s", answers={"bad": Relevance.UNDECIDED}, default=BETTER)
    questions = [Question(query="q", passages=(text,)) for text in ("good", "bad", "fine")]

    async def ask_all() -> list[Reply | BaseException]:
        return await asyncio.gather(*map(judge.ask, questions), return_exceptions=True)

    assert [type(found) for found in background.run(ask_all())] == [Reply, JudgeError, Reply]
    assert judge.asked == ["good", "bad", "fine"]


def test_the_fingerprint_covers_the_script_and_not_its_order() -> None:
    judge = ScriptedJudge("s", answers={"a": BETTER, "b": WORSE})
    same = ScriptedJudge("s", answers={"b": WORSE, "a": BETTER})
    others = [
        ScriptedJudge("t", answers={"a": BETTER, "b": WORSE}),
        ScriptedJudge("s", answers={"a": BETTER, "b": BETTER}),
        ScriptedJudge("s", answers={"a": BETTER, "b": WORSE}, default=WORSE),
        ScriptedJudge("s", answers={"a": BETTER, ("q", "b"): WORSE}),
    ]

    assert same.fingerprint == judge.fingerprint
    assert len({judge.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_it_survives_a_pickle() -> None:
    judge = ScriptedJudge("s", answers={"a": BETTER}, default=NOT_RELEVANT)
    background.run(judge.ask(QUESTION))

    copy = pickle.loads(pickle.dumps(judge))  # noqa: S301

    assert copy.fingerprint == judge.fingerprint
    assert copy.judge(QUESTION) == judge.judge(QUESTION)
