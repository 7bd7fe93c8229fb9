"""Formats: columns are found, rows read, edits written, and whole datasets converted."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_relabel.errors import ColumnError, RowError, SettingError
from hf_relabel.formats import (
    FORMATS,
    NORMALIZATION,
    Edit,
    Format,
    Passage,
    Row,
    Written,
    content_hash,
    convert,
    detect,
    get_format,
    normalize,
    resolve,
)
from hf_relabel.verdicts import Action

if TYPE_CHECKING:
    from collections.abc import Sequence

KEEP, DROP, PROMOTE = Action.KEEP, Action.DROP, Action.PROMOTE
ST_FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


def structs(*texts: str) -> list[dict[str, str]]:
    return [{"docid": f"id-{text}", "text": text, "title": ""} for text in texts]


def texts(passages: Sequence[Passage]) -> list[str]:
    return [passage.text for passage in passages]


def keep_all(rows: Sequence[Row]) -> list[Edit]:
    return [Edit(actions=(KEEP,) * len(row.negatives)) for row in rows]


def edit(*actions: Action, promoted: tuple[int, ...] | None = None) -> Edit:
    """Build an edit that promotes in the order of the negatives unless told otherwise."""
    if promoted is None:
        promoted = tuple(j for j, action in enumerate(actions) if action is PROMOTE)
    return Edit(actions=actions, promoted=promoted)


def rewrite(batch: dict[str, list[Any]], *edits: Edit, seed: int = 0, name: str = "") -> Written:
    """Read a batch and write it back with edits."""
    form = resolve(list(batch), format=name or None)
    return form.write(batch, form.read(batch), edits, seed=seed)


def examples(batch: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*batch.values(), strict=True))


# Texts and passages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b\n c", "a b c"),
        (" a b ", "a b"),
        ("a\u00a0b", "a b"),
        ("cafe\u0301", "café"),
    ],
)
def test_texts_that_differ_in_space_or_accents_form_are_one_passage(one: str, other: str) -> None:
    """NFC and white space: what no reader sees must not buy a second verdict."""
    assert normalize(one) == normalize(other)
    assert content_hash(one) == content_hash(other)


def test_case_tells_passages_apart() -> None:
    """A name in capitals may be another name."""
    assert content_hash("US") != content_hash("us")


def test_hash_is_a_published_number() -> None:
    """Verdicts are published under it: sha256 of the normalized UTF-8, for ever."""
    expected = "5eefa2a248c89e51e296c70361cbf9032654cbcba1bb32de044979c2f389daaa"
    assert content_hash("é  b") == expected
    assert NORMALIZATION == "nfc-ws-1"


def test_lone_surrogates_are_hashed_too() -> None:
    """JSON can hold half a character; one bad passage must not end a run."""
    assert content_hash("\ud800") != content_hash("\udfff")


@pytest.mark.parametrize(
    ("title", "text", "shown"),
    [
        ("", "Paris is a city.", "Paris is a city."),
        ("Paris", "It is a city.", "Paris\nIt is a city."),
        ("Paris", "Paris is a city.", "Paris is a city."),
        ("New", "Newton was born.", "New\nNewton was born."),
        ("  ", "text", "text"),
    ],
)
def test_passage_is_shown_as_title_and_text(title: str, text: str, shown: str) -> None:
    """The title comes first, unless the text starts with it anyway."""
    assert Passage(title=title, text=text).shown == shown


def test_passage_with_a_title_is_the_same_passage_once_flattened() -> None:
    """FlagEmbedding has no titles: converted passages keep their verdicts."""
    assert Passage(title="T", text="x y").key == Passage(text="T\nx  y").key


def test_values_pickle() -> None:
    """Worker processes get rows; a computed key travels or is computed again."""
    passage = Passage(text="a", title="b")
    key = passage.key
    assert pickle.loads(pickle.dumps(passage)) == passage  # noqa: S301
    assert pickle.loads(pickle.dumps(passage)).key == key  # noqa: S301
    assert pickle.loads(pickle.dumps(detect(["query", "pos", "neg"]))).name == "flagembedding"  # noqa: S301


# Detection -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("query_id query positive_passages negative_passages subset", "tevatron"),
        ("query positive_passages negative_passages", "tevatron"),
        ("query pos neg", "flagembedding"),
        ("query pos neg pos_scores neg_scores prompt type", "flagembedding"),
        ("anchor positive negative", "triplet"),
        ("query answer negative", "triplet"),
        ("question positive negative other", "triplet"),
        ("anchor positive negative_1 negative_2", "n-tuple"),
        ("anchor positive negative negative_1", "n-tuple"),
        ("query answer negative_1", "n-tuple"),
        ("anchor document label", "labeled-pair"),
        ("query answer label", "labeled-pair"),
        ("anchor positive label", "labeled-pair"),
        ("anchor documents labels", "labeled-list"),
        ("query answer labels", "labeled-list"),
    ],
)
def test_format_is_found_from_columns(columns: str, name: str) -> None:
    """The names that datasets on the Hub and `mine_hard_negatives` use need no configuration."""
    assert detect(columns.split()).name == name


def test_formats_are_six() -> None:
    assert FORMATS == (
        "tevatron",
        "flagembedding",
        "triplet",
        "n-tuple",
        "labeled-pair",
        "labeled-list",
    )
    assert get_format("bge").name == "flagembedding"


def test_what_is_spread_and_what_refills() -> None:
    spread = {name for name in FORMATS if name != "n-tuple" and get_format(name).is_spread}
    assert spread == {"triplet", "labeled-pair"}
    assert resolve(["anchor", "positive", "negative_1"]).refills
    assert get_format("triplet").refills
    assert not get_format("tevatron").refills


def test_negatives_are_ordered_by_number_not_by_name() -> None:
    """negative_10 follows negative_9, wherever the columns stand."""
    columns = ["anchor", "positive", *(f"negative_{k}" for k in (10, 9, 1))]
    batch = {column: [column] for column in columns}

    (row,) = detect(columns).read(batch)

    assert texts(row.negatives) == ["negative_1", "negative_9", "negative_10"]


def test_sample_tells_texts_from_lists() -> None:
    """`pos` and `neg` hold lists in FlagEmbedding's files and single texts in many others."""
    columns = ["query", "pos", "neg"]
    assert detect(columns, sample={"query": "q", "pos": "p", "neg": "n"}).name == "triplet"
    assert detect(columns, sample={"query": "q", "pos": ["p"], "neg": []}).name == "flagembedding"
    lists = {"query": "q", "positive": ["p"], "negative": ["n"]}
    assert detect(list(lists), sample=lists).name == "flagembedding"


