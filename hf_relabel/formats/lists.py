"""Formats that hold a query, its positives and its negatives in one row: Tevatron, FlagEmbedding.

References:
    Tevatron: https://github.com/texttron/tevatron (training data with passages in the row).
    FlagEmbedding: https://github.com/FlagOpen/FlagEmbedding (pos, neg and optional teacher scores).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hf_relabel.errors import RowError
from hf_relabel.formats.base import QUERY, SHARED_ROLES, Format, Role, without_rows
from hf_relabel.formats.checks import list_of, row_error, text_or_none
from hf_relabel.formats.rows import Batch, Edit, Passage, Row, Written
from hf_relabel.verdicts import Action

__all__ = ["FlagEmbedding", "Tevatron"]


class _ListFormat(Format):
    """A format with a list of positives and a list of negatives in each row."""

    in_place = True
    pairs: ClassVar[tuple[tuple[str, str], ...]]
    """Roles of list columns, positives' then negatives', whose values move together."""

    @abstractmethod
    def _passages(self, batch: Batch, role: str, i: int, number: int) -> tuple[Passage, ...]:
        """Read one row's list of passages."""

    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        positives, negatives = self.pairs[0]
        queries = self.queries(batch, numbers)
        ids = self.names(batch, "query_id", len(queries))
        subsets = self.names(batch, "subset", len(queries))
        return [
            Row(
                query=query,
                positives=self._passages(batch, positives, i, number),
                negatives=self._passages(batch, negatives, i, number),
                query_id=ids[i],
                subset=subsets[i],
                indices=(i,),
            )
            for i, (query, number) in enumerate(zip(queries, numbers, strict=True))
        ]

    def _write(
        self,
        batch: Batch,
        rows: Sequence[Row],
        edits: Sequence[Edit],
        *,
        seed: int,  # noqa: ARG002 (nothing is refilled)
    ) -> Written:
        present = [pair for pair in self.pairs if any(role in self.columns for role in pair)]
        changed = {self.columns[r] for pair in present for r in pair if r in self.columns}
        out = {name: list(v) if name in changed else v for name, v in batch.items()}
        reasons = {}
        for row, edit in zip(rows, edits, strict=True):
            (i,) = row.indices
            if edit.drop_row is not None:
                reasons[i] = edit.drop_row
            elif not edit.changes_nothing:
                for positives, negatives in present:
                    self._move(out, positives, negatives, i, edit)
        return without_rows(out, reasons)

    def _move(self, out: Batch, positives: str, negatives: str, i: int, edit: Edit) -> None:
        old = out[self.columns[negatives]][i] if negatives in self.columns else None
        if old is not None:
            kept = zip(old, edit.actions, strict=True)
            out[self.columns[negatives]][i] = [value for value, a in kept if a is Action.KEEP]
        if edit.promoted and positives in self.columns:
            column = out[self.columns[positives]]
            # A row without scores for its positives stays without; a promoted one that never had
            # a score gets None, because a shorter list would pair every score with the wrong text.
            if column[i] is not None:
                moved = [None if old is None else old[j] for j in edit.promoted]
                column[i] = [*column[i], *moved]


class Tevatron(_ListFormat):
    """`query_id, query, positive_passages[{docid, text, title}], negative_passages[…], subset`.

    A struct may hold more fields; they move with it. A number named `score` is the passage's score.
    """

    name = "tevatron"
    roles = (
        QUERY,
        Role(name="positive_passages", words=("positives", "positive"), is_list=True),
        Role(name="negative_passages", words=("negatives", "negative"), is_list=True),
        *SHARED_ROLES,
    )
    pairs = (("positive_passages", "negative_passages"),)

    def _passages(self, batch: Batch, role: str, i: int, number: int) -> tuple[Passage, ...]:
        column = self.columns[role]
        structs = _filled(batch[column][i], column, number, of="structs with a text")
        return tuple([_struct_passage(struct, column, number) for struct in structs])


