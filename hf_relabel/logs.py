"""Logs: what happens in a run, as JSON lines in a file and as news above the progress bar."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from hf_relabel.console import err

__all__ = ["log_to", "tell_what_is_logged"]


def log_to(path: Path) -> None:
    """Write what the library logs to a file, a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger("hf_relabel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    """One JSON object a record: when, what, and all that came along."""

    _OWN = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in self._OWN}
        values = {"time": round(record.created, 3), "event": record.getMessage(), **extra}
        return json.dumps(values, ensure_ascii=False, default=str)


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), style="dim", highlight=False, markup=False)


def tell_what_is_logged(name: str) -> None:
    """Print a logger's news above the progress bar: batches take hours, and silence worries."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Printed())