def test_similarities_are_not_labels() -> None:
    """`mine_hard_negatives(output_scores=True)` writes scores: above 0 does not mean relevant."""
    with pytest.raises(ColumnError, match="expected a 'label"):
        detect(["anchor", "document", "score"])


def test_unknown_columns_are_named_with_a_fix() -> None:
    """The error says what is missing, what there is, and what to type."""
    with pytest.raises(
        ColumnError,
        match=r"expected a 'negative' column .*found \['query', 'positive', 'negativ'\]\. "
        r"Did you mean 'negativ'\? Map it with `columns=\{'negative': 'negativ'\}`",
    ):
        detect(["query", "positive", "negativ"])


def test_two_aliases_side_by_side_are_no_guess() -> None:
    with pytest.raises(ColumnError, match="expected an 'anchor' column"):
        get_format("triplet", available=["query", "question", "positive", "negative"])


def test_columns_of_two_formats_need_a_choice() -> None:
    columns = ["query", "pos", "neg", "positive_passages", "negative_passages"]
    with pytest.raises(ColumnError, match="Choose one with format='tevatron'"):
        detect(columns)
    assert resolve(columns, format="bge").name == "flagembedding"


def test_unknown_format_is_named() -> None:
    with pytest.raises(ColumnError, match="Did you mean 'triplet'"):
        get_format("triplets")


def test_wrong_types_are_named() -> None:
    with pytest.raises(
        ColumnError, match="expected a list a row in the column 'positive_passages'"
    ):
        detect(
            ["query", "positive_passages", "negative_passages"],
            sample={"query": "q", "positive_passages": "p", "negative_passages": "n"},
        )


def test_mapped_columns_are_read() -> None:
    """Roles are mapped by the format's own name, or by a plain word for it."""
    batch = {"title": ["q"], "good": [structs("p")], "bad": [structs("n")]}
    mapping = {"query": "title", "positives": "good", "negatives": "bad"}

    form = get_format("tevatron", mapping, list(batch))

    (row,) = form.read(batch)
    assert (row.query, texts(row.positives), texts(row.negatives)) == ("q", ["p"], ["n"])
    assert get_format("tevatron", mapping) == form


def test_mapping_is_enough_to_detect() -> None:
    form = resolve(["q", "positive", "negative"], mapping={"anchor": "q"})
    assert form.name == "triplet"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"query": "titel"}, r"expected a 'titel' column for the role 'query'.*'title'"),
        ({"colour": "title"}, "expected roles out of"),
    ],
)
def test_bad_mapping_is_named(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        get_format("triplet", mapping, ["title", "positive", "negative"])


# Reading -------------------------------------------------------------------------------------


def test_tevatron_row_is_read_whole() -> None:
    batch = {
        "query_id": [7],
        "query": ["q"],
        "positive_passages": [[{"docid": "1", "text": "p", "title": "T"}]],
        "negative_passages": [[{"text": "n"}, {"docid": None, "text": "m", "title": None}]],
        "subset": ["msmarco"],
    }

    (row,) = detect(list(batch)).read(batch)

    assert row == Row(
        query="q",
        positives=(Passage(text="p", title="T", docid="1"),),
        negatives=(Passage(text="n"), Passage(text="m")),
        query_id="7",
        subset="msmarco",
        indices=(0,),
    )


def test_subset_and_id_are_read_in_every_format() -> None:
    batches: list[dict[str, list[Any]]] = [
        {"query": ["q"], "pos": [["p"]], "neg": [["n"]]},
        {"anchor": ["q"], "positive": ["p"], "negative": ["n"]},
        {"anchor": ["q"], "positive": ["p"], "negative_1": ["n"]},
        {"anchor": ["q"], "document": ["p"], "label": [1]},
        {"anchor": ["q"], "documents": [["p"]], "labels": [[1]]},
    ]
    for batch in batches:
        batch |= {"subset": ["s"], "query_id": ["7"]}
        (row,) = detect(list(batch)).read(batch)
        assert (row.subset, row.query_id) == ("s", "7")


def test_triplets_of_one_query_are_one_row() -> None:
    """One call to the judge for a query, not one for each of its triplets."""
    batch = {
        "anchor": ["q", "r", "q", "q"],
        "positive": ["p1", "p", "p2", "p1"],
        "negative": ["n1", "n", "n2", "n1 "],
    }

    first, second = detect(list(batch)).read(batch)

    assert (texts(first.positives), texts(first.negatives)) == (["p1", "p2"], ["n1", "n2"])
    assert (first.indices, second.indices) == ((0, 2, 3), (1,))


def test_subsets_are_not_mixed() -> None:
    """Two subsets may ask the same words and mean different things."""
    batch = {"anchor": ["q", "q"], "document": ["a", "b"], "label": [0, 0], "subset": ["x", "y"]}
    assert [row.indices for row in detect(list(batch)).read(batch)] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("batch", "positives", "negatives"),
    [
        ({"anchor": ["q"] * 3, "document": ["a", "b", "c"], "label": [0, 1, 0]}, "b", "ac"),
        ({"anchor": ["q"], "document": ["a"], "label": [0.0]}, "", "a"),
        ({"anchor": ["q"], "documents": [["a", "b"]], "labels": [[2, 0]]}, "a", "b"),
        ({"anchor": ["q"], "documents": [["a", "b"]], "labels": [[True, True]]}, "ab", ""),
        ({"anchor": ["q"], "documents": [[]], "labels": [[]]}, "", ""),
    ],
)
def test_label_above_zero_is_positive(
    batch: dict[str, list[Any]], positives: str, negatives: str
) -> None:
    """A row with nothing to compare, or nothing to judge, is legal where passages are labeled."""
    (row,) = detect(list(batch)).read(batch)
    assert texts(row.positives) == list(positives)
    assert texts(row.negatives) == list(negatives)


