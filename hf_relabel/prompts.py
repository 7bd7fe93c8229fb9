"""Prompts: versioned templates, and the strict parsing of what judges reply to them.

Text in, values out: nothing here calls a model. A template is a text with the three slots
`{query}`, `{positives}` and `{passages}`; other braces are plain text. What stands above a line
`--- user ---` becomes the system message, the rest the user message; without that line all of it
is the user message.

What is inserted cannot leave its place: tags of the template, passage labels and control characters
are neutralised in it, and nothing else is changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from hf_relabel.errors import PromptError, UnusableReplyError
from hf_relabel.texts import is_printable
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hf_relabel.questions import Question, Reply

__all__ = ["PARSER_VERSION", "PROMPTS", "Prompt", "Protocol", "load_prompt"]

PARSER_VERSION: int = 1
"""Part of the fingerprint of parsed verdicts, not of calls: raw replies can be parsed again."""

# Part of every prompt's fingerprint: raise it when labels, escaping or the repair question change.
_RENDERING_VERSION = 1


class Protocol(str, Enum):
    """The form in which a judge is asked to reply."""

    XML = "xml"
    """Reasoning, then a `<verdict>` block with a `<better>` and a `<worse>` list of labels."""
    JSON = "json"
    """One object with a reason and a grade from 0 to 3 for every passage, under a strict schema."""


_SHIPPED = {
    "paper-cheap": Protocol.XML,
    "paper-strong": Protocol.XML,
    "paper-title": Protocol.XML,
    "graded": Protocol.JSON,
}

PROMPTS: tuple[str, ...] = tuple(_SHIPPED)
"""The names of the prompts that come with the library."""

_SLOTS = ("query", "positives", "passages")
_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_USER_LINE = re.compile(r"^--- user ---[ \t]*\r?$\n?", re.MULTILINE)

# Characters that show as nothing. They are common in honest text (emoji, Persian), so they stay;
# where they would hide a tag or a label, the patterns below see through them.
_UNSEEN = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u2060-\u2064\ufeff"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PROTOCOL_TAGS = ("verdict", "better", "worse", "thinking", "preference")
_TEMPLATE_TAG = re.compile(r"</?\s*([A-Za-z][\w.-]*)")
# A cheap first look: it jumps from "(" to "(", where the pattern for labels tries every character.
_NUMBERED = re.compile(rf"\([\s{_UNSEEN}]*\d")

_MAX_REPEATED_CHARS = 4000
_MAX_QUOTED_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A versioned template: asks one question, and reads the replies to it.

    Attributes:
        name: What reports and errors call it.
        text: The template, with its slots and, if it has a system part, its `--- user ---` line.
        protocol: The form in which it asks for the reply, and which `parse` expects.

    Raises:
        PromptError: A slot is missing or unknown, or there is no user part.
    """

    name: str
    text: str
    protocol: Protocol
    _parts: tuple[tuple[str, tuple[str, ...]], ...] = field(init=False, repr=False, compare=False)
    _tags: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _fingerprint: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        protocol = _as_protocol(self.protocol)
        version = f"{_RENDERING_VERSION}\n{protocol.value}\n{self.text}"
        digest = hashlib.sha256(version.encode("utf-8", "surrogatepass")).hexdigest()
        names = {*_PROTOCOL_TAGS, *(name.lower() for name in _TEMPLATE_TAG.findall(self.text))}
        for attribute, value in (
            ("protocol", protocol),
            ("_parts", _split_template(self.name, self.text)),
            ("_tags", _tag_pattern(tuple(sorted(names)))),
            ("_fingerprint", digest),
        ):
            object.__setattr__(self, attribute, value)

    def __reduce__(self) -> tuple[object, ...]:
        # Settings alone: a Relabeler's pickle holds its prompts, and `map` hashes that pickle.
        return (_rebuild, (self.name, self.text, self.protocol.value))

    @property
    def fingerprint(self) -> str:
        """A hash of all in a prompt that can change an answer; the name is not part of it."""
        return self._fingerprint

    def messages(self, question: Question) -> list[dict[str, str]]:
        """Render the chat messages that ask a question.

        The passages are labeled `Doc (1)` to `Doc (n)` in their order, the positives `Ground truth
        (1)` and on. One pass: what is inserted is never searched for slots.
        """
        clean = self._clean
        values = {
            "query": clean(question.query),
            "positives": _numbered("Ground truth", map(clean, question.positives)),
            "passages": _numbered("Doc", map(clean, question.passages)),
        }
        messages = []
        for role, parts in self._parts:
            pieces = list(parts)
            pieces[1::2] = [values[slot] for slot in parts[1::2]]
            messages.append({"role": role, "content": "".join(pieces)})
        return messages

    def repair(
        self, question: Question, reply: Reply, error: UnusableReplyError
    ) -> list[dict[str, str]]:
        """Render the one repair question: the question, the reply, and what was wrong with it.

        Args:
            question: What was asked.
            reply: The unusable reply; the middle of a long one is left out.
            error: What `parse` raised on it.
        """
        # Some servers refuse an assistant turn without text.
        said = reply.text.strip() or (reply.refusal or "").strip() or "(no text)"
        if len(said) > _MAX_REPEATED_CHARS:
            half = _MAX_REPEATED_CHARS // 2
            said = f"{said[:half]}\n[...]\n{said[-half:]}"
        return [
            *self.messages(question),
            {"role": "assistant", "content": _CONTROLS.sub(" ", said)},
            {"role": "user", "content": _repair_turn(self.protocol, len(question.passages), error)},
        ]

    def response_format(self, n_passages: int) -> dict[str, object] | None:
        """Return the `response_format` of a chat completion, or None where the protocol has none.

        The schema has one required entry for every passage, so that a model under it can neither
        invent an id nor leave one out; the reason comes before the grade that follows from it.
        """
        if self.protocol is not Protocol.JSON:
            return None
        entry = {
            "type": "object",
            "properties": {
                "reason": {"type": "string"},
                "grade": {"type": "integer", "enum": [0, 1, 2, 3]},
            },
            "required": ["reason", "grade"],
            "additionalProperties": False,
        }
        ids = _json_ids(n_passages)
        schema = {
            "type": "object",
            "properties": dict.fromkeys(ids, entry),
            "required": ids,
            "additionalProperties": False,
        }
        json_schema = {"name": "grades", "strict": True, "schema": schema}
        return {"type": "json_schema", "json_schema": json_schema}

    def parse(
        self, reply: Reply, n_passages: int, *, judge: str, has_reasons: bool = True
    ) -> list[Verdict]:
        """Read a reply's verdicts; a reply without one for every passage is an error, never a "no".

        Args:
            reply: The reply to a question of this prompt. Only the finish reason "stop" counts as
                whole: a client that knows its server's other words for it translates them.
            n_passages: How many passages the question showed.
            judge: The name that the verdicts carry.
            has_reasons: Whether verdicts bring the judge's words on their passage. Looking for them
                takes as long as all the rest, and those who judge much read them later, if ever.

        Returns:
            N verdicts aligned with the question's passages, all decided. Relevant ones have a rank,
            counted from 0 through the better ones and then the worse ones.

        Raises:
            UnusableReplyError: By its `reason`: not whole ("truncated", "content_filter",
                "no_finish_reason", "finish_reason"), "refused", "empty"; "no_verdict",
                "malformed_verdict", "malformed_list", "contradiction" in xml; "bad_json",
                "missing_ids", "bad_grade" in json; "unknown_id" in both.
        """
        _check_whole(reply)
        if self.protocol is Protocol.JSON:
            return _parse_json(reply.text, n_passages, judge)
        return _parse_xml(reply.text, n_passages, judge, has_reasons=has_reasons)

    def _clean(self, text: str) -> str:
        # The first three tests run at memory speed, and most texts pass them all.
        if not (is_printable(text) or is_printable(text.replace("\n", " "))):
            text = _CONTROLS.sub(" ", text)
        if "<" in text:
            text = self._tags.sub("&lt;", text)
        if "(" in text and _NUMBERED.search(text):
            text = _LABEL.sub(r"\1[\2]", text)
        return text


