"""Settings of a published dataset, and the names that the Hub accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_relabel.errors import SettingError

__all__ = ["CONFIGS", "ROW_CONFIGS", "TEXT_FREE_CONFIGS", "BuildSettings", "check_repo_id"]

ROW_CONFIGS = ("triplet", "n-tuple", "labeled-list", "tevatron", "bge")
"""Configs that hold the rows themselves; the first one chosen is the default."""
CONFIGS = (*ROW_CONFIGS, "qrels", "decisions", "verdicts", "calls")
TEXT_FREE_CONFIGS = ("decisions", "verdicts", "calls")
"""Configs that can be published without a word of the source."""

# `datasets` accepts other names when it writes, and then loads no config at all (hub.md, B2).
_SPLIT = re.compile(r"\w+(\.\w+)*")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What is to be built.

    Attributes:
        configs: Which of `CONFIGS`; empty for all that can be built.
        license: A licence id, or subset → licence id; empty for the source's own.
        source: The source's Hub id, where the run does not know it.
        source_revision: Its commit.
        pretty_name: The dataset's name for people.
        languages: Codes such as "en"; empty for the source's.
        text_free: Publish hashes, verdicts and decisions alone.
        n_negatives: Width of the n-tuple; None for the most common number.
        has_plots: Whether plots are drawn; needs the extra `report`.
        seed: Chooses the negatives that fill short n-tuples.
    """

    configs: Sequence[str] = ()
    license: str | Mapping[str, str] = ""
    source: str = ""
    source_revision: str = ""
    pretty_name: str = ""
    languages: Sequence[str] = ()
    text_free: bool = False
    n_negatives: int | None = None
    has_plots: bool = True
    seed: int = 0
    source_card: Mapping[str, object] = field(default_factory=dict)
    """The source's card metadata, as fetched; build itself opens no connection."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.configs if name not in CONFIGS]
        if unknown:
            raise SettingError(f"expected configs out of {list(CONFIGS)}, found {unknown}.")
        textual = [name for name in self.configs if name not in TEXT_FREE_CONFIGS]
        if self.text_free and textual:
            raise SettingError(
                f"expected only {list(TEXT_FREE_CONFIGS)} in a text-free dataset, found {textual}. "
                "Leave them out of configs, or publish with text."
            )
        if self.n_negatives is not None and self.n_negatives < 1:
            raise SettingError(f"expected n_negatives of 1 or more, found {self.n_negatives}.")
        if self.source:
            check_repo_id(self.source)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The configs to build, in the order of `CONFIGS`."""
        possible = TEXT_FREE_CONFIGS if self.text_free else CONFIGS
        return tuple(name for name in possible if not self.configs or name in self.configs)


def check_repo_id(repo_id: str) -> None:
    """Check a repository's name.

    Raises:
        SettingError: It is not owner/name in characters that the Hub takes.
    """
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        raise SettingError(f"expected a repository as owner/name, found {repo_id!r}.")


def check_split(name: str) -> None:
    """Check a split's name.

    Raises:
        SettingError: `datasets` could not load it again.
    """
    if not _SPLIT.fullmatch(name):
        raise SettingError(
            f"expected a split name of letters, digits, '_' and single dots, found {name!r}. "
            f"Rename it: {re.sub(r'[^0-9A-Za-z_]+', '_', name)!r}."
        )
