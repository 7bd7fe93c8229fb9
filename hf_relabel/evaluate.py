"""Evaluation: how well a model retrieves, as nDCG@10 and its like, query by query.

A bi-encoder searches a whole corpus; a cross-encoder reorders the first hundred of a first stage.
ir-measures scores what they found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.benchmark import Benchmark, Qrels, judged_queries, load_benchmark
from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.search import (
    Progress,
    Run,
    SearchSettings,
    is_cross_encoder,
    load_model,
    model_name,
    ranked,
    rerank,
    retrieve,
    write_run,
)

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

__all__ = [
    "METRICS",
    "Benchmark",
    "Evaluation",
    "evaluate",
    "evaluate_with",
    "load_benchmark",
    "score",
]

METRICS = ("nDCG@10", "R@100", "RR@10")
"""What is measured, as ir-measures writes it; the first is the one that papers quote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How one model did on one benchmark.

    Attributes:
        model: The model's name.
        benchmark: The benchmark's name.
        per_query: Metric → query id → value in [0, 1].
        settings: What else the values depend on: lengths, prompts, the first stage.
    """

    model: str
    benchmark: str
    per_query: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_queries(self) -> int:
        return len(next(iter(self.per_query.values())))

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the queries.

        Raises:
            SettingError: The metric was not measured.
        """
        values = self.values(metric)
        return math.fsum(values.values()) / len(values)

    def values(self, metric: str) -> Mapping[str, float]:
        """Return a metric by query id.

        Raises:
            SettingError: The metric was not measured.
        """
        if metric not in self.per_query:
            raise SettingError(
                f"expected a metric that was measured, found {metric!r}. "
                f"On {self.benchmark!r} there are: {', '.join(self.per_query)}."
            )
        return self.per_query[metric]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; the means are in it for people, and not read back."""
        return {
            "model": self.model,
            "benchmark": self.benchmark,
            "n_queries": self.n_queries,
            "means": {metric: self.mean(metric) for metric in self.per_query},
            "settings": dict(self.settings),
            "per_query": {metric: dict(values) for metric, values in self.per_query.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """Build from what `to_json` returned.

        Raises:
            SettingError: It is something else.
        """
        names = ("model", "benchmark", "per_query", "settings")
        if missing := [name for name in names if name not in values]:
            raise SettingError(
                f"expected a saved evaluation, found an object without {missing[0]!r}. "
                "`hf-relabel evaluate --output` writes one."
            )
        return cls(**{name: values[name] for name in names})


def evaluate(
    model: str | SentenceTransformer | CrossEncoder,
    benchmark: Benchmark,
    *,
    first_stage: str | SentenceTransformer | Run | None = None,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    top_k: int = 100,
    device: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on a benchmark.

    Args:
        model: A loaded model, or its name or folder (see `load_model`).
        benchmark: What to search, and for what.
        first_stage: For a cross-encoder, what finds the passages that it reorders: a bi-encoder
            or a run. A name or folder as `model` is then loaded as a cross-encoder.
        metrics: As ir-measures writes them.
        batch_size: This and the four next: see `SearchSettings`.
        max_seq_length: In tokens.
        query_prompt: "query: " for models of the E5 family, unless they bring it along.
        passage_prompt: "passage: " for them.
        top_k: Passages for each query.
        device: Where a model given by name runs, as torch names it.
        name: What to call the model; None takes its own name.
        progress: Told how far it is.

    Returns:
        One value per metric and query. Queries without a relevant passage do not count; one for
        which nothing was found counts as 0.

    Raises:
        SettingError: A setting has a value that cannot work.
        SourceError: A model given by name cannot be loaded.
        MissingExtraError: sentence-transformers or ir-measures is not installed.
    """
    settings = SearchSettings(
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        top_k=top_k,
    )
    check_metrics(metrics, top_k)
    name = name or model_name(model)
    if isinstance(model, str):
        model = load_model(model, is_reranker=first_stage is not None, device=device)
    noted = {"first_stage": None if first_stage is None else _first_name(first_stage)}
    stage = load_model(first_stage, device=device) if isinstance(first_stage, str) else first_stage
    return evaluate_with(
        model,
        benchmark,
        settings,
        first_stage=stage,
        metrics=metrics,
        name=name,
        noted=noted,
        progress=progress,
    )


