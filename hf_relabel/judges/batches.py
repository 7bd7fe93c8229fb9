"""Batches: the same questions, asked through a Batch API at half the price.

Rows do not know: each awaits `ask` as ever. Here its request is written to a file with others of
its model; the file becomes a batch when it is full, or when no more requests come for a moment; and
when the batch has ended, the row goes on, into the next stage's file if it must. What is under way
is on disk (`BatchFolder`), so a run that died finds its batches again and buys nothing twice.

Under a cap the most that a batch can cost is set aside in the ledger before its file goes out, and
stays there until the batch has ended and is booked, by this run or a later one. A file goes out as
far as the cap has room; the rest waits until other batches have ended and freed what they did not
use. Later stages come first then, so that rows that were begun are finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from hf_relabel.cache import VerdictCache
from hf_relabel.errors import AccountError, JudgeError, SettingError, UnusableReplyError
from hf_relabel.judges.batch_api import ENDED, MARK, BatchApi, BatchView
from hf_relabel.judges.batch_costs import BatchReserve, spent_pico
from hf_relabel.judges.batch_files import (
    CHAT_URL,
    base_key,
    outcome_of_line,
    request_id,
    request_line,
)
from hf_relabel.judges.batch_spool import Spool, SpooledLine
from hf_relabel.judges.batch_state import REPLY_FILES, BatchFolder, Manifest
from hf_relabel.judges.budget import Budget, worst_tokens
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.client import RetryRule
from hf_relabel.judges.faults import DROPPABLE, Fault
from hf_relabel.judges.ledger import PICO, BatchGrant, BatchLedger, ledger_file, to_pico
from hf_relabel.judges.protocol import Judge
from hf_relabel.judges.redirect import RedirectedJudge
from hf_relabel.questions import Question, Reply

__all__ = ["BatchSettings", "Batches"]

_AZURE_URL = "/chat/completions"
_CHARS_PER_TOKEN = 4
_BREATH = (
    200  # lines read between two turns of the loop, so that rows go on and are saved meanwhile
)
_MAX_REFUSALS = 50
# A whole batch refused for one of these would be refused again.
_FINAL_CODES = re.compile(r"model|billing|quota|permission|unauthor", re.IGNORECASE)
_LIMIT = re.compile(r"limit:?\s*([\d,_]+)|([\d,_]+)\s+enqueued", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How requests are gathered into batches, and how batches are watched.

    Attributes:
        max_requests: Most requests of one file; OpenAI takes 50,000.
        max_bytes: Largest file; OpenAI takes 200 MB, which binds first.
        max_enqueued_tokens: Most input tokens of a model on their way at once (estimated, 4
            characters each). A lower limit of the account is found out and kept.
        max_attempts: How often one request is sent before its row is given up.
        max_rows: Most rows under way at once. Each is held in memory: 35 KB for one query and 16
            passages of 100 words, measured; memory does not grow beyond them.
        quiet_s: A file goes out when no request joined it for this long.
        first_poll_s: Wait before a batch is looked at; grows by half each time.
        max_poll_s: The longest such wait.
        transfer_timeout_s: Longest time for one file, up or down.
        keeps_files: Whether a batch's files stay on the server once its replies are in the cache.
        retry: When a call for files or batches is sent again.
    """

    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    max_enqueued_tokens: int = 20_000_000
    max_attempts: int = 3
    max_rows: int = 20_000
    quiet_s: float = 5.0
    first_poll_s: float = 5.0
    max_poll_s: float = 120.0
    transfer_timeout_s: float = 1800.0
    keeps_files: bool = False
    retry: RetryRule = field(default_factory=lambda: RetryRule(max_attempts=20, max_wait_s=60.0))

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) in (int, float) and value <= 0:
                raise SettingError(f"expected {name} above 0, found {value}.")


