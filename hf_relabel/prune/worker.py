"""Worker: the process of one run. It trains, evaluates, writes the result, and ends.

It is started by the scheduler, reads what to do from its standard input, and ends itself and all
that it started when that input closes: when the scheduler was killed, no training goes on unseen.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_relabel.errors import StoppedError
from hf_relabel.prune.runs import write_json
from hf_relabel.prune.training import Evaluate, Train

__all__ = ["GRACE_S", "Order", "main", "send"]

GRACE_S = 5.0
"""What a training has between SIGTERM and SIGKILL."""
_LENGTH_BYTES = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker does.

    Attributes:
        train: Trains the model; None where the attempt has one already.
        evaluate: Scores it.
        data: The rows to train on.
        attempt: A folder for the model.
        seed: For `train`.
        left_out: Written into the result.
        result: The file to write the result to.
        failure: The file to write the reason to, where there is no result.
    """

    train: Train | None
    evaluate: Evaluate
    data: str
    attempt: Path
    seed: int
    left_out: tuple[str, ...]
    result: Path
    failure: Path


def send(order: Order) -> bytes:
    """Return an order as the bytes that `main` reads.

    Functions of a script or a notebook travel by value: whence dill, which `datasets` brings.
    """
    import dill

    body = dill.dumps(order, recurse=True)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + bytes(body)


def main() -> None:
    """Read an order from the standard input, and carry it out."""
    import dill

    source = sys.stdin.buffer
    length = int.from_bytes(source.read(_LENGTH_BYTES), "big")
    body = source.read(length)
    if not body or len(body) < length:
        sys.exit(1)  # the scheduler is gone already
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _on_term)
    threading.Thread(target=_end_with_scheduler, daemon=True).start()
    # The bytes come from the scheduler that started this process, through a pipe of its own.
    order: Order = dill.loads(body)  # noqa: S301
    sys.exit(_carry_out(order))


_is_ending = threading.Event()


def _on_term(*_: object) -> None:
    """Do nothing, but not by SIG_IGN, which the training would inherit."""


def _end_with_scheduler() -> None:
    """End this process and all that it started, once nobody waits for them any more."""
    sys.stdin.buffer.read()
    _is_ending.set()
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _carry_out(order: Order) -> int:
    try:
        model = _trained(order)
        scores = _scores(order.evaluate(model))
    # Whatever a user's function raises is this run's failure, not the sweep's.
    except Exception as error:
        if _is_ending.is_set():
            # The training was ended, and did not fail.
            os.killpg(os.getpgrp(), signal.SIGKILL)
        if not isinstance(error, StoppedError):
            traceback.print_exc()
        write_json(order.failure, {"message": _message(error)})
        return 1
    result = {"left_out": list(order.left_out), "seed": order.seed, "scores": scores}
    write_json(order.result, result)
    return 0


def _trained(order: Order) -> str:
    """Train, or find what was trained, and return the model's path."""
    import json

    note = order.attempt / "trained.json"
    if order.train is None:
        return str(json.loads(note.read_text("utf-8"))["model"])
    output = order.attempt / "model"
    model = Path(order.train(order.data, str(output), order.seed) or output)
    if not model.exists() or (model.is_dir() and not any(model.iterdir())):
        raise StoppedError(
            f"expected a model in {str(model)!r} after training, found nothing. Let the training "
            "write it to {output}."
        )
    write_json(note, {"model": str(model.absolute())})
    return str(model.absolute())


def _scores(found: Any) -> dict[str, float]:
    is_mapping = isinstance(found, Mapping) and bool(found)
    scores = {str(name): float(value) for name, value in found.items()} if is_mapping else {}
    if not scores or not all(map(math.isfinite, scores.values())):
        raise StoppedError(
            f"expected a finite score for every benchmark, found {found!r}. If it is NaN, the "
            "training may have diverged."
        )
    return scores


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, StoppedError) else f"{type(error).__name__}: {error}"
