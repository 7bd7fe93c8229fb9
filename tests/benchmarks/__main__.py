"""Run the benchmarks and print one table: `python -m tests.benchmarks [NAME …]`."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all of them, and print their ratios."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    chosen = [name for name in found if not names or name.removeprefix("bench_") in names]
    table = Table("benchmark", "ours", "peer", "unit", "ratio", "held to", "", box=SIMPLE_HEAD)
    notes = []
    for name in chosen:
        for ratio in import_module(f"tests.benchmarks.{name}").measure():
            verdict = "holds" if ratio.holds else "MISSED"
            numbers = (f"{ratio.ours:,.4g}", f"{ratio.peer:,.4g}", ratio.unit, f"{ratio.value:.3f}")
            table.add_row(ratio.name, *numbers, ratio.bound, verdict)
            notes.append(f"{ratio.name}: median of {ratio.n_runs} runs. {ratio.note}")
    console = Console(width=120)
    console.print(table)
    console.print("\n".join(notes), highlight=False)
    console.print(f"{os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__":
    main(sys.argv[1:])
