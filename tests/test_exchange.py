"""Verdicts as Parquet: what went out comes in again, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_relabel.cache import Call, Failure, Pairs, VerdictCache
from hf_relabel.errors import SourceError
from hf_relabel.exchange import export_cache, import_cache
from hf_relabel.questions import Reply
from hf_relabel.verdicts import Relevance, Verdict

BETTER, NOT_RELEVANT, UNDECIDED = Relevance.BETTER, Relevance.NOT_RELEVANT, Relevance.UNDECIDED


def call_of(key: str, text: str = "reply") -> Call:
    reply = Reply(
        text=text,
        finish_reason="length",
        refusal="no",
        model="m-1",
        usage={"prompt_tokens": 3, "details": {"cached": 1}},
        latency_s=0.25,
    )
    return Call(key=key, judge="j", reply=reply, query="q", passages=("p", "r"), time=1.5)


def pairs_of(query: str, relevance: Relevance, n_passages: int = 2) -> Pairs:
    cheap = Verdict(relevance=relevance, judge="cheap", rank=1, grade=2, confidence=0.9, call="k1")
    strong = Verdict(relevance=UNDECIDED, judge="strong")
    traces = {f"p{i}": (cheap,) if i % 2 else (cheap, strong) for i in range(n_passages)}
    return Pairs(cascade="c", query=query, judges=("cheap", "strong"), traces=traces)


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[Callable[[str], VerdictCache]]:
    made: list[VerdictCache] = []

    def make(name: str) -> VerdictCache:
        made.append(VerdictCache(tmp_path / name))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def exported(make_cache: Callable[[str], VerdictCache], tmp_path: Path) -> Path:
    """An export of two calls and three queries' pairs."""
    cache = make_cache("source")
    cache.write([call_of("k1"), call_of("k2"), *(pairs_of(q, BETTER) for q in ("q1", "q2", "q3"))])
    export_cache(cache, tmp_path / "export")
    return tmp_path / "export"


def test_a_round_trip_changes_nothing(
    make_cache: Callable[[str], VerdictCache], tmp_path: Path
) -> None:
    """Confidences too, to the last bit; and more rows than one chunk holds."""
    source, target = make_cache("source"), make_cache("target")
    source.write([call_of(f"k{i:05}", f"é {i}") for i in range(2500)])
    source.write([pairs_of("q1", BETTER, 2500), pairs_of("q2", NOT_RELEVANT, 3)])

    sent = export_cache(source, tmp_path / "export")
    received = import_cache(tmp_path / "export", target)

    assert (sent.n_calls, sent.n_pairs) == (2500, 2503)
    assert received == sent
    assert list(target.calls()) == list(source.calls())
    assert list(target.pairs()) == list(source.pairs())


def test_failures_stay_at_home(make_cache: Callable[[str], VerdictCache], tmp_path: Path) -> None:
    """They are no verdicts, and their messages may tell of a server."""
    source, target = make_cache("source"), make_cache("target")
    source.write([Failure(key="k", judge="j", reason="timeout", message="m", time=1.0)])

    export_cache(source, tmp_path / "export")
    import_cache(tmp_path / "export", target)

    assert list(target.all_failures()) == []


def test_an_empty_cache_makes_a_round_trip(
    make_cache: Callable[[str], VerdictCache], tmp_path: Path
) -> None:
    export_cache(make_cache("source"), tmp_path / "export")

    assert import_cache(tmp_path / "export", make_cache("target")).n_pairs == 0


def test_what_a_cache_holds_already_stays(
    make_cache: Callable[[str], VerdictCache], exported: Path
) -> None:
    """The first final verdict of a pair stays, wherever it came from; new ones join it."""
    target = make_cache("target")
    own = Pairs(
        cascade="c",
        query="q1",
        judges=("cheap",),
        traces={"p1": (Verdict(relevance=NOT_RELEVANT, judge="cheap", call="own"),)},
    )
    target.write([call_of("k1", "own reply"), own])

    import_cache(exported, target)

    assert [call.reply.text for call in target.calls()] == ["own reply", "reply"]
    assert target.traces("c", "q1") == {**pairs_of("q1", BETTER).traces, **own.traces}
    assert target.traces("c", "q2") == pairs_of("q2", BETTER).traces


def test_a_second_import_changes_nothing(
    make_cache: Callable[[str], VerdictCache], exported: Path
) -> None:
    target = make_cache("target")
    import_cache(exported, target)
    before = list(target.scan("call:")), list(target.scan("pair:"))

    import_cache(exported, target)

    assert (list(target.scan("call:")), list(target.scan("pair:"))) == before


def test_an_export_replaces_an_earlier_one_and_leaves_nothing_else(
    make_cache: Callable[[str], VerdictCache], exported: Path
) -> None:
    export_cache(make_cache("empty"), exported)

    assert sorted(path.name for path in exported.iterdir()) == ["calls.parquet", "pairs.parquet"]
    assert pq.read_table(exported / "calls.parquet").num_rows == 0


def test_a_folder_without_tables_is_refused(
    make_cache: Callable[[str], VerdictCache], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"expected the table calls\.parquet of an export"):
        import_cache(tmp_path, make_cache("target"))


def test_a_file_that_is_no_table_is_refused(
    make_cache: Callable[[str], VerdictCache], exported: Path
) -> None:
    (exported / "pairs.parquet").write_bytes(b"PAR1 no table")

    with pytest.raises(SourceError, match=r"expected the table pairs\.parquet of an export"):
        import_cache(exported, make_cache("target"))


def test_a_table_with_other_columns_is_refused(
    make_cache: Callable[[str], VerdictCache], exported: Path
) -> None:
    pq.write_table(pa.table({"query": ["q"], "text": ["t"]}), exported / "calls.parquet")

    with pytest.raises(SourceError, match=r"found \['query', 'text'\]"):
        import_cache(exported, make_cache("target"))


def _change(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("pairs", lambda rows: rows[0].update(relevance="maybe"), "the relevance 'maybe'"),
        ("pairs", lambda rows: rows[0].update(relevance=None), "the relevance None"),
        ("pairs", lambda rows: rows[0].update(cascade="a:b"), "the cascade 'a:b'"),
        ("pairs", lambda rows: rows[0].update(query=None), "the query None"),
        ("pairs", lambda rows: rows[0].update(judge=None), "the judge None"),
        ("pairs", lambda rows: rows.reverse(), "stage 1 after 0 stages"),
        ("pairs", lambda rows: rows.pop(0), "stage 1 after 0 stages"),
        ("calls", lambda rows: rows[0].update(key=None), "the key None"),
        ("calls", lambda rows: rows[0].update(text=None), "the text None"),
        ("calls", lambda rows: rows[0].update(usage="{"), "'k1': Expecting"),
        ("calls", lambda rows: rows[0].update(usage="[]"), r"the usage '\[\]'"),
        ("calls", lambda rows: rows[0].update(passages=None), "'k1': 'NoneType'"),
    ],
)
def test_rows_that_no_export_writes_are_refused(
    make_cache: Callable[[str], VerdictCache],
    exported: Path,
    table: str,
    change: Callable[[list[dict[str, Any]]], Any],
    message: str,
) -> None:
    """A table out of order would lose the strong judge's last word without a sign."""
    _change(exported / f"{table}.parquet", change)
    target = make_cache("target")

    with pytest.raises(SourceError, match=message):
        import_cache(exported, target)

    assert list(target.pairs()) == []