TEVATRON = {"query": "q", "positive_passages": structs("p"), "negative_passages": structs("n")}
FLAG = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [0.5], "neg_scores": None}
TUPLE = {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}
LIST = {"anchor": "q", "documents": ["p"], "labels": [1]}
PAIR = {"anchor": "q", "document": "p", "label": 1}
TRIPLET = {"anchor": "q", "positive": "p", "negative": "n"}


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (TEVATRON, "query", None, "expected a string .*found None.*filter"),
        (TEVATRON, "positive_passages", [], "expected at least one passage.*filter"),
        (TEVATRON, "negative_passages", [], "expected at least one passage.*filter"),
        (TEVATRON, "negative_passages", None, "expected a list of structs.*found None.*filter"),
        (TEVATRON, "negative_passages", "n", "found str 'n'.*format='triplet'"),
        (TEVATRON, "negative_passages", ["n"], "expected structs with a text.*'flagembedding'"),
        (TEVATRON, "negative_passages", [{"docid": "1"}], "expected a text for every passage"),
        (TEVATRON, "negative_passages", [{"text": None}], "expected a text for every passage"),
        (FLAG, "neg", "n", "expected a list of strings.*format='triplet'"),
        (FLAG, "neg", [], "expected at least one passage"),
        (FLAG, "neg", [None], "expected a text for every passage"),
        (FLAG, "neg", [3], "expected a text for every passage"),
        (FLAG, "neg", 3, "expected a list of strings.*Wrap a single value"),
        (FLAG, "pos_scores", [0.5, 0.5], "expected one score for each of 1 passages"),
        (FLAG, "neg_scores", 0.5, "expected a list of numbers"),
        (TUPLE, "negative_2", None, "same number of negatives in every row.*labeled-list"),
        (TUPLE, "positive", None, "expected a string"),
        (TRIPLET, "negative", ["n"], "expected a string.*found list"),
        (PAIR, "document", None, "expected a string"),
        (PAIR, "label", None, "expected a number"),
        (PAIR, "label", "1", "expected a number"),
        (PAIR, "label", float("nan"), "expected a number"),
        (LIST, "labels", [1, 0], "expected one label for each of 1 documents"),
        (LIST, "documents", "p", "expected a list of strings"),
    ],
)
def test_bad_row_is_named(row: dict[str, Any], column: str, value: Any, message: str) -> None:
    """The error names the column, and the row by its number in the dataset, not in the batch."""
    good, bad = dict(row), {**row, column: value}
    batch = {name: [good[name], bad[name]] for name in row}

    with pytest.raises(RowError, match=message) as error:
        detect(list(row)).read(batch, first_index=1000)

    assert f"column {column!r}" in str(error.value)
    assert "in row 1001" in str(error.value)


@pytest.mark.parametrize("row", [TUPLE, TRIPLET, LIST])
def test_aligned_scores_are_refused(row: dict[str, Any]) -> None:
    """Teacher scores beside a refilled slot would be those of the passage that left."""
    batch = {name: [value] for name, value in row.items()} | {"scores": [[0.9, 0.1]]}
    with pytest.raises(ColumnError, match=r"remove_columns\(\['scores'\]\)"):
        detect(list(batch)).read(batch)


def test_format_of_other_columns_is_refused() -> None:
    with pytest.raises(ColumnError, match=r"expected the columns \['pos'\]"):
        get_format("bge").read({"query": ["q"], "neg": [["n"]]})


# Writing -------------------------------------------------------------------------------------


def test_tevatron_promotes_in_the_judges_order() -> None:
    """Structs are moved as they are, fields that we do not know included."""
    negatives = [{"text": text, "url": text.upper()} for text in "abcd"]
    batch = {"query": ["q"], "positive_passages": [structs("p")], "negative_passages": [negatives]}

    written = rewrite(batch, edit(PROMOTE, KEEP, PROMOTE, DROP, promoted=(2, 0)))

    (positives,) = written.batch["positive_passages"]
    assert positives == [*structs("p"), negatives[2], negatives[0]]
    assert positives[1] is negatives[2]
    assert written.batch["negative_passages"] == [[negatives[1]]]
    assert written.rows_dropped == {}


def test_batch_is_never_changed_in_place() -> None:
    """`map` may hand the same objects to others."""
    batch = {"query": ["q"], "pos": [["p"]], "neg": [["a", "b"]]}
    before = copy.deepcopy(batch)
    rewrite(batch, edit(PROMOTE, KEEP))
    assert batch == before


@pytest.mark.parametrize(
    ("pos_scores", "neg_scores", "pos_after", "neg_after"),
    [
        ([0.9], [0.1, 0.2, 0.3], [0.9, 0.2], [0.3]),
        (None, [0.1, 0.2, 0.3], None, [0.3]),
        ([0.9], None, [0.9, None], None),
        (None, None, None, None),
    ],
)
def test_scores_stay_aligned(
    pos_scores: Any, neg_scores: Any, pos_after: Any, neg_after: Any
) -> None:
    """A promoted passage takes its score along; a shorter list would shift all the others."""
    batch = {
        "query": ["q"],
        "pos": [["p"]],
        "neg": [["a", "b", "c"]],
        "pos_scores": [pos_scores],
        "neg_scores": [neg_scores],
        "prompt": ["find"],
    }

    out = rewrite(batch, edit(DROP, PROMOTE, KEEP)).batch

    assert (out["pos"], out["neg"]) == ([["p", "b"]], [["c"]])
    assert (out["pos_scores"], out["neg_scores"]) == ([pos_after], [neg_after])
    assert list(out) == list(batch)


def test_dropped_rows_are_counted_by_reason() -> None:
    batch = {"query": ["q", "r", "s"], "pos": [["p"]] * 3, "neg": [["n"]] * 3, "type": [1, 2, 3]}
    leave = Edit(actions=(KEEP,), drop_row="too_many")

    written = rewrite(batch, leave, edit(KEEP), leave)

    assert written.batch == {"query": ["r"], "pos": [["p"]], "neg": [["n"]], "type": [2]}
    assert written.rows_dropped == {"too_many": 2}


