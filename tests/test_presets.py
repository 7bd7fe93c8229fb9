"""Presets: every one builds, and every override arrives."""

from __future__ import annotations

import pickle
import tomllib
from importlib.resources import files
from typing import Any

import pytest

from hf_relabel.errors import SettingError
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.limits import Ceilings
from hf_relabel.judges.models import shutdown_date
from hf_relabel.judges.scripted import ScriptedJudge
from hf_relabel.policy import Policy
from hf_relabel.presets import PRESETS, Overrides, Preset, load_preset
from hf_relabel.prompts import Protocol

TABLE = tomllib.loads(files("hf_relabel").joinpath("data", "presets.toml").read_text("utf-8"))
CHAT = [name for name in PRESETS if name != "offline"]
QUERY_PROMPT = "Q {query} P {positives} N {passages}"


def chat_judges(preset: Preset) -> list[ChatJudge]:
    judges = [stage.judge for stage in preset.cascade.stages if stage.title != "screen"]
    assert all(isinstance(judge, ChatJudge) for judge in judges)
    return judges  # type: ignore[return-value]


def test_the_names_are_those_of_the_table() -> None:
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_data(name: str) -> None:
    """What the table says is what is built: nothing is set in code behind its back."""
    values = TABLE[name]

    preset = load_preset(name)

    assert (preset.name, preset.about) == (name, values["about"])
    assert preset.cascade.escalate == values["escalate"]
    assert preset.policy == Policy(
        **{**values["policy"], "skip_subsets": frozenset(values["policy"]["skip_subsets"])}
    )
    for stage, entry in zip(preset.cascade.stages, values["stages"], strict=True):
        assert stage.name == entry["name"]
        settings = {key: entry[key] for key in entry if key not in ("name", "judge")}
        built: dict[str, Any] = {key: getattr(stage.judge, key) for key in settings}
        if "prompt" in settings:
            built["prompt"] = built["prompt"].name
        if "prompts_by_subset" in settings:
            named = {subset: p.name for subset, p in built["prompts_by_subset"].items()}
            built["prompts_by_subset"] = named
        assert built == settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_pickle(name: str) -> None:
    preset = load_preset(name)

    copy = pickle.loads(pickle.dumps(preset))  # noqa: S301

    assert copy.cascade.fingerprint == preset.cascade.fingerprint
    assert copy.policy == preset.policy


def test_presets_differ_in_what_they_answer() -> None:
    assert len({load_preset(name).cascade.fingerprint for name in PRESETS}) == len(PRESETS)


def test_the_paper_preset_is_the_papers_cascade() -> None:
    """Thakur et al. (2025): gpt-4o-mini, then gpt-4o, temperature 0.1, 25 passages, 7 at most."""
    preset = load_preset("paper")

    found = [(judge.model, judge.temperature, judge.max_passages) for judge in chat_judges(preset)]
    assert found == [("gpt-4o-mini", 0.1, 25), ("gpt-4o", 0.1, 25)]
    assert preset.policy == Policy()


def test_the_current_preset_asks_no_model_with_a_known_end() -> None:
    models = [judge.model for judge in chat_judges(load_preset("current"))]

    assert [shutdown_date(model) for model in models] == [None, None]


@pytest.mark.parametrize(
    ("models", "titles", "prompts"),
    [
        (["a"], ["strong"], ["paper-strong"]),
        (["a", "b"], ["cheap", "strong"], ["paper-cheap", "paper-strong"]),
        (
            ["a", "b", "c"],
            ["stage 1", "stage 2", "strong"],
            ["paper-cheap", "paper-cheap", "paper-strong"],
        ),
    ],
)
def test_the_callers_models_are_the_stages(
    models: list[str], titles: list[str], prompts: list[str]
) -> None:
    """The last one has the last word, so it takes the strong stage's settings."""
    preset = load_preset("paper", Overrides(models=models))

    assert [judge.model for judge in chat_judges(preset)] == models
    assert [stage.title for stage in preset.cascade.stages] == titles
    assert [judge.prompt.name for judge in chat_judges(preset)] == prompts


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize(
    ("protocol", "prompts"),
    [("xml", ["paper-cheap", "paper-strong"]), ("json", ["graded", "graded"])],
)
def test_a_protocol_brings_its_prompts(name: str, protocol: str, prompts: list[str]) -> None:
    judges = chat_judges(load_preset(name, Overrides(protocol=protocol)))

    assert [judge.prompt.name for judge in judges] == prompts
    asked = [p for judge in judges for p in (judge.prompt, *judge.prompts_by_subset.values())]
    assert {prompt.protocol for prompt in asked} == {Protocol(protocol)}


