"""Questions as a file, replies from a file: judging by an engine that no network reaches.

`export_requests` writes what a run would ask next, as `vllm run-batch` and the Batch API take it;
`import_replies` reads what they give back into the cache. The two in turn, once for each stage,
are a run in which no call is made.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hf_relabel import background
from hf_relabel.cache import Call, Entry, Failure, VerdictCache
from hf_relabel.cascade import Cascade
from hf_relabel.errors import SourceError, UnusableReplyError
from hf_relabel.formats import content_hash
from hf_relabel.judges.batch_files import Outcome, outcome_of_line, request_id, request_line
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.protocol import Judge
from hf_relabel.judges.redirect import RedirectedJudge
from hf_relabel.questions import Question, Reply
from hf_relabel.transform import Relabeler

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImportCounts", "export_requests", "import_replies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCounts:
    """What became of a file's lines.

    Attributes:
        n_lines: Lines that name a request.
        n_read: Replies that hold verdicts and are in the cache now.
        n_unusable: Faults, and replies without verdicts: their questions stay open.
        n_open: Rows that have open questions left.
    """

    n_lines: int
    n_read: int
    n_unusable: int
    n_open: int


def export_requests(
    relabeler: Relabeler, splits: Mapping[str, Dataset], path: Path
) -> dict[Path, int]:
    """Write the requests that a run would send next, without sending any.

    Args:
        relabeler: Whose cascade asks; what its cache knows is not asked.
        splits: Split name → rows.
        path: The file; where several models are to be asked, each gets one, named after it.

    Returns:
        The files, and how many requests each holds.
    """
    rounds = _Rounds(relabeler)
    written: dict[str, int] = {}
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for question in _questions(relabeler, splits):
            for judge, part in rounds.open_calls(question):
                custom_id = request_id(judge.key(part))
                if custom_id in seen:
                    continue
                seen.add(custom_id)
                if judge.model not in files:
                    part_path = _temporary(path, judge.model)
                    part_path.parent.mkdir(parents=True, exist_ok=True)
                    files[judge.model] = stack.enter_context(part_path.open("wb"))
                files[judge.model].write(request_line(custom_id, judge.body(part)))
                written[judge.model] = written.get(judge.model, 0) + 1
    names = {model: path if len(written) == 1 else _named(path, model) for model in written}
    for model, name in names.items():
        _temporary(path, model).replace(name)
    return {names[model]: count for model, count in written.items()}


def import_replies(relabeler: Relabeler, splits: Mapping[str, Dataset], path: Path) -> ImportCounts:
    """Read replies into the cache, for every stage that they answer, without a call.

    Args:
        relabeler: With the settings that the requests were written with.
        splits: The rows that they were written for.
        path: The output of `vllm run-batch`, or an output or error file of the Batch API.

    Raises:
        SourceError: The file cannot be read, or no line of it names a request.
    """
    lines = _index(path)
    rounds, cache = _Rounds(relabeler), relabeler.cache
    n_read = n_unusable = n_open = 0
    done: set[str] = set()
    with path.open("rb") as file:
        for question in _questions(relabeler, splits):
            while calls := rounds.open_calls(question):
                entries: list[Entry] = []
                for judge, part in calls:
                    key = judge.key(part)
                    if key in lines and key not in done:
                        done.add(key)
                        file.seek(lines[key])
                        entries += _entries(judge, part, outcome_of_line(file.readline()), cache)
                if entries:
                    cache.write(entries)
                n_new = sum(isinstance(entry, Call) for entry in entries)
                n_read, n_unusable = n_read + n_new, n_unusable + len(entries) - n_new
                if not n_new:
                    n_open += 1
                    break
    return ImportCounts(n_lines=len(lines), n_read=n_read, n_unusable=n_unusable, n_open=n_open)


class _OpenCallError(Exception):
    """A judge would have to be asked now."""


class _Rounds:
    """Finds the calls that a row waits for, by letting its cascade go as far as the cache does."""

    def __init__(self, relabeler: Relabeler) -> None:
        self._cache = relabeler.cache
        self._calls: list[tuple[ChatJudge, Question]] = []
        self._cascade: Cascade = copy(relabeler.cascade)
        self._cascade.stages = tuple(
            replace(stage, judge=RedirectedJudge(stage.judge, self._note))
            if isinstance(stage.judge, ChatJudge)
            else stage
            for stage in relabeler.cascade.stages
        )

    def open_calls(self, question: Question) -> list[tuple[ChatJudge, Question]]:
        """Return the calls that can be made now; none when the row is judged."""
        self._calls.clear()
        with contextlib.suppress(_OpenCallError):
            background.run(self._cascade.judge_question(question, self._cache))
        return list(self._calls)

    async def _note(self, judge: ChatJudge, question: Question, _: object) -> Reply:
        self._calls.append((judge, question))
        raise _OpenCallError(judge.name)


def _questions(relabeler: Relabeler, splits: Mapping[str, Dataset]) -> Iterator[Question]:
    for part in splits.values():
        for row in relabeler.rows(part):
            question = relabeler.question(row)
            if question is not None:
                yield question


def _entries(
    judge: Judge, question: Question, outcome: Outcome | None, cache: VerdictCache
) -> list[Entry]:
    """Return what the cache must keep of one line; nothing for a failure that it has already."""
    if outcome is None:
        return []
    key, reply, fault = judge.key(question), outcome.reply, outcome.fault
    reason, message = ("", "") if fault is None else (fault.reason, fault.message)
    if reply is not None:
        try:
            judge.parse(question, reply)
        except UnusableReplyError as error:
            reason, message = error.reason, str(error)
        else:
            passages = tuple(content_hash(passage) for passage in question.passages)
            return [
                Call(
                    key=key,
                    judge=judge.name,
                    reply=reply,
                    query=content_hash(question.query),
                    passages=passages,
                    time=time.time(),
                    supersedes=True,  # asked because what is there cannot be read any more
                )
            ]
    failure = Failure(
        key=key, judge=judge.name, reason=reason, message=message, time=time.time(), reply=reply
    )
    known = [(found.message, found.reply) for found in cache.failures(key)]
    return [] if (message, reply) in known else [failure]


def _index(path: Path) -> dict[str, int]:
    """Return where each request's line begins."""
    lines: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                outcome = outcome_of_line(line)
                if outcome is not None:
                    lines[outcome.custom_id] = offset
                offset += len(line)
    except OSError as error:
        raise SourceError(f"expected a file of replies, found {str(path)!r}: {error}") from error
    if not lines:
        raise SourceError(
            f"expected the output of a batch in {str(path)!r}, found no line with a custom_id. Give "
            "the output file of `vllm run-batch` or of the Batch API."
        )
    return lines


def _named(path: Path, model: str) -> Path:
    return path.with_name(f"{path.stem}-{_slug(model)}{path.suffix}")


def _temporary(path: Path, model: str) -> Path:
    return path.with_name(f".{path.name}.{_slug(model)}.part")


def _slug(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model)
