"""Publishing: what a build costs beside `Dataset.to_parquet`, and that its memory stays flat.

A run's folder is made up (passages of 100 words, 15 negatives a row, one in ten rows with a false
one), so that nothing but the build is measured, each build in a process of its own.
`HF_RELABEL_BENCH_ROWS=100000` runs it at the size that the claim is about.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset

from hf_relabel import Relabeler, Relevance, ScriptedJudge
from hf_relabel.decisions import COLUMNS
from hf_relabel.files import ParquetWriter, ShardedWriter, write_relabeled
from hf_relabel.formats import content_hash
from hf_relabel.records import CALL_COLUMNS, VERDICT_COLUMNS
from tests.benchmarks import Ratio

__all__ = ["measure"]

_NEGATIVES = 15
_BATCH = 1000
_SMALL_SHARE = 10
_WORDS = [f"{start}{end}" for start in "bcdfglmnprst" for end in ("ar", "ello", "in", "uma", "or")]
_LINES = [" ".join(random.Random(seed).choices(_WORDS, k=10)) for seed in range(20_000)]
_TEXT = Value("string")
_PASSAGES = List({"docid": _TEXT, "text": _TEXT, "title": _TEXT})


def measure() -> Iterator[Ratio]:
    n_rows = int(os.environ.get("HF_RELABEL_BENCH_ROWS", "20000"))
    with tempfile.TemporaryDirectory(prefix="hf-relabel-bench-") as scratch:
        small = _built(Path(scratch) / "small", n_rows // _SMALL_SHARE)
        large = _built(Path(scratch) / "large", n_rows)
        n_bytes, peer_s = _to_parquet(Path(scratch) / "large" / "built", Path(scratch))
    yield Ratio(
        name=f"build of {n_rows:,} rows, memory",
        ours=large["memory_mb"],
        peer=small["memory_mb"],
        unit="MB",
        bound="<= 1.1",
        n_runs=1,
        note=f"Peak memory of the process, against {n_rows // _SMALL_SHARE:,} rows.",
    )
    yield Ratio(
        name=f"build of {n_rows:,} rows, speed",
        ours=n_bytes / large["build_s"] / 1e6,
        peer=n_bytes / peer_s / 1e6,
        unit="MB/s",
        bound=">= 0.5",
        n_runs=1,
        note=f"Against Dataset.to_parquet of the same {n_bytes / 1e6:,.0f} MB (Arrow), all configs.",
    )


def _built(folder: Path, n_rows: int) -> dict[str, float]:
    """Make up a run and build it, both in processes of their own."""
    for step in ("make", "build"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_publish", step, str(folder)]
        done = subprocess.run([*command, str(n_rows)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _build(folder: Path) -> None:
    from hf_relabel.hub.build import build
    from hf_relabel.hub.settings import BuildSettings

    settings = BuildSettings(license="mit", has_plots=False)
    start = time.perf_counter()
    build(folder / "run", folder / "built", "me/bench", settings)
    build_s = time.perf_counter() - start
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"build_s": build_s, "memory_mb": memory_mb}))


def _to_parquet(built: Path, scratch: Path) -> tuple[int, float]:
    """Write every config again with `Dataset.to_parquet`; return its bytes and the seconds."""
    manifest = json.loads((built / "hf_relabel.json").read_text())
    n_bytes, seconds = 0, 0.0
    for name in manifest["configs"]:
        rows = load_dataset(str(built), name, split="train", cache_dir=str(scratch / "cache"))
        start = time.perf_counter()
        n_bytes += rows.to_parquet(scratch / "peer.parquet")
        seconds += time.perf_counter() - start
    return n_bytes, seconds


# A made-up run ----------------------------------------------------------------------------------


def _make(folder: Path, n_rows: int) -> None:
    run = folder / "run"
    _write_small_run(run)  # for the JSON files alone; the tables are written over
    features = Features(
        {"query_id": _TEXT, "query": _TEXT, "positive_passages": _PASSAGES,
         "negative_passages": _PASSAGES, "subset": _TEXT}
    )  # fmt: skip
    kinds = {"decisions": {**COLUMNS, "split": "string"}, "verdicts": VERDICT_COLUMNS,
             "calls": CALL_COLUMNS}  # fmt: skip
    writers = {name: ParquetWriter(run / f"{name}.parquet", _flat(k)) for name, k in kinds.items()}
    draw = random.Random(0)
    for writer in writers.values():
        writer.__enter__()
    with ShardedWriter(run / "data", "train", features) as shards:
        for start in range(0, n_rows, _BATCH):
            rows = [_row(index, draw) for index in range(start, min(start + _BATCH, n_rows))]
            shards.write({name: [row[name] for row in rows] for name in features})
            pairs = [pair for row in rows for pair in _pairs(row)]
            for name, writer in writers.items():
                columns = kinds[name]
                chosen = pairs[::_NEGATIVES] if name == "calls" else pairs
                writer.write({c: [pair.get(c) for pair in chosen] for c in columns})
    for writer in writers.values():
        writer.__exit__(None, None, None)
    report = json.loads((run / "report.json").read_text())
    report |= {"rows_in": n_rows, "rows_out": n_rows}
    (run / "report.json").write_text(json.dumps(report))


def _flat(columns: dict[str, str]) -> Features:
    return Features({name: Value(kind) for name, kind in columns.items()})


def _write_small_run(folder: Path) -> None:
    rows = Dataset.from_list([_row(index, random.Random(index)) for index in range(2)])
    judge = ScriptedJudge("judge", answers={}, default=Relevance.NOT_RELEVANT)
    with tempfile.TemporaryDirectory() as cache:
        relabeler = Relabeler(judge, cache=cache)
        relabeler.judge(rows)
        write_relabeled(relabeler, {"train": rows}, folder)


def _row(index: int, draw: random.Random) -> dict[str, Any]:
    n_false = index % 10 == 0
    texts = [" ".join(draw.choices(_LINES, k=10)) for _ in range(1 + _NEGATIVES)]
    passages = [
        {"docid": f"d{index}-{place}", "text": text, "title": ""}
        for place, text in enumerate(texts)
    ]
    return {
        "query_id": f"q{index}",
        "query": f"query {index} {texts[0][:40]}",
        "positive_passages": passages[: 1 + n_false],
        "negative_passages": passages[1 + n_false :],
        "subset": f"subset {index % 5}",
    }


def _pairs(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    query_hash = content_hash(row["query"])
    promoted = [(passage, "better", "promote") for passage in row["positive_passages"][1:]]
    kept = [(passage, "not-relevant", "keep") for passage in row["negative_passages"]]
    for passage, relevance, action in promoted + kept:
        passage_hash = content_hash(passage["text"])
        yield {
            "query_id": row["query_id"], "query": row["query"], "docid": passage["docid"],
            "passage": passage["text"], "subset": row["subset"], "query_hash": query_hash,
            "passage_hash": passage_hash, "stage": 0, "judge": "judge", "relevance": relevance,
            "action": action, "split": "train", "doc_id": passage["docid"],
            "query_sha256": query_hash, "doc_sha256": passage_hash, "stage_name": "judge",
            "judge_model": "judge", "verdict": relevance, "is_final": True,
            "call_id": query_hash, "attempt": 0, "passages_in_call": _NEGATIVES,
        }  # fmt: skip


if __name__ == "__main__":
    step, place = sys.argv[1], Path(sys.argv[2])
    _make(place, int(sys.argv[3])) if step == "make" else _build(place)
