"""The cross-encoder as a judge: by itself, and as the screen before a language model."""

from __future__ import annotations

import json
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_relabel import Cascade, ChatJudge, Relabeler, Stage, VerdictCache, background
from hf_relabel.errors import JudgeError, SettingError, UnusableReplyError
from hf_relabel.judges.cross_encoder import CrossEncoderJudge
from hf_relabel.judges.endpoint import Endpoint
from hf_relabel.judges.models import ShutdownWarning
from hf_relabel.judges.pair_scorer import PairScorer, probability
from hf_relabel.judges.protocol import Judge
from hf_relabel.questions import Question, Reply
from hf_relabel.verdicts import Relevance
from tests.chat_answers import passages_shown, prompt_of
from tests.chat_server import ChatServer, from_key
from tests.cross_encoders import FALSE, TRAP, lit_rows, random_cross_encoder

pytestmark = pytest.mark.filterwarnings(f"ignore::{ShutdownWarning.__module__}.ShutdownWarning")
BETTER, WORSE, NOT = Relevance.BETTER, Relevance.WORSE, Relevance.NOT_RELEVANT
ROWS = lit_rows()
LIT = Question(query=ROWS[0]["query"], passages=tuple(ROWS[0]["neg"]), positives=("plant needs",))
TRUTH = {(row["query"], FALSE.format(i)): "worse" for i, row in enumerate(ROWS) if i % 2 == 0}


class Scripted:
    """A cross-encoder that gives out the logits it was told to, passage by passage."""

    num_labels = 1
    max_seq_length = 64
    prompts: dict[str, str] = {}  # noqa: RUF012  as the real one's
    default_prompt_name = None

    def __init__(self, logits: dict[str, float]) -> None:
        self.logits = logits

    def state_dict(self) -> dict[str, Any]:
        return {}

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
        return [self.logits[passage] for _, passage in pairs]


def scripted(logits: dict[str, float], **settings: Any) -> CrossEncoderJudge:
    return CrossEncoderJudge(Scripted(logits), **settings)  # type: ignore[arg-type]


def relevances(judge: CrossEncoderJudge, question: Question) -> list[Relevance]:
    return [verdict.relevance for verdict in judge.judge(question)]


def odds(share: float) -> float:
    """Return the logit of a probability."""
    return math.log(share / (1 - share))


def asking(*passages: str, positives: tuple[str, ...] = ("p",)) -> Question:
    return Question(query="q", passages=passages, positives=positives)


LOGITS = {"p": odds(0.8), "as good": odds(0.77), "less": odds(0.75), "low": odds(0.1)}


def test_a_score_beside_the_positives_is_better_and_a_high_one_worse() -> None:
    """0.95 of 0.8 is 0.76."""
    judge = scripted(LOGITS, threshold=0.5)

    verdicts = judge.judge(asking("low", "less", "as good"))

    assert [verdict.relevance for verdict in verdicts] == [NOT, WORSE, BETTER]
    assert [verdict.rank for verdict in verdicts] == [None, 1, 0]
    assert [verdict.confidence for verdict in verdicts] == pytest.approx(
        [0.9, 0.75, 0.77], abs=1e-3
    )
    assert verdicts[0].reason == "score 0.1 ≤ 0.76, 0.95 of the positive's; < 0.5"
    assert verdicts[2].reason == "score 0.77 > 0.76, 0.95 of the positive's; ≥ 0.5"


def test_a_share_is_of_the_probability_and_never_of_a_negative_logit() -> None:
    """0.95 of a logit of -4 would be -3.8, above the positive itself."""
    judge = scripted({"p": -4.0, "above": -3.9, "below": -4.2, "copy": -4.0})
    close = CrossEncoderJudge.perc_pos(judge.scorer._source)

    assert relevances(close, asking("above", "copy", "below")) == [BETTER, BETTER, NOT]


@pytest.mark.parametrize(("reference", "expected"), [("lowest", BETTER), ("highest", NOT)])
def test_several_positives_are_compared_with_the_one_asked_for(
    reference: Any, expected: Relevance
) -> None:
    judge = scripted({**LOGITS, "p2": odds(0.3)}, threshold=None, reference=reference)

    assert relevances(judge, asking("less", positives=("p", "p2"))) == [expected]
    assert relevances(judge, asking("as good", positives=("p", "p2"))) == [BETTER]


def test_without_a_share_nothing_is_better() -> None:
    judge = scripted(LOGITS, threshold=0.76, share_of_positive=None)

    assert relevances(judge, asking("as good", "less")) == [WORSE, NOT]


