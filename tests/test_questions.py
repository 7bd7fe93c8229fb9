"""Questions: a long row is cut into calls, and nothing is lost on the way."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from hf_relabel.questions import Question, Reply


@given(st.lists(st.text(max_size=3)), st.integers(1, 9))
def test_a_split_holds_every_passage_once_and_in_order(
    passages: list[str], max_passages: int
) -> None:
    question = Question(query="q", passages=tuple(passages), positives=("p",), subset="fiqa")

    parts = question.split(max_passages)

    assert [passage for part in parts for passage in part.passages] == passages
    assert all(len(part.passages) == max_passages for part in parts[:-1])
    assert all(1 <= len(part.passages) <= max_passages for part in parts)
    assert {(part.query, part.positives, part.subset) for part in parts} <= {("q", ("p",), "fiqa")}


def test_no_passages_make_no_question() -> None:
    """A call that shows nothing would be paid for, too."""
    assert Question(query="q", passages=()).split(25) == []


def test_a_reply_without_usage_says_nothing_of_tokens() -> None:
    """Unknown, not zero: a report must not call it free."""
    assert "prompt_tokens" not in Reply(text="").usage


def test_questions_and_replies_survive_a_pickle() -> None:
    question = Question(query="q", passages=("a", "b"), positives=("p",), subset="s")
    reply = Reply(text="t", refusal="r", usage={"prompt_tokens": 3}, model="m", latency_s=0.5)

    assert pickle.loads(pickle.dumps((question, reply))) == (question, reply)  # noqa: S301
