"""Scores of a cross-encoder beside the passages, and what is done with them.

    scored = score(rows, "Alibaba-NLP/gte-reranker-modernbert-base")    # pos_scores, neg_scores
    clean = drop_by_score(scored, scale="logit")                        # TopK-PercPos

`score` writes what training with distillation reads: FlagEmbedding's columns, one score for each
passage. `drop_by_score` filters by scores that are there, whoever made them; to judge and filter rows
in their own format at once, see `CrossEncoderJudge.perc_pos`.

References:
    TopK-PercPos: Moreira et al. (2024), arXiv:2407.15831. The columns: FlagEmbedding's
    `add_reranker_score.py`, https://github.com/FlagOpen/FlagEmbedding.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hf_relabel.errors import AccountError, ColumnError, JudgeError, RowError, SettingError
from hf_relabel.files import ParquetWriter, write_rows
from hf_relabel.formats import Batch, Format, Passage, Row, convert, iter_rows, resolve
from hf_relabel.formats.lists import FlagEmbedding
from hf_relabel.judges.cross_encoder import ReferencePositive, reference_score
from hf_relabel.judges.pair_scorer import PairScorer, probability
from hf_relabel.policy import Policy
from hf_relabel.verdicts import Relevance, Verdict

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
    from sentence_transformers import CrossEncoder

__all__ = ["Scale", "count_negatives", "drop_by_score", "score", "write_scores"]

AnyDataset = TypeVar(
    "AnyDataset", "Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict"
)
Scale = Literal["logit", "probability"]
"""What a score is: a logit, any real number; or a number of which a share makes sense as it is."""

_ROWS_AT_ONCE = 64  # some 1,600 pairs, sorted by length before they become batches
_ROWS_A_PART = 256  # what a crash can cost: minutes on a CPU, seconds on a GPU
_ROWS_SAMPLED = 1_000
_VERSION = 1
"""Version of what `_Scored` makes of a batch; part of what `map` and finished parts are known by."""


def score(
    dataset: AnyDataset,
    model: str | CrossEncoder | PairScorer,
    *,
    format: str | None = None,  # noqa: A002  the word that users know
    columns: Mapping[str, str] | None = None,
    scale: Scale = "logit",
) -> AnyDataset:
    """Score every passage of a dataset, for distillation from a cross-encoder.

    Args:
        dataset: Rows in any format of the library; those of one query become one row.
        model: A cross-encoder's name, its folder, loaded, or a `PairScorer` with settings.
        format: The rows' format, where its columns do not tell.
        columns: Role → column name, where columns have names of their own.
        scale: "logit", which FlagEmbedding's distillation takes the softmax of, or "probability",
            its sigmoid.

    Returns:
        A dataset of the same kind in FlagEmbedding's format: `pos_scores` and `neg_scores` hold one
        score for each entry of `pos` and `neg`, in order. Scores that were there are replaced.

    Raises:
        ColumnError, RowError: The rows fit no format, or one does not.
        SettingError: The model cannot be used.
        JudgeError: The model gave NaN for a passage.
    """
    rows = convert(dataset, "flagembedding", format=format, columns=columns)
    scored = _Scored(_as_scorer(model), scale)
    if isinstance(rows, dict):
        return type(rows)({name: _map_scores(part, scored) for name, part in rows.items()})
    return _map_scores(rows, scored)


def drop_by_score(
    dataset: AnyDataset,
    *,
    share: float = 0.95,
    reference: ReferencePositive = "lowest",
    scale: Scale | None = None,
    min_negatives: int = 1,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
) -> AnyDataset:
    """Drop the negatives that score above a share of their positive: TopK-PercPos.

    Args:
        dataset: Rows with a score beside every passage: FlagEmbedding's format, or Tevatron's with
            a field `score`.
        share: The share of the positive's score, in (0, 1].
        reference: Which positive, where a row has several.
        scale: "logit": the sigmoid is taken first, since 95 % of a negative number is more than the
            number. "probability": scores are compared as they are, which suits cosines too. None
            tells a logit by a score beyond 1, in the first 1000 rows.
        min_negatives: A row that loses negatives and keeps fewer is dropped.
        format: The rows' format, where its columns do not tell.
        columns: Role → column name, where columns have names of their own.

    Returns:
        A dataset of the same kind and format; scores stay aligned.

    Raises:
        ColumnError: The format has no scores.
        RowError: A passage has no score, or a positive none of which a share makes sense.
        SettingError: A setting cannot work, or the scale has to be told.

    References:
        Moreira et al. (2024), arXiv:2407.15831: a share of 0.95, one positive.
    """
    _check_share(share, reference)
    if scale is not None:
        _check_scale(scale)
    if isinstance(dataset, dict):
        parts = {
            name: _filtered(part, share, reference, scale, min_negatives, format, columns)
            for name, part in dataset.items()
        }
        return type(dataset)(parts)
    return _filtered(dataset, share, reference, scale, min_negatives, format, columns)


def write_scores(
    dataset: Dataset,
    path: Path,
    model: str | CrossEncoder | PairScorer,
    *,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    scale: Scale = "logit",
    shard: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Score a dataset into a file, and go on where an earlier call with the same settings stopped.

    Finished parts lie beside the file until it is whole, known by their rows and the model: rows that
    changed are scored again, others are not.

    Args:
        dataset: As for `score`.
        path: A .parquet or .jsonl file; it appears whole or not at all.
        model: As for `score`.
        format: As for `score`.
        columns: As for `score`.
        scale: As for `score`.
        shard: Only the i-th of n runs of rows, from 0: files of all shards, joined in order, are
            the file of the whole.
        progress: Called with the rows done and the rows in all.

    Returns:
        The number of rows written.

    Raises:
        ColumnError, RowError, SettingError, JudgeError: As `score` does.
        SourceError: The file's kind is unknown.
        AccountError: Ctrl-C; what was scored is kept.
    """
    rows = convert(dataset, "flagembedding", format=format, columns=columns)
    if shard is not None:
        index, n_shards = shard
        rows = rows.shard(num_shards=n_shards, index=index, contiguous=True)
    work = _Parts(rows, path, _Scored(_as_scorer(model), scale), progress or _ignore)
    try:
        work.finish()
    except KeyboardInterrupt:
        raise AccountError(
            f"interrupted. {work.n_done:,} of {len(rows):,} rows are scored and kept in "
            f"{work.folder}; the same command resumes.",
            reason="interrupted",
        ) from None
    work.join()
    return len(rows)


