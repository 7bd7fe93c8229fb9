"""Relabeler: the callable for `Dataset.map` that puts rows right.

    clean = dataset.map(Relabeler("paper"), batched=True)

It reads rows by their format, asks the cascade about every negative that the cache does not know,
lets the policy decide, and writes the rows back in their own format.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from hf_relabel import __version__, background
from hf_relabel.cache import Call, Failure, VerdictCache, default_directory
from hf_relabel.cascade import NOT_ASKED, Cascade, Escalation, Stage
from hf_relabel.decisions import COLUMNS, decision_columns
from hf_relabel.errors import SettingError
from hf_relabel.formats import Batch, Edit, Format, Row, Written, content_hash, iter_rows, resolve
from hf_relabel.judges.batches import BatchSettings
from hf_relabel.judges.budget import Budget
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.limits import Ceilings
from hf_relabel.judges.models import warn_of_shutdown
from hf_relabel.judges.money import Prices
from hf_relabel.judges.protocol import Judge
from hf_relabel.judging import READ_BATCH, Progress, Work, judge_in_batches, judge_live
from hf_relabel.policy import ActionName, Policy, open_negatives
from hf_relabel.presets import Overrides, load_preset
from hf_relabel.prompts import Prompt
from hf_relabel.published import pull_verdicts
from hf_relabel.questions import Question
from hf_relabel.report import RelabelReport, Tally
from hf_relabel.row_index import UNCHANGED, Notes, RowIndex
from hf_relabel.verdicts import Trace

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from sentence_transformers import CrossEncoder

    from hf_relabel.formats.arrow import InPlace

    AnyDataset: TypeAlias = Dataset | IterableDataset
    AnyDatasets: TypeAlias = AnyDataset | DatasetDict | IterableDatasetDict

__all__ = ["Relabeled", "Relabeler"]

T = TypeVar("T")

VERSION = 1
"""Version of what a Relabeler does with verdicts; part of its fingerprint."""


class Relabeler:
    """Drops or promotes the false negatives of retrieval training data.

    Args:
        judged_by: A preset's name, a cascade, a judge, or judges from cheap to strong.
        action: "promote", "drop", "remove_row", or one action per relevance; None is the preset's.
        count: "better" or "better+worse": which relevances make a false negative.
        max_false_negatives: Rows with more are dropped: a count, a share (float), or None for no
            limit; "preset" is the preset's.
        skip_subsets: Subsets that pass through unjudged.
        min_negatives: A row that loses negatives and keeps fewer than this is dropped.
        models: Exactly these models are the chat stages of the preset, cheap to strong.
        screen: The cross-encoder of the preset "screened": its name, its folder, loaded, or a judge
            of your own in its place, such as one whose threshold was fitted.
        screen_threshold: The lowest score that the cross-encoder passes on.
        protocol: "xml" or "json": the preset with that protocol's prompts.
        prompt: One prompt for all stages: a name, a file, or a template.
        escalate: "row" or "passage".
        base_url: An OpenAI-compatible address.
        endpoint: The address with all its settings (Azure, headers, time limit), instead.
        api_key: Kept in this process alone: workers of `num_proc` take theirs from the environment.
        max_concurrency: Most calls in flight to one model on one host; the server's own limit is
            found out below it. Processes on one cache folder share this and the next two out.
        rpm: Most requests a minute, likewise.
        tpm: Most tokens a minute, likewise.
        n_shards: Machines that share these three out, each with a shard of the rows.
        batch: Whether `judge` asks through the Batch API, at half the price and within a day; map
            then only reads. True, or `BatchSettings`. Under a cap a batch goes out as large as the
            most that it can cost allows, and its end frees what it did not use for the next one.
        cache: The folder of verdicts, or an open `VerdictCache`; None is `~/.cache/hf_relabel`.
        format: The rows' format, where its columns do not tell; one of `FORMATS`.
        columns: Role → column name, where columns have names of their own.
        seed: Chooses the negatives that refill freed slots.
        max_cost_usd: The most that calls and batches of `ChatJudge` may cost, never exceeded: by
            all processes and all runs of the same budget together.
        prices: Model → USD per million tokens of (prompt, reply), where the extra `prices` does not
            know them or you pay others.
        budget: The budget's name in the cache's ledger; None makes one of what the fingerprint
            covers, so that the same settings go on with the same budget.

    Raises:
        SettingError: A setting cannot work, alone or with the others.

    References:
        Thakur et al. (2025), arXiv:2505.16967.
    """

    def __init__(
        self,
        judged_by: str | Cascade | Judge | Sequence[Judge] = "paper",
        *,
        action: ActionName | Mapping[str, ActionName] | None = None,
        count: str | None = None,
        max_false_negatives: int | float | str | None = "preset",
        skip_subsets: Iterable[str] | None = None,
        min_negatives: int | None = None,
        models: Sequence[str] = (),
        screen: str | CrossEncoder | Judge | None = None,
        screen_threshold: float | None = None,
        protocol: str | None = None,
        prompt: str | Prompt | None = None,
        escalate: Escalation | None = None,
        base_url: str | None = None,
        endpoint: Endpoint | None = None,
        api_key: str | None = None,
        max_concurrency: int | None = None,
        rpm: float | None = None,
        tpm: float | None = None,
        n_shards: int | None = None,
        batch: bool | BatchSettings = False,
        cache: str | Path | VerdictCache | None = None,
        format: str | None = None,  # noqa: A002  the word that users know
        columns: Mapping[str, str] | None = None,
        seed: int = 0,
        max_cost_usd: float | None = None,
        prices: Mapping[str, tuple[float, float]] | None = None,
        budget: str | None = None,
    ) -> None:
        overrides = Overrides(
            models=tuple(models),
            screen=screen,
            screen_threshold=screen_threshold,
            protocol=protocol,
            prompt=prompt,
            escalate=escalate,
            endpoint=_endpoint(base_url, endpoint),
            api_key=api_key,
            ceilings=_ceilings(max_concurrency, rpm, tpm, n_shards),
        )
        self.preset, self.cascade, policy = _cascade_and_policy(judged_by, overrides)
        changed = {
            "action": action,
            "count": count,
            "skip_subsets": None if skip_subsets is None else frozenset(skip_subsets),
            "min_negatives": min_negatives,
        }
        chosen: dict[str, Any] = {name: v for name, v in changed.items() if v is not None}
        if max_false_negatives != "preset":
            chosen["max_false_negatives"] = max_false_negatives
        self.policy = replace(policy, **chosen)
        self.format = format
        self.columns = dict(columns or {})
        self.seed = seed
        self.batch = BatchSettings() if batch is True else batch or None
        self.cache = _as_cache(cache)
        self.prices = Prices(prices)
        self.budget: Budget | None = None
        if max_cost_usd is not None:
            name, folder = budget or f"relabeler:{self.fingerprint}", self.cache.directory
            self.budget = Budget(max_cost_usd, name=name, folder=folder, prices=self.prices)
            self.cascade = _capped(self.cascade, self.budget, is_batch=self.batch is not None)
        self._begin()

    @classmethod
    def from_verdicts(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        cache: str | Path | VerdictCache | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        **settings: Any,
    ) -> Relabeler:
        """Build a relabeler from the verdicts that a dataset on the Hub was published with.

        It makes no call and needs no key: passages without a published verdict stay undecided, with
        the reason `not_published`.

        Args:
            repo_id: The published dataset, as owner/name.
            revision: A tag, branch or commit.
            cache: Where the verdicts go; None is a folder of their own.
            endpoint: The Hub's address; None is the client's own.
            token: A token; None is the one logged in with.
            settings: Of actions and rows, as `Relabeler` takes them: action, count,
                max_false_negatives, skip_subsets, min_negatives, format, columns, seed. Actions
                are those that it was published with, where they are not given.

        Raises:
            SourceError: Nothing can be read there.
            SettingError: A setting cannot work.
        """
        found = pull_verdicts(
            repo_id, revision=revision, cache=cache, endpoint=endpoint, token=token
        )
        return cls(found.cascade, cache=found.cache, **{**found.policy, **settings})

    def _begin(self) -> None:
        self._since = time.time()
        self._formats: dict[tuple[str, ...], Format] = {}
        self._has_warned = False
        self._row_index: RowIndex | None = None
        for stage in self.cascade.stages:
            if isinstance(stage.judge, ChatJudge):
                stage.judge.attach(self.cache.presence)

    @property
    def row_index(self) -> RowIndex:
        """What is known of whole rows, by this cascade in this cache."""
        if self._row_index is None:
            self._row_index = RowIndex(self.cache, self.cascade.fingerprint)
        return self._row_index

    @property
    def fingerprint(self) -> str:
        """Hash of all that can change an answer or an action, and of nothing else."""
        policy = {**asdict(self.policy), "skip_subsets": sorted(self.policy.skip_subsets)}
        parts = [VERSION, self.cascade.fingerprint, policy, self.format, self.columns, self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __call__(self, batch: Batch) -> Batch:
        """Relabel the rows of one batch, as `Dataset.map(…, batched=True)` hands it over.

        Rows of one query in triplet and pair formats are judged together within the batch; run
        `judge` first, so that they are over the whole dataset.

        Returns:
            All columns, with equal lengths; there may be fewer rows than before, or more.

        Raises:
            ColumnError, RowError: The batch fits no format, or a row does not.
            AccountError: The run cannot go on; run again, what was judged is in the cache.
        """
        if hasattr(batch, "pa_table"):  # lazy, as `map` of a Dataset without a format makes it
            from hf_relabel.formats import arrow

            if arrow.is_untouched(batch):
                return self._call_in_place(batch)
        return self._call(batch, self.format_of(batch))

    def _call(self, batch: Batch, format_: Format) -> Batch:
        rows = format_.read(batch)
        edits = self._edits(rows, self._traces(rows), format_)
        return format_.write(batch, rows, edits, seed=self.seed).batch

    def _call_in_place(self, batch: Any) -> Batch:
        """Relabel an untouched lazy batch, looking only into those rows that are not known."""
        from hf_relabel.formats import arrow

        format_ = self.format_of(arrow.sample_of(batch))
        format_.check_columns(batch)
        there = arrow.in_place(format_, batch)
        written = (
            None if there is None else there.write(self._edits_in_place(batch, format_, there))
        )
        if written is None:
            written = arrow.as_lazy(batch, self._call(dict(batch), format_))
        return cast("Batch", written)

    def _edits_in_place(self, batch: Any, format_: Format, there: InPlace) -> dict[int, Edit]:
        from hf_relabel.formats import arrow

        found = self.row_index.edits(
            there.digests(self.row_index.prefix), self.policy, can_run_out=format_.can_run_out
        )
        unknown = [i for i, edit in enumerate(found) if edit is None]
        edits = {
            i: edit for i, edit in enumerate(found) if edit is not None and edit is not UNCHANGED
        }
        if unknown:
            rows = format_.read_numbered(arrow.some_of(batch, unknown), unknown)
            traces = self._traces(rows)
            edits.update(zip(unknown, self._edits(rows, traces, format_), strict=True))
            if self.batch is None:  # else they may be read from replies, and not be final yet
                self.cache.write(self.row_index.entries(rows, traces, skips=self.policy.skips))
        return edits

    def _edits(
        self, rows: Sequence[Row], traces: Sequence[Mapping[str, Trace]], format_: Format
    ) -> list[Edit]:
        return [self.edit(row, found, format_) for row, found in zip(rows, traces, strict=True)]

    def judge(
        self,
        dataset: AnyDatasets,
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> Progress:
        """Fill the cache with the verdicts of a whole dataset; `map` then only reads.

        Rows stream through a window of calls in flight, without a barrier between batches and
        without growing with the dataset. In triplet and pair formats all rows of a query are judged
        together, wherever they lie (a stream is judged batch by batch).

        Args:
            dataset: Any of the four kinds of `datasets`.
            progress: Called after each row, on a thread of its own.

        Returns:
            The run's totals.

        Raises:
            ColumnError, RowError: As calling does.
            AccountError: The run cannot go on; what was judged, and what was in flight, is kept.
        """
        rows = (row for part in _parts(dataset) for row in self.rows(part))
        notes = Notes(self.row_index, self.cache, skips=self.policy.skips)

        async def judge(cascade: Cascade, row: Row) -> None:
            traces = await self._judge_row(cascade, row)
            if self._has_format_in_place:
                await notes.add(row, traces)

        with background.calm_collector():
            try:
                return self._run(rows, judge, progress)
            finally:
                background.run(notes.write())

    def probe(
        self,
        questions: Sequence[Question],
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[list[Trace]]:
        """Ask the cascade beside the data: replies are kept, final verdicts are not.

        Args:
            questions: N questions; no verdict on them is used by `map`, nor written anywhere.
            progress: As for `judge`.

        Returns:
            For each question one trace for each passage, in order.

        Raises:
            AccountError: The run cannot go on; replies that came are in the cache.
        """
        found: dict[int, list[Trace]] = {}

        async def ask(cascade: Cascade, numbered: tuple[int, Question]) -> None:
            number, question = numbered
            found[number] = await cascade.probe(question, self.cache)

        self._run(enumerate(questions), ask, progress)
        return [found[number] for number in range(len(questions))]

    def _run(
        self, items: Iterator[T], work: Work[T], progress: Callable[[Progress], None] | None
    ) -> Progress:
        """Work on a stream of items, live or in batches, as a run that counts from zero."""
        self._warn_once()
        self.cascade.start_run(prices=self.prices)
        if self.batch is None:
            stream = judge_live(items, work, cascade=self.cascade, progress=progress)
        else:
            stream = judge_in_batches(
                items,
                work,
                cascade=self.cascade,
                settings=self.batch,
                cache=self.cache,
                prices=self.prices,
                progress=progress,
            )
        return background.run(stream)

    def decisions(self, dataset: AnyDatasets) -> AnyDatasets:
        """Return one row for each (query, passage), from the cache alone.

        Returns:
            A dataset of the same kind with the columns query_id, query, docid, passage, subset,
            role ("positive", "negative"), stage, judge, relevance, action, grade and reason.
        """
        from datasets import DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

        features = Features({name: Value(kind) for name, kind in COLUMNS.items()})

        def decide(part: AnyDataset) -> AnyDataset:
            columns = list(part.column_names or next(iter(part)))
            settings: dict[str, Any] = (
                {}
                if isinstance(part, IterableDataset)
                else {
                    # In the cache of `datasets`, an undecided passage would stay so for ever.
                    "load_from_cache_file": False,
                    "desc": "decisions",
                }
            )
            return part.map(
                self._decide, batched=True, remove_columns=columns, features=features, **settings
            )

        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            return type(dataset)({name: decide(part) for name, part in dataset.items()})
        return decide(dataset)

    def report(self, dataset: AnyDatasets) -> RelabelReport:
        """Count what was judged and what becomes of it, from the cache alone."""
        tally = self.new_tally()
        for part in _parts(dataset):
            for batch in part.iter(batch_size=1000):
                self.relabel(batch, tally)
        return tally.report

    def new_tally(self) -> Tally:
        """Return an empty count of this cascade."""
        tally = Tally(self.cascade, lookup=self._lookup, since=self._since, prices=self.prices)
        tally.report.settings = self.settings()
        return tally

    def relabel(self, batch: Batch, tally: Tally, *, first_index: int = 0) -> Relabeled:
        """Relabel a batch from the cache alone, and count it.

        Args:
            batch: Rows in their own format.
            tally: Where they are counted.
            first_index: Where the batch starts in the dataset, for error messages.
        """
        format_ = self.format_of(batch)
        rows = format_.read(batch, first_index=first_index)
        traces = [self.recall(row) for row in rows]
        edits = self._edits(rows, traces, format_)
        for row, edit, found in zip(rows, edits, traces, strict=True):
            if self.policy.skips(row):
                tally.add_skipped(row)
            else:
                tally.add_row(row, edit, found)
        written = format_.write(batch, rows, edits, seed=self.seed)
        tally.add_batch(_length(batch), written)
        return Relabeled(relabeler=self, rows=rows, edits=edits, traces=traces, written=written)

    def recall(self, row: Row) -> dict[str, Trace]:
        """Return what each stage said of a row's negatives, by `Passage.key`, without a call."""
        question = self.question(row)
        if question is None:
            return {}
        keys = [content_hash(passage) for passage in question.passages]
        return dict(zip(keys, self.cascade.recall(question, self.cache), strict=True))

    def edit(self, row: Row, traces: Mapping[str, Trace], format_: Format) -> Edit:
        """Decide what becomes of a row, given what each stage said of its negatives."""
        verdicts = {key: trace[-1] for key, trace in traces.items()}
        return self.policy.edit(row, verdicts, can_run_out=format_.can_run_out)

    def format_of(self, batch: Batch) -> Format:
        """Return the format of a batch, found once for each set of columns."""
        names = tuple(batch)
        if names not in self._formats:
            sample = {name: values[0] for name, values in batch.items() if values}
            self._formats[names] = resolve(
                names, format=self.format, mapping=self.columns, sample=sample
            )
        return self._formats[names]

    @property
    def _has_format_in_place(self) -> bool:
        """Whether rows were seen that `map` may know from the row index alone."""
        return any(format_.in_place for format_ in self._formats.values())

    def rows(self, dataset: AnyDataset) -> Iterator[Row]:
        """Read a dataset's rows; those of one query together, wherever they lie."""
        first = next(iter(dataset.iter(batch_size=1)), None)
        if first is not None:
            yield from iter_rows(dataset, self.format_of(first), batch_size=READ_BATCH)

    def shard(self, dataset: Dataset, index: int, n_shards: int) -> Dataset:
        """Return the rows of one shard: whole queries, by a hash of their text.

        Args:
            dataset: All rows.
            index: Which shard, from 0.
            n_shards: How many there are.
        """
        first = next(iter(dataset.iter(batch_size=1)), None)
        if first is None:
            return dataset
        queries = dataset[self.format_of(first).query_column]
        shards = (int(content_hash(query)[:8], 16) % n_shards for query in queries)
        return dataset.select([row for row, shard in enumerate(shards) if shard == index])

    def failures(self) -> Iterator[Failure]:
        """Iterate over what went wrong with calls since this object was made, in all processes."""
        return (failure for failure in self.cache.all_failures() if failure.time >= self._since)

    def settings(self) -> dict[str, Any]:
        """Return what was asked for, in JSON values and without secrets."""
        policy = {**asdict(self.policy), "skip_subsets": sorted(self.policy.skip_subsets)}
        return {
            "preset": self.preset,
            "models": [stage.judge.model for stage in self.cascade.stages],
            "escalate": self.cascade.escalate,
            **policy,
            "seed": self.seed,
            "cascade_fingerprint": self.cascade.fingerprint,
            "fingerprint": self.fingerprint,
            "version": __version__,
        }

    def _decide(self, batch: Batch) -> Batch:
        return self.relabel(batch, self.new_tally()).decisions()

    def _traces(self, rows: Sequence[Row]) -> list[dict[str, Trace]]:
        """Return the rows' verdicts: from the cache where it knows them all, else by asking."""
        found = [self.known(row) for row in rows]
        unknown = [row for row, traces in zip(rows, found, strict=True) if traces is None]
        if not unknown:
            return [traces for traces in found if traces is not None]
        if self.batch is not None:  # never at the full price, behind the user's back
            return [self._recalled(row) for row in rows]
        self._warn_once()
        with background.calm_collector():
            asked = iter(background.run(self._judge_rows(unknown)))
        return [next(asked) if traces is None else traces for traces in found]

    def known(self, row: Row) -> dict[str, Trace] | None:
        """Return a row's final verdicts by `Passage.key`, or None while one is missing."""
        if self.policy.skips(row):
            return {}
        return self.cascade.known(
            row.query, [passage.key for passage in open_negatives(row)], self.cache
        )

    async def _judge_rows(self, rows: Sequence[Row]) -> list[dict[str, Trace]]:
        found: dict[int, dict[str, Trace]] = {}

        async def judge(cascade: Cascade, numbered: tuple[int, Row]) -> None:
            found[numbered[0]] = await self._judge_row(cascade, numbered[1])

        await judge_live(enumerate(rows), judge, cascade=self.cascade)
        return [found[index] for index in range(len(rows))]

    async def _judge_row(self, cascade: Cascade, row: Row) -> dict[str, Trace]:
        question = self.question(row)
        if question is None:
            return {}
        keys = [content_hash(passage) for passage in question.passages]
        traces = await cascade.judge_question(question, self.cache)
        return dict(zip(keys, traces, strict=True))

    def _recalled(self, row: Row) -> dict[str, Trace]:
        traces = {} if self.policy.skips(row) else self.recall(row)
        if any(trace[-1].reason == NOT_ASKED for trace in traces.values()):
            raise SettingError(
                f"expected rows that were judged, found one that was not: {row.query[:80]!r}. With "
                "batch, call `judge` on the dataset first; map then reads."
            )
        return traces

    def question(self, row: Row) -> Question | None:
        """Return what a judge is asked about a row, or None where there is nothing to ask."""
        passages = open_negatives(row)
        if not passages or self.policy.skips(row):
            return None
        return Question(
            query=row.query,
            passages=tuple(passage.shown for passage in passages),
            positives=tuple(dict.fromkeys(passage.shown for passage in row.positives)),
            subset=row.subset,
        )

    def _lookup(self, key: str) -> tuple[Call | None, list[Failure]]:
        return self.cache.call(key), self.cache.failures(key)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            for stage in self.cascade.stages:
                warn_of_shutdown(stage.judge.model)

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_since", "_formats", "_has_warned", "_row_index"}
        state = {name: value for name, value in self.__dict__.items() if name not in hidden}
        # `map` hashes classes by name alone: without this, new prompts would not be noticed.
        return {**state, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: v for name, v in state.items() if name != "fingerprint"})
        self._begin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabeled:
    """One batch, relabeled, with all that led there."""

    relabeler: Relabeler
    rows: Sequence[Row]
    edits: Sequence[Edit]
    traces: Sequence[Mapping[str, Trace]]
    written: Written

    def decisions(self) -> Batch:
        """Return the columns of `COLUMNS`, one entry for each negative."""
        cascade, cache = self.relabeler.cascade, self.relabeler.cache
        reasons = [
            cascade.reasons(found, cache, subset=row.subset)
            for row, found in zip(self.rows, self.traces, strict=True)
        ]
        return decision_columns(cascade, self.rows, self.edits, self.traces, reasons)


