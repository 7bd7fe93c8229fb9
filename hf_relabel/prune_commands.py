"""The command of pruning: arguments to calls, nothing else. `cli` adds it to its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from hf_relabel.console import err, out
from hf_relabel.errors import StoppedError

__all__ = ["prune"]

_PRINT_COMMANDS = "--print-commands"


def prune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="The training rows: a JSONL, Parquet or CSV file, a folder, or a Hub id.",
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            "--train",
            help="The training command; {data}, {output} and {seed} are filled in.",
            metavar="COMMAND",
        ),
    ],
    benchmark: Annotated[
        list[str],
        typer.Option("--benchmark", help="A benchmark's folder (BEIR layout); once for each."),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for runs, table and keep-list.")],
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings of each arm.", min=1)] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", help="They count from here.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Remove the worst, and repeat on the rest.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Runs at once  [one a device, or one].", min=1)
    ] = None,
    devices: Annotated[
        str, typer.Option("--devices", help="0,1,…: CUDA_VISIBLE_DEVICES, handed round.")
    ] = "",
    metric: Annotated[str, typer.Option("--metric", help="What is compared.")] = "nDCG@10",
    alpha: Annotated[
        float, typer.Option("--alpha", help="Chance that any subset is marked wrongly.")
    ] = 0.05,
    min_gain: Annotated[
        float, typer.Option("--min-gain", help="Smaller gains are not marked.")
    ] = 0.001,
    subset_column: Annotated[
        str, typer.Option("--subset-column", help="The column that names subsets.")
    ] = "subset",
    split: Annotated[str | None, typer.Option("--split", help="Which split.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="The Hub dataset's subset.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Write the rows to keep: a .parquet or .jsonl file."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw heatmap.png.")] = True,
    model_in: Annotated[
        str, typer.Option("--model-in", help="The folder in {output} where --train leaves a model.")
    ] = "",
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep each run's model in its folder.")
    ] = False,
    print_commands: Annotated[
        bool, typer.Option(_PRINT_COMMANDS, help="Print a command for each missing run; do none.")
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="Do this one run, as --print-commands names it.")
    ] = None,
) -> None:
    """Find the subsets that do harm: train without each of them, evaluate, and compare."""
    from hf_relabel.prune import BenchmarkScores, Sweep, TrainCommand
    from hf_relabel.prune.heatmap import check_matplotlib

    if plot:
        check_matplotlib()
    _check_written(write)
    scores = BenchmarkScores(folders=tuple(benchmark), metric=metric)
    sweep = Sweep(
        _load(source, split, config),
        train=TrainCommand(template=train, model_in=model_in),
        evaluate=scores,
        output=output,
        seeds=range(first_seed, first_seed + seeds),
        column=subset_column,
        greedy=greedy,
        alpha=alpha,
        min_gain=min_gain,
        file_type="jsonl" if ".json" in Path(source).name else "parquet",
        keep_models=keep_models,
    )
    if print_commands:
        _print_commands(sweep.missing())
        return
    scores.load()  # a wrong folder shows now, not after the first training
    chosen = None if run is None else sweep.find(run)
    with _progress(sweep, chosen) as show:
        settings: dict[str, Any] = {"jobs": jobs, "devices": _devices(devices), "progress": show}
        if chosen is not None:
            sweep.execute([chosen], **settings)
            return
        report = sweep.run(**settings)
    _print_report(report)
    if plot:
        _draw(report, output)
    if write is not None:
        _write(sweep, report, write)
    out.print(f"Written to {output}: keep.json, table.md{', heatmap.png' if plot else ''}.")


def _load(source: str, split: str | None, config: str | None) -> Any:
    from datasets import disable_progress_bars

    from hf_relabel.files import load_source

    disable_progress_bars()  # one bar is enough, and it is ours
    splits = load_source(source, split=split, config=config)
    if len(splits) > 1:
        raise typer.BadParameter(f"choose one of the splits {list(splits)}", param_hint="--split")
    return next(iter(splits.values()))


def _check_written(write: Path | None) -> None:
    if write is not None and write.suffix not in (".parquet", ".jsonl"):
        raise typer.BadParameter(
            f"expected a file of .parquet or .jsonl, found {str(write)!r}", param_hint="--write"
        )


def _devices(given: str) -> list[str]:
    return [device.strip() for device in given.split(",") if device.strip()]


def _print_commands(missing: list[Any]) -> None:
    """Print the command that was given, once for each run: each does that run alone."""
    given = [word for word in sys.argv[1:] if word != _PRINT_COMMANDS]
    for run in missing:
        # Not by rich, which would wrap it.
        typer.echo(shlex.join(["hf-relabel", *given, "--run", run.name]))
    if not missing:
        err.print("No run is missing: the command without --print-commands prints the table.")


@contextmanager
def _progress(sweep: Any, chosen: Any) -> Iterator[Callable[[Any], None]]:
    """Show what runs and what came out; Ctrl-C ends what is in work, and says what resumes."""
    runs = sweep.runs() if chosen is None else [chosen]
    n_done = len(runs) - len(sweep.missing()) if chosen is None else 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        shown = _Shown(bar, bar.add_task("training", total=len(runs), completed=n_done))
        try:
            yield shown.tell
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted. {shown.n_done} runs were done in this call, and all that are done are "
                f"in {sweep.folder}; the same command resumes: hf-relabel {shlex.join(sys.argv[1:])}"
            ) from None


class _Shown:
    """What the user sees while runs go on: a line for each that ended, and a bar."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self.n_done = 0
        self._bar = bar
        self._task = task
        self._running: dict[str, None] = {}

    def tell(self, news: Any) -> None:
        name = news.run.name
        self._running.pop(name, None)
        if news.state == "started":
            self._running[name] = None
        elif news.state == "elsewhere":
            self._say(f"{news.run}: another process has it in work; waiting for its result")
        else:
            self._end(news)
        self._grow_total()
        self._bar.update(self._task, description=", ".join(self._running) or "training")

    def _end(self, news: Any) -> None:
        took = f"in {_duration(news.elapsed_s)}"
        if news.state == "failed":
            self._say(f"{news.run}: failed {took}: {news.failure.message}")
            return
        self.n_done += 1
        self._bar.advance(self._task)
        scores = ", ".join(f"{name} {score:.4f}" for name, score in news.scores.items())
        self._say(f"{news.run}: {scores} {took}")

    def _grow_total(self) -> None:
        """A greedy sweep has as many more runs in its next round as it starts."""
        task = self._bar.tasks[0]
        least = int(task.completed) + len(self._running)
        if task.total is not None and least > task.total:
            self._bar.update(self._task, total=least)

    def _say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _print_report(report: Any) -> None:
    for number, round_ in enumerate(report.rounds, start=1):
        first, *numbers, last = round_.header()
        title = f"Round {number}" if len(report.rounds) > 1 else None
        columns = [Column(name, justify="right") for name in numbers]
        table = Table(first, *columns, last, box=SIMPLE_HEAD, title=title, title_justify="left")
        for cells in round_.cells():
            table.add_row(*cells, style="bold" if cells[-1] == "drop" else None)
        out.print(table)
        for note in round_.notes():
            out.print(note, highlight=False, markup=False)
    out.print(report.verdict(), highlight=False, markup=False)


def _draw(report: Any, folder: Path) -> None:
    from hf_relabel.prune import draw_heatmap

    for number, round_ in enumerate(report.rounds, start=1):
        name = "heatmap.png" if number == 1 else f"heatmap-{number}.png"
        draw_heatmap(round_, folder / name)


def _write(sweep: Any, report: Any, path: Path) -> None:
    from hf_relabel.files import write_rows

    rows = sweep.kept_rows(report)
    write_rows(rows, path)
    out.print(f"{sweep.n_rows:,} rows read, {len(rows):,} kept in {path}.")
