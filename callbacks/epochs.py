"""RotationCallback: tells rotated datasets which epoch it is.

The trainers have no other way that always works: accelerate calls `set_epoch` of a dataset, but not
beside every sampler, and a `Dataset` has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_relabel.callbacks.rotation import Rotation
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_relabel.errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["RotationCallback"]


class RotationCallback(TrainerCallback):
    """Moves rotated datasets on at the start of every epoch, also of one that is resumed.

    Args:
        dataset: What `rotate` returned.

    Raises:
        SettingError: It is not that.
    """

    def __init__(self, dataset: Dataset | DatasetDict) -> None:
        from datasets import DatasetDict

        parts = dataset.values() if isinstance(dataset, DatasetDict) else [dataset]
        self._rotations = [_rotation_of(part) for part in parts]

    def on_epoch_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        # In the middle of a resumed epoch this is a fraction, and a whole number may fall just short.
        epoch = int((state.epoch or 0.0) + 1e-6)
        for rotation in self._rotations:
            rotation.epoch = epoch


def _rotation_of(dataset: Dataset) -> Rotation:
    transform = dataset.format["format_kwargs"].get("transform")
    if not isinstance(transform, Rotation):
        raise SettingError(
            f"expected a dataset that `rotate` returned, found one with the transform {transform!r}. "
            "Build the callback before the trainer, from the dataset that it trains on."
        )
    return transform
