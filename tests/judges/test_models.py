"""What is known of models by name."""

from __future__ import annotations

import warnings
from datetime import date

import pytest

from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.models import (
    ModelProfile,
    ShutdownWarning,
    profile_of,
    shutdown_date,
    warn_of_shutdown,
)
from hf_relabel.questions import Question


@pytest.mark.parametrize(
    "model", ["gpt-5", "gpt-5-mini", "gpt-5.4-mini", "gpt-5.5", "o3", "o4-mini", "openai/o3"]
)
def test_reasoning_models_take_an_effort_and_no_temperature(model: str) -> None:
    profile = profile_of(model)

    assert {"temperature", "seed"} <= set(profile.drop)
    assert profile.add == {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    "model",
    ["gpt-5.6-luna", "gpt-5.10", "gpt-6-luna", "gpt-6.1-terra", "openai/gpt-6-luna", "gpt-7"],
)
def test_from_gpt_5_6_on_prompts_are_not_written_to_the_prompt_cache(model: str) -> None:
    """A write costs 1.25 times the input, and no prompt of ours is sent twice."""
    profile = profile_of(model)

    assert {"temperature", "seed"} <= set(profile.drop)
    assert profile.add == {
        "reasoning_effort": "low",
        "prompt_cache_options": {"mode": "explicit"},
    }
    assert ChatJudge(model).body(Question(query="q", passages=("p",)))["prompt_cache_options"] == {
        "mode": "explicit"
    }


def test_the_prompt_cache_changes_the_bill_and_no_fingerprint() -> None:
    plain = ChatJudge("gpt-6-luna", parameters={"prompt_cache_options": None})

    assert "prompt_cache_options" not in plain.body(Question(query="q", passages=("p",)))
    assert plain.fingerprint == ChatJudge("gpt-6-luna").fingerprint


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-35-turbo", "gpt-3.5-turbo", "gpt-oss-120b",
        "meta-llama/Llama-3.3-70B", "my-gpt-5-clone", "my-gpt-6", "",
    ],
)  # fmt: skip
def test_other_models_are_asked_plainly(model: str) -> None:
    assert profile_of(model) == ModelProfile()


def test_the_papers_models_have_an_end() -> None:
    assert shutdown_date("gpt-4o") == date(2027, 1, 14)
    assert shutdown_date("gpt-4o-mini") == date(2027, 1, 14)
    assert shutdown_date("gpt-6-luna") is None


@pytest.mark.parametrize(
    ("today", "words"),
    [
        (date(2026, 10, 16), "in 90 days"),
        (date(2027, 1, 13), "in 1 days"),
        (date(2027, 3, 1), "in the past"),
    ],
)
def test_a_model_near_its_end_is_warned_of(today: date, words: str) -> None:
    with pytest.warns(ShutdownWarning, match=rf"gpt-4o is shut down on 2027-01-14 \({words}\)"):
        warn_of_shutdown("gpt-4o", today=today)


@pytest.mark.parametrize(
    ("model", "today"), [("gpt-4o", date(2026, 10, 15)), ("llama", date(2030, 1, 1))]
)
def test_a_model_with_time_left_or_no_known_end_is_not(model: str, today: date) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shutdown(model, today=today)
