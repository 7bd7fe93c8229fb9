"""RelabelReport: what a cascade saw and what became of it, counted from rows and cache.

Every number is recomputed from the data and from what the cache holds, so that it is the same
whoever asks, whenever, and in however many processes the work was done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any

from hf_relabel.cache import Call, Failure
from hf_relabel.cascade import Cascade
from hf_relabel.formats import Edit, Row, Written
from hf_relabel.judges.money import LOCAL, Prices
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.policy import open_negatives
from hf_relabel.questions import Reply
from hf_relabel.rates import Rate
from hf_relabel.verdicts import Action, Relevance, Trace, Verdict

__all__ = [
    "ControlReport",
    "NegativeCounts",
    "PlantedCounts",
    "RelabelReport",
    "StageCounts",
    "Tally",
]

_LATENCY_STEP = 1.05  # a histogram of powers: flat memory, and percentiles within 5 %


@dataclass(slots=True, kw_only=True)
class NegativeCounts:
    """What became of the negatives: `seen` is the sum of the other four.

    Attributes:
        seen: All negatives of all rows, duplicates too.
        kept: Still negatives, by a verdict or because their subset is not judged.
        dropped: Gone: false negatives, copies of a positive, and all those of dropped rows.
        promoted: Now positives.
        undecided: Still negatives, because no usable answer came.
    """

    seen: int = 0
    kept: int = 0
    dropped: int = 0
    promoted: int = 0
    undecided: int = 0


@dataclass(slots=True, kw_only=True)
class StageCounts:
    """What one stage was asked and said.

    Attributes:
        name: The stage's name.
        model: The judge's model.
        rows_asked: Rows with a passage that this stage was asked about.
        rows_flagged: Rows with a passage that it found relevant.
        passages_asked: Passages that it was asked about.
        passages_settled: Those of them that no later stage was asked about.
        better: Passages found relevant and as good as the positives.
        worse: Passages found relevant and not as good.
        undecided: Passages without a usable answer.
        calls: Calls made in this run, failed and repair ones included.
        cached: Calls made before, whose replies came from the cache.
        prompt_tokens: Of all these calls, as the server counted; None where it never did.
        completion_tokens: Likewise.
        calls_without_usage: Calls whose tokens are unknown.
        cost_usd: What all these calls cost, whenever they were made, at today's prices; None where
            the price is unknown, or no call's tokens are known. Where some are not
            (`calls_without_usage`), it is the least that they can have cost.
        price_source: Where the price comes from, and its date; "local" for a judge without one.
        latency_s: How long whole replies took: "p50", "p90" and "p99", within 5 %; None without one.
    """

    name: str
    model: str
    rows_asked: int = 0
    rows_flagged: int = 0
    passages_asked: int = 0
    passages_settled: int = 0
    better: int = 0
    worse: int = 0
    undecided: int = 0
    calls: int = 0
    cached: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    calls_without_usage: int = 0
    cost_usd: float | None = None
    price_source: str | None = None
    latency_s: dict[str, float] | None = None

    @property
    def is_cost_exact(self) -> bool:
        return self.price_source == LOCAL or not self.calls_without_usage

    def add_call(self, reply: Reply | None, *, is_new: bool, prices: Prices | None = None) -> None:
        """Count one call; `reply` is None where none came, and nothing was charged."""
        self.calls += is_new
        self.cached += not is_new
        if reply is None:
            return
        prompt, completion = (
            reply.usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")
        )
        if prompt is None or completion is None:
            self.calls_without_usage += 1
            if self.prompt_tokens is None and self.price_source != LOCAL:
                self.cost_usd = None
            return
        self.prompt_tokens = (self.prompt_tokens or 0) + prompt
        self.completion_tokens = (self.completion_tokens or 0) + completion
        price = None if prices is None else prices.price_of_call(self.model, reply.usage)
        if price is None:
            self.cost_usd = None
        else:
            self.cost_usd = (self.cost_usd or 0.0) + (price.cost_usd(reply.usage) or 0.0)
            self.price_source = price.origin


@dataclass(slots=True, kw_only=True)
class PlantedCounts:
    """What judges said of planted passages of one kind.

    Attributes:
        planted: How many were planted, one in each question.
        among_suspects: How many of them beside a passage that the first stage had flagged.
        stages: For each stage, how many it flagged, of those on which it gave a verdict.
        acted_on: How many the cascade and the policy would have dropped or promoted, of those on
            which the cascade gave a verdict.
        promoted: How many of these would have been promoted.
        undecided: How many are left without a verdict; no rate counts them.
    """

    planted: int = 0
    among_suspects: int = 0
    stages: list[Rate] = field(default_factory=list)
    acted_on: Rate = field(default_factory=lambda: Rate(count=0, total=0))
    promoted: int = 0
    undecided: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PlantedCounts:
        stages = [Rate(**rate) for rate in values["stages"]]
        return cls(**{**values, "stages": stages, "acted_on": Rate(**values["acted_on"])})


@dataclass(slots=True, kw_only=True)
class ControlReport:
    """What a cascade made of passages whose truth is known: planted, judged, and in no output.

    Attributes:
        wanted: How many of each kind were asked for.
        positives: Known positives among negatives: the rates are the judges' recall.
        random: Passages of other queries: the rates are those of false flags.
        refused: Why there are no rates; None where there are.
        stages: The calls that the controls took, and their cost, beside those of the run.
    """

    wanted: int
    positives: PlantedCounts | None = None
    random: PlantedCounts | None = None
    refused: str | None = None
    stages: list[StageCounts] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ControlReport:
        """Build from what `asdict` returned."""
        planted = {
            kind: values[kind] and PlantedCounts.from_json(values[kind])
            for kind in ("positives", "random")
        }
        stages = [StageCounts(**stage) for stage in values["stages"]]
        return cls(**{**values, **planted, "stages": stages})


@dataclass(slots=True, kw_only=True)
class RelabelReport:
    """The counts of one relabeling: `rows_in + rows_added == rows_out + sum(rows_dropped)`.

    Attributes:
        rows_in: Rows of the dataset, in its own format.
        rows_out: Rows after relabeling.
        rows_added: Rows for promoted passages, in formats with one positive a row.
        rows_dropped: Reason → rows.
        rows_changed: Rows (queries, where several rows share one) with a false negative or a drop.
        rows_skipped: Rows of subsets that are not judged.
        negatives: What became of the negatives.
        stages: One count for each stage, in order.
        undecided_reasons: Reason → passages whose last verdict is undecided.
        settings: What was asked for: preset, models, policy, fingerprints, version.
        controls: What judges made of planted passages, where some were planted.
    """

    rows_in: int = 0
    rows_out: int = 0
    rows_added: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    rows_changed: int = 0
    rows_skipped: int = 0
    negatives: NegativeCounts = field(default_factory=NegativeCounts)
    stages: list[StageCounts] = field(default_factory=list)
    undecided_reasons: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    controls: ControlReport | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RelabelReport:
        """Build from what `to_json` returned."""
        controls = values.get("controls")
        return cls(
            **{
                **values,
                "controls": controls and ControlReport.from_json(controls),
                "negatives": NegativeCounts(**values["negatives"]),
                "stages": [StageCounts(**stage) for stage in values["stages"]],
            }
        )

    @property
    def cost_usd(self) -> float | None:
        """What all calls cost, as the stages' `cost_usd`; None where one of them is unknown."""
        costs = [stage.cost_usd for stage in self.stages]
        return None if None in costs else sum(cost or 0.0 for cost in costs)

    def __str__(self) -> str:
        parts = [f"{self.negatives.seen} negatives: {self.negatives.kept} kept"]
        for name in ("dropped", "promoted", "undecided"):
            if count := getattr(self.negatives, name):
                parts.append(f"{count} {name}")
        return f"{', '.join(parts)}; {self._calls()}"

    @property
    def screens(self) -> list[StageCounts]:
        """The stages that cost nothing, before others that do: what they settle is saved there."""
        if self.stages and self.stages[-1].price_source == LOCAL:
            return []
        return [stage for stage in self.stages if stage.price_source == LOCAL]

    def _calls(self) -> str:
        # What a screen computes in this process is no call, where others are called.
        asked = [stage for stage in self.stages if stage not in self.screens]
        totals = [stage.calls + stage.cached for stage in asked]
        text = f"{sum(totals)} calls"
        if cached := sum(stage.cached for stage in asked):
            text += f" ({cached} from the cache)"
        if len(totals) > 1:
            text += f", {totals[-1]} of them to the strong judge"
        return text


