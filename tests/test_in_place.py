"""Batches read and edited inside Arrow: what comes out is what lists give, to the last value."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from datasets import (
    Array2D,
    ClassLabel,
    Dataset,
    Features,
    Json,
    List,
    Value,
    concatenate_datasets,
)
from datasets.formatting.formatting import LazyBatch, PythonFormatter

from hf_relabel.errors import RowError
from hf_relabel.formats import Edit, Format, Row, arrow, resolve
from hf_relabel.formats.digests import digest_of
from hf_relabel.verdicts import Action

KEEP, DROP, PROMOTE = Action.KEEP, Action.DROP, Action.PROMOTE
PREFIX = b"prefix"
TEXTS = ["", "a", " a ", "\u00e4\n", "\U0001f331 tree", "long " * 30, "a\x00b"]
SUBSETS = [None, "", "ArguAna", "fiqa"]
N_TABLES = 150


def tevatron_table(rng: Random) -> pa.Table:
    """Rows with titles or none, a field that moves along, and a column that is not the format's."""
    has_titles = rng.random() < 0.7

    def passage() -> dict[str, Any]:
        values = {"docid": rng.choice([None, "d"]), "text": rng.choice(TEXTS), "score": 0.5}
        return {**values, "title": rng.choice([None, *TEXTS])} if has_titles else values

    def row() -> dict[str, Any]:
        return {
            "query_id": rng.choice([None, *TEXTS]),
            "query": rng.choice(TEXTS),
            "positive_passages": [passage() for _ in range(rng.randint(1, 3))],
            "negative_passages": [passage() for _ in range(rng.randint(1, 4))],
            "subset": rng.choice(SUBSETS),
            "other": rng.choice([None, [], [None, 3], [7]]),
        }

    struct = {"docid": pa.string(), "text": pa.string(), "score": pa.float64()}
    passages = pa.list_(pa.struct({**struct, "title": pa.string()} if has_titles else struct))
    schema = {
        "query_id": pa.string(),
        "query": rng.choice([pa.string(), pa.large_string()]),
        "positive_passages": passages,
        "negative_passages": passages,
        "subset": pa.string(),
        "other": pa.list_(pa.int8()),
    }
    return laid_out(rng, [row() for _ in range(rng.randint(1, 5))], schema)


def flag_table(rng: Random) -> pa.Table:
    """Rows with scores for both lists, or without."""

    def row() -> dict[str, Any]:
        pos, neg = (rng.choices(TEXTS, k=rng.randint(1, 4)) for _ in range(2))
        scores = {"pos_scores": [0.25] * len(pos), "neg_scores": list(range(len(neg)))}
        return {"query": rng.choice(TEXTS), "pos": pos, "neg": neg, "type": "t", **scores}

    text, list_of = (
        rng.choice([pa.string(), pa.large_string()]),
        rng.choice([pa.list_, pa.large_list]),
    )
    schema = {"query": pa.string(), "pos": list_of(text), "neg": list_of(text), "type": pa.string()}
    names = rng.choice([(), ("pos_scores", "neg_scores")])
    schema |= {name: list_of(pa.float32()) for name in names}
    return laid_out(rng, [row() for _ in range(rng.randint(1, 5))], schema)


def laid_out(rng: Random, rows: list[dict[str, Any]], schema: dict[str, pa.DataType]) -> pa.Table:
    """Return a table, a slice of one, or two chunks: with offsets and bounds of every kind."""
    table = pa.Table.from_pylist(rows, schema=pa.schema(schema))
    part = table.slice(rng.randrange(table.num_rows))
    return rng.choice([table, part, pa.concat_tables([part, table])])


def lazy(table: pa.Table) -> LazyBatch:
    features = Features.from_arrow_schema(table.schema)
    return LazyBatch(table, PythonFormatter(features=features, lazy=True))


def read(table: pa.Table) -> tuple[Format, list[Row]]:
    batch = dict(lazy(table))
    format_ = resolve(table.column_names, sample={name: v[0] for name, v in batch.items()})
    return format_, format_.read(batch)


def edits_of(rng: Random, rows: list[Row]) -> list[Edit]:
    edits = []
    for row in rows:
        actions = tuple(rng.choices([KEEP, DROP, PROMOTE], [2, 1, 1], k=len(row.negatives)))
        promoted = [j for j, action in enumerate(actions) if action is PROMOTE]
        rng.shuffle(promoted)
        listed = promoted[rng.randint(0, 1) :]  # a PROMOTE that is not listed is dropped
        drop_row = rng.choice([None, None, None, "why"])
        edits.append(Edit(actions=actions, promoted=tuple(listed), drop_row=drop_row))
    return edits


