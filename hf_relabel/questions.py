"""Questions and replies: what a judge is asked, and the raw text that comes back.

Values only. A question is one call's worth: `Question.split` cuts a long row into several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Question", "Reply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one call asks: which of these passages answer the query, as its positives do.

    Attributes:
        query: The search text, as the retriever would see it.
        passages: N texts to be judged, in the order in which they are shown; titles included.
        positives: The texts labeled relevant: the ground truth that passages are compared with.
        subset: The dataset's named part that the row comes from; may choose the prompt.
    """

    query: str
    passages: tuple[str, ...]
    positives: tuple[str, ...] = ()
    subset: str | None = None

    def split(self, max_passages: int) -> list[Question]:
        """Cut into questions of at most `max_passages` passages, in order; none for no passages."""
        return [
            replace(self, passages=self.passages[start : start + max_passages])
            for start in range(0, len(self.passages), max_passages)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge's model returned, before anyone read a verdict from it.

    Attributes:
        text: The raw text; empty when the model sent none.
        finish_reason: Why the model stopped; anything but "stop" makes the reply unusable.
        refusal: The model's words when it refused, else None.
        model: The model that answered, as it named itself.
        usage: Token counts as the server sent them (`prompt_tokens`, `completion_tokens`, …);
            empty when it sent none, which means unknown, not zero.
        latency_s: Seconds from sending to the whole reply.
    """

    text: str
    finish_reason: str | None = "stop"
    refusal: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    latency_s: float = 0.0
