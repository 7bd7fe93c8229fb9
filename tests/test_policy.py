"""Policy: from verdicts to actions, with every row accounted for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_relabel.errors import SettingError
from hf_relabel.formats import Passage, Row
from hf_relabel.policy import Policy, open_negatives
from hf_relabel.verdicts import Action, Relevance, Verdict

BETTER, WORSE, NOT_RELEVANT = Relevance.BETTER, Relevance.WORSE, Relevance.NOT_RELEVANT
UNDECIDED = Relevance.UNDECIDED
KEEP, DROP, PROMOTE = Action.KEEP, Action.DROP, Action.PROMOTE
REASONS = {None, "false_negative", "too_many_false_negatives", "too_few_negatives"}


def row_of(*negatives: str, positives: Sequence[str] = "P", subset: str | None = None) -> Row:
    return Row(
        query="q",
        positives=tuple(Passage(text=text) for text in positives),
        negatives=tuple(Passage(text=text) for text in negatives),
        subset=subset,
        indices=(0,),
    )


def verdicts_of(
    answers: Mapping[str, Relevance | tuple[Relevance, int | None]],
) -> dict[str, Verdict]:
    found = {}
    for text, answer in answers.items():
        relevance, rank = answer if isinstance(answer, tuple) else (answer, None)
        found[Passage(text=text).key] = Verdict(relevance=relevance, judge="j", rank=rank)
    return found


# Few letters, so that negatives repeat each other and the positives.
ROWS = st.builds(
    lambda negatives, positives, subset: row_of(*negatives, positives=positives, subset=subset),
    st.lists(st.sampled_from("abcdefghijP"), max_size=12),
    st.sampled_from(["P", "PQ", ""]),
    st.sampled_from([None, "fiqa", "ArguAna"]),
)
ANSWERS = st.dictionaries(
    st.sampled_from("abcdefghij"),
    st.tuples(st.sampled_from(Relevance), st.none() | st.integers(0, 5)),
).map(verdicts_of)
ACTIONS = st.sampled_from(["promote", "drop", "remove_row"]) | st.dictionaries(
    st.sampled_from(["better", "worse"]), st.sampled_from(["promote", "drop", "keep"])
)
POLICIES = st.builds(
    Policy,
    action=ACTIONS,
    count=st.sampled_from(["better", "better+worse"]),
    max_false_negatives=st.none() | st.integers(0, 12) | st.floats(0.01, 1),
    min_negatives=st.integers(0, 5),
)


@given(POLICIES, ROWS, ANSWERS, st.booleans())
def test_every_negative_and_every_row_is_accounted_for(
    policy: Policy, row: Row, verdicts: dict[str, Verdict], can_run_out: bool
) -> None:
    edit = policy.edit(row, verdicts, can_run_out=can_run_out)

    assert len(edit.actions) == len(row.negatives)
    assert edit.drop_row in REASONS
    promoted = [index for index, action in enumerate(edit.actions) if action is PROMOTE]
    assert sorted(edit.promoted) == promoted
    assert edit == policy.edit(row, verdicts, can_run_out=can_run_out)


@given(POLICIES, ROWS, ANSWERS)
def test_nothing_changes_without_a_verdict_that_says_so(
    policy: Policy, row: Row, verdicts: dict[str, Verdict]
) -> None:
    """Missing, undecided and "not relevant" all keep; a copy of a positive alone needs no verdict."""
    positives = {passage.key for passage in row.positives}

    edit = policy.edit(row, verdicts)

    for passage, action in zip(row.negatives, edit.actions, strict=True):
        verdict = verdicts.get(passage.key)
        is_flagged = verdict is not None and verdict.relevance.is_relevant
        if action is not KEEP and passage.key not in positives:
            assert is_flagged
        if action is PROMOTE:
            assert passage.key not in positives


@given(POLICIES, ROWS, ANSWERS)
def test_a_passage_is_promoted_once_and_its_copies_leave(
    policy: Policy, row: Row, verdicts: dict[str, Verdict]
) -> None:
    edit = policy.edit(row, verdicts)

    promoted = [row.negatives[index].key for index in edit.promoted]
    assert len(set(promoted)) == len(promoted)
    for passage, action in zip(row.negatives, edit.actions, strict=True):
        assert passage.key not in promoted or action in (PROMOTE, DROP)


@given(POLICIES, ROWS, ANSWERS)
def test_promoted_passages_come_better_first_and_then_by_rank(
    policy: Policy, row: Row, verdicts: dict[str, Verdict]
) -> None:
    edit = policy.edit(row, verdicts)

    found = [verdicts[row.negatives[index].key] for index in edit.promoted]
    places = [(v.relevance is WORSE, 99 if v.rank is None else v.rank) for v in found]
    assert places == sorted(places)


@given(POLICIES, ROWS, ANSWERS)
def test_a_row_stays_only_within_the_limits(
    policy: Policy, row: Row, verdicts: dict[str, Verdict]
) -> None:
    edit = policy.edit(row, verdicts)
    if edit.drop_row is not None or policy.skips(row):
        return
    flagged = [
        passage
        for passage in open_negatives(row)
        if passage.key in verdicts
        and policy.action_on(verdicts[passage.key].relevance) is not Action.KEEP
    ]
    limit = policy.max_false_negatives
    if isinstance(limit, float):
        assert len(flagged) <= limit * len(row.negatives) + 1e-9
    elif limit is not None:
        assert len(flagged) <= limit
    assert edit.actions.count(KEEP) >= min(policy.min_negatives, len(row.negatives))
    assert not (flagged and policy.action == "remove_row")


@given(POLICIES, ROWS, ANSWERS)
def test_formats_that_cannot_run_out_never_lose_a_row_for_it(
    policy: Policy, row: Row, verdicts: dict[str, Verdict]
) -> None:
    edit = policy.edit(row, verdicts, can_run_out=False)

    assert edit.drop_row != "too_few_negatives"


def test_rank_orders_promoted_passages_within_a_relevance() -> None:
    verdicts = verdicts_of({"a": (WORSE, 0), "b": (BETTER, 2), "c": (BETTER, 1), "d": BETTER})

    edit = Policy().edit(row_of("a", "b", "c", "d", "e"), verdicts)

    assert edit.promoted == (2, 1, 3, 0)  # no rank: after those that have one


@pytest.mark.parametrize(
    ("action", "count", "expected"),
    [
        ("promote", "better+worse", (PROMOTE, PROMOTE)),
        ("promote", "better", (PROMOTE, KEEP)),
        ("drop", "better+worse", (DROP, DROP)),
        ("drop", "better", (DROP, KEEP)),
        ({"better": "promote", "worse": "drop"}, "better+worse", (PROMOTE, DROP)),
        ({"better": "keep", "worse": "drop"}, "better+worse", (KEEP, DROP)),
        ({"worse": "promote"}, "better+worse", (KEEP, PROMOTE)),
    ],
)
def test_the_action_on_each_relevance(
    action: Any, count: Any, expected: tuple[Action, ...]
) -> None:
    policy = Policy(action=action, count=count)

    edit = policy.edit(row_of("a", "b", "c", "d"), verdicts_of({"a": BETTER, "b": WORSE}))

    assert edit.actions == (*expected, KEEP, KEEP)


def test_a_negative_equal_to_a_positive_is_dropped_unasked() -> None:
    """Equal after normalization: the same words, spaced otherwise."""
    row = row_of("P  x ", "a", positives=["P x"])

    assert Policy().edit(row, {}).actions == (DROP, KEEP)
    assert [passage.text for passage in open_negatives(row)] == ["a"]


def test_a_negative_equal_to_a_positive_is_no_false_negative() -> None:
    """It does not count toward the limit, and does not take a row out."""
    row = row_of("P", "a")

    for policy in (Policy(action="remove_row"), Policy(max_false_negatives=0)):
        assert policy.edit(row, verdicts_of({"P": BETTER})).drop_row is None


def test_a_judge_sees_each_text_once() -> None:
    row = row_of("a", "b", "a", "P", " a")

    assert [passage.text for passage in open_negatives(row)] == ["a", "b"]


def test_seven_false_negatives_stay_and_eight_take_the_row_out() -> None:
    """The paper's rule."""
    names = "abcdefgh"
    row = row_of(*names, "z")

    seven = Policy().edit(row, verdicts_of(dict.fromkeys(names[:7], WORSE)))
    eight = Policy().edit(row, verdicts_of(dict.fromkeys(names, WORSE)))

    assert (seven.drop_row, eight.drop_row) == (None, "too_many_false_negatives")


