"""Check: a built folder is loaded, counted and searched before anything is sent. Offline."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_relabel.errors import CheckError, SettingError, SourceError
from hf_relabel.hub.build import read_manifest
from hf_relabel.hub.licences import KNOWN
from hf_relabel.hub.secrets import find_secrets
from hf_relabel.hub.settings import check_split
from hf_relabel.hub.shards import sha256_of

__all__ = ["check", "read_card"]

_CONFIG_NAME = re.compile(r"[^<>:/\\|?*]+")
_UNRESOLVED = re.compile(r"\{\{|\{%|\[More Information Needed\]|\bUndefined\b")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_MAX_LOADED_BYTES = 200_000_000
"""Configs above this are streamed, and counted by their footers: loading would fill the disk."""


def check(folder: Path) -> None:
    """Check a built folder.

    Raises:
        CheckError: It cannot be published; the message lists every fault.
    """
    faults = list(_faults(folder))
    if faults:
        lines = "\n".join(f"- {fault}" for fault in faults)
        raise CheckError(f"expected a folder fit to be published, found:\n{lines}")


def _faults(folder: Path) -> Iterator[str]:
    try:
        manifest = read_manifest(folder)
        header, body = read_card((folder / "README.md").read_text("utf-8"))
    except (SourceError, OSError, ValueError) as error:
        yield str(error)
        return
    yield from _file_faults(folder, manifest)
    yield from _header_faults(header, manifest)
    if found := _UNRESOLVED.search(_CODE.sub("", body)):
        yield f"README.md: the unresolved field {found[0]!r}"
    yield from _accounting_faults(manifest)
    for name, splits in manifest["configs"].items():
        yield from _config_faults(folder, header, name, splits)
    yield from find_secrets(folder)


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its YAML header and its body; a card without a header has an empty one.

    Raises:
        ValueError: The header is no YAML mapping.
    """
    import yaml

    found = re.match(r"\A---\r?\n(.*?\n)?---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError as error:
        raise ValueError(f"README.md: the header is no YAML: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"README.md: expected a mapping as header, found {type(header).__name__}")
    return header, text[found.end() :]


def _file_faults(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{name}: missing"
        elif sha256_of(path) != known["sha256"]:
            yield f"{name}: changed since it was built"
    known_names = {*manifest["files"], "README.md", "hf_relabel.json"}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known_names:
            yield f"{name}: not built by us"


def _header_faults(header: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    if header.get("license") not in KNOWN:
        yield f"README.md: expected a licence id of the Hub, found {header.get('license')!r}"
    configs = header.get("configs", [])
    names = [config.get("config_name") for config in configs]
    if sorted(map(str, names)) != sorted(manifest["configs"]):
        yield f"README.md: expected the configs {list(manifest['configs'])}, found {names}"
    for name in names:
        if not _CONFIG_NAME.fullmatch(str(name)):
            yield f"README.md: the config name {name!r}, with which no config would load"
    if sum(bool(config.get("default")) for config in configs) != 1:
        yield "README.md: expected one default config"
    for config in configs:
        for file in config.get("data_files", []):
            try:
                check_split(file["split"])
            except SettingError as error:
                yield f"README.md: {error}"


def _accounting_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    rows = manifest["rows"]
    n_out = rows["rows_in"] + rows["rows_added"] - sum(rows["rows_dropped"].values())
    if n_out != rows["rows_out"]:
        yield f"report.json: expected {n_out} rows out by its own counts, found {rows['rows_out']}"
    if not rows["is_converted"] and rows["data_rows"] != rows["rows_out"]:
        yield f"data: expected {rows['rows_out']} rows as in report.json, found {rows['data_rows']}"
    n_decided = sum(manifest["configs"].get("decisions", {}).values())
    n_seen = rows["negatives"]["seen"]
    if "decisions" in manifest["configs"] and n_decided > n_seen:
        yield f"decisions: expected at most {n_seen} rows as in report.json, found {n_decided}"


def _config_faults(
    folder: Path, header: Mapping[str, Any], name: str, splits: Mapping[str, int]
) -> Iterator[str]:
    from datasets import Features

    info = next((i for i in header.get("dataset_info", []) if i["config_name"] == name), None)
    if info is None:
        yield f"{name}: no dataset_info in the card"
        return
    declared = Features._from_yaml_list(info["features"])
    counted = {split["name"]: split["num_examples"] for split in info["splits"]}
    if counted != dict(splits):
        yield f"{name}: expected {dict(splits)} rows in dataset_info, found {counted}"
    try:
        found = _loaded(folder, name, info["dataset_size"])
    except Exception as error:  # `datasets` raises a dozen kinds; all mean that it does not load
        yield f"{name}: does not load: {type(error).__name__}: {error}"
        return
    for split, (features, n_rows) in found.items():
        if features != declared:
            yield f"{name}: expected the columns {declared}, found {features}"
        if n_rows != splits.get(split):
            yield f"{name}: expected {splits.get(split)} rows in {split}, found {n_rows}"


def _loaded(folder: Path, name: str, n_bytes: int) -> dict[str, tuple[Any, int]]:
    """Load a config as users will, and return the features and rows of its splits."""
    from datasets import load_dataset

    path = str(folder.resolve())
    if n_bytes > _MAX_LOADED_BYTES:
        return {
            split: (part.features, _footer_rows(folder / name, split))
            for split, part in load_dataset(path, name, streaming=True).items()
            if next(iter(part)) is not None
        }
    with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
        loaded = load_dataset(path, name, cache_dir=scratch)
        return {split: (part.features, len(part)) for split, part in loaded.items()}


def _footer_rows(folder: Path, split: str) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in folder.glob(f"{split}-*.parquet"))