def evaluate_with(
    model: Any,
    benchmark: Benchmark,
    settings: SearchSettings,
    *,
    first_stage: SentenceTransformer | Run | None,
    metrics: Sequence[str],
    name: str,
    noted: Mapping[str, Any],
    run_file: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a loaded model, as `evaluate` does.

    Args:
        model: A SentenceTransformer or CrossEncoder.
        benchmark: What to search, and for what.
        settings: How.
        first_stage: What a cross-encoder reorders.
        metrics: As ir-measures writes them.
        name: What to call the model.
        noted: Kept with the settings; what is None is left out.
        run_file: Where to write what was found, in TREC's format.
        progress: Told how far it is.

    Raises:
        SettingError: A cross-encoder has no first stage, or a bi-encoder has one.
    """
    run = _find(model, benchmark, settings, first_stage, name, progress)
    if run_file is not None:
        write_run(run, run_file, name)
    return Evaluation(
        model=name,
        benchmark=benchmark.name,
        per_query=score(benchmark.qrels, run, metrics),
        settings=noted_settings(settings, noted),
    )


def score(qrels: Qrels, run: Run, metrics: Sequence[str] = METRICS) -> dict[str, dict[str, float]]:
    """Score a run with ir-measures.

    Returns:
        Metric → query id → value, for every query with a relevant passage. A query that the run
        lacks has 0. Equal scores are ordered by passage id, as `retrieve` does; trec_eval would
        take the highest id first, and compares scores in single precision.
    """
    measures = check_metrics(metrics, None)
    import ir_measures

    judged = {query_id: dict(qrels[query_id]) for query_id in judged_queries(qrels)}
    by_rank = {
        query_id: {id_: float(-rank) for rank, id_ in enumerate(ranked(run.get(query_id, {})))}
        for query_id in judged
    }
    names = {measure: name for name, measure in measures.items()}
    per_query = {name: dict.fromkeys(judged, 0.0) for name in measures}
    for found in ir_measures.iter_calc(list(names), judged, by_rank):
        per_query[names[found.measure]][found.query_id] = float(found.value)
    return per_query


def check_metrics(metrics: Sequence[str], top_k: int | None) -> dict[str, Any]:
    """Return metric → what ir-measures computes.

    Raises:
        SettingError: A metric is unknown, or looks deeper than the `top_k` passages of a run.
        MissingExtraError: ir-measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise MissingExtraError.of(error.name or "ir_measures", "evaluate", "Scoring") from error
    found = {}
    for metric in metrics:
        try:
            found[metric] = ir_measures.parse_measure(metric)
        except (ValueError, NameError) as error:
            raise SettingError(
                f"expected a metric of ir-measures such as {', '.join(METRICS)}, found {metric!r}."
            ) from error
        cutoff = found[metric].params.get("cutoff", 0)
        if top_k is not None and cutoff > top_k:
            raise SettingError(
                f"expected a metric over at most top_k={top_k} passages, found {metric!r}. "
                f"Raise top_k to {cutoff}."
            )
    if not found:
        raise SettingError(f"expected a metric such as {METRICS[0]}, found none.")
    return found


def noted_settings(settings: SearchSettings, noted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what values depend on beside the model: not the batch size, which changes nothing."""
    found = {**asdict(settings), **noted}
    del found["batch_size"]
    return {name: value for name, value in sorted(found.items()) if value is not None}


def _find(
    model: Any,
    benchmark: Benchmark,
    settings: SearchSettings,
    first_stage: SentenceTransformer | Run | None,
    name: str,
    progress: Progress | None,
) -> Run:
    if not is_cross_encoder(model):
        if first_stage is not None:
            raise SettingError(
                f"expected a cross-encoder to reorder a first stage, found {name!r}, which "
                "searches by itself. Leave first_stage out."
            )
        return retrieve(model, benchmark, settings, progress=progress)
    if first_stage is None:
        raise SettingError(
            f"expected first_stage for the cross-encoder {name!r}, found none. Give the bi-encoder "
            "whose passages it reorders, or a run."
        )
    if not isinstance(first_stage, Mapping):
        searching = SearchSettings(
            batch_size=settings.batch_size,
            query_prompt=settings.query_prompt,
            passage_prompt=settings.passage_prompt,
            top_k=settings.top_k,
        )
        first_stage = retrieve(first_stage, benchmark, searching, progress=progress)
    return rerank(model, benchmark, first_stage, settings, progress=progress)


def _first_name(first_stage: object) -> str:
    return "a run" if isinstance(first_stage, Mapping) else model_name(first_stage)
