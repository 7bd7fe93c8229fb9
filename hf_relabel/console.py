"""Console: what commands print, and how: results to stdout, progress and trouble to stderr."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

__all__ = ["err", "number", "out", "print_cost", "print_report", "right", "row_bar", "usd"]

out = Console()
err = Console(stderr=True)


def usd(value: float | None) -> str:
    """Return a sum with as many digits as it needs; "-" for one that is not known."""
    if value is None:
        return "-"
    digits = 2 if value >= 1 or value == 0 else 4 if value >= 0.01 else 6
    return f"${value:,.{digits}f}"


def number(value: int | None) -> str:
    """Return a count with its thousands apart; "-" for one that is not known."""
    return "-" if value is None else f"{value:,}"


def right(name: str) -> Column:
    """Return a table's column of numbers."""
    return Column(name, justify="right")


def row_bar(*columns: TextColumn) -> Progress:
    """Return a progress bar that counts rows; `columns` come last."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        *columns,
        console=err,
    )


def print_report(found: Any) -> None:
    """Print a run's report: a line for each stage, then the rows."""
    names = ("rows", "flagged", "better", "worse", "undecided", "calls", "tokens", "cost")
    table = Table(
        "stage", "model", *map(right, names), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for stage in found.stages:
        known = [stage.prompt_tokens, stage.completion_tokens]
        tokens = None if None in known else sum(known)
        numbers = (stage.rows_asked, stage.rows_flagged, stage.better, stage.worse, stage.undecided)
        calls = stage.calls + stage.cached
        cost = ("" if stage.is_cost_exact else "≥ ") + usd(stage.cost_usd)
        table.add_row(stage.name, stage.model, *map(number, (*numbers, calls, tokens)), cost)
    out.print(table)
    for stage in found.screens:
        out.print(
            f"{stage.name} settled {stage.passages_settled:,} of {stage.passages_asked:,} passages; "
            f"{stage.passages_asked - stage.passages_settled:,} went on."
        )
    print_cost(found)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in found.rows_dropped.items())
    out.print(
        f"{found.rows_in:,} rows in, {found.rows_out:,} out"
        + (f", {found.rows_added:,} added" if found.rows_added else "")
        + (f"; dropped: {dropped}" if dropped else "")
        + "."
    )
    out.print(str(found))
    if found.undecided_reasons:
        reasons = ", ".join(f"{count:,} {why}" for why, count in found.undecided_reasons.items())
        out.print(f"Undecided: {reasons}. They stay negatives; the next run asks again.")


def print_cost(found: Any) -> None:
    """Print the total of a report or an estimate, and where the prices come from."""
    sources = dict.fromkeys(stage.price_source for stage in found.stages if stage.price_source)
    open_stages = [stage for stage in found.stages if stage.cost_usd is None]
    if not open_stages and list(sources) not in ([], ["local"]):
        is_exact = all(getattr(stage, "is_cost_exact", True) for stage in found.stages)
        least = "" if is_exact else "at least "
        out.print(f"Cost: {least}{usd(found.cost_usd)} ({'; '.join(sources)}).", highlight=False)
    if unpriced := {stage.model for stage in open_stages if stage.prompt_tokens is not None}:
        out.print(
            f"Cost unknown: no price for {', '.join(sorted(unpriced))}. Give it with --price "
            r"MODEL=IN,OUT (USD per million tokens), or install hf-relabel\[prices].",
            highlight=False,
        )
    if uncounted := {stage.model for stage in open_stages if stage.prompt_tokens is None}:
        out.print(f"Cost unknown: no token counts from {', '.join(sorted(uncounted))}.")
