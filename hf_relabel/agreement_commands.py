"""The commands that check judges: against people, and with planted passages.

Arguments to calls, nothing else. `cli` adds them to its own.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_relabel.console import err, out

if TYPE_CHECKING:
    from hf_relabel.agreement import Agreement, Figure
    from hf_relabel.rates import Rate
    from hf_relabel.report import ControlReport, PlantedCounts, StageCounts

__all__ = ["Controls", "agreement", "print_controls"]

agreement = typer.Typer(no_args_is_help=True, help="Measure how far judges agree with people.")

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
        out.print(_calls(found.stages), highlight=False)
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


@agreement.command("sample")
def sample_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --output of a run.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for tasks and key.")],
    n: Annotated[int, typer.Option("--n", help="How many pairs.", min=1)] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Chooses pairs and their order.")] = 0,
) -> None:
    """Draw judged pairs for people to look at, and write them as tasks that tell no verdict."""
    from hf_relabel.annotation import write_tasks
    from hf_relabel.sampling import draw_sample

    sample = draw_sample(folder, n, seed=seed)
    files = write_tasks(sample, output)
    table = Table("subset", "outcome", box=SIMPLE_HEAD)
    for name in ("pairs", "drawn"):
        table.add_column(name, justify="right")
    for stratum in sample.strata:
        counts = (f"{stratum.size:,}", f"{stratum.drawn:,}")
        table.add_row(stratum.subset or "-", stratum.outcome, *counts)
    out.print(table)
    if sample.n_undecided:
        out.print(f"{sample.n_undecided:,} undecided pairs are left out.")
    out.print(
        f"{len(sample.pairs):,} tasks written. For Label Studio: import {files.tasks}, with "
        f"{files.labeling} as the labeling interface. Or give each annotator a copy of "
        f"{files.table}, named after them. Keep {files.key} from annotators. Then: hf-relabel "
        f"agreement score {output} ANSWERS...",
        highlight=False,
        soft_wrap=True,
    )


@agreement.command("score")
def score_command(
    folder: Annotated[Path, typer.Argument(metavar="TASKS", help="The folder of the tasks.")],
    answers: Annotated[
        list[Path],
        typer.Argument(
            metavar="ANSWERS...", help="Label Studio's JSON exports, filled CSV tables."
        ),
    ],
    show: Annotated[int, typer.Option("--show", help="Disagreements to print.", min=0)] = 3,
) -> None:
    """Compare verdicts with people's answers: kappa, precision and recall, with intervals."""
    from hf_relabel.agreement import measure, write_agreement
    from hf_relabel.annotation import read_answers, read_sample

    sample = read_sample(folder)
    found = measure(sample, read_answers(answers, sample))
    report, table = write_agreement(found, folder)
    _print_agreement(found)
    _print_disagreements(found, show, table)
    out.print(f"All figures: {report}.", soft_wrap=True, highlight=False)


def _print_agreement(found: Agreement) -> None:
    table = Table("subset", "judge", "pairs", "kappa", "precision", "recall", box=SIMPLE_HEAD)
    for judge in found.judges:
        figures = map(_figure, (judge.kappa, judge.precision, judge.recall))
        name = f"{judge.stage} ({judge.judge})" if judge.judge else "the cascade"
        table.add_row(_subset(judge.subset), name, f"{judge.n_pairs:,}", *figures)
    for people in found.people:
        name = {"cohen": "people (Cohen)", "fleiss": "people (Fleiss)"}.get(people.kind, "people")
        pairs = f"{people.n_pairs:,}"
        table.add_row(_subset(people.subset), name, pairs, _figure(people.kappa), "", "")
    out.print(table)
    out.print(
        "Figures are of all judged pairs of the run, estimated from the sample, with 95 % intervals. "
        "Recall of the cascade counts what its first stage passed over; that of a later stage is "
        "of what it was asked about."
    )
    out.print(
        f"{found.n_answered:,} of {found.n_tasks:,} tasks have an answer. In no figure: "
        f"{found.n_cannot_tell:,} answers 'Cannot tell', {found.n_undecided:,} undecided pairs."
    )
    if found.unanswered:
        out.print(f"No answer, hence in no figure: {'; '.join(found.unanswered)}.", markup=False)


def _subset(name: str | None) -> str:
    return "all" if name is None else name or "-"


def _figure(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def _print_disagreements(found: Agreement, n_shown: int, table: Path) -> None:
    counts = Counter(disagreement.kind for disagreement in found.disagreements)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none"
    out.print(f"Disagreements to read: {listed}; {table}.", soft_wrap=True, highlight=False)
    for disagreement in found.disagreements[:n_shown]:
        pair = disagreement.pair
        out.print(f"\n{disagreement.kind}: {pair.query}", style="bold", markup=False)
        out.print(f"  {shorten(pair.passage, 300)}", highlight=False, markup=False)
        if pair.reason:
            reason = shorten(pair.reason, 300)
            out.print(f"  the judge: {reason}", style="dim", highlight=False, markup=False)
