"""Conversion of a whole dataset from one format to another, through `Row` values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hf_relabel.errors import ColumnError, SettingError
from hf_relabel.formats.base import Format
from hf_relabel.formats.columns import format_name, get_format, resolve
from hf_relabel.formats.groups import group_indices
from hf_relabel.formats.refill import Refills
from hf_relabel.formats.rows import NORMALIZATION, Batch, Passage, Row, content_hash, normalize

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

__all__ = ["convert"]

AnyDataset = TypeVar(
    "AnyDataset", "Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict"
)

_VERSION = 1  # part of what `map` hashes: raise it when the same input gives another output
_BATCH_SIZE = 1000
_ID_CHARS = 32  # 128 bits of the hash: no two of 10^12 passages meet by chance
_LIST_FORMATS = ("tevatron", "flagembedding")


def convert(
    dataset: AnyDataset,
    to: str,
    *,
    format: str | None = None,  # noqa: A002 (what the user calls it, everywhere)
    columns: Mapping[str, str] | None = None,
    n_negatives: int | None = None,
    seed: int = 0,
) -> AnyDataset:
    """Convert a dataset to another format.

    What each format becomes:
    - tevatron, flagembedding: one row per row; other columns are kept. A missing `query_id` or
      `docid` is made from the text (`content_hash`, 32 characters). FlagEmbedding has no titles:
      a passage is its title and text. Scores become a field of Tevatron's structs, and back.
    - triplet: max(P, N) rows for P positives and N negatives: the k-th pairs positive k mod P with
      negative k mod N, so that each is there at least once. Without a negative it is refilled.
    - n-tuple: one row per positive, each with the first `n_negatives` negatives; fewer are
      refilled with other queries' negatives.
    - labeled-pair: one row per passage, positives first. labeled-list: one row per row.
    The last four leave other columns out, as sentence-transformers trains on every column. Rows
    that have nothing to say in the new format are left out: a triplet needs a positive.

    Triplets and pairs are grouped by query and subset first: over the whole dataset for a
    `Dataset` (integers only in memory; a query stands where its first row stood), within each
    batch of 1000 rows for an `IterableDataset`. To the same format, columns are only renamed,
    and Tevatron's missing ids filled in.

    Args:
        dataset: A Dataset, IterableDataset, or a dict of either.
        to: The name of the format to write, or "bge".
        format: The name of the format that the dataset is in; None to detect it.
        columns: Role to column name, where they differ.
        n_negatives: Width of an n-tuple; None for the most common number of negatives in the
            first 1000 rows (the larger one of two as common), in the first split of a dict.
        seed: Chooses refills, together with the query and the slot.

    Returns:
        A dataset of the same kind, with exact features.

    Raises:
        ColumnError: The columns fit no format, or a kept one has a name that the format needs.
        RowError: A row holds what its format does not allow; names the column and the row.
        SettingError: `n_negatives` is below 1, or cannot be counted.
    """
    if n_negatives is not None and n_negatives < 1:
        raise SettingError(
            f"expected n_negatives of at least 1, found {n_negatives}. Leave it out to count it."
        )
    if isinstance(dataset, dict):
        plan = _plan(next(iter(dataset.values())), to, format, columns, n_negatives, seed)
        # One plan: splits whose columns differ in number could not be published together.
        converted = {split: _apply(plan, part) for split, part in dataset.items()}
        return cast("AnyDataset", type(dataset)(converted))
    return cast(
        "AnyDataset", _apply(_plan(dataset, to, format, columns, n_negatives, seed), dataset)
    )


@dataclass(slots=True, kw_only=True)
class _Plan:
    """All that decides what a dataset becomes; what `map` hashes.

    Attributes:
        source: The format that the dataset is in.
        to: The format's name to write.
        kept: New column name to the dataset's, for columns that pass through.
        has_scores: Whether passages carry scores.
        width: Negatives per n-tuple; 0 for other formats.
        seed: Chooses refills.
        features: The dataset's columns and their types.
    """

    source: Format
    to: str
    kept: dict[str, str]
    has_scores: bool
    width: int
    seed: int
    features: Features
    version: tuple[int, str] = (_VERSION, NORMALIZATION)

    @property
    def is_same(self) -> bool:
        """Whether only names change: the same format, and no other width asked for."""
        return self.to == self.source.name and not self.width

    def __call__(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """Convert a batch whose rows have these numbers in the dataset."""
        rows = self.source.read_numbered(batch, numbers)
        out, sources = self._emit(rows)
        for column, old in self.kept.items():
            out[column] = [batch[old][i] for i in sources]
        return {column: out[column] for column in self.out_features()}

    def _emit(self, rows: Sequence[Row]) -> tuple[Batch, list[int]]:
        """Return the new columns, and for each new row the batch row that it stands for."""
        emitted = list(_EMITTERS[self.to](self, rows))
        names = [name for name in self.out_features() if name not in self.kept]
        return {n: [new[n] for _, new in emitted] for n in names}, [i for i, _ in emitted]

    def out_features(self) -> Features:
        """Return the columns of the new dataset, in order."""
        from datasets import Features

        own = _own_features(self)
        kept = {column: self.features[old] for column, old in self.kept.items()}
        return Features({**own, **kept})


def _plan(
    dataset: Any,
    to: str,
    format_: str | None,
    columns: Mapping[str, str] | None,
    n_negatives: int | None,
    seed: int,
) -> _Plan:
    to = format_name(to)
    dataset = dataset.with_format(None)
    features = _features(dataset)
    sample = {c: [] if _is_list(feature) else "" for c, feature in features.items()}
    source = resolve(list(features), format_, columns, sample=sample)
    plan = _Plan(
        source=source,
        to=to,
        kept=_kept(source, to, list(features)),
        has_scores=_has_scores(source, features),
        width=(n_negatives or 0) if to == "n-tuple" else 0,
        seed=seed,
        features=features,
    )
    if to == "n-tuple" and not plan.is_same and not plan.width:
        plan.width = _common_width(plan, dataset)
    _check_names(plan)
    return plan


def _apply(plan: _Plan, dataset: Any) -> Any:
    from datasets import Dataset

    dataset = dataset.with_format(None)
    if plan.is_same:
        return _renamed(plan, dataset)
    if plan.source.is_spread and isinstance(dataset, Dataset):
        return _apply_grouped(plan, dataset)
    return _mapped(dataset, plan, old=list(plan.features), features=plan.out_features())


def _mapped(
    dataset: Any, function: Callable[..., Batch], *, old: Sequence[str], features: Features
) -> Any:
    from datasets import Dataset

    if isinstance(dataset, Dataset) and not len(dataset):
        # `map` hands back an empty dataset as it is, with its old columns.
        return Dataset.from_dict({column: [] for column in features}, features=features)
    return dataset.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=_BATCH_SIZE,
        remove_columns=list(old),
        features=features,
    )


# Grouping ------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Grouped:
    """Converts groups of dataset rows; called with group numbers, it fetches their rows itself.

    It is mapped over the first row of every group, so that the result lies on disk or in memory
    as the dataset does. Only the plan is pickled: `map` hashes the groups with the dataset already.
    """

    plan: _Plan
    dataset: Any = field(default=None)
    groups: list[list[int]] = field(default_factory=list)

    def __call__(self, _: Batch, numbers: Sequence[int]) -> Batch:
        indices = list(chain.from_iterable(self.groups[number] for number in numbers))
        return self.plan(self.dataset[indices], indices)

    def __getstate__(self) -> _Plan:
        return self.plan

    def __setstate__(self, plan: _Plan) -> None:
        self.plan, self.dataset, self.groups = plan, None, []


def _apply_grouped(plan: _Plan, dataset: Dataset) -> Any:
    groups = group_indices(plan.source, dataset)
    firsts = dataset.select([group[0] for group in groups])
    grouped = _Grouped(plan=plan, dataset=dataset, groups=groups)
    return _mapped(firsts, grouped, old=list(plan.features), features=plan.out_features())


# Rows out ------------------------------------------------------------------------------------

_Emitted = Iterator[tuple[int, dict[str, Any]]]


def _emit_tevatron(plan: _Plan, rows: Sequence[Row]) -> _Emitted:
    for row in rows:
        yield (
            row.indices[0],
            {
                "query_id": row.query_id or content_hash(row.query)[:_ID_CHARS],
                "query": row.query,
                "positive_passages": [_struct(p, plan.has_scores) for p in row.positives],
                "negative_passages": [_struct(p, plan.has_scores) for p in row.negatives],
            },
        )


def _struct(passage: Passage, has_scores: bool) -> dict[str, Any]:
    struct: dict[str, Any] = {
        "docid": passage.docid or content_hash(passage.text)[:_ID_CHARS],
        "text": passage.text,
        "title": passage.title,
    }
    return {**struct, "score": passage.score} if has_scores else struct


def _emit_flagembedding(plan: _Plan, rows: Sequence[Row]) -> _Emitted:  # noqa: ARG001
    for row in rows:
        yield (
            row.indices[0],
            {
                "query": row.query,
                "pos": [p.shown for p in row.positives],
                "neg": [p.shown for p in row.negatives],
                "pos_scores": _scores(row.positives),
                "neg_scores": _scores(row.negatives),
            },
        )


def _scores(passages: Sequence[Passage]) -> list[float | None] | None:
    scores = [passage.score for passage in passages]
    return scores if any(score is not None for score in scores) else None


def _emit_triplet(plan: _Plan, rows: Sequence[Row]) -> _Emitted:
    refills = _refills(rows, plan.seed)
    for row in rows:
        if not row.positives:
            continue
        negatives = _filled(row, 1, refills) if not row.negatives else list(row.negatives)
        if not negatives:
            continue
        for k in range(max(len(row.positives), len(negatives))):
            yield (
                row.indices[0],
                {
                    "anchor": row.query,
                    "positive": row.positives[k % len(row.positives)].shown,
                    "negative": negatives[k % len(negatives)].shown,
                },
            )


def _emit_ntuple(plan: _Plan, rows: Sequence[Row]) -> _Emitted:
    refills = _refills(rows, plan.seed)
    for row in rows:
        negatives = _filled(row, plan.width, refills)
        if len(negatives) < plan.width:
            continue
        slots = {f"negative_{k}": p.shown for k, p in enumerate(negatives, start=1)}
        for positive in row.positives:
            yield row.indices[0], {"anchor": row.query, "positive": positive.shown, **slots}


def _emit_labeled_pair(plan: _Plan, rows: Sequence[Row]) -> _Emitted:  # noqa: ARG001
    for row in rows:
        for passages, label in ((row.positives, 1), (row.negatives, 0)):
            for p in passages:
                new = {"anchor": row.query, "document": p.shown, "label": label}
                yield row.indices[0], new


def _emit_labeled_list(plan: _Plan, rows: Sequence[Row]) -> _Emitted:  # noqa: ARG001
    for row in rows:
        yield (
            row.indices[0],
            {
                "anchor": row.query,
                "documents": [p.shown for p in (*row.positives, *row.negatives)],
                "labels": [1] * len(row.positives) + [0] * len(row.negatives),
            },
        )


_EMITTERS: dict[str, Callable[[_Plan, Sequence[Row]], _Emitted]] = {
    "tevatron": _emit_tevatron,
    "flagembedding": _emit_flagembedding,
    "triplet": _emit_triplet,
    "n-tuple": _emit_ntuple,
    "labeled-pair": _emit_labeled_pair,
    "labeled-list": _emit_labeled_list,
}


def _refills(rows: Sequence[Row], seed: int) -> Refills:
    positives: dict[str, list[Passage]] = {}
    for row in rows:
        positives.setdefault(normalize(row.query), []).extend(row.positives)
    return Refills(
        ((normalize(row.query), p) for row in rows for p in row.negatives),
        excluded=lambda query: {p.key for p in positives[query]},
        seed=seed,
    )


def _filled(row: Row, width: int, refills: Refills) -> list[Passage]:
    """Return the first `width` negatives, with refills after them; fewer if there is nothing."""
    negatives = list(row.negatives[:width])
    in_row = {p.key for p in negatives} if len(negatives) < width else set()
    for slot in range(len(negatives), width):
        choice = refills.pick(normalize(row.query), f"{row.indices[0]}:{slot}", in_row=in_row)
        if choice is None:
            break
        negatives.append(choice)
        in_row.add(choice.key)
    return negatives


# Columns in and out --------------------------------------------------------------------------


def _own_features(plan: _Plan) -> dict[str, Any]:
    """Return the columns that the format itself writes."""
    from datasets import List, Value

    text, score = Value("string"), Value("float64")
    struct = {"docid": text, "text": text, "title": text}
    passages = List({**struct, "score": score} if plan.has_scores else struct)
    scores = {"pos_scores": List(score), "neg_scores": List(score)} if plan.has_scores else {}
    slots = {f"negative_{k}": text for k in range(1, plan.width + 1)}
    known: dict[str, dict[str, Any]] = {
        "tevatron": {
            "query_id": text,
            "query": text,
            "positive_passages": passages,
            "negative_passages": passages,
        },
        "flagembedding": {"query": text, "pos": List(text), "neg": List(text), **scores},
        "triplet": {"anchor": text, "positive": text, "negative": text},
        "n-tuple": {"anchor": text, "positive": text, **slots},
        "labeled-pair": {"anchor": text, "document": text, "label": Value("int64")},
        "labeled-list": {
            "anchor": text,
            "documents": List(text),
            "labels": List(Value("int64")),
        },
    }
    return known[plan.to]


def _kept(source: Format, to: str, names: Sequence[str]) -> dict[str, str]:
    """Return new name → old name of the columns that pass through."""
    if to not in _LIST_FORMATS:
        return {}
    roles = ("subset",) if to == "tevatron" else ("query_id", "subset")
    own = set(source.columns.values())
    shared = {role: source.columns[role] for role in roles if role in source.columns}
    return shared | {name: name for name in names if name not in own}


def _check_names(plan: _Plan) -> None:
    own = set(_own_features(plan)) if not plan.is_same else set(plan.source.columns)
    clash = [name for name in plan.kept if name in own and plan.kept[name] == name]
    clash = [name for name in clash if name not in plan.source.columns.values()]
    if clash:
        raise ColumnError(
            f"expected the names {clash} to be free for the format {plan.to!r}, found other "
            f"columns of that name. Rename them first: dataset.rename_column({clash[0]!r}, …)."
        )


def _features(dataset: Any) -> Features:
    """Return a dataset's columns; a stream that does not know them is asked for its first rows."""
    if dataset.features is not None:
        return cast("Features", dataset.features)
    from datasets import Dataset

    first = list(dataset.take(_BATCH_SIZE))
    if not first:
        raise ColumnError("expected a dataset with rows or features, found neither. Add features.")
    return Dataset.from_list(first).features


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