@pytest.mark.parametrize("make", [tevatron_table, flag_table])
def test_digests_are_those_of_the_rows_that_lists_give(make: Callable[[Random], pa.Table]) -> None:
    for seed in range(N_TABLES):
        table = make(Random(seed))
        format_, rows = read(table)
        there = arrow.in_place(format_, lazy(table))

        assert there is not None
        assert there.digests(PREFIX) == [digest_of(row, PREFIX) for row in rows], seed


@pytest.mark.parametrize("make", [tevatron_table, flag_table])
def test_edits_come_out_as_on_lists(make: Callable[[Random], pa.Table]) -> None:
    for seed in range(N_TABLES):
        rng = Random(seed)
        table = make(rng)
        format_, rows = read(table)
        edits = edits_of(rng, rows)
        there = arrow.in_place(format_, lazy(table))
        assert there is not None

        out = there.write(dict(enumerate(edits)))

        assert out is not None
        expected = format_.write(dict(lazy(table)), rows, edits, seed=0).batch
        for name, values in out.data.items():
            is_left_alone = name in out.keys_to_format
            array = table[name] if is_left_alone else pa.array(values)
            assert array.type == table.schema.field(name).type
            assert array.to_pylist() == expected[name], seed
        assert dict(out) == expected


def passages(*texts: str | None, title: str = "") -> list[dict[str, Any]]:
    return [{"text": text, "title": title} for text in texts]


def row_of(**values: Any) -> dict[str, Any]:
    positives, negatives = passages("p"), passages("n", "m")
    row = {"query": "q", "positive_passages": positives, "negative_passages": negatives}
    return {**row, "subset": None, **values}


def digest(**values: Any) -> str:
    table = pa.Table.from_pylist([row_of(**values)])
    format_ = resolve(table.column_names, format="tevatron")
    there = arrow.in_place(format_, lazy(table))
    assert there is not None
    return there.digests(PREFIX)[0]


def test_whatever_decides_is_in_the_digest() -> None:
    """Texts that run into each other, or from one list into the next, are told apart."""
    digests = [
        digest(),
        digest(query="other"),
        digest(query="qp", positive_passages=passages("")),
        digest(positive_passages=passages("pn"), negative_passages=passages("", "m")),
        digest(positive_passages=passages("p", "n"), negative_passages=passages("m")),
        digest(negative_passages=passages("m", "n")),
        digest(negative_passages=passages("nm", "")),
        digest(negative_passages=passages("nm")),
        digest(negative_passages=passages("n", "m", title="t")),
        digest(subset=""),
        digest(subset="fiqa"),
    ]

    assert len(set(digests)) == len(digests)


def test_whatever_decides_nothing_is_not_in_the_digest() -> None:
    """One record serves a row with other ids, scores and columns, and with None for no title."""
    with_more = [{"docid": "d", "score": 0.5, **passage} for passage in passages("n", "m")]

    assert digest(negative_passages=with_more, query_id=7, other=[1]) == digest()
    assert digest(negative_passages=[{"text": "n", "title": None}, {"text": "m"}]) == digest()


@pytest.mark.parametrize(
    "values",
    [
        {"query": None},
        {"negative_passages": None},
        {"negative_passages": [None, *passages("n")]},
        {"negative_passages": passages("n", None)},
        {"negative_passages": ["n", "m"]},
        {"negative_passages": [{"text": 1, "title": ""}]},
        {"negative_passages": [{"text": "n", "title": 1}]},
        {"subset": 3},
    ],
)
def test_unusual_rows_are_left_to_lists(values: dict[str, Any]) -> None:
    """Reading them as lists raises, or turns a number into a name."""
    table = pa.Table.from_pylist([row_of(**values)])
    format_ = resolve(table.column_names, format="tevatron")

    assert arrow.in_place(format_, lazy(table)) is None


def test_scores_that_do_not_fit_are_left_to_lists() -> None:
    row = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1.0], "neg_scores": [1.0]}
    table = pa.Table.from_pylist([row])
    format_ = resolve(table.column_names, format="flagembedding")

    assert arrow.in_place(format_, lazy(table)) is None
    with pytest.raises(RowError, match="one score for each of 2 passages"):
        format_.read(dict(lazy(table)))


def test_lists_of_two_types_are_not_joined() -> None:
    """Promoting from one struct into another is left to lists, which know how to fill it up."""
    row = row_of(positive_passages=[{"text": "p", "title": "", "docid": "d"}])
    table = pa.Table.from_pylist([row])
    format_, _ = read(table)
    there = arrow.in_place(format_, lazy(table))
    assert there is not None

    assert there.write({0: Edit(actions=(PROMOTE, KEEP), promoted=(0,))}) is None
    assert there.write({0: Edit(actions=(DROP, KEEP))}) is not None