def test_without_positives_the_threshold_alone_counts() -> None:
    judge = scripted(LOGITS, threshold=0.5)

    assert relevances(judge, asking("less", "low", positives=())) == [WORSE, NOT]


def test_where_only_a_positive_could_tell_and_there_is_none_it_stays_undecided() -> None:
    (verdict,) = scripted(LOGITS, threshold=None).judge(asking("low", positives=()))

    assert (verdict.relevance, verdict.reason) == (Relevance.UNDECIDED, "no_positive")


def test_a_nan_is_no_answer_and_takes_no_other_question_along() -> None:
    judge = scripted({**LOGITS, "broken": math.nan})

    good, bad = judge.judge_many([asking("low"), asking("low", "broken")])

    assert isinstance(good, list)
    assert isinstance(bad, JudgeError)
    assert bad.reason == "not_a_number"
    with pytest.raises(JudgeError, match="found NaN"):
        judge.judge(asking("broken"))


def test_no_passages_have_no_verdicts() -> None:
    empty = asking()

    assert scripted(LOGITS).judge_many([empty, asking("low")])[0] == []


def test_the_real_models_scores_decide(cross_encoder: str) -> None:
    """Expected values come from the model itself."""
    judge = CrossEncoderJudge(cross_encoder, threshold=0.6)
    positive = ROWS[0]["pos"][0]
    logits = PairScorer(cross_encoder).logits([(LIT.query, t) for t in (positive, *LIT.passages)])
    bar, *scores = map(probability, logits)
    question = Question(query=LIT.query, passages=LIT.passages, positives=(positive,))

    found = relevances(judge, question)

    assert found == [BETTER if s > 0.95 * bar else WORSE if s >= 0.6 else NOT for s in scores]
    assert found == [NOT, BETTER, WORSE, NOT, NOT]


def test_the_reply_keeps_the_scores_so_that_another_threshold_is_free(
    cross_encoder: str, tmp_path: Path
) -> None:
    cache = VerdictCache(tmp_path)
    first = CrossEncoderJudge(cross_encoder, threshold=0.5)
    low, high = (CrossEncoderJudge(cross_encoder, threshold=t) for t in (0.001, 0.99))
    Cascade([Stage(first)]).judge(LIT.query, LIT.passages, positives=("plant needs",), cache=cache)
    n_calls = len([*cache.calls()])

    for judge in (low, high):
        judge.scorer.logits = None  # type: ignore[assignment,method-assign]  # raises when called
        verdicts = Cascade([Stage(judge)]).judge(
            LIT.query, LIT.passages, positives=("plant needs",), cache=cache
        )
        alike = CrossEncoderJudge(cross_encoder, threshold=judge.threshold)
        assert [v.relevance for v in verdicts] == relevances(alike, LIT)

    assert len([*cache.calls()]) == n_calls == 1
    assert low.key(LIT) == high.key(LIT) == first.key(LIT)
    assert low.fingerprint != high.fingerprint


def test_a_reply_reads_as_the_judge_judged(cross_encoder: str) -> None:
    judge: Judge = CrossEncoderJudge(cross_encoder)
    reply = background.run(judge.ask(LIT))

    assert judge.parse(LIT, reply) == CrossEncoderJudge(cross_encoder).judge(LIT)
    assert set(json.loads(reply.text)) == {"positives", "passages"}
    # What reports read reasons with knows hashes alone, and no positives.
    hashed = Question(query="", passages=("a",) * len(LIT.passages))
    assert judge.parse(hashed, reply) == judge.parse(LIT, reply)
    with pytest.raises(UnusableReplyError, match="expected 1 scores"):
        judge.parse(asking("one"), reply)


def test_the_fingerprint_covers_weights_and_rule_and_no_more(
    cross_encoder: str, tmp_path: Path
) -> None:
    judge = CrossEncoderJudge(cross_encoder)
    other = random_cross_encoder(tmp_path, seed=1)

    alike = CrossEncoderJudge(cross_encoder, name="mine", batch_size=4, device="cpu")
    assert alike.fingerprint == judge.fingerprint
    assert CrossEncoderJudge(cross_encoder, threshold=1).fingerprint == (
        CrossEncoderJudge(cross_encoder, threshold=1.0).fingerprint
    )
    changed = [
        judge,
        CrossEncoderJudge(other),
        CrossEncoderJudge(cross_encoder, threshold=0.4),
        CrossEncoderJudge(cross_encoder, threshold=None),
        CrossEncoderJudge(cross_encoder, share_of_positive=0.9),
        CrossEncoderJudge(cross_encoder, reference="highest"),
        CrossEncoderJudge(cross_encoder, max_length=32),
    ]
    assert len({each.fingerprint for each in changed}) == len(changed)


