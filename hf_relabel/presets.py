"""Presets: cascades and policies by name, built from `data/presets.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hf_relabel.cascade import Cascade, Escalation, Stage
from hf_relabel.errors import SettingError
from hf_relabel.judges.chat import ChatJudge
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.limits import Ceilings
from hf_relabel.judges.protocol import Judge
from hf_relabel.policy import Policy
from hf_relabel.prompts import Prompt, load_prompt

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

__all__ = ["PRESETS", "Overrides", "Preset", "load_preset"]

_PROMPTS_OF_PROTOCOL = {"xml": ("paper-cheap", "paper-strong"), "json": ("graded", "graded")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What a caller changes in a preset; None leaves the preset's own.

    Attributes:
        models: Exactly these models are the chat stages, cheap to strong.
        screen: The cross-encoder of a preset that begins with one: its name, its folder, loaded,
            or a judge of your own in its place.
        screen_threshold: The lowest score that the cross-encoder passes on.
        protocol: "xml" or "json", with that protocol's prompts.
        prompt: One prompt for every stage and subset: a name, a file or a template.
        escalate: "row" or "passage".
        endpoint: Where chat models answer.
        api_key: Stays in this process.
        ceilings: What is allowed at most of calls in flight, requests and tokens a minute.
    """

    models: Sequence[str] = ()
    screen: str | CrossEncoder | Judge | None = None
    screen_threshold: float | None = None
    protocol: str | None = None
    prompt: str | Prompt | None = None
    escalate: Escalation | None = None
    endpoint: Endpoint | None = None
    api_key: str | None = field(default=None, repr=False)
    ceilings: Ceilings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A cascade and the policy that goes with it."""

    name: str
    about: str
    cascade: Cascade
    policy: Policy


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("hf_relabel").joinpath("data", "presets.toml").read_text("utf-8"))


PRESETS: tuple[str, ...] = ("paper", "current", "offline", "screened")
"""The presets that come with the library."""


def load_preset(name: str, overrides: Overrides | None = None) -> Preset:
    """Build a preset's cascade and policy.

    Args:
        name: One of `PRESETS`.
        overrides: What to change in it.

    Raises:
        SettingError: No preset has this name, or an override cannot work with it.
    """
    if name not in _table():
        raise SettingError(f"expected one of the presets {list(_table())}, found {name!r}.")
    values, changed = _table()[name], overrides or Overrides()
    _check_screen(name, values["stages"], changed)
    stages = _with_models(name, values["stages"], changed.models)
    last = len(stages) - 1
    judges = [_judge(stage, changed, is_last=index == last) for index, stage in enumerate(stages)]
    return Preset(
        name=name,
        about=values["about"],
        cascade=Cascade(
            [Stage(judge, stage["name"]) for judge, stage in zip(judges, stages, strict=True)],
            escalate=changed.escalate or values["escalate"],
        ),
        policy=_policy(values["policy"]),
    )


def _check_screen(name: str, stages: Sequence[Mapping[str, Any]], changed: Overrides) -> None:
    is_given = changed.screen is not None or changed.screen_threshold is not None
    if is_given and all(stage["judge"] != "cross-encoder" for stage in stages):
        raise SettingError(
            f"expected no screen for the preset {name!r}, which has none, found one. Take the preset "
            "'screened'."
        )
    if changed.screen_threshold is not None and isinstance(changed.screen, Judge):
        raise SettingError(
            "expected screen_threshold with a model, found it with a judge, which has its own."
        )


def _with_models(
    name: str, stages: Sequence[Mapping[str, Any]], models: Sequence[str]
) -> list[dict[str, Any]]:
    """Put the caller's models in the chat stages: the last takes the strong stage's settings."""
    if not models:
        return [dict(stage) for stage in stages]
    others = [dict(stage) for stage in stages if stage["judge"] != "chat"]
    chats = [stage for stage in stages if stage["judge"] == "chat"]
    if not chats:
        raise SettingError(f"expected no models for the preset {name!r}, found {list(models)}.")
    numbered = [{**chats[0], "name": f"stage {i}"} for i in range(1, len(models))]
    if len(numbered) == 1:
        numbered[0]["name"] = chats[0]["name"]
    settings = [*numbered, dict(chats[-1])]
    named = [{**stage, "model": model} for stage, model in zip(settings, models, strict=True)]
    return [*others, *named]


def _judge(stage: Mapping[str, Any], changed: Overrides, *, is_last: bool) -> Judge:
    settings = {key: value for key, value in stage.items() if key not in ("name", "judge")}
    if stage["judge"] == "embedding":
        _expect_no_chat_settings(changed)
        # sentence-transformers is an extra, and torch takes seconds to import.
        from hf_relabel.judges.embedding import EmbeddingJudge

        return EmbeddingJudge(**settings)
    if stage["judge"] == "cross-encoder":
        return _screen(settings, changed)
    return ChatJudge(
        **_with_prompts(settings, changed, is_last=is_last),
        endpoint=changed.endpoint,
        api_key=changed.api_key,
        ceilings=changed.ceilings,
    )


def _screen(settings: Mapping[str, Any], changed: Overrides) -> Judge:
    if isinstance(changed.screen, Judge):
        return changed.screen
    from hf_relabel.judges.cross_encoder import CrossEncoderJudge

    given = {"model": changed.screen, "threshold": changed.screen_threshold}
    chosen = {name: value for name, value in given.items() if value is not None}
    return CrossEncoderJudge(**{**settings, **chosen})


def _expect_no_chat_settings(changed: Overrides) -> None:
    given = replace(changed, models=(), escalate=None)
    if given != Overrides():
        raise SettingError(
            "expected no protocol, prompt, address, key or limit of calls for a preset that asks no "
            "chat model, found one. Leave it out, or take another preset."
        )


def _with_prompts(
    settings: Mapping[str, Any], changed: Overrides, *, is_last: bool
) -> dict[str, Any]:
    """Return a stage's settings with the caller's protocol and prompt in place."""
    result = dict(settings)
    if changed.protocol is not None:
        if changed.protocol not in _PROMPTS_OF_PROTOCOL:
            raise SettingError(f"expected protocol 'xml' or 'json', found {changed.protocol!r}.")
        result["prompt"] = _PROMPTS_OF_PROTOCOL[changed.protocol][is_last]
    if changed.prompt is not None:
        # A prompt of the caller's own is read as the protocol that the stage would speak.
        protocol = load_prompt(result["prompt"]).protocol
        own = changed.prompt
        result["prompt"] = own if isinstance(own, Prompt) else load_prompt(own, protocol=protocol)
    if changed.prompt is not None or changed.protocol == "json":
        result.pop("prompts_by_subset", None)
    return result


def _policy(values: Mapping[str, Any]) -> Policy:
    return Policy(**{**values, "skip_subsets": frozenset(values["skip_subsets"])})