def test_labeled_list_relabels_in_place() -> None:
    """List losses read the order; labels keep their type."""
    batch = {"anchor": ["q"], "documents": [["a", "p", "b", "c"]], "labels": [[0.0, 1.0, 0.0, 0.0]]}

    out = rewrite(batch, edit(PROMOTE, DROP, KEEP)).batch

    assert out["documents"] == [["a", "p", "c"]]
    assert out["labels"] == [[1.0, 1.0, 0.0]]
    assert all(isinstance(label, float) for label in out["labels"][0])


def test_labeled_list_without_passages_leaves() -> None:
    """ListNet turns an empty list into NaN."""
    batch = {"anchor": ["q"], "documents": [["a"]], "labels": [[0]]}
    written = rewrite(batch, edit(DROP))
    assert written.batch == {"anchor": [], "documents": [], "labels": []}
    assert written.rows_dropped == {"no_passage": 1}


def test_labeled_pairs_are_relabeled_or_leave() -> None:
    batch = {
        "anchor": ["q", "r", "q", "q", "q"],
        "document": ["a", "x", "b", "c", "a"],
        "label": [0, 0, 0, 0, 0],
    }

    written = rewrite(batch, edit(PROMOTE, DROP, KEEP), edit(KEEP))

    assert examples(written.batch) == [("q", "a", 1), ("r", "x", 0), ("q", "c", 0)]
    assert written.rows_dropped == {"false_negative": 1, "duplicate": 1}


def test_whole_query_leaves_with_all_its_rows() -> None:
    batch = {"anchor": ["q", "r", "q"], "positive": ["p"] * 3, "negative": ["a", "b", "c"]}
    written = rewrite(batch, Edit(actions=(KEEP, KEEP), drop_row="too_many"), edit(KEEP))
    assert examples(written.batch) == [("r", "p", "b")]
    assert written.rows_dropped == {"too_many": 2}


def test_dropped_triplet_gets_another_querys_negative() -> None:
    """The row keeps its width; nobody called the refill relevant to this query."""
    batch = {
        "anchor": ["q", "r"],
        "positive": ["p", "s"],
        "negative": ["bad", "n"],
        "extra": [1, 2],
    }
    written = rewrite(batch, edit(DROP), edit(KEEP))
    assert examples(written.batch) == [("q", "p", "n", 1), ("r", "s", "n", 2)]
    assert (written.rows_added, written.rows_dropped) == (0, {})


def test_promoted_passage_becomes_a_row_after_the_querys_last() -> None:
    """Its negative is one of the query's own kept ones: a hard one, not the refill."""
    batch = {
        "anchor": ["q", "q", "r"],
        "positive": ["p", "p", "s"],
        "negative": ["good", "hard", "n"],
        "extra": [1, 2, 3],
    }

    written = rewrite(batch, edit(PROMOTE, KEEP), edit(KEEP))

    assert examples(written.batch) == [
        ("q", "p", "n", 1),
        ("q", "p", "hard", 2),
        ("q", "good", "hard", 1),
        ("r", "s", "n", 3),
    ]
    assert written.rows_added == 1


def test_own_negative_is_repeated_only_as_a_last_resort() -> None:
    """With no other query in the batch there is nothing else to refill with."""
    batch = {"anchor": ["q"], "positive": ["p"], "negative_1": ["bad"], "negative_2": ["n"]}
    assert examples(rewrite(batch, edit(DROP, KEEP)).batch) == [("q", "p", "n", "n")]


def test_row_without_any_negative_leaves() -> None:
    """Never the row's own positive: that would teach the opposite."""
    batch = {"anchor": ["q", "r"], "positive": ["p", "s"], "negative": ["bad", "p"]}

    written = rewrite(batch, edit(PROMOTE), edit(KEEP))

    assert examples(written.batch) == [("r", "s", "p")]
    assert written.rows_dropped == {"no_negative": 1}
    assert written.rows_added == 0


def test_suspects_of_a_query_never_come_back_as_its_refill() -> None:
    """What one row of the query dropped, another query may have kept; it is no refill here."""
    batch = {
        "anchor": ["q", "r"],
        "positive": ["p", "s"],
        "negative_1": ["bad", "bad"],
        "negative_2": ["a", "b"],
    }
    for seed in range(8):
        out = rewrite(batch, edit(DROP, KEEP), edit(KEEP, KEEP), seed=seed).batch
        assert examples(out)[0] == ("q", "p", "b", "a")


def test_ntuple_row_of_a_promoted_passage_has_the_refilled_negatives() -> None:
    batch = {
        "anchor": ["q", "q", "r"],
        "positive": ["p1", "p2", "s"],
        "negative_1": ["good", "good", "x"],
        "negative_2": ["a", "b", "x"],
        "extra": [1, 2, 3],
    }

    written = rewrite(batch, edit(PROMOTE, KEEP), edit(PROMOTE, KEEP), edit(KEEP, KEEP))

    assert examples(written.batch) == [
        ("q", "p1", "x", "a", 1),
        ("q", "p2", "x", "b", 2),
        ("q", "good", "x", "a", 1),
        ("r", "s", "x", "x", 3),
    ]
    assert written.rows_added == 1


def test_seed_chooses_the_refill() -> None:
    batch = {
        "anchor": ["q", *(f"r{k}" for k in range(20))],
        "positive": ["p"] * 21,
        "negative": ["bad", *(f"n{k}" for k in range(20))],
    }
    edits = [edit(DROP), *(edit(KEEP) for _ in range(20))]
    chosen = {rewrite(batch, *edits, seed=seed).batch["negative"][0] for seed in range(10)}
    assert len(chosen) > 3


def test_triplets_of_one_query_get_different_refills() -> None:
    batch = {
        "anchor": ["q"] * 5 + ["r"] * 5,
        "positive": ["p"] * 10,
        "negative": [*"abcde", *"vwxyz"],
    }
    out = rewrite(batch, edit(*(DROP,) * 5), edit(*(KEEP,) * 5)).batch
    assert sorted(out["negative"][:5]) == list("vwxyz")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([], "expected one edit for each of 1 rows"),
        ([edit(KEEP, KEEP)], "expected one action for each of 1 negatives"),
        ([Edit(actions=(DROP,), promoted=(0,))], "expected each promoted index once"),
        ([Edit(actions=(PROMOTE,), promoted=(0, 0))], "expected each promoted index once"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edits: list[Edit], message: str) -> None:
    batch = {"query": ["q"], "pos": [["p"]], "neg": [["n"]]}
    with pytest.raises(RowError, match=message):
        rewrite(batch, *edits)


