"""Memory: the peak of a process that judges many rows, against one that judges a tenth of them.

Rows come from a generator and go nowhere, so that what is measured is the judging alone. Each run is
a process of its own: `python -m tests.benchmarks.bench_memory BASE_URL N_ROWS` prints its peak.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import IterableDataset

from hf_relabel import ChatJudge, Endpoint, Relabeler
from hf_relabel.judges.limits import Ceilings
from tests.benchmarks import Ratio, ratio_of_turns
from tests.benchmarks.rows import bench_rows
from tests.benchmarks.server import chat_server

N_FEW, N_MANY = 10_000, 100_000
LATENCY_S = 0.005
IN_FLIGHT = 64


def measure(n_few: int = N_FEW, n_many: int = N_MANY, n_runs: int = 3) -> Iterator[Ratio]:
    """Judge few rows and many, in turns."""
    with chat_server(LATENCY_S) as base_url:
        yield ratio_of_turns(
            f"peak memory at {n_many:,} / {n_few:,} rows",
            lambda: _peak_of_process(base_url, n_many),
            lambda: _peak_of_process(base_url, n_few),
            unit="MB",
            bound="<= 1.1",
            n_runs=n_runs,
            note=f"Rows of 15 passages x 100 words, streamed; {IN_FLIGHT} calls in flight.",
        )


def _peak_of_process(base_url: str, n_rows: int) -> float:
    command = [sys.executable, "-m", __name__, base_url, str(n_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _judge(base_url: str, n_rows: int) -> None:
    endpoint, ceilings = Endpoint(base_url=base_url), Ceilings(max_concurrency=IN_FLIGHT)
    judge = ChatJudge("bench", endpoint=endpoint, api_key="x", ceilings=ceilings)
    rows = IterableDataset.from_generator(bench_rows, gen_kwargs={"n_rows": n_rows})
    with tempfile.TemporaryDirectory() as folder:
        relabeler = Relabeler(judge, cache=Path(folder))
        done = relabeler.judge(rows)
        relabeler.cache.close()
    if done.n_calls != n_rows:
        raise RuntimeError(f"expected {n_rows} calls, made {done.n_calls}")


if __name__ == "__main__":
    _judge(sys.argv[1], int(sys.argv[2]))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kilobytes / (1e6 if sys.platform == "darwin" else 1e3))