def test_copies_of_a_false_negative_count_once_toward_the_limit() -> None:
    row = row_of("a", "a", "a", "b")

    assert Policy(max_false_negatives=1).edit(row, verdicts_of({"a": WORSE})).drop_row is None


@pytest.mark.parametrize(
    ("share", "n"), [(0.29, 100), (0.07, 100), (0.1, 30), (1.0, 5), (0.57, 100)]
)
def test_a_share_is_met_exactly(share: float, n: int) -> None:
    """0.29 * 100 is less than 29 in floating point, and 29 of 100 is not more than 0.29."""
    policy = Policy(max_false_negatives=share, min_negatives=0)
    row = row_of(*map(str, range(n)))
    n_allowed = round(share * n)

    at_limit = policy.edit(row, verdicts_of({str(i): WORSE for i in range(n_allowed)}))
    assert at_limit.drop_row is None
    if n_allowed < n:
        above = policy.edit(row, verdicts_of({str(i): WORSE for i in range(n_allowed + 1)}))
        assert above.drop_row == "too_many_false_negatives"


def test_no_limit_drops_no_row() -> None:
    names = "abcdefghij"
    policy = Policy(max_false_negatives=None, min_negatives=0)

    edit = policy.edit(row_of(*names), verdicts_of(dict.fromkeys(names, BETTER)))

    assert edit.drop_row is None
    assert edit.actions == (PROMOTE,) * 10