@pytest.mark.parametrize("last", ["negative", "negative_1"])
def test_rows_of_another_batch_are_refused(last: str) -> None:
    batch = {"anchor": ["q", "r"], "positive": ["p", "p"], last: ["n", "m"]}
    form = detect(list(batch))
    rows = form.read(batch)
    with pytest.raises(RowError, match="Hand back"):
        form.write(batch, rows[1:], [edit(DROP)], seed=0)


# Properties ----------------------------------------------------------------------------------

NO_DEADLINE = settings(deadline=None)  # a shared machine may stall in any example
WORDS = st.sampled_from([f"t{k}" for k in range(12)])
QUERIES = st.sampled_from(["q0", "q1", "q2"])
ACTIONS = st.sampled_from([KEEP, KEEP, DROP, PROMOTE])


def column_batch(row: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, list[Any]]]:
    def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        out = {name: [values[name] for values in rows] for name in rows[0]}
        return {**out, "extra": [{"k": k} for k in range(len(rows))]}

    return st.lists(row, min_size=1, max_size=10).map(columns)


PASSAGES = st.lists(WORDS, min_size=1, max_size=4)
BATCHES: dict[str, st.SearchStrategy[dict[str, list[Any]]]] = {
    "tevatron": column_batch(
        st.fixed_dictionaries(
            {
                "query": QUERIES,
                "positive_passages": PASSAGES.map(lambda some: structs(*some)),
                "negative_passages": PASSAGES.map(lambda some: structs(*some)),
                "subset": st.sampled_from(["x", "y", None]),
            }
        )
    ),
    "flagembedding": column_batch(
        st.fixed_dictionaries({"query": QUERIES, "pos": PASSAGES, "neg": PASSAGES}).map(
            lambda row: {**row, "neg_scores": [float(k) for k in range(len(row["neg"]))]}
        )
    ),
    "triplet": column_batch(
        st.fixed_dictionaries({"anchor": QUERIES, "positive": WORDS, "negative": WORDS})
    ),
    "n-tuple": column_batch(
        st.fixed_dictionaries(
            {
                "anchor": QUERIES,
                "positive": WORDS,
                "negative_1": WORDS,
                "negative_2": WORDS,
                "negative_3": WORDS,
            }
        )
    ),
    "labeled-pair": column_batch(
        st.fixed_dictionaries(
            {"anchor": QUERIES, "document": WORDS, "label": st.sampled_from([0, 1])}
        )
    ),
    "labeled-list": column_batch(
        st.lists(st.tuples(WORDS, st.sampled_from([0.0, 1.0])), max_size=5).flatmap(
            lambda pairs: st.fixed_dictionaries(
                {
                    "anchor": QUERIES,
                    "documents": st.just([text for text, _ in pairs]),
                    "labels": st.just([label for _, label in pairs]),
                }
            )
        )
    ),
}
ANY_BATCH = st.sampled_from(FORMATS).flatmap(lambda name: BATCHES[name].map(lambda b: (name, b)))


@st.composite
def edited(draw: st.DrawFn, names: Sequence[str] = FORMATS) -> tuple[Format, Any, Any, Any]:
    """Draw a batch, its rows, and edits as the policy makes them."""
    name = draw(st.sampled_from(names))
    batch = draw(BATCHES[name])
    form = resolve(list(batch), format=name)
    rows = form.read(batch)
    return form, batch, rows, [draw(policy_edit(row)) for row in rows]


@st.composite
def policy_edit(draw: st.DrawFn, row: Row) -> Edit:
    """Draw an edit that keeps the contract: what equals a positive is dropped, repeats too."""
    known, actions = {p.key for p in row.positives}, []
    first: dict[str, Action] = {}
    for passage in row.negatives:
        action = draw(ACTIONS)
        if passage.key in known:
            action = DROP
        elif passage.key in first:
            action = KEEP if first[passage.key] is KEEP else DROP
        first.setdefault(passage.key, action)
        actions.append(action)
    promoted = draw(st.permutations([j for j, a in enumerate(actions) if a is PROMOTE]))
    reason = draw(st.sampled_from([None, None, None, "too_many"]))
    return Edit(actions=tuple(actions), promoted=tuple(promoted), drop_row=reason)


@given(ANY_BATCH)
@NO_DEADLINE
def test_round_trip_changes_nothing(drawn: tuple[str, dict[str, list[Any]]]) -> None:
    """Without verdicts the very objects come back, other columns included."""
    name, batch = drawn
    form = resolve(list(batch), format=name)
    rows = form.read(batch)

    written = form.write(batch, rows, keep_all(rows), seed=1)

    assert written.batch == batch
    assert list(written.batch) == list(batch)
    assert all(
        new is old
        for column in batch
        for new, old in zip(written.batch[column], batch[column], strict=True)
    )
    assert (written.rows_dropped, written.rows_added) == ({}, 0)


@given(ANY_BATCH)
@NO_DEADLINE
def test_rows_cover_the_batch_once(drawn: tuple[str, dict[str, list[Any]]]) -> None:
    name, batch = drawn
    rows = resolve(list(batch), format=name).read(batch)
    covered = [i for row in rows for i in row.indices]
    assert sorted(covered) == list(range(len(batch["extra"])))


@given(edited())
@NO_DEADLINE
def test_accounting_is_exact(drawn: tuple[Format, Any, Any, Any]) -> None:
    """Rows in, plus added, are rows out, plus dropped by named reason."""
    form, batch, rows, edits = drawn
    before = copy.deepcopy(batch)

    written = form.write(batch, rows, edits, seed=0)

    n_out = {len(values) for values in written.batch.values()}
    assert len(n_out) == 1
    n_dropped = sum(written.rows_dropped.values())
    assert len(batch["extra"]) + written.rows_added == n_out.pop() + n_dropped
    assert list(written.batch) == list(batch)
    assert all(n > 0 for n in written.rows_dropped.values())
    assert batch == before


