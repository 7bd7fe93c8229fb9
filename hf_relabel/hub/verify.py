"""Verify: what was pushed is loaded back at its commit, past every cache, and counted."""

from __future__ import annotations

import tempfile
from typing import Any

from hf_relabel.errors import CheckError, SettingError
from hf_relabel.hub.build import Built
from hf_relabel.hub.check import read_card
from hf_relabel.hub.push import Pushed, PushSettings

__all__ = ["snippet", "verify"]


def verify(built: Built, pushed: Pushed, settings: PushSettings) -> None:
    """Load every config that was pushed, at its commit and with a fresh cache.

    After a failed load `load_dataset` silently serves a cached copy: hence both the exact commit and
    an empty cache. Configs are loaded one at a time, and deleted again.

    Raises:
        CheckError: A config does not load, or holds other rows or columns than were built.
        SettingError: `datasets` in this process looks at another Hub than the push went to.
    """
    from datasets import Features
    from datasets import config as datasets_config

    endpoint = settings.endpoint or datasets_config.HF_ENDPOINT
    if endpoint.rstrip("/") != datasets_config.HF_ENDPOINT.rstrip("/"):
        raise SettingError(
            f"expected HF_ENDPOINT to be {endpoint!r}, found {datasets_config.HF_ENDPOINT!r}, which "
            "`datasets` read when it was imported. Set it before Python starts, or leave verifying "
            "out with verify=False."
        )
    header, _ = read_card((built.folder / "README.md").read_text("utf-8"))
    faults = []
    for info in header["dataset_info"]:
        name = info["config_name"]
        declared = Features._from_yaml_list(info["features"])
        counts = {split["name"]: split["num_examples"] for split in info["splits"]}
        try:
            found = _load(pushed, name, settings)
        except (
            Exception
        ) as error:  # `datasets` raises a dozen kinds; all mean that it does not load
            faults.append(f"{name}: does not load: {type(error).__name__}: {error}")
            continue
        if {split: n_rows for split, (_, n_rows) in found.items()} != counts:
            faults.append(f"{name}: expected the rows {counts}, found {found}")
        if any(features != declared for features, _ in found.values()):
            faults.append(f"{name}: expected the columns {declared}, found {found}")
    if faults:
        lines = "\n".join(f"- {fault}" for fault in faults)
        raise CheckError(f"expected {pushed.url} to load as it was built, found:\n{lines}")


def _load(pushed: Pushed, name: str, settings: PushSettings) -> dict[str, tuple[Any, int]]:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
        loaded = load_dataset(
            pushed.repo_id, name, revision=pushed.sha, cache_dir=scratch, token=settings.token
        )
        return {split: (part.features, len(part)) for split, part in loaded.items()}


def snippet(built: Built, pushed: Pushed) -> str:
    """Return a line that loads the default config as it is now, whatever is pushed later."""
    name = built.manifest["default"]
    return f'load_dataset("{pushed.repo_id}", "{name}", revision="{pushed.pin}")'