def count_negatives(
    dataset: Dataset,
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
) -> int:
    """Count the negatives of all rows, in any format."""
    first = next(iter(dataset.iter(batch_size=1)), None)
    if first is None:
        return 0
    sample = {name: values[0] for name, values in first.items()}
    found = resolve(list(first), format, columns, sample=sample)
    return sum(len(row.negatives) for row in iter_rows(dataset, found, batch_size=_ROWS_SAMPLED))


class _Scored:
    """Adds scores to a batch in FlagEmbedding's format; a transform for `Dataset.map`."""

    def __init__(self, scorer: PairScorer, scale: Scale) -> None:
        _check_scale(scale)
        self.scorer = scorer
        self.scale: Scale = scale

    @property
    def fingerprint(self) -> str:
        return _hash([_VERSION, self.scorer.fingerprint, self.scale])

    def __call__(self, batch: Batch) -> Batch:
        rows = _WRITTEN.texts(batch)
        pairs = [(query, text) for query, pos, neg in rows for text in (*pos, *neg)]
        scores = map(self._scaled, self.scorer.logits(pairs), pairs)
        lists = [[[next(scores) for _ in texts] for texts in (pos, neg)] for _, pos, neg in rows]
        return _WRITTEN.with_scores(batch, [pos for pos, _ in lists], [neg for _, neg in lists])

    def _scaled(self, logit: float, pair: tuple[str, str]) -> float:
        if math.isnan(logit):
            raise JudgeError(
                f"expected a score for every passage, found NaN for the query {pair[0][:80]!r}. "
                "float16 overflows in some models: try dtype 'bfloat16' or 'float32'.",
                reason="not_a_number",
            )
        return logit if self.scale == "logit" else probability(logit)


_WRITTEN = FlagEmbedding({role: role for role in ("query", "pos", "neg")})


def _map_scores(rows: Any, scored: _Scored) -> Any:
    from datasets import Dataset

    settings: dict[str, Any] = {
        "batched": True,
        "batch_size": _ROWS_AT_ONCE,
        "features": _scored_features(rows.features),
    }
    if isinstance(rows, Dataset):
        # Told, not found by pickling: a loaded model cannot be, and other weights in the same
        # folder would look the same.
        settings["new_fingerprint"] = _hash([rows._fingerprint, scored.fingerprint])[:32]
        settings["desc"] = "scores"
    return rows.map(scored, **settings)


def _scored_features(features: Features) -> Features:
    from datasets import Features, List, Value

    scores = List(Value("float64"))
    return Features({**features, "pos_scores": scores, "neg_scores": scores})


