"""Verdicts: values that survive JSON, pickles and sets."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_relabel.verdicts import Relevance, Verdict

VERDICTS = st.builds(
    Verdict,
    relevance=st.sampled_from(Relevance),
    judge=st.text(),
    rank=st.none() | st.integers(0, 1000),
    grade=st.none() | st.integers(0, 3),
    confidence=st.none() | st.floats(0, 1),
    reason=st.none() | st.text(),
    call=st.none() | st.text(),
)


@given(VERDICTS)
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@given(VERDICTS)
def test_a_verdict_survives_a_pickle_and_hashes_alike(verdict: Verdict) -> None:
    copy = pickle.loads(pickle.dumps(verdict))  # noqa: S301

    assert {copy} == {verdict}


def test_json_leaves_out_what_is_not_set() -> None:
    verdict = Verdict(relevance=Relevance.WORSE, judge="j", rank=0)

    assert verdict.to_json() == {"relevance": "worse", "judge": "j", "rank": 0}


def test_an_unknown_relevance_is_refused() -> None:
    with pytest.raises(ValueError, match="'maybe' is not a valid Relevance"):
        Verdict.from_json({"relevance": "maybe", "judge": "j"})


def test_a_verdict_cannot_be_changed() -> None:
    verdict = Verdict(relevance=Relevance.WORSE, judge="j")

    with pytest.raises(FrozenInstanceError, match="relevance"):
        verdict.relevance = Relevance.BETTER  # type: ignore[misc]


@pytest.mark.parametrize(
    ("relevance", "is_relevant", "is_decided"),
    [
        (Relevance.BETTER, True, True),
        (Relevance.WORSE, True, True),
        (Relevance.NOT_RELEVANT, False, True),
        (Relevance.UNDECIDED, False, False),
    ],
)
def test_undecided_is_neither_relevant_nor_decided(
    relevance: Relevance, is_relevant: bool, is_decided: bool
) -> None:
    """Undecided is not "not relevant": nobody may take a missing answer for a no."""
    assert (relevance.is_relevant, relevance.is_decided) == (is_relevant, is_decided)
