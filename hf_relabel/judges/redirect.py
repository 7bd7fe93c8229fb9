"""RedirectedJudge: a judge whose questions go another way; in all else it is that judge."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from hf_relabel.errors import UnusableReplyError
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Verdict

__all__ = ["RedirectedJudge"]

_Unusable: TypeAlias = tuple[Reply, UnusableReplyError] | None
_Ask: TypeAlias = Callable[[ChatJudge, Question, _Unusable], Awaitable[Reply]]


class RedirectedJudge:
    """Asks through a function.

    Args:
        judge: Gives keys, requests and the reading of replies.
        ask: Takes the judge, the question, and the unusable reply to be repaired, if any.
    """

    def __init__(self, judge: ChatJudge, ask: _Ask) -> None:
        self._judge = judge
        self._ask = ask
        self.name = judge.name
        self.model = judge.model
        self.max_passages = judge.max_passages

    @property
    def fingerprint(self) -> str:
        return self._judge.fingerprint

    def key(self, question: Question) -> str:
        return self._judge.key(question)

    async def ask(self, question: Question, *, unusable: _Unusable = None) -> Reply:
        return await self._ask(self._judge, question, unusable)

    def parse(self, question: Question, reply: Reply) -> list[Verdict]:
        return self._judge.parse(question, reply)

    def parse_briefly(self, question: Question, reply: Reply) -> list[Verdict]:
        return self._judge.parse_briefly(question, reply)