def test_the_callers_prompt_asks_every_subset() -> None:
    judges = chat_judges(load_preset("paper", Overrides(prompt=QUERY_PROMPT)))

    assert [judge.prompt.text for judge in judges] == [QUERY_PROMPT] * 2
    assert [judge.prompts_by_subset for judge in judges] == [{}, {}]


def test_endpoint_concurrency_and_escalation_arrive() -> None:
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1")

    preset = load_preset(
        "paper",
        Overrides(endpoint=endpoint, ceilings=Ceilings(max_concurrency=3), escalate="passage"),
    )

    assert [(j.endpoint, j.ceilings.max_concurrency) for j in chat_judges(preset)] == [
        (endpoint, 3)
    ] * 2
    assert preset.cascade.escalate == "passage"


def test_overrides_do_not_reach_the_next_preset() -> None:
    """The table is read once and shared."""
    before = load_preset("paper").cascade.fingerprint

    load_preset("paper", Overrides(models=["a", "b", "c"], protocol="json"))

    assert load_preset("paper").cascade.fingerprint == before


def test_a_key_shows_nowhere() -> None:
    key = "sk-unseen-0123456789"
    overrides = Overrides(api_key=key)
    preset = load_preset("paper", overrides)

    assert key not in repr(overrides) + repr(preset)
    assert key.encode() not in pickle.dumps(preset)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "papers",
            Overrides(),
            r"one of the presets \['paper', 'current', 'offline', 'screened'\]",
        ),
        ("offline", Overrides(models=["a"]), "expected no models for the preset 'offline'"),
        ("paper", Overrides(screen="a"), "no screen for the preset 'paper', which has none"),
        ("offline", Overrides(screen_threshold=0.1), "Take the preset 'screened'"),
        ("paper", Overrides(protocol="yaml"), "expected protocol 'xml' or 'json', found 'yaml'"),
        ("paper", Overrides(escalate="all"), "'row' or 'passage'"),  # type: ignore[arg-type]
        ("paper", Overrides(prompt="no-such-prompt"), "no-such-prompt"),
    ],
)
def test_overrides_that_cannot_work_are_refused(
    name: str, overrides: Overrides, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        load_preset(name, overrides)


@pytest.mark.parametrize(
    ("preset", "protocol", "expected"),
    [("paper", None, "xml"), ("paper", "json", "json"), ("current", None, "json")],
)
def test_a_prompt_of_the_callers_own_is_read_as_the_protocol_of_its_stage(
    preset: str, protocol: str | None, expected: str
) -> None:
    template = "Q {query}\nGood: {positives}\nJudge: {passages}"

    built = load_preset(preset, Overrides(protocol=protocol, prompt=template))

    assert [judge.prompt.protocol.value for judge in chat_judges(built)] == [expected] * 2


def test_a_preset_without_a_chat_model_takes_no_chat_settings() -> None:
    with pytest.raises(SettingError, match="asks no chat model"):
        load_preset("offline", Overrides(protocol="json"))


def screen_of(**overrides: Any) -> Any:
    return load_preset("screened", Overrides(**overrides)).cascade.stages[0].judge


def test_the_screen_is_chosen_and_its_other_settings_stay() -> None:
    chosen = screen_of(screen="org/reranker", screen_threshold=0.2)

    assert (chosen.model, chosen.threshold, chosen.share_of_positive) == ("org/reranker", 0.2, 0.95)
    assert screen_of(screen="org/reranker").threshold == screen_of().threshold
    judge = ScriptedJudge("mine", answers={})
    assert screen_of(screen=judge) is judge
    with pytest.raises(SettingError, match="with a judge, which has its own"):
        screen_of(screen=judge, screen_threshold=0.2)


def test_models_are_those_of_the_chat_stages_behind_the_screen() -> None:
    preset = load_preset("screened", Overrides(models=["a", "b", "c"]))

    titles = [stage.title for stage in preset.cascade.stages]
    assert titles == ["screen", "stage 1", "stage 2", "strong"]
    assert [judge.model for judge in chat_judges(preset)] == ["a", "b", "c"]


def test_the_stages_behind_the_screen_are_the_papers() -> None:
    judges = chat_judges(load_preset("screened"))

    paper = chat_judges(load_preset("paper"))
    assert [judge.fingerprint for judge in judges] == [judge.fingerprint for judge in paper]
