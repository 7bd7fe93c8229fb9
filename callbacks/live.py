"""LiveJudge: asks the cascade in the background, the most suspect rows first.

Everything runs on the library's own event loop, in a thread beside the training. The training
hands over scores that its loss computed anyway, and takes verdicts from the index; it never waits.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from hf_relabel.callbacks.identity import TextIds
from hf_relabel.callbacks.index import VerdictIndex
from hf_relabel.callbacks.shapes import ASIDE, TrainingRow, TrainingShape, find_shape

from hf_relabel import background
from hf_relabel.errors import RelabelError
from hf_relabel.formats import Batch, Format, Row, content_hash, get_format
from hf_relabel.policy import open_negatives
from hf_relabel.transform import Relabeler
from hf_relabel.verdicts import Trace

if TYPE_CHECKING:
    from hf_relabel.callbacks.masking import Scores

__all__ = ["LiveJudge"]

logger = logging.getLogger("hf_relabel")

_FLUSH_S = 0.1
_SCAN_ROWS = 32  # read at a time: some 2 ms in which the training may have to wait for the GIL
_SCAN_PAUSE_S = 0.05
_STOP_S = 2.0


@dataclass(slots=True, kw_only=True)
class _Query:
    """What is known of one query: where its rows are, and how suspect they look.

    Attributes:
        rows: Numbers in the dataset.
        margin: The highest similarity of a negative without a verdict, less the positive's; None
            before the model scored it.
        is_done: Whether it was asked about, or needs no asking.
        n_seen: Batches that it was in.
    """

    rows: list[int]
    margin: float | None = None
    is_done: bool = False
    n_seen: int = 0


class LiveJudge:
    """Judges a dataset's rows while a model trains on them.

    Args:
        relabeler: Whose cascade and cache are used.
        index: Where new verdicts go; this process must have built it.
        dataset: Rows by number, or a stream.
        max_in_flight: Queries judged at once.

    Attributes:
        n_judged: Pairs that got a verdict in this run.
        n_pending: Queries that wait to be asked about, as far as the dataset was read.
        is_warm: Whether the model's scores may decide what is asked first; set it when they may.
        error: Why judging stopped before its time; None while all is well.
        order: The queries' ids in the order in which they were asked about.
        n_asked_unscored: How many of them came before the model's first scores.
        n_published: Queries whose new verdicts the index holds.
    """

    def __init__(
        self, relabeler: Relabeler, index: VerdictIndex, dataset: Any, *, max_in_flight: int = 16
    ) -> None:
        self.n_judged = 0
        self.n_pending = 0
        self.order: list[int] = []
        self.n_asked_unscored = 0
        self.n_published = 0
        self.error: str | None = None
        self.is_warm = False
        self._sees_batches = False
        self._relabeler = relabeler
        self._index = index
        self._dataset = dataset
        self._max_in_flight = max_in_flight
        self._ids = TextIds()
        self._scores: deque[Scores] = deque(maxlen=64)
        self._queries: dict[int, _Query] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._n_pushed = 0
        self._margins = [0.0, 0]
        self._fresh: set[str] = set()
        self._found: dict[int, bool] = {}
        self._n_late = 0
        self._n_undecided = 0
        self._future: Future[None] | None = None
        self._has_ended = threading.Event()

    def start(self) -> None:
        """Begin judging; returns at once."""
        self._relabeler.cascade.start_run()
        self._future = asyncio.run_coroutine_threadsafe(self._run(), background.loop())

    def stop(self) -> None:
        """End judging: what is in flight is given up after a moment, what came is kept."""
        future, self._future = self._future, None
        if future is None:
            return
        future.cancel()
        self._has_ended.wait(_STOP_S)
        self._drain()
        self._flush()

    def see(self, scores: Scores) -> None:
        """Take a batch's scores; called by the training, which goes on at once."""
        self._scores.append(scores)

    @property
    def cost_usd(self) -> float | None:
        """What the calls of this run cost, where the cascade can tell; None is unknown, never 0."""
        cost: float | None = getattr(self._relabeler.cascade.counts, "cost_usd", None)
        return cost

    @property
    def n_used(self) -> int:
        """False negatives found in this run that a later batch held."""
        return sum(self._found.values())

    def summary(self) -> str:
        """Say in one line what was judged, and what came of it."""
        text = (
            f"Judged {self.n_judged} pairs while training ({self._n_undecided} undecided, "
            f"{self.n_pending} queries left), {len(self._found)} queries with a false negative"
        )
        if self._sees_batches:
            n_unused = len(self._found) - self.n_used
            text += (
                f": {self._n_late} late, after a batch had held them; {self.n_used} used by a later "
                f"batch, {n_unused} unused"
            )
        return text if self.error is None else f"{text}. Judging stopped early: {self.error}"

    async def _run(self) -> None:
        tasks = [asyncio.create_task(self._scan()), asyncio.create_task(self._flush_often())]
        tasks += [asyncio.create_task(self._work()) for _ in range(self._max_in_flight)]
        try:
            await asyncio.gather(*tasks)
        except RelabelError as error:  # nothing about judging may stop a training
            self.error = str(error)
            logger.warning("judging stopped, training goes on: %s", error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            logger.exception("judging stopped, training goes on")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._has_ended.set()

    async def _scan(self) -> None:
        """Read the dataset bit by bit, so that rows can be found by their query."""
        for number, row in enumerate(self._rows()):
            self._register(number, row)
            if number % _SCAN_ROWS == _SCAN_ROWS - 1:
                await asyncio.sleep(_SCAN_PAUSE_S)

    def _rows(self) -> Iterable[TrainingRow]:
        if hasattr(self._dataset, "__len__") and hasattr(self._dataset, "__getitem__"):
            return (self._dataset[number] for number in range(len(self._dataset)))
        rows = self._dataset = _Remembered(self._dataset)
        return rows

    def _register(self, number: int, row: TrainingRow) -> None:
        shape = find_shape(row)
        if shape is None or self._skips(row):
            return
        query = self._ids(row[shape.query])
        known = self._queries.setdefault(query, _Query(rows=[], is_done=True))
        known.rows.append(number)
        if known.is_done:  # new, or asked about when not all of its rows were read
            known.is_done = False
            self.n_pending += 1
            self._push(query, known)

    def _skips(self, row: TrainingRow) -> bool:
        name = row.get(ASIDE)
        return name is not None and name.lower() in self._relabeler.policy.skip_subsets

    def _push(self, query: int, known: _Query) -> None:
        # A query that the model has not scored counts as an average one.
        total, n = self._margins
        margin = known.margin if known.margin is not None else (total / n if n else 0.0)
        self._n_pushed += 1
        heapq.heappush(self._heap, (-margin, self._n_pushed, query))

    async def _work(self) -> None:
        while True:
            self._drain()
            query = self._next()
            if query is None:
                await asyncio.sleep(_FLUSH_S)
                continue
            self.order.append(query)
            self.n_asked_unscored += self._margins[1] == 0
            for row in self._open_rows(self._queries[query]):
                await self._judge(query, row)

    def _next(self) -> int | None:
        """Take the most suspect query; entries that a newer score has overtaken are passed by."""
        while self._heap:
            priority, _, query = heapq.heappop(self._heap)
            known = self._queries[query]
            is_stale = known.margin is not None and priority != -known.margin
            if not known.is_done and not is_stale:
                known.is_done = True
                self.n_pending -= 1
                return query
        return None

    def _open_rows(self, known: _Query) -> list[Row]:
        """Read a query's rows, and return those with a negative that has no verdict."""
        rows = [self._dataset[number] for number in known.rows]
        shape = find_shape(rows[0])
        if shape is None:
            return []
        batch: Batch = {name: [row[name] for row in rows] for name in _columns(shape)}
        return [row for row in _format_of(shape).read(batch) if self._is_open(row)]

    def _is_open(self, row: Row) -> bool:
        passages = self._ids.of([passage.shown for passage in open_negatives(row)])
        query = np.uint64(self._ids(row.query))
        return bool(len(passages)) and not self._index.has(query, passages).all()  # type: ignore[arg-type]

    async def _judge(self, query: int, row: Row) -> None:
        question = self._relabeler.question(row)
        if question is None:
            return
        traces = await self._relabeler.cascade.judge_question(question, self._relabeler.cache)
        self._take(query, question.query, traces)

    def _take(self, query: int, text: str, traces: list[Trace]) -> None:
        verdicts = [trace[-1].relevance for trace in traces]
        n_decided = sum(1 for relevance in verdicts if relevance.is_decided)
        self.n_judged += n_decided
        self._n_undecided += len(verdicts) - n_decided
        if n_decided:
            self._fresh.add(content_hash(text))
        if any(relevance.is_relevant for relevance in verdicts):
            self._found.setdefault(query, False)
            self._n_late += self._queries[query].n_seen > 0

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            self._flush()

    def _flush(self) -> None:
        """Put new verdicts where every worker and rank of this node sees them."""
        fresh, self._fresh = self._fresh, set()
        if fresh and self._index.writer is not None:
            writer = self._index.writer
            writer.add([writer.record(query) for query in fresh])
            self._index.reload()
            self.n_published += len(fresh)

    def _drain(self) -> None:
        while self._scores:
            self._sees_batches = True  # losses without masks show none: then use is not known
            scores = self._scores.popleft()
            queries = scores.queries.cpu().numpy().view(np.uint64)
            docs = scores.docs.cpu().numpy().view(np.uint64)
            self._weigh(queries, docs, scores.scores.float().cpu().numpy())

    def _weigh(self, queries: Any, docs: Any, scores: Any) -> None:
        if docs.shape[1] < 2:
            return
        has_verdict = self._index.has(queries[:, None], docs[:, 1:])
        margins = np.where(has_verdict, -np.inf, scores[:, 1:]).max(axis=1) - scores[:, 0]
        for query, margin in zip(queries.tolist(), margins.tolist(), strict=True):
            known = self._queries.get(query)
            if known is None:
                continue
            known.n_seen += 1
            if query in self._found:
                self._found[query] = True
            if self.is_warm and not known.is_done and math.isfinite(margin):
                known.margin = margin
                self._margins[0] += margin
                self._margins[1] += 1
                self._push(query, known)


class _Remembered:
    """A stream's rows, kept as they come: a stream has no rows by number."""

    def __init__(self, stream: Iterable[TrainingRow]) -> None:
        self._stream = stream
        self._rows: list[TrainingRow] = []

    def __iter__(self) -> Any:
        for row in self._stream:
            self._rows.append(row)
            yield row

    def __getitem__(self, number: int) -> TrainingRow:
        return self._rows[number]


def _columns(shape: TrainingShape) -> list[str]:
    return [shape.query, *shape.texts, *([shape.label] if shape.label else [])]


def _format_of(shape: TrainingShape) -> Format:
    first, *others = shape.texts
    if shape.kind == "tuples" and shape.is_spread:
        columns = {"anchor": shape.query, "positive": first, "negative": others[0]}
        return get_format("triplet", columns)
    if shape.kind == "tuples":
        numbered = {f"negative_{number}": name for number, name in enumerate(others, 1)}
        return get_format("n-tuple", {"anchor": shape.query, "positive": first, **numbered})
    name = "labeled-list" if shape.kind == "lists" else "labeled-pair"
    passage, label = ("documents", "labels") if shape.kind == "lists" else ("document", "label")
    return get_format(name, {"anchor": shape.query, passage: first, label: str(shape.label)})