def load_prompt(source: str | Path, *, protocol: str = "xml") -> Prompt:
    """Load a prompt that comes with the library, or one of the caller's own.

    Args:
        source: One of `PROMPTS`, a path to a template file, or a template itself. A `Path` is
            always a file, and a text with a slot or a line break always a template.
        protocol: The protocol of the caller's own template; the library's know theirs.

    Raises:
        PromptError: No such prompt or file, or the template lacks a slot or has an unknown one.
    """
    if isinstance(source, Path):
        return _load_file(source, protocol)
    if source in _SHIPPED:
        return _load_shipped(source)
    if "\n" in source or _SLOT.search(source):
        digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        return Prompt(name=f"custom-{digest[:8]}", text=source, protocol=_as_protocol(protocol))
    try:
        is_file = Path(source).is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file:
        return _load_file(Path(source), protocol)
    # The reference code fell back to its default here: a typo then bought the wrong verdicts.
    raise PromptError(
        f"expected a prompt's name ({', '.join(PROMPTS)}), the path of a template file or a "
        f"template with the slots {_braced(_SLOTS)}; found {source!r}, which is none of them."
    )


@cache
def _load_shipped(name: str) -> Prompt:
    text = files("hf_relabel").joinpath("data", "prompts", f"{name}.txt").read_text("utf-8")
    return Prompt(name=name, text=text, protocol=_SHIPPED[name])