@given(edited(), st.integers(0, 3))
@NO_DEADLINE
def test_write_is_deterministic(drawn: tuple[Format, Any, Any, Any], seed: int) -> None:
    form, batch, rows, edits = drawn
    first = form.write(batch, rows, edits, seed=seed)
    assert form.write(copy.deepcopy(batch), form.read(batch), edits, seed=seed) == first


@given(edited())
@NO_DEADLINE
def test_untouched_rows_stay_as_they_are(drawn: tuple[Format, Any, Any, Any]) -> None:
    """A row is changed by edits of its own query only."""
    form, batch, rows, edits = drawn
    touched = {row.query for row, e in zip(rows, edits, strict=True) if not e.changes_nothing}

    def of_others(batch: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
        queries = batch[form.query_column]
        return [row for row, q in zip(examples(batch), queries, strict=True) if q not in touched]

    assert of_others(form.write(batch, rows, edits, seed=0).batch) == of_others(batch)


@given(edited(["triplet", "n-tuple"]))
@settings(max_examples=300, deadline=None)
def test_no_known_positive_is_among_the_negatives(drawn: tuple[Format, Any, Any, Any]) -> None:
    """Neither the query's positives in any row of the batch, nor what was promoted or dropped."""
    form, batch, rows, edits = drawn
    touched: set[str] = set()
    never: dict[str, set[str]] = {}
    for row, e in zip(rows, edits, strict=True):
        bad = {p.text for p, a in zip(row.negatives, e.actions, strict=True) if a is PROMOTE}
        known = never.setdefault(row.query, set())
        known |= {p.text for p in row.positives} | (bad if e.drop_row is None else set())
        touched |= {row.query} if not all(a is KEEP for a in e.actions) else set()

    out = form.write(batch, rows, edits, seed=0).batch

    negatives = [column for column in out if column.startswith("negative")]
    for i, query in enumerate(out["anchor"]):
        if query in touched:
            assert not {out[column][i] for column in negatives} & never[query]


@given(edited(["triplet", "n-tuple"]))
@NO_DEADLINE
def test_promoted_passages_are_positives_once(drawn: tuple[Format, Any, Any, Any]) -> None:
    """Each is one new row of its query, and duplicates add none."""
    form, batch, rows, edits = drawn
    written = form.write(batch, rows, edits, seed=0)
    before = Counter(zip(batch["anchor"], batch["positive"], strict=True))
    after = Counter(zip(written.batch["anchor"], written.batch["positive"], strict=True))
    new = {pair for pair in after if pair not in before}
    promoted = {
        (row.query, row.negatives[j].text)
        for row, e in zip(rows, edits, strict=True)
        if e.drop_row is None
        for j in e.promoted
    }
    assert new <= promoted
    assert all(after[pair] == 1 for pair in new)
    assert written.rows_added == len(new)


@given(edited(["tevatron", "flagembedding", "labeled-list", "labeled-pair"]))
@NO_DEADLINE
def test_written_rows_read_as_edited(drawn: tuple[Format, Any, Any, Any]) -> None:
    """What was promoted is a positive, what was dropped is gone, the rest is as it was."""
    form, batch, rows, edits = drawn

    out = form.write(batch, rows, edits, seed=0).batch

    wanted = []
    for row, e in zip(rows, edits, strict=True):
        kept = [p.text for p, a in zip(row.negatives, e.actions, strict=True) if a is KEEP]
        positives = sorted(texts(row.positives) + [row.negatives[j].text for j in e.promoted])
        gone = not (kept or positives) and e.actions
        if e.drop_row is None and not gone:
            wanted.append((row.query, positives, kept))
    assert sorted(wanted) == sorted(
        (row.query, sorted(texts(row.positives)), texts(row.negatives))
        for row in read_loosely(form, out)
    )


def read_loosely(form: Format, batch: dict[str, list[Any]]) -> list[Row]:
    """Read rows that may have lost all negatives, which the list formats refuse."""
    if form.name not in ("tevatron", "flagembedding"):
        return form.read(batch)
    positives, negatives = list(form.columns.values())[1:3]
    return [
        Row(
            query=batch["query"][i],
            positives=tuple(loose(v) for v in batch[positives][i]),
            negatives=tuple(loose(v) for v in batch[negatives][i]),
            indices=(i,),
        )
        for i in range(len(batch["query"]))
    ]


def loose(value: Any) -> Passage:
    return Passage(text=value if isinstance(value, str) else value["text"])


# Dataset.map ---------------------------------------------------------------------------------


def drop_first(batch: Any) -> Any:
    """Promote each row's first negative; rows of the query "gone" leave."""
    form = detect(list(batch))
    rows = form.read(batch)
    edits = [
        Edit(
            actions=(PROMOTE, *(KEEP,) * (len(row.negatives) - 1)),
            promoted=(0,),
            drop_row="gone" if row.query == "gone" else None,
        )
        for row in rows
    ]
    return form.write(batch, rows, edits, seed=0).batch


def test_map_accepts_lists_of_other_sizes() -> None:
    """Tevatron structs in Arrow: a list grows, another becomes empty, a row leaves."""
    dataset = Dataset.from_list(
        [
            {"query_id": str(k), "query": q, "positive_passages": structs("p"),
             "negative_passages": structs(*n), "subset": "s"}
            for k, (q, n) in enumerate([("q", "ab"), ("gone", "c"), ("r", "d")])
        ]
    )  # fmt: skip

    clean = dataset.map(drop_first, batched=True)

    assert clean["query"][:] == ["q", "r"]
    assert [len(some) for some in clean["positive_passages"]] == [2, 2]
    assert clean["negative_passages"][:] == [structs("b"), []]
    assert clean.features == dataset.features


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_map_accepts_more_rows_and_fewer(batch_size: int) -> None:
    dataset = Dataset.from_dict(
        {
            "anchor": ["q", "q", "gone", "r"],
            "positive": ["p", "p", "g", "s"],
            "negative": ["a", "b", "c", "d"],
            "id": [1, 2, 3, 4],
        }
    )

    clean = dataset.map(drop_first, batched=True, batch_size=batch_size)

    assert clean.features == dataset.features
    assert ("q", "a", "b") in [(r["anchor"], r["positive"], r["negative"]) for r in clean]
    assert "gone" not in clean["anchor"][:]


def test_map_without_edits_changes_nothing() -> None:
    def identity(batch: Any) -> Any:
        form = detect(list(batch))
        rows = form.read(batch)
        return form.write(batch, rows, keep_all(rows), seed=0).batch

    dataset = Dataset.from_list([{**TEVATRON, "extra": None}, {**TEVATRON, "extra": {"k": 1}}])
    assert dataset.map(identity, batched=True)[:] == dataset[:]


# Conversion ----------------------------------------------------------------------------------


def facts(dataset: Any) -> set[tuple[str, str, bool]]:
    """Return what a dataset says: (query, passage, whether it is relevant)."""
    batch = {column: list(dataset[column]) for column in dataset.column_names}
    form = detect(list(batch))
    return {
        (row.query, passage.shown, relevant)
        for row in form.read(batch)
        for passages, relevant in ((row.positives, True), (row.negatives, False))
        for passage in passages
    }


SOURCE = [
    {
        "query": f"query {k}",
        "positive_passages": [{"text": f"good {k}.{j}", "title": "T"} for j in range(1 + k % 2)],
        "negative_passages": [{"text": f"bad {k}.{j}", "title": ""} for j in range(3)],
    }
    for k in range(4)
]


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_converts_to_every_other(source: str, to: str) -> None:
    """Each (query, passage, label) survives: no row has more negatives than the n-tuple's width."""
    start = Dataset.from_list(SOURCE)

    converted = convert(convert(start, source), to)

    assert facts(converted) == facts(start)
    assert detect(converted.column_names).name == to


SLOW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(
    drawn=ANY_BATCH,
    to=st.sampled_from(["tevatron", "flagembedding", "labeled-pair", "labeled-list"]),
)
def test_conversion_keeps_every_fact(drawn: tuple[str, Any], to: str) -> None:
    """Whatever the batch, duplicates and contradictions included."""
    name, batch = drawn
    batch = {column: values for column, values in batch.items() if column != "extra"}
    rows = resolve(list(batch), format=name).read(batch)
    if not any(row.positives or row.negatives for row in rows):
        return  # lists that are all empty have no type
    dataset = Dataset.from_dict(batch)

    converted = convert(dataset, to, format=name)

    out = {column: list(converted[column]) for column in converted.column_names}
    seen = read_loosely(resolve(list(out), format=to), out)
    assert {(r.query, p.text, True) for r in seen for p in r.positives} | {
        (r.query, p.text, False) for r in seen for p in r.negatives
    } == {(r.query, p.text, True) for r in rows for p in r.positives} | {
        (r.query, p.text, False) for r in rows for p in r.negatives
    }


def test_conversion_to_tevatron_makes_ids() -> None:
    dataset = Dataset.from_dict({"query": ["q"], "pos": [["p"]], "neg": [["n"]], "type": [3]})

    (row,) = convert(dataset, "tevatron")

    assert row == {
        "query_id": content_hash("q")[:32],
        "query": "q",
        "positive_passages": [{"docid": content_hash("p")[:32], "text": "p", "title": ""}],
        "negative_passages": [{"docid": content_hash("n")[:32], "text": "n", "title": ""}],
        "type": 3,
    }


def test_tevatron_to_tevatron_fills_in_what_is_missing() -> None:
    """Fields of the structs that we do not know stay."""
    dataset = Dataset.from_dict(
        {
            "question": ["q"],
            "positive_passages": [[{"text": "p", "url": "u"}]],
            "negative_passages": [[{"text": "n", "url": "v"}]],
        }
    )

    (row,) = convert(dataset, "tevatron")

    assert row["query"] == "q"
    assert row["query_id"] == content_hash("q")[:32]
    assert row["positive_passages"][0] == {
        "docid": content_hash("p")[:32], "text": "p", "title": "", "url": "u",
    }  # fmt: skip


def test_scores_travel_with_their_passages() -> None:
    """In Tevatron they lie in the struct, where a promoted passage takes them along."""
    dataset = Dataset.from_dict(
        {
            "query": ["q", "r"],
            "pos": [["p"], ["p"]],
            "neg": [["a", "b"], ["c"]],
            "pos_scores": [[0.9], None],
            "neg_scores": [[0.1, 0.2], None],
        }
    )

    tevatron = convert(dataset, "tevatron")

    assert tevatron[0]["negative_passages"][1]["score"] == 0.2
    back = convert(tevatron, "bge")
    assert back["neg_scores"][:] == dataset["neg_scores"][:]
    assert back["pos_scores"][:] == dataset["pos_scores"][:]


def test_triplets_pair_every_positive_and_every_negative() -> None:
    dataset = Dataset.from_dict(
        {"query": ["q", "r"], "pos": [["p", "o"], ["x", "y", "z"]], "neg": [["a", "b", "c"], ["d"]]}
    )
    assert [tuple(row.values()) for row in convert(dataset, "triplet")] == [
        ("q", "p", "a"),
        ("q", "o", "b"),
        ("q", "p", "c"),
        ("r", "x", "d"),
        ("r", "y", "d"),
        ("r", "z", "d"),
    ]


def test_ntuples_are_cut_and_refilled_to_the_common_width() -> None:
    """The first negatives are the hardest; a short row is refilled, never with its positive."""
    dataset = Dataset.from_dict(
        {
            "query": ["q", "r", "s", "t"],
            "pos": [["p1", "p2"], ["x"], ["y"], ["z"]],
            "neg": [["a", "b", "c"], ["d", "e"], ["f"], ["g", "h"]],
            "type": ["k"] * 4,
        }
    )

    out = convert(dataset, "n-tuple", seed=5)

    assert out.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    rows = [tuple(row.values()) for row in out]
    assert rows[:3] == [("q", "p1", "a", "b"), ("q", "p2", "a", "b"), ("r", "x", "d", "e")]
    assert rows[3][:3] == ("s", "y", "f")
    assert rows[3][3] in set("abcdegh")
    assert convert(dataset, "n-tuple", n_negatives=1).column_names[-1] == "negative_1"


def test_no_column_is_left_for_a_trainer_to_trip_over() -> None:
    """sentence-transformers trains on every column, ids included."""
    dataset = Dataset.from_list([{**TEVATRON, "query_id": "1", "subset": "s", "extra": 1}])
    assert convert(dataset, "triplet").column_names == ["anchor", "positive", "negative"]
    assert convert(dataset, "labeled-pair").column_names == ["anchor", "document", "label"]
    assert convert(dataset, "labeled-list").column_names == ["anchor", "documents", "labels"]
    assert convert(dataset, "bge").column_names == [
        "query", "pos", "neg", "query_id", "subset", "extra",
    ]  # fmt: skip


def test_spread_rows_are_grouped_over_the_whole_dataset() -> None:
    """Rows of one query may lie far apart; the query stands where its first row stood."""
    n = 2500
    dataset = Dataset.from_dict(
        {
            "anchor": [f"q{k % 1300}" for k in range(n)],
            "positive": [f"p{k % 1300}" for k in range(n)],
            "negative": [f"n{k}" for k in range(n)],
            "id": list(range(n)),
        }
    )

    out = convert(dataset, "tevatron")

    assert len(out) == 1300
    assert out[7]["query"] == "q7"
    assert [p["text"] for p in out[7]["negative_passages"]] == ["n7", "n1307"]
    assert out[7]["id"] == 7


def test_grouped_conversion_names_the_row_of_the_dataset() -> None:
    dataset = Dataset.from_dict(
        {"anchor": ["q", "r", "q"], "positive": ["p"] * 3, "negative": ["a", "b", None]}
    )
    with pytest.raises(RowError, match="column 'negative', found None in row 2"):
        convert(dataset, "tevatron")


def test_streams_are_grouped_within_a_batch() -> None:
    dataset = Dataset.from_dict(
        {"anchor": ["q", "r", "q"], "positive": ["p"] * 3, "negative": ["a", "b", "c"]}
    ).to_iterable_dataset()

    out = convert(dataset, "bge")

    assert isinstance(out, IterableDataset)
    assert [tuple(row.values()) for row in out] == [("q", ["p"], ["a", "c"]), ("r", ["p"], ["b"])]
    assert out.features == Features(
        {"query": Value("string"), "pos": List(Value("string")), "neg": List(Value("string"))}
    )


def test_streams_without_features_are_converted() -> None:
    """After a `map` a stream forgets its columns."""
    stream = Dataset.from_list(SOURCE).to_iterable_dataset().map(lambda row: row)
    assert stream.features is None
    out = convert(stream, "n-tuple")
    assert out.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    assert len(list(out)) == 6


def test_splits_of_a_dict_get_one_width() -> None:
    """Splits with other columns than each other cannot be published together."""
    parts = DatasetDict(
        train=Dataset.from_list(SOURCE),
        test=Dataset.from_dict({
            "query": ["q", "r"],
            "positive_passages": [[{"text": "p", "title": ""}]] * 2,
            "negative_passages": [[{"text": "n", "title": ""}], [{"text": "m", "title": ""}]],
        }),
    )  # fmt: skip

    out = convert(parts, "n-tuple")

    assert isinstance(out, DatasetDict)
    assert out["train"].column_names == out["test"].column_names
    assert len(out["test"]) == 2


def test_empty_lists_keep_their_type() -> None:
    """A first batch without negatives must not fix the column as null."""
    dataset = Dataset.from_dict({"anchor": ["q"], "document": ["p"], "label": [1]})
    out = convert(dataset, "tevatron")
    assert out.features["negative_passages"] == List(
        {"docid": Value("string"), "text": Value("string"), "title": Value("string")}
    )
    assert out[0]["negative_passages"] == []


def test_conversion_of_no_rows_has_the_columns() -> None:
    dataset = Dataset.from_list(SOURCE).select([])
    assert convert(dataset, "triplet").column_names == ["anchor", "positive", "negative"]


def test_same_format_is_renamed_only() -> None:
    dataset = Dataset.from_dict({"query": ["q"], "answer": ["p"], "negative": ["n"], "id": [1]})
    assert convert(dataset, "triplet")[:] == {"anchor": ["q"], "positive": ["p"], "negative": ["n"]}


def test_conversion_is_the_same_on_disk(tmp_path: Any) -> None:
    """A dataset with cache files gets its result on disk, and finds it again."""
    path = tmp_path / "rows.parquet"
    convert(Dataset.from_list(SOURCE), "triplet").to_parquet(path)
    dataset = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))

    first, second = convert(dataset, "bge"), convert(dataset, "bge")

    assert first[:] == second[:]
    assert first.cache_files
    assert first.cache_files == second.cache_files