def test_settings_survive_a_pickle(cross_encoder: str) -> None:
    settings: dict[str, Any] = {
        "threshold": 0.25,
        "share_of_positive": 0.9,
        "reference": "highest",
        "name": "mine",
        "batch_size": 3,
        "max_length": 32,
    }
    judge = CrossEncoderJudge(cross_encoder, **settings)
    before = pickle.dumps(judge)
    verdicts = judge.judge(LIT)

    copy = pickle.loads(pickle.dumps(judge))  # noqa: S301

    assert pickle.dumps(judge) == before  # used or not: Dataset.map hashes this
    assert copy.fingerprint == judge.fingerprint
    assert copy.judge(LIT) == verdicts
    assert {name: getattr(copy, name) for name in settings if name != "max_length"} == {
        name: value for name, value in settings.items() if name != "max_length"
    }
    assert copy.scorer.max_length == 32


def test_fit_threshold_maximises_f1_and_shares_the_model() -> None:
    logits = {"p": odds(0.9), "a": odds(0.6), "b": odds(0.4), "c": odds(0.3), "d": odds(0.2)}
    judge = scripted(logits, share_of_positive=None, name="mine", reference="highest")
    questions = [asking("a", "b"), asking("c", "d")]

    fitted = judge.fit_threshold(questions, [[True, False], [True, False]])

    # a alone: F1 2/3; a, b, c: 4/5; all: 2/3.
    assert fitted.threshold == pytest.approx(0.3, abs=1e-3)
    assert (fitted.name, fitted.reference, fitted.scorer) == ("mine", "highest", judge.scorer)
    assert judge.threshold == 0.5
    assert relevances(fitted, questions[1]) == [WORSE, NOT]


def test_fit_threshold_for_a_screen_keeps_a_recall() -> None:
    logits = {"p": odds(0.9), "a": odds(0.6), "b": odds(0.4), "c": odds(0.3), "d": odds(0.05)}
    judge = scripted(logits)
    question, labels = asking("a", "b", "c", "d"), [[True, False, False, True]]

    found = [judge.fit_threshold([question], labels, min_recall=r).threshold for r in (0.5, 1.0)]

    assert found == pytest.approx([0.6, 0.05], abs=1e-3)


def test_fit_threshold_counts_what_the_share_flags_anyway() -> None:
    """The copy of the positive is flagged at any threshold; one above all others adds nothing."""
    judge = scripted({"p": odds(0.3), "same": odds(0.3), "a": odds(0.2)})

    fitted = judge.fit_threshold([asking("same", "a")], [[True, False]])

    assert relevances(fitted, asking("same", "a")) == [BETTER, NOT]