def _load_file(path: Path, protocol: str) -> Prompt:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(
            f"expected a template in UTF-8 at '{path}', found none that can be read ({error}). "
            f"The prompts by name are {', '.join(PROMPTS)}."
        ) from error
    return Prompt(name=path.stem, text=text, protocol=_as_protocol(protocol))


def _as_protocol(value: str) -> Protocol:
    try:
        return Protocol(value)
    except ValueError:
        known = " or ".join(repr(protocol.value) for protocol in Protocol)
        raise PromptError(f"expected the protocol {known}, found {value!r}.") from None


def _rebuild(name: str, text: str, protocol: str) -> Prompt:
    return Prompt(name=name, text=text, protocol=Protocol(protocol))


# -- Templates ------------------------------------------------------------------------------------


def _split_template(name: str, text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Cut a template into roles, and each role's text into static parts and slot names by turns."""
    used = _SLOT.findall(text)
    if unknown := [slot for slot in dict.fromkeys(used) if slot not in _SLOTS]:
        raise PromptError(
            f"expected the slots {_braced(_SLOTS)} in the prompt {name!r}, "
            f"found the unknown {_braced(unknown)}. Rename or remove it."
        )
    if missing := [slot for slot in _SLOTS if slot not in used]:
        raise PromptError(
            f"expected the slots {_braced(_SLOTS)} in the prompt {name!r}, "
            f"found no {_braced(missing)}. Put it where its texts belong."
        )
    sections = _USER_LINE.split(text)
    if len(sections) > 2 or not sections[-1].strip():
        raise PromptError(
            f"expected at most one line '--- user ---' in the prompt {name!r} and a text below it, "
            f"found {len(sections) - 1} such lines. Keep the one above the user's part."
        )
    roles = ("system", "user")[-len(sections) :]
    return tuple(
        (role, tuple(_SLOT.split(section.strip())))
        for role, section in zip(roles, sections, strict=True)
        if section.strip()
    )


def _braced(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def _numbered(label: str, texts: Iterable[str]) -> str:
    return (
        "\n\n".join([f"{label} ({i}): {text}" for i, text in enumerate(texts, 1)]) or "(none known)"
    )


def _seen_through(word: str) -> str:
    """A pattern for a word with unseen characters anywhere inside it."""
    return f"[{_UNSEEN}]*".join(re.escape(character) for character in word)


@lru_cache(maxsize=64)
def _tag_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for the "<" of a tag with one of these names, opening or closing."""
    either = "|".join(_seen_through(name) for name in names)
    # "<|name|>" is how chat models mark turns; a server that reads them in a text would end ours.
    return re.compile(rf"<(?=[\s/{_UNSEEN}]*(?:{either})(?!\w)|\|\w+\|>)", re.IGNORECASE)


_GAP = rf"[\s{_UNSEEN}]*"
_LABEL = re.compile(
    rf"(?<!\w)((?:{_seen_through('doc')}(?:[{_UNSEEN}]*{_seen_through('ument')})?"
    rf"|{_seen_through('ground')}{_GAP}{_seen_through('truth')}){_GAP})"
    rf"\(({_GAP}\d[\d\s,{_UNSEEN}]*)\)",
    re.IGNORECASE,
)


def _repair_turn(protocol: Protocol, n_passages: int, error: UnusableReplyError) -> str:
    brief = " Keep every reason to one short sentence." if error.reason == "truncated" else ""
    if protocol is Protocol.JSON:
        form = (
            'one JSON object with exactly one entry for every document, "doc_1" to '
            f'"doc_{n_passages}", each with a "reason" (text) and a "grade" (0, 1, 2 or 3). '
            "Write nothing before or after the object"
        )
    else:
        form = (
            f"judge every document from Doc (1) to Doc ({n_passages}), and end with one <verdict> "
            "block that holds one <better> list and one <worse> list. A list holds labels alone, "
            "as in [Doc (i), Doc (j)], or is []; no document is in both"
        )
    return (
        f"That reply cannot be used: {_CONTROLS.sub(' ', str(error))} "
        f"Give the whole answer again, from the start: {form}.{brief}"
    )


# -- Replies --------------------------------------------------------------------------------------


def _check_whole(reply: Reply) -> None:
    if reply.finish_reason == "length":
        raise _unusable(
            "truncated", "expected a whole reply, found one cut off at its token limit."
        )
    if reply.finish_reason == "content_filter":
        raise _unusable(
            "content_filter", "expected a reply, found one cut off by a content filter."
        )
    if reply.finish_reason is None:
        # A stream that broke off looks just like a server that never says why it stopped.
        raise _unusable("no_finish_reason", "expected the finish reason 'stop', found none.")
    if reply.finish_reason != "stop":
        found = _quoted(reply.finish_reason)
        raise _unusable("finish_reason", f"expected the finish reason 'stop', found {found}.")
    if reply.refusal:
        raise _unusable("refused", f"expected a reply, found a refusal: {_quoted(reply.refusal)}.")
    if not reply.text.strip():
        raise _unusable("empty", "expected a reply, found no text.")


def _unusable(reason: str, message: str) -> UnusableReplyError:
    return UnusableReplyError(message, reason=reason)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}…"


# -- Replies in xml -------------------------------------------------------------------------------
# Possessive gaps (`*+`) throughout: a reply of a million blanks is still read in linear time.

_VERDICT_TAG = re.compile(r"<\s*+(?:(/)\s*+)?verdict\s*+>", re.IGNORECASE)
_LIST = r"<\s*+{0}\s*+>(?P<{0}>[^<]*+)<\s*+/\s*+{0}\s*+>"
_LISTS = [
    re.compile(rf"[\s,;]*+{_LIST.format(one)}[\s,;]*+{_LIST.format(two)}[\s,;.]*+", re.IGNORECASE)
    for one, two in (("better", "worse"), ("worse", "better"))
]
# The prompts of the paper's code put these words into the lists, and so do the replies to them.
_OR_EQUAL = r"(?: or equal(?:ly)?(?: good| preferred)?(?: as| to| with)?)?"
_LIST_LABELS = {
    "better": re.compile(
        rf"(?:relevant and )?(?:preferred(?: over)?|better(?: than)?){_OR_EQUAL}"
        r"(?: the)? ground truth ?: ?",
        re.IGNORECASE,
    ),
    "worse": re.compile(
        rf"relevant,? but (?:not (?:preferred over|better than){_OR_EQUAL}|worse than)"
        r"(?: the)? ground truth ?: ?",
        re.IGNORECASE,
    ),
}
_NOTHING = ("", "none", "n/a")
# Nine digits: int() refuses thousands of them with an error of its own.
_ID = r"-?[0-9]{1,9}"
_IDS = rf"{_ID}(?:(?: ?, ?(?:and )?| and | ?& ?){_ID})*"
_DOC = rf"doc(?:ument)? ?(?:\( ?{_IDS} ?\)|[0-9]{{1,9}})"
_ITEM = re.compile(_DOC, re.IGNORECASE)
_ITEM_IN_BRACKETS = re.compile(rf"{_DOC}|{_ID}", re.IGNORECASE)
_SEPARATOR = re.compile(r"[ \n]?[,;](?:[ \n]?and\b)?[ \n]?|[ \n](?:and|&)[ \n]|\n", re.IGNORECASE)
_BULLET = re.compile(r"^[-*•] ", re.MULTILINE)
_NUMBER = re.compile(_ID)
# A passage's own line of reasoning; the leading "\n" lets the search jump from line to line.
_REASONING = re.compile(
    r"\n[ \t>*#•-]{0,8}doc(?:ument)? ?(?:\( ?([0-9]{1,9}) ?\)|([0-9]{1,9}))\*{0,2} ?:\*{0,2}",
    re.IGNORECASE,
)


def _parse_xml(text: str, n_passages: int, judge: str, *, has_reasons: bool) -> list[Verdict]:
    start, better_text, worse_text = _find_lists(text)
    better = _parse_list(better_text, "better", n_passages)
    worse = _parse_list(worse_text, "worse", n_passages)
    if both := better.keys() & worse.keys():
        raise _unusable(
            "contradiction",
            f"expected every document in one list at most, found {_listed(sorted(both))} in both.",
        )
    reasons = _find_reasons(text[:start]) if has_reasons else {}
    listed = [*dict.fromkeys(better, Relevance.BETTER).items()]
    listed += dict.fromkeys(worse, Relevance.WORSE).items()
    found = {
        number: Verdict(relevance=relevance, judge=judge, rank=rank, reason=reasons.get(number))
        for rank, (number, relevance) in enumerate(listed)
    }
    neither = Verdict(relevance=Relevance.NOT_RELEVANT, judge=judge)
    for number in reasons.keys() - found.keys():
        found[number] = replace(neither, reason=reasons[number])
    return [found.get(number, neither) for number in range(1, n_passages + 1)]


def _find_lists(text: str) -> tuple[int, str, str]:
    """Find the last verdict block: where it starts, and the texts of its two lists.

    The last, because a model that reasons may mention or draft one before. It must be the end of
    the matter: an opening tag behind it means that the model began another one and never ended it.
    """
    tags = list(_VERDICT_TAG.finditer(text))
    openings = [i for i, tag in enumerate(tags) if not tag[1]]
    if not openings:
        raise _unusable("no_verdict", "expected a <verdict> block, found none.")
    last = openings[-1]
    n_closings = len(tags) - last - 1
    if n_closings == 0:
        raise _unusable("no_verdict", "expected a whole <verdict> block, found one left open.")
    if n_closings > 1:
        raise _unusable(
            "malformed_verdict", "expected one </verdict> at the end, found more than one."
        )
    start, stop = tags[last].end(), tags[last + 1].start()
    for pattern in _LISTS:
        if match := pattern.fullmatch(text, start, stop):
            return tags[last].start(), match["better"], match["worse"]
    raise _unusable(
        "malformed_verdict",
        "expected <better>…</better> and <worse>…</worse> once each and nothing else in the "
        f"verdict, found {_quoted(text[start:stop].strip())}.",
    )


def _parse_list(body: str, side: str, n_passages: int) -> dict[int, None]:
    """Read one list of labels, in order and without repeats; whatever is not one is refused."""
    text = "\n".join(line for raw in body.split("\n") if (line := " ".join(raw.split())))
    if label := _LIST_LABELS[side].match(text):
        text = text[label.end() :].lstrip()
    if len(text) > 1:
        text = text.removesuffix(".")
    in_brackets = text.startswith("[") and text.endswith("]")
    # A bare number outside brackets could be a count, and "- 1" inside them a negative number.
    text = text[1:-1].strip() if in_brackets else _BULLET.sub("", text)
    if text.lower() in _NOTHING:
        return {}
    item_pattern = _ITEM_IN_BRACKETS if in_brackets else _ITEM
    numbers: dict[int, None] = {}
    item = item_pattern.match(text)
    while item:
        numbers.update((int(number), None) for number in _NUMBER.findall(item[0]))
        if item.end() == len(text):
            break
        separator = _SEPARATOR.match(text, item.end())
        item = separator and item_pattern.match(text, separator.end())
    else:
        raise _unusable(
            "malformed_list",
            f"expected only labels such as [Doc (i), Doc (j)] in <{side}>, found {_quoted(text)}.",
        )
    if unknown := [number for number in numbers if not 1 <= number <= n_passages]:
        raise _unusable(
            "unknown_id",
            f"expected documents from 1 to {n_passages}, found {_listed(unknown)} in <{side}>.",
        )
    return numbers


def _listed(numbers: Sequence[object]) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return shown if len(numbers) <= 10 else f"{shown} and {len(numbers) - 10} more"


def _find_reasons(text: str) -> dict[int, str]:
    """Find the first paragraph that opens with a passage's own label, for those that have one."""
    text = f"\n{text}"
    lines = list(_REASONING.finditer(text))
    reasons: dict[int, str] = {}
    for i, line in enumerate(lines):
        number = int(line[1] or line[2])
        if number in reasons:
            continue
        stop = lines[i + 1].start() if i + 1 < len(lines) else len(text)
        part = text[line.end() : stop].split("\n<", 1)[0]
        paragraph = part.strip().split("\n\n", 1)[0]
        if paragraph := _CONTROLS.sub(" ", paragraph).strip():
            reasons[number] = paragraph
    return reasons


# -- Replies in json ------------------------------------------------------------------------------

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)```", re.DOTALL | re.IGNORECASE)
_BY_GRADE = (
    Relevance.NOT_RELEVANT,
    Relevance.NOT_RELEVANT,
    Relevance.WORSE,
    Relevance.BETTER,
)


def _parse_json(text: str, n_passages: int, judge: str) -> list[Verdict]:
    values = _load_object(text)
    ids = _json_ids(n_passages)
    if unknown := [_quoted(key) for key in values if key not in set(ids)]:
        raise _unusable(
            "unknown_id",
            f"expected entries for documents 1 to {n_passages} only, found {_listed(unknown)}.",
        )
    if missing := [key for key in ids if key not in values]:
        raise _unusable(
            "missing_ids", f"expected an entry for every document, found no {_listed(missing)}."
        )
    entries = [_read_entry(key, values[key]) for key in ids]
    relevant = [i for i, (grade, _) in enumerate(entries) if _BY_GRADE[grade].is_relevant]
    relevant.sort(key=lambda i: -entries[i][0])
    ranks = {i: rank for rank, i in enumerate(relevant)}
    return [
        Verdict(
            relevance=_BY_GRADE[grade], judge=judge, rank=ranks.get(i), grade=grade, reason=reason
        )
        for i, (grade, reason) in enumerate(entries)
    ]


def _json_ids(n_passages: int) -> list[str]:
    return [f"doc_{number}" for number in range(1, n_passages + 1)]


def _load_object(text: str) -> dict[str, object]:
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        values = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _unusable(
            "bad_json", f"expected one JSON object and nothing else, found an error: {error}."
        ) from error
    if not isinstance(values, dict):
        raise _unusable(
            "bad_json", f"expected one JSON object, found {_quoted(type(values).__name__)}."
        )
    return values


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _read_entry(key: str, entry: object) -> tuple[int, str | None]:
    """Read one passage's grade, and its reason if there is one."""
    if not isinstance(entry, dict):
        raise _unusable("bad_json", f"expected an object for {key}, found {_quoted(entry)}.")
    grade = entry.get("grade")
    # type(): True is an int to isinstance, and 2.0 equals 2.
    if type(grade) is not int or not 0 <= grade < len(_BY_GRADE):
        raise _unusable(
            "bad_grade", f"expected the grade 0, 1, 2 or 3 for {key}, found {_quoted(grade)}."
        )
    reason = entry.get("reason")
    if not isinstance(reason, str) or len(entry) != 2:
        raise _unusable(
            "bad_json",
            f"expected a reason and a grade and nothing else for {key}, found "
            f"{_quoted(sorted(entry))}.",
        )
    return grade, _CONTROLS.sub(" ", reason).strip() or None