def _has_scores(source: Format, features: Mapping[str, Any]) -> bool:
    if source.name == "flagembedding":
        return "pos_scores" in source.columns or "neg_scores" in source.columns
    if source.name != "tevatron":
        return False
    return "score" in _struct_fields(features[source.columns["positive_passages"]])


def _struct_fields(column: Any) -> Mapping[str, Any]:
    """Return the fields of a column of lists of structs; none for what is something else."""
    struct = column[0] if isinstance(column, list) else getattr(column, "feature", None)
    return struct if isinstance(struct, Mapping) else {}


def _common_width(plan: _Plan, dataset: Any) -> int:
    """Return the most common number of negatives in the first rows."""
    from datasets import Dataset

    if plan.source.is_spread and isinstance(dataset, Dataset):
        groups = group_indices(plan.source, dataset)[:_BATCH_SIZE]
        numbers = list(chain.from_iterable(groups))
        batch = dataset[numbers]
    else:
        batch = _columns(dataset.take(_BATCH_SIZE), list(plan.source.columns.values()))
        numbers = list(range(len(batch[plan.source.query_column])))
    counts = Counter(len(row.negatives) for row in plan.source.read_numbered(batch, numbers))
    counts.pop(0, None)
    if not counts:
        raise SettingError(
            "expected rows with negatives to count, found none in the first "
            f"{_BATCH_SIZE}. Say how many an n-tuple has with n_negatives=…."
        )
    return max(counts, key=lambda n: (counts[n], n))


