"""RelabelCallback: a trainer of sentence-transformers that cleans its own batches.

    trainer = SentenceTransformerTrainer(
        ..., loss=loss, callbacks=[RelabelCallback(relabeler, loss=loss)]
    )

It changes three things while a training runs, and puts them back: the collate function of the
training loader, the similarity function of a loss that can mask, and its own place among callbacks.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hf_relabel.callbacks.collator import RelabelCollator
from hf_relabel.callbacks.counts import Counts
from hf_relabel.callbacks.edits import KnownPositives
from hf_relabel.callbacks.index import VerdictIndex
from hf_relabel.callbacks.live import LiveJudge
from hf_relabel.callbacks.masking import MaskedSimilarity, gathers, install
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_relabel.errors import CacheError, SettingError
from hf_relabel.transform import Relabeler

__all__ = ["RelabelCallback"]

logger = logging.getLogger("hf_relabel")

STATE_FILE = "relabel_state.json"
"""The counts in a checkpoint's folder: JSON, and nothing that a resumed run could not do without."""

_TAGS = ["relabeled", "hf_relabel"]


class RelabelCallback(TrainerCallback):
    """Drops or promotes the false negatives of every training batch.

    Negatives whose verdict is in the Relabeler's cache are acted on, as `Dataset.map` would; those
    without one are trained on as they are. In losses of the MultipleNegativesRanking family they
    are masked exactly; in others the text of a freed slot becomes another row's negative.

    Args:
        relabeler: Whose cascade, cache, policy and seed are used.
        loss: The trainer's loss, or its losses by dataset; None has it looked for.
        judge: Judge in the background what the cache does not know, on rank 0.
        mask_in_batch: Mask a query's known positives in other rows' places too.
        known_positives: Query → passages relevant to it beyond what the rows say (from qrels).
        warmup_steps: Steps before the model's scores decide what is judged first.
        max_in_flight: Rows judged at once.
        refresh_s: How often verdicts that other processes bring are looked for.

    Raises:
        SettingError: A setting cannot work.
    """

    def __init__(
        self,
        relabeler: Relabeler,
        *,
        loss: nn.Module | Mapping[str, nn.Module] | None = None,
        judge: bool = False,
        mask_in_batch: bool = True,
        known_positives: KnownPositives | None = None,
        warmup_steps: int = 100,
        max_in_flight: int = 16,
        refresh_s: float = 10.0,
    ) -> None:
        if warmup_steps < 0 or max_in_flight < 1 or refresh_s <= 0:
            raise SettingError(
                "expected warmup_steps of 0 or more, max_in_flight of 1 or more and refresh_s above "
                f"0, found {warmup_steps}, {max_in_flight} and {refresh_s}."
            )
        self.relabeler = relabeler
        self.loss = loss
        self.judge = judge
        self.mask_in_batch = mask_in_batch
        self.known_positives = known_positives
        self.warmup_steps = warmup_steps
        self.max_in_flight = max_in_flight
        self.refresh_s = refresh_s
        self.live: LiveJudge | None = None
        self._begin()

    def _begin(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._collator: RelabelCollator | None = None
        self._masks: list[MaskedSimilarity] = []
        self._before = dict.fromkeys(_names(), 0)
        self._logged = dict(self._before)
        self._n_batches = 0
        self._made_before: list[int] = []

    @property
    def counts(self) -> dict[str, int]:
        """What was done on this rank, in this run and in those it resumes."""
        now = Counts()
        if self._collator is not None and self._made_before:
            now = self._collator.counts_after(self._n_batches, self._made_before)
        masked = [int(mask.n_masked) for mask in self._masks if mask.n_masked is not None]
        values = {**now.to_json(), "masked_in_batch": sum(masked)}
        return {name: self._before[name] + values[name] for name in _names()}

    # ruff: noqa: ARG002  the signatures are transformers'

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have everything put back when `train` fails, which no other event tells."""
        trainer = _find_trainer()
        if trainer is not None:
            train = trainer.train

            def train_and_restore(*args: Any, **kwargs: Any) -> Any:
                try:
                    return train(*args, **kwargs)
                finally:
                    self.close()

            trainer.train = train_and_restore  # type: ignore[method-assign]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Build the index, and wrap the collate function and the loss."""
        self.close()
        self._begin()
        trainer = _find_trainer()
        losses = self._losses(trainer)
        index = self._shared_index(args)
        self._install_masks(losses)
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        masked = frozenset(name for name, mask in losses.items() if self._is_masked(mask))
        self._collator = RelabelCollator(
            loader.collate_fn,
            index,
            known_positives=self.known_positives,
            masked=masked,
            keeps_size=any(gathers(loss) for loss in losses.values()),
            n_workers=loader.num_workers,
        )
        self._warn_of_replaced_texts(losses, masked)
        self._swap(loader, "collate_fn", self._collator)
        if state.global_step:
            self._resume(args, state)
        if trainer is not None:
            self._go_first(trainer)
        if self.judge and state.is_world_process_zero:
            self._start_judging(index, loader.dataset)
        _tag(model)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the workers the epoch, before they make its first batch."""
        if self._collator is not None:
            self._collator.epoch = int((state.epoch or 0) + 1e-6)
            self._n_batches, self._made_before = 0, self._collator.n_made

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a batch whose gradient is added to that of others."""
        self._n_batches += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a batch, and trust the model's scores once it is warm."""
        self._n_batches += 1
        if self.live is not None and state.global_step >= self.warmup_steps:
            self.live.is_warm = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the counts to the trainer's own line of a training step."""
        if logs is None or "loss" not in logs or self._collator is None:
            return
        metrics = self._metrics(args)
        logs.update(metrics)
        if state.log_history:  # a copy was appended before this event
            state.log_history[-1].update(metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the counts beside the checkpoint."""
        totals = self._summed(args)
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                (folder / STATE_FILE).write_text(json.dumps(totals) + "\n")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Say what was done, write it into the model card, and put everything back."""
        totals = self._summed(args)
        self._stop_judging()
        self.close()
        if state.is_world_process_zero:
            logger.info("%s", self._summary(totals))
            _note(model, totals)

    def close(self) -> None:
        """Put back what was wrapped; safe to call at any time, and again."""
        self._stop_judging()
        self._before = self.counts
        self._collator, self._masks = None, []
        while self._undo:
            self._undo.pop()()

    def _losses(self, trainer: Trainer | None) -> dict[str, nn.Module]:
        """Return the losses by dataset; "" names the one without a name.

        Raises:
            SettingError: The loss given is not the one that is trained.
        """
        given = _by_name(self.loss)
        found = _by_name(getattr(trainer, "loss", None))
        if given and found and any(given.get(name) is not loss for name, loss in found.items()):
            raise SettingError(
                "expected loss to be the trainer's own object, found another one, which masks "
                "nothing. Give the same object to the trainer and to RelabelCallback."
            )
        if not given and not found:
            logger.warning(
                "expected loss=…, found none, and no trainer to take it from: freed slots get "
                "another row's negative. Pass loss= for exact masks."
            )
        return given or found

    def _install_masks(self, losses: Mapping[str, nn.Module]) -> None:
        for loss in {id(loss): loss for loss in losses.values()}.values():
            installed = install(loss, masks_in_batch=self.mask_in_batch)
            if installed is not None:
                self._masks.append(installed[0])
                self._undo.append(installed[1])

    def _is_masked(self, loss: nn.Module) -> bool:
        return any(mask.is_inside(loss) for mask in self._masks)

    def _warn_of_replaced_texts(
        self, losses: Mapping[str, nn.Module], masked: frozenset[str]
    ) -> None:
        names = sorted({type(loss).__name__ for name, loss in losses.items() if name not in masked})
        if names and not any("cross_encoder" in type(loss).__module__ for loss in losses.values()):
            logger.warning(
                "%s cannot mask single negatives: in tuples, the text of a dropped or promoted one "
                "is replaced by another row's negative, which is nearly but not exactly the same.",
                " and ".join(names),
            )

    def _swap(self, owner: Any, name: str, value: object) -> None:
        old = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old))

    def _go_first(self, trainer: Trainer) -> None:
        """Stand before the callbacks that send logs elsewhere, so that they send ours too."""
        callbacks = trainer.callback_handler.callbacks
        place = callbacks.index(self)
        callbacks.insert(0, callbacks.pop(place))

        def back() -> None:
            if self in callbacks:
                callbacks.remove(self)
                callbacks.insert(place, self)

        self._undo.append(back)

    def _shared_index(self, args: TrainingArguments) -> VerdictIndex:
        """Build the index once for each node; its other ranks open the same files."""
        if args.world_size <= 1 or not _is_distributed():
            return self._own_index()
        index = self._own_index() if args.local_process_index == 0 else None
        mine = None if index is None else (socket.gethostname(), str(index.directory))
        everywhere: list[tuple[str, str] | None] = [None] * args.world_size
        torch.distributed.all_gather_object(everywhere, mine)
        if index is not None:
            return index
        folders = dict(filter(None, everywhere))
        relabeler = self.relabeler
        folder = folders[socket.gethostname()]
        return VerdictIndex(folder, policy=relabeler.policy, seed=relabeler.seed)

    def _own_index(self) -> VerdictIndex:
        folder = Path(tempfile.mkdtemp(prefix="hf-relabel-index-"))
        self._undo.append(lambda: shutil.rmtree(folder, ignore_errors=True))
        index = VerdictIndex.build(self.relabeler, directory=folder)
        stopped = threading.Event()
        thread = threading.Thread(
            target=_refresh, args=(index, stopped, self.refresh_s), name="hf_relabel-refresh",
            daemon=True,
        )  # fmt: skip

        def stop() -> None:
            stopped.set()
            thread.join()

        thread.start()
        self._undo.append(stop)
        return index

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        given = args.resume_from_checkpoint
        default = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for folder in (Path(given) if isinstance(given, str) else default, default):
            if (folder / STATE_FILE).is_file() and state.is_world_process_zero:
                saved = json.loads((folder / STATE_FILE).read_text("utf-8"))
                self._before = {name: int(saved.get(name, 0)) for name in _names()}
                self._logged = dict(self._before)
                return

    def _start_judging(self, index: VerdictIndex, dataset: Any) -> None:
        self.live = LiveJudge(self.relabeler, index, dataset, max_in_flight=self.max_in_flight)
        self.live.is_warm = not self.warmup_steps
        for mask in self._masks:
            mask.on_scores = self.live.see
        self.live.start()

    def _stop_judging(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _metrics(self, args: TrainingArguments) -> dict[str, float]:
        totals = self._summed(args)
        since = {name: totals[name] - self._logged.get(name, 0) for name in ("seen", "known")}
        self._logged = totals
        metrics: dict[str, float] = {
            "relabel/dropped": totals["dropped"],
            "relabel/promoted": totals["promoted"],
            "relabel/rows_dropped": totals["rows_dropped"],
            "relabel/masked_in_batch": totals["masked_in_batch"],
            "relabel/judged": 0 if self.live is None else self.live.n_judged,
            "relabel/pending": 0 if self.live is None else self.live.n_pending,
        }
        if since["seen"]:
            metrics["relabel/coverage"] = round(since["known"] / since["seen"], 4)
        if self.live is not None and (cost_usd := self.live.cost_usd) is not None:
            metrics["relabel/cost_usd"] = cost_usd
        return metrics

    def _summed(self, args: TrainingArguments) -> dict[str, int]:
        """Return the counts of all ranks; every rank must call this."""
        counts = self.counts
        if args.world_size <= 1 or not _is_distributed():
            return counts
        values = torch.tensor([counts[name] for name in _names()], device=args.device)
        torch.distributed.all_reduce(values)
        return dict(zip(_names(), values.tolist(), strict=True))

    def _summary(self, totals: Mapping[str, int]) -> str:
        text = (
            f"relabeled while training: {totals['seen']} negatives seen, {totals['known']} with a "
            f"verdict; {totals['dropped']} dropped, {totals['promoted']} promoted, "
            f"{totals['masked_in_batch']} masked in other rows, {totals['rows_dropped']} rows dropped"
        )
        return text if self.live is None else f"{text}. {self.live.summary()}"


def _names() -> tuple[str, ...]:
    return (*Counts.names(), "masked_in_batch")


def _by_name(loss: object) -> dict[str, nn.Module]:
    if loss is None:
        return {}
    return dict(loss) if isinstance(loss, Mapping) else {"": loss}  # type: ignore[dict-item]


def _find_trainer() -> Trainer | None:
    """Return the trainer that fires this event: no event names it, so its frame is looked for."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _refresh(index: VerdictIndex, stopped: threading.Event, every_s: float) -> None:
    while not stopped.wait(every_s):
        try:
            if index.writer is not None:
                index.writer.refresh()
        except CacheError as error:  # training goes on with the verdicts that it has
            logger.warning("the verdict index was not refreshed: %s", error)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _tag(model: Any) -> None:
    card = getattr(model, "model_card_data", None)
    if card is not None and hasattr(card, "add_tags"):
        card.add_tags(_TAGS)


def _note(model: Any, totals: Mapping[str, int]) -> None:
    """Say beside each dataset's name in the model card what was done to it."""
    card = getattr(model, "model_card_data", None)
    note = (
        f"relabeled while training by hf_relabel: {totals['dropped']} negatives dropped, "
        f"{totals['promoted']} promoted"
    )
    for dataset in getattr(card, "train_datasets", None) or []:
        name = str(dataset.get("name") or "Unnamed Dataset").split(" (relabeled while")[0]
        dataset["name"] = f"{name} ({note})"