class Batches:
    """The batches of one run; opened and used on one event loop, by one process a cache.

    Args:
        settings: Sizes, limits and waits.
        cache: Where the cascade keeps replies; batches under way are kept in its folder.

    Raises:
        CacheError: On entering, when another process runs batches of this cache.
    """

    def __init__(self, settings: BatchSettings, cache: VerdictCache) -> None:
        self.settings = settings
        self.cache = cache
        self.folder = BatchFolder(cache.directory)
        self.ledger = BatchLedger(ledger_file(cache.directory))
        self.news = asyncio.Event()
        """Set whenever a file may go out that could not before."""
        self._judges: list[ChatJudge] = []
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._is_short = False
        self._open = contextlib.ExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._open.enter_context(self.folder.locked())
        self.folder.remove_leftovers()
        self._settle_what_was_left()
        self.start(self._submit_files())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # After an error a row may have ended before what it was given was saved.
            is_whole = kind is None and self._stopped is None
            for lane in self._lanes.values():
                await lane.close(is_whole=is_whole)
            self._forget_what_is_cached()
            self.folder.remove_leftovers()
            self.ledger.free_unsent()
        finally:
            self._open.close()

    def judge(self, judge: Judge) -> Judge:
        """Return a judge that asks through batches, or the judge itself where it asks no API.

        Raises:
            SettingError: It has a cap that cannot hold here.
        """
        if not isinstance(judge, ChatJudge):
            return judge
        self._check_budget(judge)
        self._judges.append(judge)
        return RedirectedJudge(judge, self._ask)

    def _check_budget(self, judge: ChatJudge) -> None:
        budget = judge.budget
        if budget is not None:
            budget.batch_price(judge.model)
            if budget.folder.resolve() != self.cache.directory.resolve():
                raise SettingError(
                    f"expected the budget of judge {judge.name!r} in the cache's folder "
                    f"{str(self.cache.directory)!r}, where a later run finds what its batches hold; "
                    f"found {str(budget.folder)!r}."
                )
        for other in self._judges:
            if _place(other) == _place(judge) and other.budget is not budget:
                raise SettingError(
                    f"expected one budget for all judges that ask {judge.model!r} in batches, found "
                    "two, or one judge without. Use max_cost_usd, which is for all."
                )

    def stop(self, error: BaseException) -> None:
        """End the run: every row that waits gets the error. Batches on the server go on."""
        if self._stopped is None:
            self._stopped = error
            for task in self._tasks - {_current_task()}:
                task.cancel()
            for lane in self._lanes.values():
                lane.give_up(error)

    @property
    def is_stopped(self) -> bool:
        return self._stopped is not None

    def check(self) -> None:
        """Raise what ended the run, if anything did."""
        if self._stopped is not None:
            raise self._stopped

    def _settle_what_was_left(self) -> None:
        """Bring the ledger up to what a process that died had on disk already."""
        self.ledger.free_unsent()
        for manifest in self.folder.manifests():
            if manifest.end is not None:
                self.ledger.book(manifest.id, manifest.spent)

    def _forget_what_is_cached(self) -> None:
        """Drop ended batches whose rows needed no question any more, so that no lane saw them."""
        for manifest in self.folder.manifests():
            keys = map(base_key, manifest.keys)
            if manifest.end is not None and all(map(self.cache.has_call, keys)):
                self.folder.drop(manifest)

    async def _ask(
        self,
        judge: ChatJudge,
        question: Question,
        unusable: tuple[Reply, UnusableReplyError] | None,
    ) -> Reply:
        self.check()
        custom_id = request_id(judge.key(question), is_repair=unusable is not None)
        lane = self._lane(judge)
        return await lane.ask(custom_id, lambda: judge.body(question, unusable=unusable))

    def _lane(self, judge: ChatJudge) -> _Lane:
        lane = self._lanes.get(_place(judge))
        if lane is None:
            lane = self._lanes[_place(judge)] = _Lane(self, judge)
        return lane

    async def _submit_files(self) -> None:
        """Submit files for as long as the run goes on; the only place that sets money aside."""
        while True:
            await self.news.wait()
            self.news.clear()
            if self._is_short:
                # Rows that have just got a reply ask their next stage, which comes first.
                await asyncio.sleep(self.settings.quiet_s)
                for lane in self._lanes.values():
                    lane.seal()
            await self._submit_what_fits()

    async def _submit_what_fits(self) -> None:
        for judge in reversed(self._judges):  # later stages first: rows begun are finished
            lane = self._lanes.get(_place(judge))
            shortage = None if lane is None else await lane.submit_what_fits()
            if shortage is not None:
                self._wait_for_money(shortage)
                return
        self._is_short = False

    def _wait_for_money(self, shortage: _Shortage) -> None:
        """Go on when something has ended that may free money, if there is any such thing.

        Raises:
            BudgetError: There is none.
        """
        is_busy = any(lane.is_busy for lane in self._lanes.values()) or self._collect_more()
        if not is_busy and not shortage.can_wait:
            raise shortage.budget.refusal(shortage.pico)
        if not self._is_short:
            _log.info("the cap has no room for the next request until others are booked")
        self._is_short = True
        if not is_busy:  # the end of a batch is news; of what another process does there is none
            self.news.set()

    def _collect_more(self) -> bool:
        """Look for batches of stages that no row has asked yet: their ends free money, too."""
        under_way = {(m.host, m.model) for m in self.folder.manifests() if m.end is None}
        left = [
            judge
            for judge in self._judges
            if _place(judge) in under_way and _place(judge) not in self._lanes
        ]
        for judge in left:
            self._lane(judge)
        return bool(left)

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something beside the rows; its error ends the run."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # rows would wait for ever for what has died
                self.stop(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # one cancelled before its first step
        return task


_Body = Callable[[], dict[str, object]]


@dataclass(slots=True, kw_only=True)
class _Request:
    """A request that a row waits for; its body is built when a file is written, and not kept."""

    custom_id: str
    body: _Body
    reply: asyncio.Future[Reply]
    n_sent: int = 0
    left_out: frozenset[str] = frozenset()
    """Parameters that it was last sent without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shortage:
    """The cap has no room for the next request, which could cost so much."""

    budget: Budget
    pico: int
    can_wait: bool
    """Whether another process may give money back."""


@dataclass(slots=True, kw_only=True)
class _Stock:
    """Replies of an ended batch that are on disk, and perhaps in no row yet."""

    manifest: Manifest
    keys: set[str] = field(default_factory=set)


class _Lane:
    """The batches of one model behind one host."""

    def __init__(self, batches: Batches, judge: ChatJudge) -> None:
        self._batches = batches
        self._settings = batches.settings
        self._folder = batches.folder
        self._judge = judge.name
        self._host, self._model = judge.endpoint.host, judge.model
        self._api = BatchApi(
            judge.connect(),
            retry=self._settings.retry,
            timeout_s=self._settings.transfer_timeout_s,
            url=CHAT_URL if judge.endpoint.azure_endpoint is None else _AZURE_URL,
        )
        self._budget = judge.budget
        self._price = None if self._budget is None else self._budget.batch_price(self._model)
        self._requests: dict[str, _Request] = {}
        self._under_way: dict[str, Manifest] = {}  # by custom_id
        self._in_stock: dict[str, tuple[Path, int]] = {}  # custom_id → file and offset
        self._handed: set[str] = set()
        self._stocks: list[_Stock] = []
        self._spool: Spool | None = None
        self._sealed: deque[Spool] = deque()
        self._quiet: asyncio.TimerHandle | None = None
        self._ceiling = self._settings.max_enqueued_tokens
        self._enqueued = 0
        self._n_refusals = 0
        self._is_held = False
        self._dropped: set[str] = set()
        self._cancelled_before: set[str] = set()  # manifests
        self._forgetting: set[asyncio.Task[None]] = set()
        self._recovered = batches.start(self._recover())
        self._recovered.add_done_callback(lambda _: batches.news.set())

    @property
    def is_busy(self) -> bool:
        """Whether a batch is under way, or may turn out to be."""
        return self._enqueued > 0 or not self._recovered.done()

    async def ask(self, custom_id: str, body: _Body) -> Reply:
        await asyncio.wait([self._recovered])
        self._batches.check()
        if (place := self._in_stock.pop(custom_id, None)) is not None:
            self._handed.add(custom_id)
            return _reply_at(*place)
        request = self._requests.get(custom_id)
        if request is None:
            future = asyncio.get_running_loop().create_future()
            request = _Request(custom_id=custom_id, body=body, reply=future)
            self._requests[custom_id] = request
            manifest = self._under_way.get(custom_id)
            if manifest is None:
                self._write(request)
            else:
                request.n_sent = 1 + manifest.attempts.get(custom_id, 0)
        return await asyncio.shield(request.reply)

    def give_up(self, error: BaseException) -> None:
        """Hand an error to every row that waits here."""
        if self._quiet is not None:
            self._quiet.cancel()
        for request in list(self._requests.values()):
            self._fail(request, error)

    async def close(self, *, is_whole: bool) -> None:
        """Close the connections, and forget the replies that the cache holds by now."""
        if self._spool is not None:
            self._spool.close()
        self._release(self._stocks, self._handed if is_whole else frozenset())
        await asyncio.gather(*self._forgetting)
        await self._api.close()

    # Files of requests

    def _write(self, request: _Request) -> None:
        body = {name: value for name, value in request.body().items() if name not in self._dropped}
        line = request_line(request.custom_id, body, url=self._api.url)
        if len(line) > self._settings.max_bytes:
            words = f"the request of {len(line):,} bytes fits into no file of a batch."
            fault = Fault(kind="row", reason="too_large", message=words)
            self._fail(request, fault.error(self._judge))
            return
        tokens = len(line) // _CHARS_PER_TOKEN + 1
        if self._spool is not None and self._is_full(self._spool, len(line), tokens):
            self.seal()
        spool = self._spool = self._spool or Spool(self._folder.file(uuid.uuid4().hex, "input"))
        spool.write(line, SpooledLine(request.custom_id, len(line), tokens, self._most(body)))
        request.n_sent += 1
        request.left_out = frozenset(self._dropped)
        if self._quiet is not None:
            self._quiet.cancel()
        loop = asyncio.get_running_loop()
        self._quiet = loop.call_later(self._settings.quiet_s, self.seal)

    def _most(self, body: Mapping[str, object]) -> int:
        """Return the most that a request can cost, in picodollars."""
        return 0 if self._price is None else to_pico(self._price.worst_usd(*worst_tokens(body)))

    def _is_full(self, spool: Spool, n_bytes: int, tokens: int) -> bool:
        return (
            len(spool.lines) >= self._settings.max_requests
            or spool.n_bytes + n_bytes > self._settings.max_bytes
            or spool.tokens + tokens > self._ceiling
        )

    def seal(self) -> None:
        """End the file that grows: it goes out as it is, when there is room."""
        if self._spool is not None:
            self._spool.close()
            self._sealed.append(self._spool)
            self._spool = None
            self._batches.news.set()

    async def submit_what_fits(self) -> _Shortage | None:
        """Submit files, as long as the queue and the cap have room; return what the cap lacked."""
        while self._sealed and not self._is_held and not self._batches.is_stopped:
            spool = self._sealed[0]
            if self._enqueued and self._enqueued + spool.tokens > self._ceiling:
                break
            manifest_id = uuid.uuid4().hex
            grant = await self._reserve(manifest_id, spool)
            if not grant.n_requests and self._budget is not None:
                pico, can_wait = spool.lines[0].pico, grant.can_wait
                return _Shortage(budget=self._budget, pico=pico, can_wait=can_wait)
            path = self._folder.file(manifest_id, "input")
            lines = await asyncio.to_thread(spool.take, grant.n_requests, path)
            if not spool.lines:
                self._sealed.popleft()
            self._enqueued += sum(line.tokens for line in lines)
            self._batches.start(self._submit(manifest_id, lines))
        return None

    async def _reserve(self, manifest_id: str, spool: Spool) -> BatchGrant:
        if self._budget is None:
            return BatchGrant(n_requests=len(spool.lines), can_wait=False)
        amounts = [line.pico for line in spool.lines]
        return await asyncio.to_thread(self._budget.reserve_batch, manifest_id, amounts)

    # Batches

    async def _recover(self) -> None:
        """Find what an earlier process left: batches under way, and replies in no row yet."""
        left = [
            manifest
            for manifest in self._folder.manifests()
            if (manifest.host, manifest.model) == (self._host, self._model)
        ]
        unsure = [manifest for manifest in left if manifest.batch_id is None]
        found = await self._find(unsure) if unsure else {}
        for manifest in left:
            if manifest.end is not None:
                async for _ in self._outcomes(manifest):
                    pass
            elif manifest.batch_id is not None:
                self._follow(manifest)
            elif (view := found.get(manifest.id)) is not None:
                _log.info("found batch %s, which was submitted as the run died", view.id)
                submitted = _submitted(manifest, view)
                self._folder.save(submitted)
                self._follow(submitted)
            else:
                self._batches.ledger.book(manifest.id, 0)  # no server has it
                self._folder.drop(manifest)

    async def _find(self, unsure: Sequence[Manifest]) -> dict[str, BatchView]:
        ids, since = [manifest.id for manifest in unsure], unsure[0].created
        found = await self._api.find(ids, since=since)
        if len(found) < len(ids) and time.time() - unsure[-1].created < self._settings.max_poll_s:
            # Made a moment ago, a batch may not be listed yet.
            await asyncio.sleep(self._settings.first_poll_s)
            found = await self._api.find(ids, since=since)
        return found

    async def _submit(self, manifest_id: str, lines: Sequence[SpooledLine]) -> None:
        keys = tuple(line.custom_id for line in lines)
        manifest = Manifest(
            id=manifest_id,
            host=self._host,
            model=self._model,
            keys=keys,
            tokens=sum(line.tokens for line in lines),
            created=time.time(),
            attempts=self._attempts(keys),
            reserve=self._reserve_of(lines),
        )
        # Before the server hears of it: a batch made as this process dies is found by this id.
        await asyncio.to_thread(self._folder.save, manifest)
        if manifest.reserve is not None:
            await asyncio.to_thread(self._batches.ledger.mark_sent, manifest.id)
        metadata = {
            MARK: manifest.id,
            "cache": self._folder.id,
            "model": self._model[:512],
            "requests": str(len(keys)),
        }
        path = self._folder.file(manifest.id, "input")
        view = await self._api.create(await self._api.upload(path), metadata)
        manifest = _submitted(manifest, view)
        await asyncio.to_thread(self._folder.save, manifest)
        path.unlink(missing_ok=True)
        _log.info(
            "submitted batch %s: %d requests to %s%s", view.id, len(keys), self._model,
            _at_most(manifest.reserve),
        )  # fmt: skip
        await self._watch(manifest)

    def _reserve_of(self, lines: Sequence[SpooledLine]) -> BatchReserve | None:
        if self._price is None:
            return None
        return BatchReserve(price=self._price, amounts=tuple(line.pico for line in lines))

    def _attempts(self, keys: Sequence[str]) -> dict[str, int]:
        sent = {key: self._requests[key].n_sent for key in keys if key in self._requests}
        return {key: n_sent - 1 for key, n_sent in sent.items() if n_sent > 1}

    def _follow(self, manifest: Manifest) -> None:
        """Watch a batch that an earlier process submitted; rows that ask its keys wait for it."""
        self._under_way.update(dict.fromkeys(manifest.keys, manifest))
        self._enqueued += manifest.tokens
        if self._folder.is_cancelled(manifest):
            self._cancelled_before.add(manifest.id)
        self._batches.start(self._watch(manifest))

    async def _watch(self, manifest: Manifest) -> None:
        wait_s, status = self._settings.first_poll_s, ""
        while True:
            view = await self._api.retrieve(str(manifest.batch_id))
            if view.status != status:
                status = view.status
                _log.info("batch %s is %s (%d of %d done)", view.id, status, *view.counts[1::-1])
            if status in ENDED:
                break
            await asyncio.sleep(wait_s)
            wait_s = min(self._settings.max_poll_s, 1.5 * wait_s)
        await self._settle(manifest, view)

    async def _settle(self, manifest: Manifest, view: BatchView) -> None:
        """Fetch all that an ended batch gave, whatever its end; ask again for what is missing."""
        for kind in REPLY_FILES:
            if kind in view.files:
                path = self._folder.file(manifest.id, kind)
                await self._api.download(view.files[kind], path)
        # One cancelled before this run: whoever runs again after that wants its requests asked.
        is_cancelled = (
            self._folder.is_cancelled(manifest) and manifest.id not in self._cancelled_before
        )
        manifest = await asyncio.to_thread(self._book, manifest, view)
        faults = {}
        async for custom_id, fault in self._outcomes(manifest):
            faults[custom_id] = fault
        for key in manifest.keys:
            self._under_way.pop(key, None)
        self._enqueued -= manifest.tokens
        missing = [self._requests[key] for key in manifest.keys if key in self._requests]
        if is_cancelled and missing:
            self._batches.stop(_cancelled(view, len(missing)))
        elif view.status == "failed":
            await self._refused(manifest, view, missing)
        else:
            self._n_refusals, self._is_held = 0, False
            self._settle_missing(view, missing, faults)
        # Cheap to tell, and it spares most looks into the cache.
        self._release([stock for stock in self._stocks if stock.keys <= self._handed], frozenset())
        self._batches.news.set()

    def _book(self, manifest: Manifest, view: BatchView) -> Manifest:
        """Note that a batch has ended and is here, and what it cost; frees the rest."""
        files = tuple(dict.fromkeys([*manifest.files, *view.files.values()]))
        manifest = replace(manifest, end=view.status, files=files)
        if manifest.reserve is not None:
            outcomes = map(outcome_of_line, _all_lines(self._folder.reply_files(manifest)))
            spent = spent_pico(
                manifest.reserve,
                manifest.keys,
                filter(None, outcomes),
                end=view.status,
                n_answered=view.counts[1],
            )
            manifest = replace(manifest, spent=spent)
            _log.info("batch %s cost $%.4f", view.id, spent / PICO)
        # In this order: whoever finds the manifest books what it says, once.
        self._folder.save(manifest)
        self._batches.ledger.book(manifest.id, manifest.spent)
        return manifest

    def _settle_missing(
        self, view: BatchView, missing: Sequence[_Request], faults: Mapping[str, Fault]
    ) -> None:
        words = f"batch {view.id} is {view.status}, and has no answer to this request."
        unanswered = Fault(kind="retry", reason=f"batch_{view.status}", message=words)
        for request in missing:
            fault = faults.get(request.custom_id, unanswered)
            fault = replace(fault, message=self._api.blanked(fault.message))
            if fault.kind == "stop":
                self._batches.stop(fault.error(self._judge))
            if self._batches.is_stopped:
                return
            if fault.parameter in DROPPABLE - request.left_out:
                self._dropped.add(str(fault.parameter))
                request.n_sent -= 1  # known from now on: not a failed attempt
                self._write(request)
            elif fault.kind == "retry":
                self._ask_again(request, fault)
            else:
                self._fail(request, fault.error(self._judge))

    def _ask_again(self, request: _Request, fault: Fault) -> None:
        if request.n_sent >= self._settings.max_attempts:
            self._fail(request, fault.error(self._judge))
        else:
            self._write(request)

    async def _refused(
        self, manifest: Manifest, view: BatchView, missing: Sequence[_Request]
    ) -> None:
        """Deal with a batch that failed as a whole: the queue is full, or lines cannot be read."""
        codes = {code for code, _, _ in view.errors}
        words = self._api.blanked("; ".join(sorted({m for _, _, m in view.errors})) or "no reason")
        if "token_limit_exceeded" in codes:
            await self._wait_for_room(manifest, words, missing)
            return
        by_line = {line: message for _, line, message in view.errors if line is not None}
        named = {
            manifest.keys[line - 1]: message
            for line, message in by_line.items()
            if 1 <= line <= len(manifest.keys)
        }
        if not named or any(_FINAL_CODES.search(code) for code in codes):
            raise AccountError(
                f"judge {self._judge!r}: batch {view.id} was refused: {words[:500]} Mend it and "
                "run the same command again; what was judged is kept.",
                reason="batch_failed",
            )
        self._n_refusals, self._is_held = 0, False
        for request in missing:
            if request.custom_id in named:
                message = self._api.blanked(named[request.custom_id])
                fault = Fault(kind="row", reason="batch_invalid", message=message)
                self._fail(request, fault.error(self._judge))
            else:
                beside = f"other lines of batch {view.id} were refused: {words[:200]}"
                self._ask_again(request, Fault(kind="retry", reason="batch_failed", message=beside))

    async def _wait_for_room(
        self, manifest: Manifest, words: str, missing: Sequence[_Request]
    ) -> None:
        """Submit again, in smaller files: the account lets fewer tokens wait than we thought."""
        self._n_refusals += 1
        if self._n_refusals > _MAX_REFUSALS:
            raise AccountError(
                f"judge {self._judge!r}: the account's queue stays full: {words[:500]} Run the same "
                "command again when it is not.",
                reason="batch_queue",
            )
        named = _LIMIT.search(words)
        limit = int(re.sub(r"\D", "", named[1] or named[2]) or 0) if named else 0
        if limit:
            self._ceiling = min(self._ceiling, limit)
        elif not self._enqueued:
            self._ceiling = max(1, manifest.tokens // 2)
        self._is_held = True  # until a batch of ours ends, or for a while where there is none
        for request in missing:
            request.n_sent -= 1  # waiting for room is not an attempt
            self._write(request)
        if not self._enqueued:
            wait_s = self._settings.first_poll_s * 1.5 ** min(self._n_refusals, 20)
            await asyncio.sleep(min(self._settings.max_poll_s, wait_s))
            self._is_held = False

    # Replies

    async def _outcomes(self, manifest: Manifest) -> AsyncIterator[tuple[str, Fault]]:
        """Hand the replies of an ended batch to the rows that wait, put the others in stock.

        Yields:
            The requests that brought a fault instead.
        """
        stock = _Stock(manifest=manifest)
        for path in self._folder.reply_files(manifest):
            for index, (offset, line) in enumerate(_lines(path)):
                if index % _BREATH == 0:
                    await asyncio.sleep(0)
                outcome = outcome_of_line(line)
                if outcome is None:
                    continue
                if outcome.fault is not None:
                    yield outcome.custom_id, outcome.fault
                elif outcome.reply is not None:
                    stock.keys.add(outcome.custom_id)
                    self._deliver(outcome.custom_id, outcome.reply, (path, offset))
        self._stocks.append(stock)  # now, and not before: a part of it must never be released

    def _deliver(self, custom_id: str, reply: Reply, place: tuple[Path, int]) -> None:
        request = self._requests.pop(custom_id, None)
        if request is None:
            self._in_stock[custom_id] = place
        else:
            self._handed.add(custom_id)
            if not request.reply.done():
                request.reply.set_result(reply)

    def _fail(self, request: _Request, error: BaseException) -> None:
        self._requests.pop(request.custom_id, None)
        if not request.reply.done():
            request.reply.set_exception(error)

    def _release(self, stocks: Sequence[_Stock], saved: Set[str]) -> None:
        """Forget batches once every reply in them is in the cache, read or unreadable.

        Args:
            stocks: Those that may be.
            saved: Replies that are known to be in the cache.
        """
        has_call = self._batches.cache.has_call
        for stock in list(stocks):
            if all(key in saved or has_call(base_key(key)) for key in stock.keys):
                self._stocks.remove(stock)
                self._handed -= stock.keys
                task = asyncio.create_task(self._forget(stock.manifest))
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)

    async def _forget(self, manifest: Manifest) -> None:
        """Delete a batch's files, there and here: providers count what is stored."""
        if not self._settings.keeps_files:
            await asyncio.gather(*map(self._api.delete, manifest.files))
        self._folder.drop(manifest)


def _place(judge: ChatJudge) -> tuple[str, str]:
    """Return what a lane is for: a host and a model."""
    return judge.endpoint.host, judge.model


def _current_task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _submitted(manifest: Manifest, view: BatchView) -> Manifest:
    return replace(manifest, batch_id=view.id, files=tuple(view.files.values()))


def _at_most(reserve: BatchReserve | None) -> str:
    return "" if reserve is None else f", at most ${sum(reserve.amounts) / PICO:,.4f}"


def _cancelled(view: BatchView, n_missing: int) -> AccountError:
    return AccountError(
        f"batch {view.id} was cancelled. What it had answered is kept; the same command asks for "
        f"the {n_missing:,} requests that are missing.",
        reason="cancelled",
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        offset = 0
        for line in file:
            yield offset, line
            offset += len(line)


def _all_lines(paths: Sequence[Path]) -> Iterator[bytes]:
    return (line for path in paths for _, line in _lines(path))


def _reply_at(path: Path, offset: int) -> Reply:
    with path.open("rb") as file:
        file.seek(offset)
        outcome = outcome_of_line(file.readline())
    if outcome is None or outcome.reply is None:
        raise JudgeError(f"the file {path} has changed: no reply at {offset}.", reason="batch_file")
    return outcome.reply