def _columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Batch:
    batch: Batch = {name: [] for name in names}
    for row in rows:
        for name in names:
            batch[name].append(row[name])
    return batch


# The same format -----------------------------------------------------------------------------


def _renamed(plan: _Plan, dataset: Any) -> Any:
    if plan.to not in _LIST_FORMATS:
        own = {r: c for r, c in plan.source.columns.items() if r not in ("query_id", "subset")}
        dataset = dataset.select_columns(list(own.values()))
    else:
        own = plan.source.columns
    new = {column: role for role, column in own.items() if role != column}
    dataset = dataset.rename_columns(new) if new else dataset
    return _completed(plan, dataset) if plan.to == "tevatron" else dataset


def _completed(plan: _Plan, dataset: Any) -> Any:
    """Fill in the ids and titles that a Tevatron dataset leaves out; other fields stay."""
    from datasets import Features, List, Value

    names = {column: role for role, column in plan.source.columns.items()}
    features = {names.get(c, c): feature for c, feature in plan.features.items()}
    old = list(features)
    text = Value("string")
    ids = {"docid": text, "text": text, "title": text}
    for column in ("positive_passages", "negative_passages"):
        fields = _struct_fields(features[column])
        others = {name: feature for name, feature in fields.items() if name not in ids}
        features[column] = List({**ids, **others})
    features = {"query_id": text, **{c: f for c, f in features.items() if c != "query_id"}}
    return _mapped(dataset, _complete, old=old, features=Features(features))


def _complete(batch: Batch, numbers: Sequence[int]) -> Batch:
    rows = get_format("tevatron").read_numbered(batch, numbers)
    ids = batch["query_id"] if "query_id" in batch else [None] * len(rows)
    made = [content_hash(row.query)[:_ID_CHARS] for row in rows]
    out: Batch = {column: values for column, values in batch.items() if column != "query_id"}
    for column in ("positive_passages", "negative_passages"):
        out[column] = [[_complete_struct(s) for s in structs] for structs in batch[column]]
    return {"query_id": [str(i or new) for i, new in zip(ids, made, strict=True)], **out}


def _complete_struct(struct: Mapping[str, Any]) -> dict[str, Any]:
    docid = struct.get("docid") or content_hash(struct["text"])[:_ID_CHARS]
    return {**struct, "docid": str(docid), "title": struct.get("title") or ""}
