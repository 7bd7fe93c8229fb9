"""ScriptedJudge: answers from a table, for tests of your own code and of this library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hf_relabel.errors import JudgeError
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.questions import Question
from hf_relabel.verdicts import Relevance, Verdict

__all__ = ["ScriptedJudge"]


class ScriptedJudge(LocalJudge):
    """A judge that says what it was told to say, and remembers what it was asked.

    Args:
        name: Shown in verdicts and reports.
        answers: Passage, or (query, passage), → relevance. `Relevance.UNDECIDED` makes the judge
            fail on that whole question, as a real one does on an unusable reply.
        default: The answer for passages that are not in the table; None raises `JudgeError`.

    Attributes:
        asked: Every passage asked about, in order; a copy by pickle was asked nothing yet.
    """

    def __init__(
        self,
        name: str,
        *,
        answers: Mapping[str | tuple[str, str], Relevance],
        default: Relevance | None = None,
    ) -> None:
        self.name = name
        self.default = default
        self.asked: list[str] = []
        self._answers = dict(answers)
        table = sorted((json.dumps(key), value.value) for key, value in answers.items())
        self.fingerprint = hashlib.sha256(
            json.dumps([name, table, default and default.value]).encode()
        ).hexdigest()

    def judge(self, question: Question) -> list[Verdict]:
        self.asked.extend(question.passages)
        answers = [self._answer(question.query, passage) for passage in question.passages]
        flagged = [index for index, answer in enumerate(answers) if answer.is_relevant]
        flagged.sort(key=lambda index: answers[index] is not Relevance.BETTER)
        return [
            Verdict(
                relevance=answer,
                judge=self.name,
                rank=flagged.index(index) if answer.is_relevant else None,
            )
            for index, answer in enumerate(answers)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # What it was asked is no setting: `map`, which hashes the pickle, would start over.
        return {**super().__getstate__(), "asked": []}

    def _answer(self, query: str, passage: str) -> Relevance:
        answer = self._answers.get((query, passage), self._answers.get(passage, self.default))
        if answer is None or answer is Relevance.UNDECIDED:
            raise JudgeError(
                f"expected an answer for the passage {passage!r}, found none in the script of "
                f"judge {self.name!r}. Add it to `answers`, or set `default`.",
                reason="scripted",
            )
        return answer
