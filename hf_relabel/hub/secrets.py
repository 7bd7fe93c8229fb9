"""Secrets and machine paths: what must be in no file that is published.

The search reads bytes, so that it sees Parquet and PNG files as well as text; Parquet columns are
read besides, for compression hides their words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["find_secrets"]

_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\b(?:sk|rk|pk)-(?:proj-|ant-|or-v1-)?[A-Za-z0-9_-]{20,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a GitHub token": r"\b(?:ghp|gho|ghs|ghu|ghr|github_pat)_[A-Za-z0-9_]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a bearer token": r"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?bearer\s+[A-Za-z0-9._~+/-]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\bhttps?://[^\s/@:\"']+:[^\s/@\"']+@",
}
_PATHS = {
    "a path of this machine": (
        r"(?<![\w.:/-])/(?:home|Users|root|mnt|tmp|private/var|var/folders|scratch|workspace)/[^\s\"'<>|]+"
    ),
    "a path of a Windows machine": r"(?i)\b[A-Z]:\\+(?:Users|Documents and Settings)\\+[^\s\"'<>|]+",
    "an address of a local server": r"\bhttps?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?",
}
_EXAMPLE = re.compile(r"^```json\n.*?^```", re.MULTILINE | re.DOTALL)
"""A row shown in the card: the source's own words."""
_CHUNK = 8_000_000
_OVERLAP = 300  # longer than anything that is searched for has to be to be recognized


def find_secrets(folder: Path, *, is_data_exempt: bool = True) -> list[str]:
    """Search every file of a folder.

    Args:
        folder: What is to be published.
        is_data_exempt: Whether paths are allowed in columns of the source's own words: a passage
            about Unix names /home/user rightly. Keys and tokens are allowed nowhere.

    Returns:
        One line for each find: the file, and what it is; never the secret itself.
    """
    finds = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for what, where in sorted(set(_in_file(path, folder, is_data_exempt))):
                finds.append(f"{path.relative_to(folder)}: {what}{where}")
    return finds


def _in_file(path: Path, folder: Path, is_data_exempt: bool) -> Iterator[tuple[str, str]]:
    patterns = _patterns(folder)
    secrets = {what: pattern for what, pattern in patterns.items() if what in _SECRETS}
    with path.open("rb") as file:
        before = b""
        while chunk := file.read(_CHUNK):
            # Text only where it is text: compressed bytes spell anything sooner or later.
            if path.suffix not in (".parquet", ".png"):
                text = (before + chunk).decode("utf-8", "replace")
                yield from _in_text(text, secrets)
                own = _EXAMPLE.sub("", text) if is_data_exempt else text
                yield from _in_text(own, patterns)
            before = chunk[-_OVERLAP:]
    if path.suffix == ".parquet":
        yield from _in_parquet(path, patterns, is_data_exempt)
    if path.suffix == ".png":
        yield from _in_text(path.read_bytes().decode("latin-1"), patterns)


def _in_text(
    text: str, patterns: dict[str, re.Pattern[str]], where: str = ""
) -> Iterator[tuple[str, str]]:
    for what, pattern in patterns.items():
        if pattern.search(text):
            yield what, where


def _in_parquet(
    path: Path, patterns: dict[str, re.Pattern[str]], is_data_exempt: bool
) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        metadata = {**(file.schema_arrow.metadata or {}), **(file.metadata.metadata or {})}
        for value in metadata.values():
            if not value.startswith(b"/////"):  # the schema in Arrow's own bytes
                yield from _in_text(value.decode("utf-8", "replace"), patterns, " in its metadata")
        secrets = {what: pattern for what, pattern in patterns.items() if what in _SECRETS}
        for batch in file.iter_batches(batch_size=2000):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                wanted = secrets if is_data_exempt and name in _WORDS else patterns
                yield from _in_column(column, wanted, f" in column {name!r}")


_WORDS = {
    *("anchor", "positive", "negative", "query", "passage", "documents", "pos", "neg", "reason"),
    *("positive_passages", "negative_passages"),
    *(f"negative_{number}" for number in range(1, 1000)),
}
"""Columns of the source's own words."""


def _in_column(
    column: Any, patterns: dict[str, re.Pattern[str]], where: str
) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type):
        column = column.flatten()
    if pa.types.is_struct(column.type):
        for part in column.flatten():
            yield from _in_column(part, patterns, where)
        return
    if not pa.types.is_string(column.type):
        return
    for what, pattern in patterns.items():
        # RE2 knows no look-behind: a coarse search in Arrow, and the exact one on what it found.
        coarse = _COARSE[what]
        found = column.filter(pc.fill_null(pc.match_substring_regex(column, coarse), False))
        if any(pattern.search(text) for text in found.to_pylist()):
            yield what, where


_COARSE = {
    "a Hugging Face token": "hf_[A-Za-z0-9]{20}",
    "an API key": "[srp]k-[A-Za-z0-9_-]{20}",
    "a Google API key": "AIza[0-9A-Za-z_-]{35}",
    "a GitHub token": "(gh[posur]|github_pat)_[A-Za-z0-9_]{20}",
    "an AWS access key": "A(KIA|SIA)[0-9A-Z]{16}",
    "a bearer token": "(?i)bearer",
    "a private key": "PRIVATE KEY",
    "a password in an address": "https?://[^/@ ]+:[^/@ ]+@",
    "a path of this machine": "/(home|Users|root|mnt|tmp|private|var|scratch|workspace)/",
    "a path of a Windows machine": r"(?i)[A-Z]:\\",
    "an address of a local server": r"https?://(localhost|127\.0\.0\.1|\[::1\])",
    "this machine's own folder": "/",
}


def _patterns(folder: Path) -> dict[str, re.Pattern[str]]:
    """Return what to search for, the names of this very machine among it."""
    patterns = {what: re.compile(pattern) for what, pattern in (_SECRETS | _PATHS).items()}
    folders = {str(place) for place in (Path.home(), Path.cwd(), folder.resolve().parent)}
    own = "|".join(re.escape(place) for place in sorted(folders) if place.count("/") > 1)
    if own:
        patterns["this machine's own folder"] = re.compile(own)
    return patterns