def test_column_in_the_way_is_named() -> None:
    dataset = Dataset.from_list([{**TEVATRON, "pos": 3}])
    with pytest.raises(ColumnError, match=r"rename_column\('pos'"):
        convert(dataset, "bge")


@pytest.mark.parametrize(
    ("dataset", "n_negatives", "message"),
    [
        (Dataset.from_list([TEVATRON]), 0, "expected n_negatives of at least 1"),
        (Dataset.from_dict({"anchor": ["q"], "document": ["p"], "label": [1]}), None, "to count"),
    ],
)
def test_width_must_be_known(dataset: Dataset, n_negatives: int | None, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        convert(dataset, "n-tuple", n_negatives=n_negatives)


# Cost ----------------------------------------------------------------------------------------


def test_untouched_batch_is_fast() -> None:
    """Read and write of 1000 rows of 15 passages: well under 0.1 s, for they are never hashed."""
    words = " ".join(["word"] * 100)
    batch = {
        "query": ["q"] * 1000,
        "positive_passages": [structs(words)] * 1000,
        "negative_passages": [structs(*[words] * 14)] * 1000,
    }
    form = detect(list(batch))

    def seconds() -> float:
        start = time.perf_counter()
        rows = form.read(batch)
        form.write(batch, rows, keep_all(rows), seed=0)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1


def test_import_brings_no_datasets() -> None:
    """`import hf_relabel` stays light: datasets alone takes longer than all we have."""
    code = "import sys, hf_relabel.formats; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
