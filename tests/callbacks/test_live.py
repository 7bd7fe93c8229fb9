"""Judging while training: the most suspect rows first, and nothing may stop the training."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_relabel.callbacks import RelabelCallback
from hf_relabel.callbacks.identity import TextIds
from transformers import TrainerCallback

from hf_relabel import Relabeler
from tests.callbacks.models import tiny_bert, trainer_of
from tests.chat_server import ChatServer, from_key

pytestmark = pytest.mark.filterwarnings("ignore")

N_QUERIES = 96
TEXT = "light water soil heat wind salt iron sand clay rain snow leaf root seed bark"
WORDS = TEXT.split()


def _planted() -> tuple[Dataset, dict[tuple[str, str], str]]:
    """Return rows of which every eighth hides a false negative, nearly a copy of its query."""
    rows, key = [], {}
    for number in range(N_QUERIES):
        word, other = WORDS[number % len(WORDS)], WORDS[(number * 7 + 3) % len(WORDS)]
        query = f"plant {number} {word}"
        negative = f"text {other} beside stands kind of {number}"
        if number % 8 == 5:
            negative = f"plant {number} {word} needs"
            key[query, negative] = "better"
        rows.append({"anchor": query, "positive": f"{other} {word}", "negative_1": negative})
    for row in rows:
        row["negative_2"] = f"beside {row['positive']} of text"
    return Dataset.from_list(rows), key


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [text for row in _planted()[0] for text in row.values()]
    return tiny_bert(tmp_path_factory.mktemp("bert"), texts=texts)


class _Pace(TrainerCallback):
    """Gives each step the time that a real model would take, and writes down what happened when."""

    def __init__(self, step_s: float = 0.03, *, at: Any = None) -> None:
        self.step_s = step_s
        self.at = at or {}

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        time.sleep(self.step_s)
        if state.global_step in self.at:
            self.at[state.global_step]()


def _relabeler(server: ChatServer, folder: Path) -> Relabeler:
    return Relabeler(
        "paper", models=["gpt-4o-mini"], base_url=server.base_url, api_key="none",
        cache=folder / "cache", action="drop",
    )  # fmt: skip


def _train(
    bert: str,
    rows: Dataset,
    folder: Path,
    callbacks: list[Any],
    *,
    epochs: int = 8,
    **settings: Any,
) -> Any:
    trainer = trainer_of(
        "bi", bert, rows, folder / "run", callbacks=callbacks, num_train_epochs=epochs,
        logging_steps=4, learning_rate=1e-5, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_suspects_are_judged_before_others_and_act_at_once(
    bert: str, chat_server: ChatServer, tmp_path: Path
) -> None:
    """200 ms an answer; a random order would put the planted ones in the middle on average."""
    rows, key = _planted()
    chat_server.answer, chat_server.latency_s = from_key(key), 0.2
    callback = RelabelCallback(
        _relabeler(chat_server, tmp_path), judge=True, warmup_steps=N_QUERIES // 8, max_in_flight=2
    )

    trainer = _train(bert, rows, tmp_path, [callback, _Pace(0.05)])

    live = callback.live
    assert live is not None
    ids = TextIds()
    planted = {ids(query) for query, _ in key}
    # What was asked before the model's scores were trusted came in the dataset's order.
    scored = live.order[live.n_asked_unscored :]
    ranks = [rank for rank, query in enumerate(scored) if query in planted]
    mean_rank = sum(ranks) / len(ranks)
    others = [rank for rank, query in enumerate(scored) if query not in planted]
    print(f"mean rank of planted {mean_rank:.1f}, of others {sum(others) / len(others):.1f}")
    assert mean_rank < 0.5 * sum(others) / len(others)
    assert callback.counts["dropped"] > 0
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert log[-1]["relabel/judged"] > log[0]["relabel/judged"]
    assert "relabel/cost_usd" not in log[-1]


def test_a_verdict_acts_within_five_batches(bert: str, tmp_path: Path) -> None:
    """Every batch holds all rows: the first one after the verdict that drops it is the answer."""
    from hf_relabel import Relevance, ScriptedJudge

    rows, key = _planted()
    script: Any = dict.fromkeys(key, Relevance.BETTER)
    judge = ScriptedJudge("scripted", answers=script, default=Relevance.NOT_RELEVANT)
    made = Relabeler(judge, cache=tmp_path / "cache", action="drop")
    callback = RelabelCallback(made, judge=True, warmup_steps=0)
    steps: list[tuple[int, int]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            assert callback.live is not None
            steps.append((callback.live.n_published, callback.counts["dropped"]))

    _train(
        bert, rows, tmp_path, [callback, Watch(), _Pace(0.05)], epochs=60,
        per_device_train_batch_size=N_QUERIES,
    )  # fmt: skip

    per_step = [after - before for (_, before), (_, after) in pairwise(steps)]
    known = next(step for step, (n, _) in enumerate(steps) if n == N_QUERIES)
    acted = next(step for step, n in enumerate(per_step) if n == len(key))
    print(f"all verdicts were there at step {known}, all of them acted at step {acted}")
    assert acted - known <= 5
    assert callback.live is not None
    assert callback.live.n_used == len(key)


def test_a_dead_server_costs_nothing_but_coverage(
    bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, key = _planted()
    server = ChatServer(from_key(key), latency_s=0.05)
    server.__enter__()
    callback = RelabelCallback(
        _relabeler(server, tmp_path), judge=True, warmup_steps=0, max_in_flight=2
    )
    killer = _Pace(at={12: lambda: server.__exit__(None)})

    started = time.monotonic()
    trainer = _train(bert, rows, tmp_path, [callback, killer], epochs=6)

    assert trainer.state.global_step == 6 * N_QUERIES // 8
    assert callback.live is not None
    assert 0 < callback.live.n_judged < 2 * N_QUERIES
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert log[-1]["relabel/coverage"] < 1.0
    print(f"{time.monotonic() - started:.1f} s; {callback.live.summary()}; {len(caplog.records)}")


def test_a_wrong_key_ends_judging_and_not_the_training(
    bert: str, chat_server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = _planted()
    chat_server.fail(*["401"] * 50)
    callback = RelabelCallback(_relabeler(chat_server, tmp_path), judge=True, warmup_steps=0)

    trainer = _train(bert, rows, tmp_path, [callback, _Pace()], epochs=2)

    assert trainer.state.global_step == 2 * N_QUERIES // 8
    assert callback.live is not None
    assert callback.live.error is not None
    assert "judging stopped, training goes on" in caplog.text
    assert "Judging stopped early" in callback.live.summary()


def test_scores_of_a_batch_are_those_of_its_own_passages() -> None:
    """What the live judge is handed: (B, D), in the order of the columns, from chunks too."""
    from hf_relabel.callbacks.masking import MaskedSimilarity, Scores
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(torch.nn.Identity())
    masked = MaskedSimilarity(lambda a, b: a @ b.T, loss, masks_in_batch=True)
    found: list[Scores] = []
    masked.on_scores = found.append
    queries, docs = torch.randn(4, 3), torch.randn(2, 4, 3)
    ids = torch.arange(8).reshape(4, 2) + 100
    head = torch.tensor([[2, number, 0] for number in range(4)])
    masked.begin(torch.cat([head, ids, ids[:, :1]], dim=1))

    for start in (0, 3):
        masked(queries[start : start + 3], docs.reshape(8, 3))

    expected = torch.stack([(queries * docs[0]).sum(1), (queries * docs[1]).sum(1)], dim=1)
    assert torch.allclose(found[0].scores, expected)
    assert found[0].queries.tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_judging_costs_the_training_little(
    bert: str, chat_server: ChatServer, tmp_path: Path
) -> None:
    """Median step times with and without judging, in turns: held to 3 %, printed as measured.

    Steps are as long as a real model's (a pause stands in for the device), so that what is measured
    is what the judge takes from the process: the lock of the interpreter, and the index.
    """
    rows, key = _planted()
    chat_server.answer, chat_server.latency_s = from_key(key), 0.2
    times: dict[bool, list[float]] = {True: [], False: []}

    class Clock(TrainerCallback):
        def __init__(self, judges: bool) -> None:
            self.judges = judges
            self.last: float | None = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            if self.last is not None:
                times[self.judges].append(now - self.last)
            self.last = now

    for turn in range(3):
        for judges in (False, True):
            folder = tmp_path / f"{turn}-{judges}"
            callback = RelabelCallback(
                _relabeler(chat_server, folder), judge=judges, warmup_steps=0, max_in_flight=4
            )
            _train(bert, rows, folder, [callback, _Pace(0.2), Clock(judges)], epochs=2)

    without, with_ = statistics.median(times[False]), statistics.median(times[True])
    print(f"step with judging {with_:.4f} s, without {without:.4f} s: {with_ / without:.3f}")
    assert with_ / without <= 1.03