class Tally:
    """Counts rows into a report.

    Args:
        cascade: Whose stages are counted.
        lookup: Call key → the reply kept under it, if any, and the failures before it.
        since: Calls from this time on (seconds since the epoch) count as made in this run.
        prices: What calls cost; None leaves the cost unknown.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        lookup: Callable[[str], tuple[Call | None, list[Failure]]],
        since: float,
        prices: Prices | None = None,
    ) -> None:
        self.report = RelabelReport(
            stages=[
                StageCounts(
                    name=stage.title,
                    model=stage.judge.model,
                    cost_usd=0.0,
                    price_source=LOCAL if isinstance(stage.judge, LocalJudge) else None,
                )
                for stage in cascade.stages
            ]
        )
        self._prices = prices
        self._lookup = lookup
        self._since = since
        # A reply can stand behind several rows. 64 bits of each key keep a million calls in 60 MB.
        self._seen_calls: set[int] = set()
        self._latencies: list[Counter[int]] = [Counter() for _ in cascade.stages]

    def add_batch(self, n_rows: int, written: Written) -> None:
        """Count the rows of one batch, in the dataset's own format, before and after."""
        report = self.report
        report.rows_in += n_rows
        report.rows_out += n_rows + written.rows_added - sum(written.rows_dropped.values())
        report.rows_added += written.rows_added
        dropped = Counter(report.rows_dropped) + Counter(written.rows_dropped)
        report.rows_dropped = dict(sorted(dropped.items()))
        for stage, latencies in zip(report.stages, self._latencies, strict=True):
            stage.latency_s = _percentiles(latencies)

    def add_skipped(self, row: Row) -> None:
        """Count a row whose subset is not judged."""
        self.report.rows_skipped += len(row.indices)
        self.report.negatives.seen += len(row.negatives)
        self.report.negatives.kept += len(row.negatives)

    def add_row(self, row: Row, edit: Edit, traces: Mapping[str, Trace]) -> None:
        """Count one judged row.

        Args:
            row: The row as its format read it.
            edit: What became of it.
            traces: What each stage said, by `Passage.key`.
        """
        self._count_negatives(row, edit, traces)
        keys = [passage.key for passage in open_negatives(row)]
        self._count_stages([traces[key] for key in keys if key in traces])

    def _count_negatives(self, row: Row, edit: Edit, traces: Mapping[str, Trace]) -> None:
        counts = self.report.negatives
        counts.seen += len(row.negatives)
        if edit.drop_row is not None:
            counts.dropped += len(row.negatives)
        else:
            for passage, action in zip(row.negatives, edit.actions, strict=True):
                fate = _fate(action, traces.get(passage.key))
                setattr(counts, fate, getattr(counts, fate) + 1)
        if edit.drop_row is not None or any(action is not Action.KEEP for action in edit.actions):
            self.report.rows_changed += 1

    def _count_stages(self, traces: Sequence[Trace]) -> None:
        for index, stage in enumerate(self.report.stages):
            verdicts = [trace[index] for trace in traces if len(trace) > index]
            if not verdicts:
                break
            found = Counter(verdict.relevance for verdict in verdicts)
            stage.rows_asked += 1
            stage.passages_asked += len(verdicts)
            stage.passages_settled += sum(len(trace) == index + 1 for trace in traces)
            stage.rows_flagged += found[Relevance.BETTER] + found[Relevance.WORSE] > 0
            stage.better += found[Relevance.BETTER]
            stage.worse += found[Relevance.WORSE]
            stage.undecided += found[Relevance.UNDECIDED]
            self._count_calls(stage, verdicts, self._latencies[index])
        self._count_undecided([trace[-1] for trace in traces])

    def _count_calls(
        self, stage: StageCounts, verdicts: Sequence[Verdict], latencies: Counter[int]
    ) -> None:
        for key in dict.fromkeys(verdict.call for verdict in verdicts):
            if key is None or (short := int(key[:16], 16)) in self._seen_calls:
                continue
            self._seen_calls.add(short)
            call, failures = self._lookup(key)
            if call is not None:
                is_new = call.time >= self._since
                stage.add_call(call.reply, is_new=is_new, prices=self._prices)
                if call.reply.latency_s > 0:
                    latencies[round(log(call.reply.latency_s, _LATENCY_STEP))] += 1
            for failure in failures:
                is_new = failure.time >= self._since
                stage.add_call(failure.reply, is_new=is_new, prices=self._prices)

    def _count_undecided(self, verdicts: Sequence[Verdict]) -> None:
        reasons = Counter(
            verdict.reason or "unknown" for verdict in verdicts if not verdict.relevance.is_decided
        )
        total = Counter(self.report.undecided_reasons) + reasons
        self.report.undecided_reasons = dict(sorted(total.items()))


def _percentiles(latencies: Counter[int]) -> dict[str, float] | None:
    """Return percentiles of a histogram whose bars are powers of `_LATENCY_STEP` seconds."""
    total = latencies.total()
    if not total:
        return None
    found: dict[str, float] = {}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        left = share * total
        for bar in sorted(latencies):
            left -= latencies[bar]
            if left <= 0:
                found[name] = round(_LATENCY_STEP**bar, 3)
                break
    return found


def _fate(action: Action, trace: Trace | None) -> str:
    if action is Action.DROP:
        return "dropped"
    if action is Action.PROMOTE:
        return "promoted"
    return "undecided" if trace is not None and not trace[-1].relevance.is_decided else "kept"
