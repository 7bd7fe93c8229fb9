"""What the tests' chat server answers: replies made up from the prompt that it was sent.

An answerer takes the body of a request to `/v1/chat/completions` and returns what the model says.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Answer",
    "Answerer",
    "Body",
    "from_key",
    "passages_shown",
    "prompt_of",
    "replay",
    "synthetic",
    "write_reply",
]

Body = Mapping[str, Any]
NOT_RELEVANT = "not-relevant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said."""

    text: str = ""
    finish_reason: str = "stop"
    refusal: str | None = None
    model: str | None = None
    """The model as it names itself; None repeats the name that was asked."""
    has_usage: bool = True
    usage: Mapping[str, Any] | None = None
    """The tokens as the server counts them; None counts four characters as one."""


Answerer = Callable[[Body], Answer | str]


def prompt_of(body: Body) -> str:
    """Join what the request says to the model; what it repeats of the model's own is left out."""
    return "\n".join(_text(m["content"]) for m in body["messages"] if m["role"] != "assistant")


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def passages_shown(prompt: str) -> dict[int, str]:
    """Read the numbered passages off a prompt: `Doc (1): …` up to the next, or a closing tag."""
    heads = list(re.finditer(r"^Doc \((\d+)\):", prompt, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(prompt)]
    shown: dict[int, str] = {}
    for head, end in zip(heads, ends, strict=True):
        text = re.split(r"^</", prompt[head.end() : end], maxsplit=1, flags=re.MULTILINE)[0]
        shown[int(head[1])] = _squeeze(text)
    return shown


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _query_of(prompt: str, queries: Iterable[str]) -> str:
    """Find which query is asked: the one between the tags, else the longest that occurs.

    Raises:
        LookupError: The prompt asks none of them.
    """
    tagged = re.search(r"<query>\n(.*?)\n</query>", prompt, re.DOTALL)
    text = _squeeze(tagged[1] if tagged else prompt)
    found = [query for query in queries if (text == _squeeze(query) if tagged else query in text)]
    if not found:
        raise LookupError(f"the prompt asks no known query: {text[:200]!r}")
    return max(found, key=len)


def replay(replies: Mapping[str, Mapping[str, str]]) -> Answerer:
    """Answer with recorded replies, by model and then by query."""

    def answer(body: Body) -> str:
        known = replies[body["model"]]
        return known[_query_of(prompt_of(body), known)]

    return answer


def from_key(key: Mapping[tuple[str, str], str]) -> Answerer:
    """Answer by the truth: "better" or "worse" for a (query, passage).

    A passage that the key does not name is not relevant; nor is any of a query that it does not.
    """
    truth = {(query, _squeeze(passage)): value for (query, passage), value in key.items()}
    queries = {query for query, _ in truth}

    def answer(body: Body) -> str:
        prompt = prompt_of(body)
        shown = passages_shown(prompt)
        try:
            query = _query_of(prompt, queries)
        except LookupError:
            return write_reply(body, dict.fromkeys(shown, NOT_RELEVANT))
        verdicts = {doc: truth.get((query, text), NOT_RELEVANT) for doc, text in shown.items()}
        return write_reply(body, verdicts)

    return answer


def synthetic(body: Body) -> str:
    """Answer by a hash of model and passage: always alike, and right about nothing."""
    verdicts = {}
    for doc, text in passages_shown(prompt_of(body)).items():
        draw = random.Random(f"{body['model']}:{text}").random()
        verdicts[doc] = "better" if draw < 0.05 else "worse" if draw < 0.15 else NOT_RELEVANT
    return write_reply(body, verdicts)


def write_reply(body: Body, verdicts: Mapping[int, str]) -> str:
    """Write verdicts by doc number in the form that the request wants: tags, or JSON."""
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        entries = wanted["json_schema"]["schema"]["properties"]
        by_doc = {name: verdicts.get(_number(name), NOT_RELEVANT) for name in entries}
        return json.dumps({name: _fill(entries[name], by_doc[name]) for name in entries})
    better, worse = (
        ", ".join(f"Doc ({doc})" for doc, verdict in verdicts.items() if verdict == name)
        for name in ("better", "worse")
    )
    thoughts = "\n".join(f"Doc ({doc}): scripted, {value}." for doc, value in verdicts.items())
    return (
        f"<thinking>\n{thoughts}\n</thinking>\n<preference>\n</preference>\n"
        f"<verdict>\n<better>[{better}]</better>\n<worse>[{worse}]</worse>\n</verdict>"
    )


def _number(name: str) -> int:
    return int("".join(filter(str.isdigit, name)) or 0)


def _fill(schema: Mapping[str, Any], verdict: str) -> Any:
    """Make up the value that a schema asks for, true to a verdict."""
    if "properties" in schema:
        return {name: _fill(part, verdict) for name, part in schema["properties"].items()}
    if verdict in schema.get("enum", ()):
        return verdict
    grade = {"better": 3, "worse": 2}.get(verdict, 0)
    by_type = {"integer": grade, "number": grade / 3, "boolean": grade > 1}
    return by_type.get(schema["type"], f"scripted, {verdict}")
