"""Callbacks: relabel while a model trains; they decide when actions apply, never which.

    trainer = SentenceTransformerTrainer(
        ..., loss=loss, callbacks=[RelabelCallback(relabeler, loss=loss)]
    )

Modules, each importing only from those before it: identity (64-bit ids of texts), index (verdicts
on disk, read without a lock), counts, shapes (which columns are what), edits (a batch before and
after), collator (edits where batches are made), masking (exact -inf masks in the loss), live
(judging in the background), callback; beside them rotation (a row's tuple of each epoch) and epochs
(its callback). Names are loaded when they are first used, and torch with those that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_relabel.callbacks.callback import RelabelCallback as RelabelCallback
    from hf_relabel.callbacks.collator import RelabelCollator as RelabelCollator
    from hf_relabel.callbacks.collator import relabel_batch as relabel_batch
    from hf_relabel.callbacks.epochs import RotationCallback as RotationCallback
    from hf_relabel.callbacks.index import VerdictIndex as VerdictIndex
    from hf_relabel.callbacks.rotation import rotate as rotate

_HOMES = {
    "RelabelCallback": "callback",
    "RelabelCollator": "collator",
    "RotationCallback": "epochs",
    "VerdictIndex": "index",
    "relabel_batch": "collator",
    "rotate": "rotation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hf_relabel.callbacks.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
