"""Controls: passages whose truth is known, planted among a run's negatives to test its judges.

Two kinds, one planted passage in each question:

- positives: a row with two or more of them gives one up. It is shown among the row's negatives, and
  the others stay as the ground truth. A row with one positive gives none: without it there is nothing
  left to compare with. A judge should flag it; the share that it flags is its recall.
- random: a passage of another query that occurs nowhere with this one, planted in rows with a
  suspect first, for there the later stages look as well. A judge should pass it over.

A planted passage changes the prompt, and a judge compares passages with each other. So controls are
questions of their own, beside those of the run: what is said of the real negatives in them is not
used, no verdict on them becomes final, and nothing of them is in the data, the decisions or the
published verdicts. Only their replies are kept, so that the same controls are paid for once.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from hf_relabel.cache import Call, Failure, VerdictCache
from hf_relabel.errors import SettingError
from hf_relabel.formats import Passage, Row, content_hash
from hf_relabel.judges.money import LOCAL
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.judging import Progress
from hf_relabel.questions import Question
from hf_relabel.rates import Rate
from hf_relabel.report import ControlReport, PlantedCounts, StageCounts
from hf_relabel.transform import Relabeler
from hf_relabel.verdicts import Action, Trace, Verdict

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["run_controls"]

T = TypeVar("T")
Kind = Literal["positives", "random"]

_POOL_PER_CONTROL = 4  # random passages at hand for each control: some occur with its query
_MIN_COMPARED = 2
_REPEATED = 0.9
"""Judges that repeat more of their replies than this, whatever they are shown, read none of it."""


def run_controls(
    relabeler: Relabeler,
    dataset: Dataset | DatasetDict,
    *,
    n: int,
    seed: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ControlReport:
    """Plant known positives and random passages beside a judged dataset, and count what judges say.

    Args:
        relabeler: Whose cascade is tested; `judge` ran before.
        dataset: The rows that were judged.
        n: How many of each kind to plant: fewer, where fewer rows can take one.
        seed: Chooses rows, passages and places; None is the relabeler's.
        progress: Called after each question, on a thread of its own.

    Returns:
        The counts; without rates, and with the reason in `refused`, where the judges did not look
        at the planted passages.

    Raises:
        SettingError: The rows were not judged, or n is below 1.
        AccountError: The run cannot go on; replies that came are in the cache.
    """
    if n < 1:
        raise SettingError(f"expected one control or more of each kind, found {n}.")
    draw = _Draw(relabeler.seed if seed is None else seed)
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    controls = _plant(relabeler, parts, n, draw)
    since = time.time()
    answers = relabeler.probe([control.question for control in controls], progress=progress)
    report = ControlReport(wanted=n, stages=_count_calls(relabeler, controls, answers, since))
    report.refused = _fault(relabeler, controls, answers)
    if report.refused is None:
        report.positives = _count(relabeler, "positives", controls, answers)
        report.random = _count(relabeler, "random", controls, answers)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Control:
    """One planted passage: the question that holds it, and what the run said of its row.

    Attributes:
        place: Where in the question it stands, from 0.
    """

    kind: Kind
    question: Question
    place: int
    before: Mapping[str, Trace]

    @property
    def is_among_suspects(self) -> bool:
        return _has_suspect(self.before)


class _Draw:
    """Numbers that depend on a seed and a name alone, so that more rows change few of them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, *name: str) -> int:
        text = "\0".join([str(self._seed), *name]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class _Lowest(Generic[T]):
    """The items with the lowest ranks of a stream, each rank once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: dict[int, T] = {}
        self._heap: list[int] = []

    def add(self, rank: int, item: T) -> None:
        if rank in self._items:
            return
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, -rank)
        elif rank < -self._heap[0]:
            del self._items[-heapq.heapreplace(self._heap, -rank)]
        else:
            return
        self._items[rank] = item

    def __iter__(self) -> Iterator[T]:
        return (self._items[rank] for rank in sorted(self._items))


def _plant(relabeler: Relabeler, parts: Sequence[Dataset], n: int, draw: _Draw) -> list[_Control]:
    givers: _Lowest[Row] = _Lowest(n)
    takers: _Lowest[Row] = _Lowest(n)
    pool: _Lowest[Passage] = _Lowest(_POOL_PER_CONTROL * n + 100)
    for row, traces in _judged_rows(relabeler, parts):
        query = content_hash(row.query)
        if len({passage.key for passage in row.positives}) > 1:
            givers.add(draw("positives", query), row)
        behind = 0 if _has_suspect(traces) else 2**64
        takers.add(behind + draw("random", query), row)
        for passage in (*row.positives, *row.negatives):
            pool.add(draw("pool", passage.key), passage)
    planted = [_positive_of(relabeler, row, draw) for row in givers]
    return planted + _random(relabeler, parts, list(takers), list(pool), draw)


def _judged_rows(
    relabeler: Relabeler, parts: Iterable[Dataset]
) -> Iterator[tuple[Row, Mapping[str, Trace]]]:
    is_judged = False
    for part in parts:
        for row in relabeler.rows(part):
            traces = relabeler.known(row)
            if traces:  # rows that are skipped or have no open negative hold none
                is_judged = True
                yield row, traces
    if not is_judged:
        raise SettingError(
            "expected rows that were judged, found none. Call judge(dataset) first, with the same "
            "relabeler."
        )


def _has_suspect(traces: Mapping[str, Trace]) -> bool:
    return any(trace[0].relevance.is_relevant for trace in traces.values())


def _positive_of(relabeler: Relabeler, row: Row, draw: _Draw) -> _Control:
    """Move one of a row's positives among its negatives."""
    positives = {passage.key: passage for passage in row.positives}
    keys = sorted(positives)
    chosen = positives[keys[draw("which", content_hash(row.query)) % len(keys)]]
    left = tuple(passage for passage in row.positives if passage.key != chosen.key)
    return _control(relabeler, "positives", row, chosen, draw, positives=left)


def _random(
    relabeler: Relabeler,
    parts: Sequence[Dataset],
    rows: Sequence[Row],
    pool: Sequence[Passage],
    draw: _Draw,
) -> list[_Control]:
    """Plant in each row a passage that occurs nowhere with its query."""
    taken = _texts_of(relabeler, parts, {content_hash(row.query) for row in rows})
    controls = []
    for row in rows:
        query = content_hash(row.query)
        first = draw("foreign", query) % max(1, len(pool))
        turned = (*pool[first:], *pool[:first])
        foreign = next((passage for passage in turned if passage.key not in taken[query]), None)
        if foreign is not None:
            controls.append(
                _control(relabeler, "random", row, foreign, draw, positives=row.positives)
            )
    return controls


def _texts_of(
    relabeler: Relabeler, parts: Sequence[Dataset], queries: set[str]
) -> dict[str, set[str]]:
    """Return the keys of all passages that some queries have, in whichever rows."""
    found: dict[str, set[str]] = {query: set() for query in queries}
    for part in parts:
        for row in relabeler.rows(part):
            if (query := content_hash(row.query)) in found:
                found[query].update(passage.key for passage in (*row.positives, *row.negatives))
    return found


def _control(
    relabeler: Relabeler,
    kind: Kind,
    row: Row,
    planted: Passage,
    draw: _Draw,
    *,
    positives: Sequence[Passage],
) -> _Control:
    """Build the question: as many of the row's negatives as one call shows, and the planted one."""
    whole = relabeler.question(row)
    assert whole is not None  # noqa: S101  a row with verdicts has a question
    shown = whole.passages[: _max_passages(relabeler) - 1]
    place = draw("place", kind, content_hash(row.query)) % (len(shown) + 1)
    question = replace(
        whole,
        passages=(*shown[:place], planted.shown, *shown[place:]),
        positives=tuple(dict.fromkeys(passage.shown for passage in positives)),
    )
    return _Control(kind=kind, question=question, place=place, before=relabeler.known(row) or {})


def _max_passages(relabeler: Relabeler) -> int:
    return min(stage.judge.max_passages for stage in relabeler.cascade.stages)


def _count(
    relabeler: Relabeler,
    kind: Kind,
    controls: Sequence[_Control],
    answers: Sequence[Sequence[Trace]],
) -> PlantedCounts:
    chosen = [
        (control, traces[control.place])
        for control, traces in zip(controls, answers, strict=True)
        if control.kind == kind
    ]
    traces = [trace for _, trace in chosen]
    finals = [trace[-1].relevance for trace in traces if trace[-1].relevance.is_decided]
    actions = Counter(relabeler.policy.action_on(relevance) for relevance in finals)
    n_acted_on = len(finals) - actions[Action.KEEP]
    return PlantedCounts(
        planted=len(traces),
        among_suspects=sum(control.is_among_suspects for control, _ in chosen),
        stages=[
            _flagged([trace[index] for trace in traces if len(trace) > index])
            for index in range(len(relabeler.cascade.stages))
        ],
        acted_on=Rate.from_counts(n_acted_on, len(finals)),
        promoted=actions[Action.PROMOTE],
        undecided=len(traces) - len(finals),
    )


def _flagged(verdicts: Sequence[Verdict]) -> Rate:
    decided = [verdict.relevance for verdict in verdicts if verdict.relevance.is_decided]
    return Rate.from_counts(sum(relevance.is_relevant for relevance in decided), len(decided))


def _count_calls(
    relabeler: Relabeler,
    controls: Sequence[_Control],
    answers: Sequence[Sequence[Trace]],
    since: float,
) -> list[StageCounts]:
    """Count the calls behind the controls, without those that the run made for itself."""
    counts = []
    for index, stage in enumerate(relabeler.cascade.stages):
        source = LOCAL if isinstance(stage.judge, LocalJudge) else None
        count = StageCounts(
            name=stage.title, model=stage.judge.model, cost_usd=0.0, price_source=source
        )
        own = {call for control in controls for call in _calls(control.before.values(), index)}
        asked = dict.fromkeys(call for traces in answers for call in _calls(traces, index))
        for call in asked:
            if call not in own:
                _add_call(count, call, relabeler, since)
        counts.append(count)
    return counts


def _add_call(count: StageCounts, key: str, relabeler: Relabeler, since: float) -> None:
    attempts: list[Call | Failure] = [*relabeler.cache.failures(key)]
    if (call := relabeler.cache.call(key)) is not None:
        attempts.append(call)
    for attempt in attempts:
        count.add_call(attempt.reply, is_new=attempt.time >= since, prices=relabeler.prices)


def _calls(traces: Iterable[Trace], index: int) -> list[str]:
    """Return the keys of the calls of one stage, each once."""
    calls = (trace[index].call for trace in traces if len(trace) > index)
    return list(dict.fromkeys(call for call in calls if call is not None))


def _fault(
    relabeler: Relabeler, controls: Sequence[_Control], answers: Sequence[Sequence[Trace]]
) -> str | None:
    """Say why the answers are none to the planted passages, or None."""
    finals = [traces[control.place][-1] for control, traces in zip(controls, answers, strict=True)]
    if finals and not any(verdict.relevance.is_decided for verdict in finals):
        reasons = Counter(verdict.reason or "unknown" for verdict in finals)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        return (
            f"none of the {len(finals):,} questions with a planted passage got a usable answer "
            f"({listed}). Controls need judges that can be asked now; recorded and published "
            "verdicts know nothing of planted passages."
        )
    for index, stage in enumerate(relabeler.cascade.stages):
        if isinstance(stage.judge, LocalJudge):
            continue
        n_repeated, n_compared = _count_repeated(relabeler, controls, answers, index)
        if n_compared >= _MIN_COMPARED and n_repeated > _REPEATED * n_compared:
            return (
                f"the judge {stage.judge.name!r} gave {n_repeated:,} of {n_compared:,} questions "
                "with a planted passage, word for word, the reply that it had given without it. It "
                "repeats recorded replies, which do not cover planted passages, or does not read "
                "what it is shown; rates from such replies would mean nothing. Ask a live judge."
            )
    return None


def _count_repeated(
    relabeler: Relabeler,
    controls: Sequence[_Control],
    answers: Sequence[Sequence[Trace]],
    index: int,
) -> tuple[int, int]:
    """Count replies of one stage that are those to the row without the planted passage.

    A stage that was asked the very question of the run (the planted passage did not reach it) says
    nothing, and neither does one that is shown a passage at a time: "no" is like any other "no".

    Returns:
        How many are repeated, of how many that can be compared.
    """
    if _max_passages(relabeler) == 1:
        return 0, 0
    n_repeated = n_compared = 0
    for control, traces in zip(controls, answers, strict=True):
        before = _calls(control.before.values(), index)
        after = [call for call in _calls(traces, index) if call not in before]
        old, new = (_reply_texts(relabeler.cache, calls) for calls in (before, after))
        if old and new:
            n_compared += 1
            n_repeated += new <= old
    return n_repeated, n_compared


def _reply_texts(cache: VerdictCache, keys: Iterable[str]) -> set[str]:
    return {call.reply.text for key in keys if (call := cache.call(key)) is not None}