@pytest.mark.parametrize(
    ("relevant", "settings", "message"),
    [
        ([[True]], {}, "one label for every passage"),
        ([[False, False]], {}, "labeled relevant, found none in 1 questions"),
        ([[True, False]], {"min_recall": 0}, "min_recall in"),
    ],
)
def test_a_sample_that_cannot_fit_is_refused(
    relevant: list[list[bool]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        scripted(LOGITS).fit_threshold([asking("low", "less")], relevant, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "from 0 to 1, found 1.5"),
        ({"threshold": math.nan}, "found nan"),
        ({"threshold": "0.5"}, "to be a number or None, found '0.5'"),
        ({"share_of_positive": 95}, r"in \(0, 1\], found 95"),
        ({"share_of_positive": 0}, "found 0"),
        ({"threshold": None, "share_of_positive": None}, "nothing would be relevant"),
        ({"reference": "mean"}, "'lowest' or 'highest', found 'mean'"),
        ({"name": ""}, "at least one sign"),
        ({"batch_size": 0}, "an integer from 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        CrossEncoderJudge("org/model", **settings)


# Before a language model ---------------------------------------------------------------------


def screened(server: ChatServer, screen: CrossEncoderJudge, **settings: Any) -> Cascade:
    server.answer = from_key(TRUTH)
    endpoint = Endpoint(base_url=server.base_url)
    return Cascade(
        [Stage(screen), Stage(ChatJudge("gpt-4o", endpoint=endpoint, api_key="x"))], **settings
    )


def shown_to(server: ChatServer) -> list[list[str]]:
    return [[*passages_shown(prompt_of(seen.body)).values()] for seen in server.seen]


def test_what_the_screen_settles_never_reaches_the_language_model(
    cross_encoder: str, chat_server: ChatServer, tmp_path: Path
) -> None:
    """Three of six rows have suspects: three calls, each about its two suspects alone."""
    cascade = screened(chat_server, CrossEncoderJudge(cross_encoder))
    rows = Dataset.from_list(ROWS)

    clean = rows.map(Relabeler(cascade, action="drop", cache=tmp_path), batched=True)

    expected = [[FALSE.format(index), TRAP.format(index)] for index in (0, 2, 4)]
    assert sorted(shown_to(chat_server)) == expected
    for index, (before, after) in enumerate(zip(ROWS, clean, strict=True)):
        gone = [text for text in before["neg"] if text not in after["neg"]]
        assert gone == ([FALSE.format(index)] if index % 2 == 0 else [])


def test_with_row_escalation_one_suspect_takes_the_row_along(
    cross_encoder: str, chat_server: ChatServer, tmp_path: Path
) -> None:
    cascade = screened(chat_server, CrossEncoderJudge(cross_encoder), escalate="row")

    Dataset.from_list(ROWS).map(Relabeler(cascade, cache=tmp_path), batched=True)

    assert sorted(shown_to(chat_server)) == [ROWS[index]["neg"] for index in (0, 2, 4)]


def test_what_the_screen_cannot_score_goes_on(chat_server: ChatServer) -> None:
    """A failure is never a "not relevant"."""
    cascade = screened(chat_server, scripted({**LOGITS, "broken": math.nan}))

    verdicts = cascade.judge("q", ["broken"], positives=["p"])

    assert shown_to(chat_server) == [["broken"]]
    assert [verdict.judge for verdict in verdicts] == ["gpt-4o"]


def test_a_second_run_asks_neither_model(
    cross_encoder: str, chat_server: ChatServer, tmp_path: Path
) -> None:
    rows = Dataset.from_list(ROWS)
    first = rows.map(
        Relabeler(screened(chat_server, CrossEncoderJudge(cross_encoder)), cache=tmp_path),
        batched=True,
    )
    n_calls = len(chat_server.seen)
    judge = CrossEncoderJudge(cross_encoder)
    judge.scorer.logits = None  # type: ignore[assignment,method-assign]  # raises when called
    again = Relabeler(screened(chat_server, judge), cache=tmp_path)

    assert again.judge(rows).n_calls == 0
    assert [*map(json.dumps, again(rows[:])["neg"])] == [*map(json.dumps, first["neg"])]
    assert len(chat_server.seen) == n_calls


def test_perc_pos_drops_what_scores_above_the_share(cross_encoder: str, tmp_path: Path) -> None:
    """Expected negatives come from the model itself."""
    rows = Dataset.from_list(ROWS)
    judge = CrossEncoderJudge.perc_pos(cross_encoder, share=0.95)
    relabeler = Relabeler(judge, action="drop", max_false_negatives=None, cache=tmp_path)

    clean = rows.map(relabeler, batched=True)

    for row, kept in zip(ROWS, clean, strict=True):
        texts = [*row["pos"], *row["neg"]]
        logits = PairScorer(cross_encoder).logits([(row["query"], text) for text in texts])
        bar, *scores = map(probability, logits)
        expected = [t for t, s in zip(row["neg"], scores, strict=True) if s <= 0.95 * bar]
        assert kept["neg"] == expected
    assert sum(map(len, clean["neg"])) == sum(len(row["neg"]) for row in ROWS) - 3


def test_workers_of_map_judge_alike(cross_encoder: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)

    def relabeler(folder: str) -> Relabeler:
        judge = CrossEncoderJudge(cross_encoder)
        return Relabeler(judge, action="drop", cache=tmp_path / folder)

    alone = rows.map(relabeler("a"), batched=True)
    pickled: Callable[..., Any] = pickle.loads(pickle.dumps(relabeler("b")))  # noqa: S301

    assert pickled(rows[:]) == alone[:]


def test_the_judges_thread_is_not_the_loops(cross_encoder: str) -> None:
    """A model that computes for minutes must not hold up the calls in flight."""
    threads: list[str] = []
    judge = CrossEncoderJudge(cross_encoder)
    logits = judge.scorer.logits

    def watched(pairs: Any) -> list[float]:
        threads.append(threading.current_thread().name)
        return logits(pairs)

    judge.scorer.logits = watched  # type: ignore[method-assign]
    reply = background.run(judge.ask(LIT))

    assert isinstance(reply, Reply)
    assert set(threads).isdisjoint({"hf_relabel-loop", "MainThread"})
