"""Scheduler: runs in processes of their own, several at once, each on its device."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_relabel.errors import SettingError
from hf_relabel.prune.runs import Run, RunFolder
from hf_relabel.prune.subsets import Subsets
from hf_relabel.prune.training import Evaluate, Train
from hf_relabel.prune.worker import GRACE_S, Order, send

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Failure", "Progress", "Scheduler", "Workload"]

_POLL_S = 0.5
_TAIL_LINES = 15
_TAIL_BYTES = 20_000
# `-m` would have the worker look for modules in its folder, not where the caller found them.
_START = "import sys; sys.path[:] = {path!r}; from hf_relabel.prune.worker import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every run of a sweep shares.

    Attributes:
        subsets: The training rows.
        train: Trains a model.
        evaluate: Scores it.
        folder: Where runs are kept.
        keep_models: Whether models stay after they were evaluated.
    """

    subsets: Subsets
    train: Train
    evaluate: Evaluate
    folder: Path
    keep_models: bool = False

    def folder_of(self, run: Run) -> RunFolder:
        return RunFolder(path=self.folder / "runs" / run.name, run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What became of a run.

    Attributes:
        run: The run.
        state: "started", "done", "failed", or "elsewhere": another process has it in work.
        elapsed_s: Since it started.
        scores: Benchmark → score, once it is done.
        failure: Why it failed.
    """

    run: Run
    state: Literal["started", "done", "failed", "elsewhere"]
    elapsed_s: float = 0.0
    scores: Mapping[str, float] | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run without a result.

    Attributes:
        run: The run.
        message: Why.
        tail: The last lines of its log.
        log: The log.
    """

    run: Run
    message: str
    tail: str
    log: Path

    def __str__(self) -> str:
        indented = "\n".join(f"    {line}" for line in self.tail.splitlines())
        return f"{self.run}: {self.message}\n  Its log, {self.log}, ends with:\n{indented}"


class Scheduler:
    """Carries out runs, `n_jobs` at once.

    Several schedulers, also on several machines, may work on one folder: each run is locked while
    it is in work, and who meets a locked one waits for its result.

    Args:
        workload: What every run shares.
        n_jobs: Runs at once; None is one for each device, or one.
        devices: Values of CUDA_VISIBLE_DEVICES, handed round; none leaves it as it is.
        progress: Told of every run, on threads, one call at a time.

    Raises:
        SettingError: A setting cannot work.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        n_jobs: int | None = None,
        devices: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._workload = workload
        self._n_jobs = n_jobs or max(1, len(devices))
        if self._n_jobs < 1:
            raise SettingError(f"expected one job or more at once, found {n_jobs}.")
        self._devices = list(devices)
        self._progress = progress
        self._telling = threading.Lock()
        self._is_stopping = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for job in range(self._n_jobs):
            self._free.put(self._devices[job % len(devices)] if devices else None)

    def execute(self, runs: Sequence[Run]) -> list[Failure]:
        """Carry out runs that have no result yet; a failure of one leaves the others alone.

        Returns:
            The runs that failed.

        Raises:
            KeyboardInterrupt: What was in work is ended, and starts over the next time.
        """
        pool = ThreadPoolExecutor(self._n_jobs, thread_name_prefix="prune")
        try:
            futures = [pool.submit(self._carry_out, run) for run in runs]
            # In slices: a wait without end does not notice Ctrl-C everywhere.
            while wait(futures, timeout=_POLL_S, return_when=FIRST_EXCEPTION).not_done:
                _raise_first(futures)
            return [failure for future in futures if (failure := future.result()) is not None]
        finally:
            self._is_stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._end_processes()
            pool.shutdown()

    def tidy(self, runs: Sequence[Run]) -> None:
        """Remove what is left beside a result, where a scheduler was killed before it tidied up."""
        from filelock import FileLock, Timeout

        for folder in map(self._workload.folder_of, runs):
            if folder.read() is None or not any(folder.path.glob("attempt-*")):
                continue
            with suppress(Timeout), FileLock(folder.lock, timeout=0):  # else its owner tidies up
                for attempt in folder.path.glob("attempt-*"):
                    self._clean_up(folder, attempt)

    def _carry_out(self, run: Run) -> Failure | None:
        device = self._free.get()
        try:
            folder = self._workload.folder_of(run)
            folder.path.mkdir(parents=True, exist_ok=True)
            with self._locked(folder):
                return self._attempt(folder, device)
        finally:
            self._free.put(device)

    def _attempt(self, folder: RunFolder, device: str | None) -> Failure | None:
        if self._is_stopping.is_set():
            return None
        if (found := folder.read()) is not None:  # by another process, meanwhile
            self._tell(Progress(run=folder.run, state="done", scores=found.scores))
            return None
        since = time.monotonic()
        self._tell(Progress(run=folder.run, state="started"))
        attempt, status = self._work(folder, device)
        if self._is_stopping.is_set():
            return None
        elapsed_s = time.monotonic() - since
        if (found := folder.read()) is not None:
            self._clean_up(folder, attempt)
            done = Progress(run=folder.run, state="done", elapsed_s=elapsed_s, scores=found.scores)
            self._tell(done)
            return None
        if not (attempt / "trained.json").exists():
            shutil.rmtree(attempt)
        failure = _failure(folder, status)
        failed = Progress(run=folder.run, state="failed", elapsed_s=elapsed_s, failure=failure)
        self._tell(failed)
        return failure

    def _work(self, folder: RunFolder, device: str | None) -> tuple[Path, int]:
        """Let a worker do the run, and return its attempt and exit status."""
        folder.failure.unlink(missing_ok=True)
        trained = folder.trained_attempt()
        attempt = trained or self._new_attempt(folder)
        data = attempt / f"data.{self._workload.subsets.file_type}"
        if trained is None:
            self._workload.subsets.write(folder.run.left_out, attempt)
        order = Order(
            train=self._workload.train if trained is None else None,
            evaluate=self._workload.evaluate,
            data=str(data.absolute()),
            attempt=attempt.absolute(),
            seed=folder.run.seed,
            left_out=folder.run.left_out,
            result=folder.result.absolute(),
            failure=folder.failure.absolute(),
        )
        status = self._run_worker(order, folder.log, device)
        data.unlink(missing_ok=True)
        return attempt, status

    def _new_attempt(self, folder: RunFolder) -> Path:
        """Make a folder that no process of an earlier attempt, still ending, writes to."""
        for stale in folder.path.glob("attempt-*"):
            # Such a process may put a file back while its folder is being emptied.
            shutil.rmtree(stale, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="attempt-", dir=folder.path))

    def _run_worker(self, order: Order, log: Path, device: str | None) -> int:
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        code = _START.format(path=[os.path.abspath(entry) for entry in sys.path])  # noqa: PTH100
        with log.open("ab") as sink:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                # A group of its own: Ctrl-C reaches the scheduler alone, which then ends all.
                start_new_session=True,
            )
        self._processes.add(process)
        try:
            _hand_over(process, send(order))
            if self._is_stopping.is_set():
                _close(process)
            return process.wait()
        finally:
            self._processes.discard(process)
            _close(process)
            if process.returncode and process.returncode < 0:
                _kill_group(process)  # killed from outside: what it had started must not go on

    def _clean_up(self, folder: RunFolder, attempt: Path) -> None:
        model = attempt / "model"
        if self._workload.keep_models and model.exists():
            kept = folder.path / "model"
            if kept.exists():
                shutil.rmtree(kept)
            model.replace(kept)
        shutil.rmtree(attempt)

    @contextmanager
    def _locked(self, folder: RunFolder) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock, is_told = FileLock(folder.lock), False
        while True:
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                if self._is_stopping.is_set():
                    break
                if not is_told:
                    self._tell(Progress(run=folder.run, state="elsewhere"))
                    is_told = True
        try:
            yield
        finally:
            lock.release()

    def _tell(self, news: Progress) -> None:
        if self._progress is not None:
            with self._telling:
                self._progress(news)

    def _end_processes(self) -> None:
        """End what still runs: closing its input tells a worker to."""
        running = list(self._processes)
        for process in running:
            _close(process)
        until = time.monotonic() + GRACE_S + 2
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_group(process)


def _raise_first(futures: Sequence[object]) -> None:
    """Raise what went wrong in the scheduler itself (a full disk), without waiting for the rest."""
    for future in futures:
        if future.done() and (error := future.exception()) is not None:  # type: ignore[attr-defined]
            raise error


def _hand_over(process: subprocess.Popen[bytes], order: bytes) -> None:
    """Write the order; the pipe stays open, for its end is the worker's."""
    if process.stdin is not None:
        # One that ended at its start reads nothing; its status and log say why.
        with suppress(BrokenPipeError):
            process.stdin.write(order)
            process.stdin.flush()


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it ended before it had read all
            process.stdin.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)


def _failure(folder: RunFolder, status: int) -> Failure:
    message = f"its process ended with status {status} and left no result."
    if status < 0:
        message = f"its process was killed by signal {-status}; was the memory used up?"
    if folder.failure.is_file():
        message = json.loads(folder.failure.read_text("utf-8"))["message"]
    return Failure(run=folder.run, message=message, tail=_tail(folder.log), log=folder.log)


def _tail(log: Path) -> str:
    """Return the last lines of a log, each as a terminal would show it in the end."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-_TAIL_LINES:])
