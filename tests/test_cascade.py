"""Cascades: who is asked next, who has the last word, and what is bought only once."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest

from hf_relabel import Cascade, Question, Relevance, ScriptedJudge, Stage, VerdictCache, background
from hf_relabel.cascade import NOT_ASKED
from hf_relabel.errors import AccountError, SettingError
from hf_relabel.formats import content_hash
from hf_relabel.judges.protocol import LocalJudge
from hf_relabel.verdicts import Trace, Verdict

BETTER, WORSE = Relevance.BETTER, Relevance.WORSE
NOT_RELEVANT, UNDECIDED = Relevance.NOT_RELEVANT, Relevance.UNDECIDED
QUERY, PARIS, CATS, DOGS = "capital of France", "Paris is it.", "Cats purr.", "Dogs bark."


@pytest.fixture
def cache(tmp_path: Path) -> VerdictCache:
    return VerdictCache(tmp_path / "cache")


def row(*passages: str) -> Question:
    return Question(query=QUERY, passages=passages, positives=("Paris, France",))


def judge_row(cascade: Cascade, cache: VerdictCache | None, *passages: str) -> list[Trace]:
    return background.run(cascade.judge_question(row(*passages), cache))


def cheap_and_strong(escalate: str = "passage") -> tuple[ScriptedJudge, ScriptedJudge, Cascade]:
    cheap = ScriptedJudge("cheap", answers={PARIS: WORSE, CATS: NOT_RELEVANT, DOGS: WORSE})
    strong = ScriptedJudge("strong", answers={PARIS: BETTER, CATS: WORSE, DOGS: NOT_RELEVANT})
    cascade = Cascade([Stage(cheap), Stage(strong)], escalate=escalate)  # type: ignore[arg-type]
    return cheap, strong, cascade


def test_only_suspects_reach_the_strong_judge() -> None:
    """A sure "not relevant" from the cheap judge is final: the strong one costs nothing there."""
    _, strong, cascade = cheap_and_strong()

    verdicts = cascade.judge(QUERY, [CATS, PARIS])

    assert [verdict.judge for verdict in verdicts] == ["cheap", "strong"]
    assert strong.asked == [PARIS]


def test_row_escalation_asks_about_all_passages_again() -> None:
    """The paper's way: one suspect sends the whole row on, and the last word is the strong one's."""
    _, strong, cascade = cheap_and_strong("row")

    verdicts = cascade.judge(QUERY, [CATS, PARIS, DOGS])

    assert strong.asked == [CATS, PARIS, DOGS]
    assert [verdict.relevance for verdict in verdicts] == [WORSE, BETTER, NOT_RELEVANT]


def test_a_row_without_suspects_stays_with_the_cheap_judge() -> None:
    _, strong, cascade = cheap_and_strong("row")

    assert [verdict.relevance for verdict in cascade.judge(QUERY, [CATS])] == [NOT_RELEVANT]
    assert strong.asked == []


def test_no_usable_answer_goes_to_the_next_stage_and_is_never_a_no() -> None:
    cheap = ScriptedJudge("cheap", answers={CATS: UNDECIDED})
    strong = ScriptedJudge("strong", answers={CATS: NOT_RELEVANT})

    (trace,) = judge_row(Cascade([Stage(cheap), Stage(strong)]), None, CATS)

    assert [verdict.relevance for verdict in trace] == [UNDECIDED, NOT_RELEVANT]
    (alone,) = judge_row(Cascade([Stage(cheap)]), None, CATS)
    assert alone[-1].relevance is UNDECIDED
    assert alone[-1].reason == "scripted"


def test_the_last_stage_asked_has_the_last_word_even_without_one(cache: VerdictCache) -> None:
    """A strong judge that fails leaves a flagged passage undecided: the cheap word is not enough."""
    cheap = ScriptedJudge("cheap", answers={PARIS: BETTER})
    strong = ScriptedJudge("strong", answers={PARIS: UNDECIDED})
    cascade = Cascade([Stage(cheap), Stage(strong)])

    (trace,) = judge_row(cascade, cache, PARIS)

    assert trace[-1].relevance is UNDECIDED
    assert cache.traces(cascade.fingerprint, content_hash(QUERY)) == {}


def test_a_pair_is_bought_once_whatever_rows_it_stands_in(cache: VerdictCache) -> None:
    cheap, _, cascade = cheap_and_strong()
    judge_row(cascade, cache, PARIS, CATS)

    judge_row(cascade, cache, CATS, DOGS, PARIS)

    assert cheap.asked == [PARIS, CATS, DOGS]


def test_rows_of_one_query_in_flight_at_once_share_their_pairs(cache: VerdictCache) -> None:
    cheap, _, cascade = cheap_and_strong()

    async def both() -> None:
        questions = [row(PARIS, CATS), row(CATS, DOGS)]
        await asyncio.gather(*(cascade.judge_question(each, cache) for each in questions))

    background.run(both())

    assert sorted(cheap.asked) == sorted([PARIS, CATS, DOGS])


def test_the_first_final_verdict_of_a_pair_stays(cache: VerdictCache) -> None:
    """A result must not depend on which row of a query comes first in the next run."""
    cascade = Cascade([Stage(ScriptedJudge("j", answers={CATS: WORSE, DOGS: WORSE}))])
    before = judge_row(cascade, cache, CATS)

    after = judge_row(cascade, cache, DOGS, CATS)

    assert after[1] == before[0]


def test_an_undecided_passage_is_asked_again_in_the_next_run_only(cache: VerdictCache) -> None:
    judge = ScriptedJudge("j", answers={CATS: UNDECIDED})
    cascade = Cascade([Stage(judge)])
    judge_row(cascade, cache, CATS)
    judge_row(cascade, cache, CATS)
    assert judge.asked == [CATS]

    cascade.start_run()
    judge_row(cascade, cache, CATS)

    assert judge.asked == [CATS, CATS]


def test_recall_reads_what_is_there_and_asks_nobody(cache: VerdictCache) -> None:
    cheap, _, cascade = cheap_and_strong()
    bought = judge_row(cascade, cache, PARIS, CATS)
    cheap.asked.clear()

    recalled = cascade.recall(row(DOGS, CATS, PARIS), cache)

    assert recalled[1:] == [bought[1], bought[0]]
    assert recalled[0][-1].reason == NOT_ASKED
    assert cheap.asked == []


def test_recall_knows_why_a_passage_is_undecided(cache: VerdictCache) -> None:
    cascade = Cascade([Stage(ScriptedJudge("j", answers={CATS: UNDECIDED}))])
    judge_row(cascade, cache, CATS)

    ((verdict,),) = cascade.recall(row(CATS), cache)

    assert verdict.reason == "scripted"


class _Narrow(LocalJudge):
    """Finds whatever says "yes" relevant, two passages a call."""

    name = "narrow"
    fingerprint = "narrow-1"
    max_passages = 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def judge(self, question: Question) -> list[Verdict]:
        self.calls.append(question.passages)
        if "stop" in question.passages:
            raise AccountError("no credit.", reason="quota")
        return [
            Verdict(relevance=WORSE if "yes" in text else NOT_RELEVANT, judge=self.name)
            for text in question.passages
        ]


def test_a_long_row_is_asked_in_several_calls_and_every_passage_is_judged(
    cache: VerdictCache,
) -> None:
    judge = _Narrow()
    passages = ["no 1", "yes 2", "no 3", "no 4", "yes 5"]

    traces = judge_row(Cascade([Stage(judge)]), cache, *passages)

    assert sorted(map(len, judge.calls)) == [1, 2, 2]
    assert [trace[-1].relevance.is_relevant for trace in traces] == [
        "yes" in passage for passage in passages
    ]


def test_an_account_fault_stops_the_run_and_keeps_what_came(cache: VerdictCache) -> None:
    judge = _Narrow()
    cascade = Cascade([Stage(judge)])
    judge_row(cascade, cache, "yes 1")

    with pytest.raises(AccountError, match="no credit"):
        judge_row(cascade, cache, "stop")

    assert cascade.known(QUERY, [content_hash("yes 1")], cache) is not None


def test_the_fingerprint_covers_judges_order_and_escalation() -> None:
    a, b = (ScriptedJudge(name, answers={}) for name in "ab")
    cascades = [
        Cascade([Stage(a), Stage(b)]),
        Cascade([Stage(b), Stage(a)]),
        Cascade([Stage(a)]),
        Cascade([Stage(a), Stage(b)], escalate="row"),
    ]
    assert len({cascade.fingerprint for cascade in cascades}) == len(cascades)
    assert Cascade([Stage(a, "first"), Stage(b)]).fingerprint == cascades[0].fingerprint


def test_a_pickle_holds_settings_alone(cache: VerdictCache) -> None:
    cascade = Cascade([Stage(_Narrow())])
    before = pickle.dumps(cascade)
    judge_row(cascade, cache, "yes")
    cascade.stages[0].judge.calls.clear()  # type: ignore[attr-defined]

    assert pickle.dumps(cascade) == before
    assert pickle.loads(before).fingerprint == cascade.fingerprint  # noqa: S301  our own bytes


def test_settings_are_checked_when_the_cascade_is_built() -> None:
    with pytest.raises(SettingError, match="one stage or more"):
        Cascade([])
    with pytest.raises(SettingError, match="'row' or 'passage'"):
        Cascade([Stage(_Narrow())], escalate="all")  # type: ignore[arg-type]


def test_a_judge_may_hand_out_one_object_for_many_passages(cache: VerdictCache) -> None:
    """What a call's verdicts point to stays with that call."""
    no = Verdict(relevance=NOT_RELEVANT, judge="lazy")

    class Lazy(_Narrow):
        def parse(self, question: Question, reply: object) -> list[Verdict]:  # noqa: ARG002
            return [no] * len(question.passages)

    traces = judge_row(Cascade([Stage(Lazy())]), cache, "a", "b", "c")

    calls = [trace[-1].call for trace in traces]
    assert calls[0] == calls[1] != calls[2]


class ReasoningJudge(LocalJudge):
    """Flags what names Paris, and says who says so."""

    def __init__(self, name: str) -> None:
        self.name = self.fingerprint = name

    def judge(self, question: Question) -> list[Verdict]:
        return [
            Verdict(
                relevance=WORSE if "Paris" in passage else NOT_RELEVANT,
                judge=self.name,
                reason=f"{self.name} read it",
            )
            for passage in question.passages
        ]


def test_the_reason_is_the_last_judges_though_an_earlier_call_shows_the_passage_too(
    cache: VerdictCache,
) -> None:
    """Calls stand in a set, in an order of chance: eight rows, so that luck is no excuse."""
    cascade = Cascade([Stage(ReasoningJudge("cheap")), Stage(ReasoningJudge("strong"))])
    cats, paris = content_hash(CATS), content_hash(PARIS)
    for index in range(8):
        question = Question(query=f"{QUERY} {index}", passages=(CATS, PARIS))
        background.run(cascade.judge_question(question, cache))
        traces = cascade.known(question.query, [cats, paris], cache)
        assert traces is not None

        reasons = cascade.reasons(traces, cache)

        assert reasons == {cats: "cheap read it", paris: "strong read it"}
