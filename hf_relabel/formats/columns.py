"""Columns: which format a dataset is in, from the names of its columns.

A format fits when all its required roles have a column. The own name of a role wins over its
aliases; two aliases side by side are a question for the user, not a guess.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_relabel.errors import ColumnError
from hf_relabel.formats.base import Format, Role
from hf_relabel.formats.fixed import NTuple, Triplet
from hf_relabel.formats.labeled import LabeledList, LabeledPair
from hf_relabel.formats.lists import FlagEmbedding, Tevatron

__all__ = ["FORMATS", "detect", "format_name", "get_format", "resolve"]

_KINDS: dict[str, type[Format]] = {
    kind.name: kind for kind in (Tevatron, FlagEmbedding, Triplet, NTuple, LabeledPair, LabeledList)
}
FORMATS: tuple[str, ...] = tuple(_KINDS)
_ALIASES = {"bge": "flagembedding"}
_NUMBERED = re.compile(r"(?:negative|neg)[_-]?(\d+)")


def format_name(name: str) -> str:
    """Return the format's own name for a name or an alias ("bge").

    Raises:
        ColumnError: There is no such format.
    """
    own = _ALIASES.get(name, name)
    if own not in _KINDS:
        close = difflib.get_close_matches(name, (*FORMATS, *_ALIASES), n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ColumnError(
            f"expected a format out of {[*FORMATS, *_ALIASES]}, found {name!r}. "
            f"{hint}Choose one of them, or leave `format` out to have it detected."
        )
    return own


def resolve(
    columns: Sequence[str],
    format: str | None = None,  # noqa: A002 (what the user calls it, everywhere)
    mapping: Mapping[str, str] | None = None,
    sample: Mapping[str, Any] | None = None,
) -> Format:
    """Find the format of a dataset, or check the one asked for.

    Args:
        columns: The dataset's column names.
        format: A name out of `FORMATS`, or "bge"; None to detect it.
        mapping: Role to column name, where a name is not one that is known: {"query": "title"}.
        sample: One row, whose types decide where names alone do not (`pos` of one text or many).

    Raises:
        ColumnError: No format fits, several do, or the one asked for does not.
    """
    mapping = dict(mapping or {})
    kinds = list(_KINDS.values()) if format is None else [_KINDS[format_name(format)]]
    _check_mapping(mapping, columns, kinds)
    tried = [_bind(kind, columns, mapping, sample if format is None else None) for kind in kinds]
    fits = [match for match in tried if not match.missing and not match.misfits]
    fits = [match for match in fits if not any(_outranks(other, match) for other in fits)]
    if len(fits) == 1:
        return fits[0].kind(fits[0].found)
    raise _ambiguous(fits, columns) if fits else _nothing_fits(tried, columns)


def detect(columns: Sequence[str], *, sample: Mapping[str, Any] | None = None) -> Format:
    """Find the format of a dataset from its column names and, if given, one row."""
    return resolve(columns, sample=sample)


def get_format(
    name: str, columns: Mapping[str, str] | None = None, available: Sequence[str] = ()
) -> Format:
    """Build a format by its name.

    Args:
        name: One of `FORMATS`, or "bge".
        columns: Role to column name, where they differ.
        available: The dataset's column names. Without them the format takes the names in `columns`
            and, for the rest, its own; an n-tuple's negatives must then all be in `columns`.

    Raises:
        ColumnError: There is no such format, or these are not its columns.
    """
    if not available:
        kind = _KINDS[format_name(name)]
        taken = [_role_of(kind, role) for role in columns or {}]
        own = [r.name for r in kind.roles if r.is_required and not r.is_numbered and r not in taken]
        available = [*own, *(columns or {}).values()]
    return resolve(available, format=name, mapping=columns)


@dataclass(slots=True)
class _Match:
    kind: type[Format]
    found: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)


def _bind(
    kind: type[Format],
    columns: Sequence[str],
    mapping: Mapping[str, str],
    sample: Mapping[str, Any] | None,
) -> _Match:
    """Find a column for each role of a format."""
    match = _Match(kind=kind)
    match.missing += [key for key in mapping if _role_of(kind, key) is None]
    free = [column for column in columns if column not in mapping.values()]
    for role in kind.roles:
        found = (
            _numbered(mapping, free) if role.is_numbered else _column(role, free, mapping, sample)
        )
        if role.is_required and not found:
            match.missing.append("negative_1" if role.is_numbered else role.name)
        elif not _types_fit(role, found, sample):
            match.misfits.update(found)
        match.found.update(found)
    return match


def _column(
    role: Role,
    free: Sequence[str],
    mapping: Mapping[str, str],
    sample: Mapping[str, Any] | None,
) -> dict[str, str]:
    for key in role.keys:
        if key in mapping:
            return {role.name: mapping[key]}
    if role.name in free:
        return {role.name: role.name}
    aliases = (*role.aliases, *(role.needs_sample if sample else ()))
    found = [column for column in free if column in aliases]
    return {role.name: found[0]} if len(found) == 1 else {}


def _numbered(mapping: Mapping[str, str], free: Sequence[str]) -> dict[str, str]:
    """Return negative_k → column, in the order of k; an unnumbered `negative` comes first."""
    numbers = {column: int(number[1]) for column in free if (number := _NUMBERED.fullmatch(column))}
    numbers |= {
        column: int(number[1])
        for key, column in mapping.items()
        if (number := _NUMBERED.fullmatch(key))
    }
    if numbers and "negative" in free:
        numbers["negative"] = -1
    ordered = sorted(numbers, key=lambda column: numbers[column])
    return {f"negative_{k}": column for k, column in enumerate(ordered, start=1)}


def _types_fit(role: Role, found: Mapping[str, str], sample: Mapping[str, Any] | None) -> bool:
    values = [sample[c] for c in found.values() if sample and sample.get(c) is not None]
    is_list = [isinstance(value, list | tuple) for value in values]
    return role.is_list is None or all(flag is role.is_list for flag in is_list)


def _role_of(kind: type[Format], key: str) -> Role | None:
    for role in kind.roles:
        if key in role.keys or key == role.name or (role.is_numbered and _NUMBERED.fullmatch(key)):
            return role
    return None


def _outranks(other: _Match, match: _Match) -> bool:
    """Whether a format reads all that another reads, and more."""
    if other.kind is NTuple and match.kind is Triplet:
        return True
    # (query, answer, negative, label): the label is not the answer's, as there is a negative too.
    labeled = match.kind in (LabeledPair, LabeledList)
    document = match.found.get("document", match.found.get("documents"))
    return labeled and other.kind in (Triplet, NTuple) and other.found["positive"] == document


def _check_mapping(
    mapping: Mapping[str, str], columns: Sequence[str], kinds: Sequence[type[Format]]
) -> None:
    for role, column in mapping.items():
        if column not in columns:
            raise ColumnError(
                f"expected a {column!r} column for the role {role!r}, found {list(columns)}. "
                f"{_did_you_mean(role, column, columns)}"
            )
        if not any(_role_of(kind, role) for kind in kinds):
            roles = {r.name + "1" * r.is_numbered: None for kind in kinds for r in kind.roles}
            raise ColumnError(
                f"expected roles out of {list(roles)} in `columns`, found {role!r}. "
                "A role is the format's own name for a column; the dataset's name is its value."
            )


def _did_you_mean(role: str, name: str, columns: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    example = close[0] if close else "your_column"
    hint = f"Did you mean {example!r}? " if close else ""
    return f"{hint}Map it with `columns={{{role!r}: {example!r}}}`."


def _nothing_fits(tried: Sequence[_Match], columns: Sequence[str]) -> ColumnError:
    best = min(
        tried, key=lambda match: (len(match.missing) + len(match.misfits), -len(match.found))
    )
    if not best.missing:
        return _wrong_type(best, columns)
    role = best.missing[0]
    known = "; ".join(f"{match.kind.name} ({_signature(match.kind)})" for match in tried)
    return ColumnError(
        f"expected {_article(role)} {role!r} column for the format {best.kind.name!r}, "
        f"found {list(columns)}. "
        f"{_did_you_mean(role, role, [c for c in columns if c not in best.found.values()])} "
        f"Known: {known}."
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _wrong_type(match: _Match, columns: Sequence[str]) -> ColumnError:
    role, column = next(iter(match.misfits.items()))
    wanted = next((r for r in match.kind.roles if r.name == role), match.kind.roles[0])
    expected, found = ("a list", "one value") if wanted.is_list else ("one value", "a list")
    return ColumnError(
        f"expected {expected} a row in the column {column!r} for the format {match.kind.name!r}, "
        f"found {found}; the columns are {list(columns)}. "
        f"Name the format and its columns: format={FORMATS[0]!r}, columns={{role: column}}."
    )


def _signature(kind: type[Format]) -> str:
    return ", ".join(r.name + "1…n" * r.is_numbered for r in kind.roles if r.is_required)


def _ambiguous(fits: Sequence[_Match], columns: Sequence[str]) -> ColumnError:
    names = [match.kind.name for match in fits]
    return ColumnError(
        f"expected the columns of one format, found those of {names} in {list(columns)}. "
        f"Choose one with format={names[0]!r}."
    )
