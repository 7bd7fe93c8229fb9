"""The commands that check judges: against people, and with planted passages.

Arguments to calls, nothing else. `cli` adds them to its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hf_relabel.rates import Rate
    from hf_relabel.report import ControlReport, PlantedCounts, StageCounts

__all__ = ["Controls", "agreement", "print_controls"]

agreement = typer.Typer(no_args_is_help=True, help="Measure how far judges agree with people.")
out = Console()
err = Console(stderr=True)

Controls = Annotated[
    int | None,
    typer.Option(
        "--controls",
        help="Test the judges with N known positives and N random passages, planted beside the data.",
        min=1,
    ),
]


def print_controls(found: ControlReport) -> None:
    """Print what judges made of planted passages; why not, where there is nothing to tell."""
    if found.refused is not None or found.positives is None or found.random is None:
        err.print(f"Controls: no rates, for {found.refused}", highlight=False, markup=False)
        return
    kinds = {
        "known positives (recall)": found.positives,
        "random passages (false)": found.random,
    }
    table = Table("planted", "asked at", "flagged", "share", "95 %", box=SIMPLE_HEAD)
    for kind, planted in kinds.items():
        for name, rate in _rates(found.stages, planted):
            table.add_row(kind, name, f"{rate.count:,} of {rate.total:,}", *_share(rate))
            kind = ""
    out.print(table)
    for text in (_what_counts(found.random), *_shortfalls(found), _calls(found.stages)):
        out.print(text, highlight=False)


def _rates(stages: list[StageCounts], planted: PlantedCounts) -> list[tuple[str, Rate]]:
    names = [stage.name for stage in stages]
    return [*zip(names, planted.stages, strict=True), ("the cascade", planted.acted_on)]


def _share(rate: Rate) -> tuple[str, str]:
    if rate.share is None:
        return "-", "-"
    return f"{rate.share:.3f}", f"{rate.low:.3f} to {rate.high:.3f}"


def _what_counts(random: PlantedCounts) -> str:
    return (
        "A stage flags what it finds relevant; the cascade's line counts what would be dropped or "
        f"promoted: of the random passages, {random.promoted:,} would be promoted. "
        f"{random.among_suspects:,} of {random.planted:,} random passages stood beside a suspect."
    )


def _shortfalls(found: ControlReport) -> list[str]:
    texts = []
    assert found.positives is not None  # noqa: S101  checked by the only caller
    assert found.random is not None  # noqa: S101
    if found.positives.planted < found.wanted:
        texts.append(
            f"{found.positives.planted:,} known positives were planted, not {found.wanted:,}: only a "
            "row with two or more can give one up."
        )
    if found.random.planted < found.wanted:
        texts.append(
            f"{found.random.planted:,} random passages were planted, not {found.wanted:,}: there are "
            "no more rows, or no passages of other queries."
        )
    if undecided := found.positives.undecided + found.random.undecided:
        texts.append(f"{undecided:,} planted passages are undecided; no rate counts them.")
    return texts


def _calls(stages: list[StageCounts]) -> str:
    counts = ", ".join(f"{stage.calls + stage.cached:,} of {stage.name}" for stage in stages)
    costs = [stage.cost_usd for stage in stages]
    if None in costs:
        return f"Controls took calls beside those of the run: {counts}."
    total = sum(cost or 0.0 for cost in costs)
    return f"Controls took calls beside those of the run: {counts}; cost: ${total:,.4f}."
