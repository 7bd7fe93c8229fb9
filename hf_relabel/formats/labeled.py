"""Formats that label passages: labeled-list and labeled-pair, as cross-encoders train on them.

The names are those of `sentence_transformers.util.mine_hard_negatives`. Its `score` and `scores`
columns are not read as labels: a similarity above 0 does not mean relevant.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_relabel.formats.base import SHARED_ROLES, Format, Role, without_rows
from hf_relabel.formats.checks import label_of, list_of, row_error, text_of
from hf_relabel.formats.groups import Group, check_groups, gather, group_key
from hf_relabel.formats.rows import Batch, Edit, Passage, Row, Written
from hf_relabel.verdicts import Action

__all__ = ["ANCHOR", "LabeledList", "LabeledPair"]

ANCHOR = Role(name="anchor", aliases=("query", "question"), is_list=False)
_ONE_DOCUMENT = ("document", "passage", "answer", "response", "positive")


class LabeledList(Format):
    """`anchor, [documents], [labels]`: a label above 0 is relevant.

    Dropped passages leave both lists; promoted ones keep their place and get the label 1. A row
    whose last passage was dropped leaves, as "no_passage": list losses give NaN on an empty list.
    """

    name = "labeled-list"
    roles = (
        ANCHOR,
        Role(
            name="documents",
            aliases=("docs", "passages", *_ONE_DOCUMENT),
            words=("positives",),
            is_list=True,
        ),
        Role(name="labels", is_list=True),
        *SHARED_ROLES,
    )
    aligned = frozenset({"scores", "score"})

    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        queries = self.queries(batch, numbers)
        ids = self.names(batch, "query_id", len(queries))
        subsets = self.names(batch, "subset", len(queries))
        rows = []
        for i, number in enumerate(numbers):
            passages, relevant = self._passages(batch, i, number)
            rows.append(
                Row(
                    query=queries[i],
                    positives=tuple([p for p, r in zip(passages, relevant, strict=True) if r]),
                    negatives=tuple([p for p, r in zip(passages, relevant, strict=True) if not r]),
                    query_id=ids[i],
                    subset=subsets[i],
                    indices=(i,),
                )
            )
        return rows

    def _passages(self, batch: Batch, i: int, number: int) -> tuple[list[Passage], list[bool]]:
        column, label_column = self.columns["documents"], self.columns["labels"]
        texts = list_of(batch[column][i], column, number, of="strings")
        labels = list_of(batch[label_column][i], label_column, number, of="numbers")
        if len(texts) != len(labels):
            expected = f"one label for each of {len(texts)} documents"
            fix = "Label every document of the row."
            raise row_error(label_column, number, expected=expected, found=labels, fix=fix)
        passages = [Passage(text=text_of(text, column, number)) for text in texts]
        return passages, [label_of(label, label_column, number) for label in labels]

    def _write(
        self,
        batch: Batch,
        rows: Sequence[Row],
        edits: Sequence[Edit],
        *,
        seed: int,  # noqa: ARG002 (nothing is refilled)
    ) -> Written:
        out = dict(batch)
        texts = out[self.columns["documents"]] = list(batch[self.columns["documents"]])
        labels = out[self.columns["labels"]] = list(batch[self.columns["labels"]])
        reasons = {}
        for row, edit in zip(rows, edits, strict=True):
            (i,) = row.indices
            if edit.drop_row is not None:
                reasons[i] = edit.drop_row
            elif not edit.changes_nothing:
                texts[i], labels[i] = _relabeled_lists(texts[i], labels[i], edit)
                if not texts[i]:
                    reasons[i] = "no_passage"
        return without_rows(out, reasons)


def _relabeled_lists(
    texts: Sequence[str], labels: Sequence[float], edit: Edit
) -> tuple[list[str], list[float]]:
    # The j-th negative is the j-th entry whose label is not above 0.
    negatives = [position for position, label in enumerate(labels) if not label > 0]
    promoted = {negatives[j] for j in edit.promoted}
    kept = {p for p, a in zip(negatives, edit.actions, strict=True) if a is Action.KEEP}
    gone = set(negatives) - kept - promoted
    left = [p for p in range(len(texts)) if p not in gone]
    return (
        [texts[p] for p in left],
        [type(labels[p])(1) if p in promoted else labels[p] for p in left],
    )


class LabeledPair(Format):
    """`anchor, document, label`, one passage a row: a label above 0 is relevant.

    All pairs of a batch with one (query, subset) are one row. A dropped passage's pairs leave, as
    "false_negative"; a promoted one's first pair gets the label 1, and repeats of it leave, as
    "duplicate".
    """

    name = "labeled-pair"
    is_spread = True
    roles = (
        ANCHOR,
        Role(name="document", aliases=_ONE_DOCUMENT[1:], is_list=False),
        Role(name="label", is_list=False),
        *SHARED_ROLES,
    )

    def read_numbered(self, batch: Batch, numbers: Sequence[int]) -> list[Row]:
        ids = self.names(batch, "query_id", len(numbers))
        queries = self.queries(batch, numbers)
        return [
            Row(
                query=queries[group.indices[0]],
                positives=tuple(group.positives.passages),
                negatives=tuple(group.negatives.passages),
                query_id=ids[group.indices[0]],
                subset=group.key[1],
                indices=tuple(group.indices),
            )
            for group in self._groups(batch, numbers)
        ]

    def _groups(self, batch: Batch, numbers: Sequence[int]) -> list[Group]:
        subsets = self.names(batch, "subset", len(numbers))
        queries = self.queries(batch, numbers)
        column, label_column = self.columns["document"], self.columns["label"]
        passages = [
            Passage(text=text_of(text, column, number))
            for text, number in zip(batch[column], numbers, strict=True)
        ]
        relevant = [
            label_of(label, label_column, number)
            for label, number in zip(batch[label_column], numbers, strict=True)
        ]
        return gather(
            [group_key(q, s) for q, s in zip(queries, subsets, strict=True)],
            [p if r else None for p, r in zip(passages, relevant, strict=True)],
            [None if r else p for p, r in zip(passages, relevant, strict=True)],
        )

    def _write(
        self,
        batch: Batch,
        rows: Sequence[Row],
        edits: Sequence[Edit],
        *,
        seed: int,  # noqa: ARG002 (nothing is refilled)
    ) -> Written:
        out = dict(batch)
        labels = out[self.columns["label"]] = list(batch[self.columns["label"]])
        groups = self._groups(batch, range(len(labels)))
        check_groups(groups, rows)
        reasons: dict[int, str] = {}
        for group, edit in zip(groups, edits, strict=True):
            if edit.drop_row is not None:
                reasons.update(dict.fromkeys(group.indices, edit.drop_row))
                continue
            for j, action in enumerate(edit.actions):
                first, *repeats = group.negatives.sources[j]
                if j in edit.promoted:
                    labels[first] = type(labels[first])(1)
                    reasons.update(dict.fromkeys(repeats, "duplicate"))
                elif action is not Action.KEEP:
                    reasons.update(dict.fromkeys((first, *repeats), "false_negative"))
        return without_rows(out, reasons)