class FlagEmbedding(_ListFormat):
    """`query, pos[], neg[]`, and optionally `pos_scores[], neg_scores[]`, kept aligned.

    Score columns may be absent, and None in single rows. Other columns (prompt, type) pass through.
    """

    name = "flagembedding"
    roles = (
        QUERY,
        Role(name="pos", needs_sample=("positives", "positive"), is_list=True),
        Role(name="neg", needs_sample=("negatives", "negative"), is_list=True),
        Role(name="pos_scores", is_required=False),
        Role(name="neg_scores", is_required=False),
        *SHARED_ROLES,
    )
    pairs = (("pos", "neg"), ("pos_scores", "neg_scores"))

    def _passages(self, batch: Batch, role: str, i: int, number: int) -> tuple[Passage, ...]:
        column = self.columns[role]
        _filled(batch[column][i], column, number, of="strings")
        texts = _strings(batch[column][i], column, number)
        scores = self._scores(batch, f"{role}_scores", i, number, texts)
        if scores is None:
            return tuple([Passage(text=text) for text in texts])
        return tuple([Passage(text=t, score=s) for t, s in zip(texts, scores, strict=True)])

    def texts(
        self, batch: Batch, *, first_index: int = 0
    ) -> list[tuple[str, list[str], list[str]]]:
        """Return each row's query, positives and negatives, any of them may be none.

        Raises:
            RowError: A value is not what the format holds.
        """
        numbers = range(first_index, first_index + len(batch[self.query_column]))
        columns = [
            [
                _strings(values, self.columns[role], number)
                for values, number in zip(batch[self.columns[role]], numbers, strict=True)
            ]
            for role in self.pairs[0]
        ]
        return list(zip(self.queries(batch, numbers), *columns, strict=True))

    def with_scores(
        self, batch: Batch, positives: Sequence[list[float]], negatives: Sequence[list[float]]
    ) -> Batch:
        """Return the batch with scores for each row's passages, in place of any it had."""
        names = [self.columns.get(role, role) for role in self.pairs[1]]
        return {**batch, names[0]: list(positives), names[1]: list(negatives)}

    def _scores(
        self, batch: Batch, role: str, i: int, number: int, texts: list[str]
    ) -> list[Any] | None:
        if role not in self.columns or batch[self.columns[role]][i] is None:
            return None
        column = self.columns[role]
        scores = list_of(batch[column][i], column, number, of="numbers")
        if len(scores) != len(texts):
            fix = "Score every passage of the row, or store None for the whole row."
            expected = f"one score for each of {len(texts)} passages"
            raise row_error(column, number, expected=expected, found=scores, fix=fix)
        return scores


def _filled(value: Any, column: str, number: int, *, of: str) -> list[Any]:
    fix = (
        "If the column holds one text a row, name the format and its columns, as in "
        "format='triplet', columns={'positive': …, 'negative': …}."
    )
    values = list_of(value, column, number, of=of, fix=fix)
    if not values:
        fix = f"Leave such rows out: dataset.filter(lambda row: len(row[{column!r}]) > 0)."
        raise row_error(column, number, expected="at least one passage", found=value, fix=fix)
    return values


def _strings(value: Any, column: str, number: int) -> list[str]:
    texts = list_of(value, column, number, of="strings")
    for text in texts:
        if not isinstance(text, str):
            raise _no_text(text, column, number)
    return texts


def _struct_passage(struct: Any, column: str, number: int) -> Passage:
    if not isinstance(struct, dict | Mapping):
        fix = "Store {'docid': …, 'text': …, 'title': …}; plain strings are format='flagembedding'."
        raise row_error(column, number, expected="structs with a text", found=struct, fix=fix)
    text, title, score = struct.get("text"), struct.get("title") or "", struct.get("score")
    if not isinstance(text, str) or not isinstance(title, str):
        raise _no_text(struct, column, number)
    if score is not None and not isinstance(score, int | float):
        score = None
    return Passage(text=text, title=title, docid=text_or_none(struct.get("docid")), score=score)


def _no_text(value: Any, column: str, number: int) -> RowError:
    fix = "Leave the passage out, or store its text as a string."
    return row_error(column, number, expected="a text for every passage", found=value, fix=fix)