def _parts(dataset: AnyDatasets) -> list[AnyDataset]:
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def _length(batch: Batch) -> int:
    return len(next(iter(batch.values()), []))


def _endpoint(base_url: str | None, endpoint: Endpoint | None) -> Endpoint | None:
    if base_url is not None and endpoint is not None:
        raise SettingError("expected base_url or endpoint, found both. Put base_url into endpoint.")
    return Endpoint(base_url=base_url) if base_url is not None else endpoint


def _ceilings(
    max_concurrency: int | None, rpm: float | None, tpm: float | None, n_shards: int | None
) -> Ceilings | None:
    given = {"max_concurrency": max_concurrency, "rpm": rpm, "tpm": tpm, "n_shards": n_shards}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Ceilings(**chosen) if chosen else None


def _cascade_and_policy(
    judged_by: str | Cascade | Judge | Sequence[Judge], overrides: Overrides
) -> tuple[str | None, Cascade, Policy]:
    if isinstance(judged_by, str):
        preset = load_preset(judged_by, overrides)
        return preset.name, preset.cascade, preset.policy
    if overrides != Overrides(escalate=overrides.escalate):
        raise SettingError(
            "expected models, screen, protocol, prompt, base_url, endpoint, api_key, "
            "max_concurrency, rpm and tpm with a preset's name only: a judge or cascade of your own "
            "has its own."
        )
    if isinstance(judged_by, Cascade):
        if overrides.escalate is not None:
            raise SettingError("expected escalate in the cascade itself, found it here too.")
        return None, judged_by, Policy()
    judges = list(judged_by) if isinstance(judged_by, Sequence) else [judged_by]
    stages = [Stage(cast("Judge", judge)) for judge in judges]
    return None, Cascade(stages, escalate=overrides.escalate or "passage"), Policy()


def _capped(cascade: Cascade, budget: Budget, *, is_batch: bool) -> Cascade:
    """Return a cascade that asks alike, and whose chat judges share a budget.

    Raises:
        SettingError: A judge's price is unknown.
    """
    stages = []
    for stage in cascade.stages:
        judge = stage.judge
        if isinstance(judge, ChatJudge):
            budget.prices.require(judge.model, is_batch=is_batch)
            judge = judge.with_budget(budget)
        stages.append(replace(stage, judge=judge))
    return Cascade(stages, escalate=cascade.escalate)


def _as_cache(cache: str | Path | VerdictCache | None) -> VerdictCache:
    return cache if isinstance(cache, VerdictCache) else VerdictCache(cache or default_directory())