def test_an_edited_batch_is_a_batch_of_lists_to_whoever_looks() -> None:
    table = pa.Table.from_pylist([row_of(), row_of(query="r")])
    format_, _ = read(table)
    before = lazy(table)
    there = arrow.in_place(format_, before)
    assert there is not None

    out = there.write({1: Edit(actions=(DROP, KEEP))})

    assert out is not None
    assert out["negative_passages"] == [passages("n", "m"), passages("m")]
    assert out["query"] == ["q", "r"]
    assert before["negative_passages"] == [passages("n", "m")] * 2
    again = there.write({1: Edit(actions=(DROP, KEEP))})
    assert again is not None
    assert {**again} == {**(again | {})} == dict(out)
    assert repr(again) == repr(dict(out))


def _features() -> Features:
    passage = {"docid": Value("string"), "text": Value("string"), "title": Value("string")}
    return Features(
        {
            "query": Value("large_string"),
            "positive_passages": List(passage),
            "negative_passages": List(passage),
            "label": ClassLabel(names=["a", "b"]),
            "number": Value("int8"),
        }
    )


@pytest.fixture
def rows() -> Dataset:
    def values(index: int) -> dict[str, Any]:
        texts = [f"{index}-{number}" for number in range(4)]
        made = [{"docid": text, "text": text, "title": None} for text in texts]
        return {
            "query": f"q{index}",
            "positive_passages": made[:1],
            "negative_passages": made[1:],
            "label": index % 2,
            "number": index,
        }

    return Dataset.from_list([values(index) for index in range(9)], features=_features())


def _edits(rows: list[Row]) -> list[Edit]:
    """Keep, drop one, promote one, and drop the row, in turns, by what the row says."""
    kinds = [
        Edit(actions=(KEEP, KEEP, KEEP)),
        Edit(actions=(KEEP, DROP, KEEP)),
        Edit(actions=(KEEP, DROP, PROMOTE), promoted=(2,)),
        Edit(actions=(KEEP, KEEP, KEEP), drop_row="why"),
    ]
    return [kinds[int(row.query[1:]) % 4 if row.query != "q0" else 0] for row in rows]


def in_arrow(batch: LazyBatch) -> Any:
    format_ = resolve(list(batch))
    there = arrow.in_place(format_, batch)
    assert there is not None
    rows = format_.read(dict(LazyBatch(batch.pa_table, batch.formatter)))
    out = there.write(dict(enumerate(_edits(rows))))
    assert out is not None
    return out


def on_lists(batch: Any) -> Any:
    values = dict(batch)
    format_ = resolve(list(values))
    rows = format_.read(values)
    return format_.write(values, rows, _edits(rows), seed=0).batch


def test_columns_that_are_decoded_move_with_their_rows_too(rows: Dataset) -> None:
    """Some values are one thing in Arrow and another in a list: JSON, matrices."""
    values = [
        {**row, "json": {"n": i} if i % 2 else [i], "matrix": [[i, 1]]}
        for i, row in enumerate(rows)
    ]
    features = Features({**_features(), "json": Json(), "matrix": Array2D((1, 2), "int8")})
    rows = Dataset.from_list(values, features=features)

    expected = rows.map(on_lists, batched=True)
    found = rows.map(in_arrow_or_on_lists, batched=True)

    assert found.features == expected.features == rows.features
    assert found.to_list() == expected.to_list()
    assert len(found) < len(rows)


def in_arrow_or_on_lists(batch: LazyBatch) -> Any:
    values = dict(LazyBatch(batch.pa_table, batch.formatter))
    format_ = resolve(list(values))
    there = arrow.in_place(format_, batch)
    edits = _edits(format_.read(values))
    out = None if there is None else there.write(dict(enumerate(edits)))
    return arrow.as_lazy(batch, on_lists(values)) if out is None else out


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda rows: rows,
        lambda rows: rows.shuffle(seed=1),
        lambda rows: rows.select(range(3, 9)),
        lambda rows: concatenate_datasets([rows.select(range(5)), rows.select([8, 1, 1])]),
        lambda rows: rows.select([0, 4, 8]),
        lambda rows: rows.select([3, 7]),
    ],
)
def test_map_writes_the_same_file_either_way(
    rows: Dataset, arrange: Callable[[Dataset], Dataset], batch_size: int
) -> None:
    arranged = arrange(rows)

    expected, found = (
        arranged.map(function, batched=True, batch_size=batch_size, load_from_cache_file=False)
        for function in (on_lists, in_arrow)
    )

    assert found.features == expected.features
    assert found.data.table.combine_chunks() == expected.data.table.combine_chunks()
