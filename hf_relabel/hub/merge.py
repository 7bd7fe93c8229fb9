"""Merging: our card into the one that is there. What is not ours stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hf_relabel.hub.build import join_card
from hf_relabel.hub.check import read_card
from hf_relabel.hub_cards import END, insert_block

__all__ = ["merge_card"]

_UNIONS = ("tags", "task_categories", "language", "source_datasets")
_LICENCE_DETAILS = ("license_name", "license_link")


def merge_card(old: str, new: str, *, earlier: Collection[str] = ()) -> str:
    """Merge a card that was built into the one in the repository.

    Args:
        old: The repository's README.md; may be empty.
        new: The built one.
        earlier: Configs that we published before: those not built any more leave the card.

    Returns:
        The old card with our keys, our configs and our block of text; other keys, other configs
        and all words outside our markers are kept.

    Raises:
        ValueError: The old header is no YAML mapping.
    """
    old_header, old_body = read_card(old)
    new_header, block = read_card(new)
    header = _merged_header(old_header, new_header, earlier)
    if not old_body.strip():
        return join_card(header, block)
    body = insert_block(old_body, block)
    return join_card(header, body if END in old_body else f"\n{body.lstrip()}")


def _merged_header(
    old: Mapping[str, Any], new: Mapping[str, Any], earlier: Collection[str]
) -> dict[str, Any]:
    ours = {*earlier, *(config["config_name"] for config in new["configs"])}
    header = {**new, **{key: value for key, value in old.items() if key not in new}}
    for key in _UNIONS:
        if key in old and key in new:
            header[key] = list(dict.fromkeys([*new[key], *_listed(old[key])]))
    for key in _LICENCE_DETAILS:
        if key not in new:
            header.pop(key, None)
    foreign = _foreign(old, "configs", ours)
    header["configs"] = [*_without_default(new["configs"], foreign), *foreign]
    names = {config.get("config_name") for config in foreign}
    infos = [info for info in _foreign(old, "dataset_info", ours) if _name(info) in names]
    header["dataset_info"] = [*new["dataset_info"], *infos]
    return header


def _without_default(configs: list[Any], foreign: list[Any]) -> list[Any]:
    """Leave the default to a foreign config that has it: two of them load nothing."""
    if not any(config.get("default") for config in foreign):
        return configs
    return [{k: v for k, v in config.items() if k != "default"} for config in configs]


def _foreign(header: Mapping[str, Any], key: str, ours: Collection[str]) -> list[Any]:
    return [entry for entry in _listed(header.get(key)) if _name(entry) not in ours]


def _name(entry: Any) -> str:
    return str(entry.get("config_name", "default")) if isinstance(entry, Mapping) else "default"


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