def test_only_false_negatives_that_the_policy_acts_on_count_toward_the_limit() -> None:
    verdicts = verdicts_of(dict.fromkeys("abcd", WORSE))
    row = row_of(*"abcde")

    assert Policy(count="better", max_false_negatives=3).edit(row, verdicts).drop_row is None
    assert Policy(max_false_negatives=3).edit(row, verdicts).drop_row is not None


def test_one_false_negative_removes_the_row() -> None:
    row, policy = row_of("a", "b"), Policy(action="remove_row")

    assert policy.edit(row, verdicts_of({"a": WORSE})).drop_row == "false_negative"
    assert policy.edit(row, verdicts_of({"a": NOT_RELEVANT, "b": UNDECIDED})).changes_nothing


def test_a_row_without_negatives_left_is_dropped() -> None:
    row, verdicts = row_of("a"), verdicts_of({"a": BETTER})

    assert Policy().edit(row, verdicts).drop_row == "too_few_negatives"
    assert Policy(min_negatives=0).edit(row, verdicts).drop_row is None
    assert Policy().edit(row, verdicts, can_run_out=False).drop_row is None


def test_a_row_that_came_with_few_negatives_and_loses_none_stays() -> None:
    policy = Policy(min_negatives=5)

    assert policy.edit(row_of("a", "b"), {}).changes_nothing
    assert policy.edit(row_of(), {}).changes_nothing


def test_a_skipped_subset_passes_through_untouched() -> None:
    """Not even a copy of a positive leaves, and the case of letters does not matter."""
    policy = Policy(skip_subsets=frozenset({"ArguAna"}))
    row = row_of("a", "P", subset="arguana")

    assert policy.skips(row)
    assert policy.edit(row, verdicts_of({"a": BETTER})).changes_nothing
    assert not policy.skips(row_of("a", subset="fiqa"))
    assert not policy.skips(row_of("a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "delete"}, "expected action to be one of"),
        ({"action": "keep"}, "expected action to be one of"),
        ({"action": {"better": "remove_row"}}, "expected action to be one of"),
        ({"action": {"undecided": "drop"}}, "expected action's relevance"),
        ({"count": "worse"}, "expected count to be one of"),
        ({"max_false_negatives": -1}, "a count of 0 or more"),
        ({"max_false_negatives": 0.0}, "a share in"),
        ({"max_false_negatives": 1.5}, "a share in"),
        ({"max_false_negatives": float("nan")}, "a share in"),
        ({"min_negatives": -1}, "min_negatives of 0 or more"),
        ({"skip_subsets": "arguana"}, "expected skip_subsets to be a set of names"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Policy(**changes)


def test_a_policy_survives_a_pickle_and_compares_by_value() -> None:
    """The order in which actions were written is no setting."""
    policy = Policy(action={"worse": "drop", "better": "promote"}, skip_subsets=frozenset({"A"}))
    same = Policy(action={"better": "promote", "worse": "drop"}, skip_subsets=frozenset({"a"}))

    assert pickle.dumps(policy) == pickle.dumps(same)
    assert pickle.loads(pickle.dumps(policy)) == same  # noqa: S301
