"""Texts: the quick answers are those of the slow ways that they stand for."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from hf_relabel.texts import is_printable, json_string

ANY = st.text(st.characters(exclude_categories=[]))


@given(ANY)
@example("tab\there")
@example("delete\x7f")
@example("no-break\xa0space")
@example("")
def test_printable_is_what_python_says(text: str) -> None:
    assert is_printable(text) == text.isprintable()


@given(ANY)
@example('a "quote", a \\ and\na line')
@example('\\" both \\n')
@example("tab\t and \x00")
@example("half an emoji \ud83d")
def test_a_json_string_reads_back(text: str) -> None:
    expected = text.encode("utf-8", "replace").decode()

    assert json.loads(json_string(text)) == expected