class _Parts:
    """The finished parts of a file to be, in a folder beside it."""

    def __init__(
        self, rows: Dataset, path: Path, scored: _Scored, progress: Callable[[int, int], None]
    ) -> None:
        self.folder = path.with_name(f".{path.name}.parts")
        self.n_done = 0
        self._rows = rows
        self._path = path
        self._scored = scored
        self._progress = progress
        self._features = _scored_features(rows.features)
        self._finished: list[Path] = []

    def finish(self) -> None:
        """Score what no finished part holds yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for batch in self._rows.iter(batch_size=_ROWS_A_PART):
            n_rows = len(batch["query"])
            # Known by all that is in it, so that a part is never taken for another's.
            name = _hash([self._scored.fingerprint, len(self._finished), batch])
            part = self.folder / f"{name}.parquet"
            if not part.exists():
                self._write(part, batch, n_rows)
            self._finished.append(part)
            self._tell(self._n_before + n_rows)

    @property
    def _n_before(self) -> int:
        return (len(self._finished) - 1) * _ROWS_A_PART

    def _write(self, part: Path, batch: Batch, n_rows: int) -> None:
        n_before = len(self._finished) * _ROWS_A_PART
        with ParquetWriter(part, self._features) as writer:
            for start in range(0, n_rows, _ROWS_AT_ONCE):
                window = {c: values[start : start + _ROWS_AT_ONCE] for c, values in batch.items()}
                writer.write(self._scored(window))
                self._progress(min(start + _ROWS_AT_ONCE, n_rows) + n_before, len(self._rows))

    def _tell(self, n_done: int) -> None:
        self.n_done = n_done
        self._progress(n_done, len(self._rows))

    def join(self) -> None:
        """Write the file, and delete the parts."""
        from datasets import Dataset

        if self._finished:
            # Its cache goes with the folder: it is of no use once the file is there.
            joined = Dataset.from_parquet(
                [str(part) for part in self._finished], cache_dir=str(self.folder / "cache")
            )
        else:
            joined = Dataset.from_dict({c: [] for c in self._features}, features=self._features)
        write_rows(joined, self._path)
        del joined
        shutil.rmtree(self.folder)


def _filtered(
    rows: Any,
    share: float,
    reference: ReferencePositive,
    scale: Scale | None,
    min_negatives: int,
    format_: str | None,
    columns: Mapping[str, str] | None,
) -> Any:
    sample = next(iter(rows.with_format(None).iter(batch_size=_ROWS_SAMPLED)), None)
    if sample is None:
        return rows
    first = {name: values[0] for name, values in sample.items()}
    found = resolve(list(sample), format_, columns, sample=first)
    scores = [p.score for row in found.read(sample) for p in (*row.positives, *row.negatives)]
    _expect_scores(found, scores)
    filter_ = _Filter(
        format=found,
        share=float(share),
        reference=reference,
        scale=scale or _scale_of(scores),
        policy=Policy(
            action="drop",
            max_false_negatives=None,
            skip_subsets=frozenset(),
            min_negatives=min_negatives,
        ),
    )
    return rows.with_format(None).map(filter_, batched=True, with_indices=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filter:
    """Drops negatives by their scores; a transform for `Dataset.map`."""

    format: Format
    share: float
    reference: ReferencePositive
    scale: Scale
    policy: Policy
    version: int = _VERSION

    def __call__(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        rows = self.format.read(batch, first_index=numbers[0])
        edits = [
            self.policy.edit(row, self._verdicts(row, numbers[row.indices[0]])) for row in rows
        ]
        return self.format.write(batch, rows, edits, seed=0).batch

    def _verdicts(self, row: Row, number: int) -> dict[str, Verdict]:
        bar = self.share * self._reference(row, number)
        verdicts: dict[str, Verdict] = {}
        for passage in row.negatives:
            is_false = self._score(passage, number) > bar
            # Of copies with scores of their own, one that is false speaks for all.
            if is_false or passage.key not in verdicts:
                verdicts[passage.key] = _FALSE if is_false else _TRUE
        return verdicts

    def _reference(self, row: Row, number: int) -> float:
        scores = [self._score(passage, number) for passage in row.positives]
        found = reference_score(scores, self.reference)
        if found is None or found <= 0:
            raise RowError(
                f"expected a positive with a score above 0 in row {number}, found {found}: a share "
                "of it would be more than it. If the scores are logits, say scale='logit'."
            )
        return found

    def _score(self, passage: Passage, number: int) -> float:
        if passage.score is None or math.isnan(passage.score):
            raise RowError(
                f"expected a score for every passage of row {number}, found {passage.score} for "
                f"{passage.shown[:60]!r}. Score the rows first: `score`, or hf-relabel score."
            )
        return probability(passage.score) if self.scale == "logit" else passage.score


_FALSE = Verdict(relevance=Relevance.BETTER, judge="perc-pos")
_TRUE = Verdict(relevance=Relevance.NOT_RELEVANT, judge="perc-pos")


def _expect_scores(format_: Format, scores: Sequence[float | None]) -> None:
    if all(score is None for score in scores):
        raise ColumnError(
            f"expected rows with a score for each passage, found none in the format "
            f"{format_.name!r}. Score them first: `score`, or hf-relabel score."
        )


def _scale_of(scores: Sequence[float | None]) -> Scale:
    if any(score is not None and abs(score) > 1 for score in scores):
        return "logit"
    raise SettingError(
        f"expected scores beyond 1, which can only be logits, found none in {len(scores):,}. Say "
        "what they are: scale='logit', or scale='probability' (cosines too)."
    )


def _check_scale(scale: str | None) -> None:
    if scale not in ("logit", "probability"):
        raise SettingError(f"expected scale 'logit' or 'probability', found {scale!r}.")


def _check_share(share: float, reference: str) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise SettingError(f"expected share in (0, 1], found {share!r}. 0.95 is 95 %.")
    if reference not in ("lowest", "highest"):
        raise SettingError(f"expected reference 'lowest' or 'highest', found {reference!r}.")


def _as_scorer(model: str | CrossEncoder | PairScorer) -> PairScorer:
    return model if isinstance(model, PairScorer) else PairScorer(model)


def _hash(parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)  # dates, in columns that pass through
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _ignore(n_done: int, n_rows: int) -> None: ...
