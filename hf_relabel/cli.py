"""The command line: arguments to calls, nothing else.

Exit codes: 0 done; 1 a usage or data error; 2 stopped with work left, and the same command resumes;
3 finished with more undecided passages than allowed.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import TextColumn
from rich.table import Table

from hf_relabel import (
    agreement_commands,
    cache_commands,
    evaluate_commands,
    hub_commands,
    prune_commands,
    score_commands,
)
from hf_relabel.arguments import (
    BaseUrl,
    CacheFolder,
    Columns,
    Config,
    Escalate,
    FormatName,
    Input,
    Limit,
    Models,
    PresetName,
    PromptFile,
    ProtocolName,
    Screen,
    ScreenThreshold,
    Split,
    mapping_of,
    relabeler_of,
    shard_of,
)
from hf_relabel.console import err, number, out, print_cost, print_report, right, row_bar, usd
from hf_relabel.errors import AccountError, CacheError, HubError, RelabelError, StoppedError
from hf_relabel.logs import log_to, tell_what_is_logged

if TYPE_CHECKING:
    from datasets import DatasetDict

    from hf_relabel.judging import Progress as Done
    from hf_relabel.report import RelabelReport
    from hf_relabel.transform import Relabeler

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-relabel",
    help="Find the false negatives in retrieval training data, and drop or promote them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_log = logging.getLogger("hf_relabel.cli")
_REFRESH_S = 0.1


class Count(str, Enum):
    """Which relevances make a false negative."""

    BETTER = "better"
    BOTH = "better+worse"


class RowAction(str, Enum):
    """What becomes of false negatives."""

    PROMOTE = "promote"
    DROP = "drop"
    REMOVE_ROW = "remove-row"


ActionOption = Annotated[
    RowAction | None, typer.Option("--action", help="What false negatives become.")
]
CountOption = Annotated[Count | None, typer.Option("--count", help="What makes a false negative.")]
MaxFalse = Annotated[
    int | None,
    typer.Option("--max-false-negatives", help="Rows with more are dropped.", min=0),
]
Concurrency = Annotated[
    int | None, typer.Option("--max-concurrency", help="Most calls of a judge in flight.", min=1)
]

Price = Annotated[
    list[str] | None,
    typer.Option(
        "--price", help="MODEL=IN,OUT: USD per million tokens of prompt and reply.", metavar="M=I,O"
    ),
]


@app.command()
def run(
    source: Input,
    output: Annotated[Path, typer.Option("--output", help="Folder for data and report.")],
    preset: PresetName = "paper",
    base_url: BaseUrl = None,
    model: Models = None,
    screen: Screen = None,
    screen_threshold: ScreenThreshold = None,
    protocol: ProtocolName = None,
    prompt: PromptFile = None,
    action: ActionOption = None,
    count: CountOption = None,
    escalate: Escalate = None,
    max_false_negatives: MaxFalse = None,
    cache: CacheFolder = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    to: Annotated[str | None, typer.Option("--to", help="Convert the result to a format.")] = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
    max_concurrency: Concurrency = None,
    rpm: Annotated[float | None, typer.Option("--rpm", help="Most requests a minute.")] = None,
    tpm: Annotated[float | None, typer.Option("--tpm", help="Most tokens a minute.")] = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="i/n: only this part of the queries, and of the limits."),
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="What happens, as JSON lines.")
    ] = None,
    max_cost_usd: Annotated[
        float | None,
        typer.Option(
            "--max-cost-usd",
            help="The most that calls and batches may cost, in all runs that write this output.",
        ),
    ] = None,
    price: Price = None,
    max_undecided: Annotated[
        int | None, typer.Option("--max-undecided", help="More undecided passages: exit code 3.")
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Ask through the Batch API: half price, up to a day.")
    ] = False,
    published: Annotated[
        str | None,
        typer.Option("--verdicts", help="Published verdicts (OWNER/NAME[@REVISION]): no call."),
    ] = None,
    controls: agreement_commands.Controls = None,
) -> None:
    """Judge a dataset, and write it with its false negatives dropped or promoted."""
    from hf_relabel.files import load_source, write_relabeled

    index, n_shards = shard_of(shard)
    relabeler = relabeler_of(
        published=published,
        preset=preset,
        base_url=base_url,
        models=model or (),
        screen=screen,
        screen_threshold=screen_threshold,
        protocol=protocol and protocol.value,
        prompt=prompt,
        action=action and action.value.replace("-", "_"),
        count=count and count.value,
        escalate=escalate and escalate.value,
        max_false_negatives="preset" if max_false_negatives is None else max_false_negatives,
        cache=cache,
        format=format,
        columns=mapping_of(column),
        max_concurrency=max_concurrency,
        rpm=rpm,
        tpm=tpm,
        n_shards=n_shards,
        max_cost_usd=max_cost_usd,
        prices=_prices(price),
        budget=_budget_of(output),
        batch=batch,
    )
    splits = load_source(source, split=split, config=config, limit=limit)
    if n_shards is not None:
        for name, part in splits.items():
            splits[name] = relabeler.shard(part, index, n_shards)
    if log_file is not None:
        log_to(log_file)
    _log.info("run", extra={"source": source, "output": str(output), **relabeler.settings()})
    if batch:
        tell_what_is_logged("hf_relabel.judges.batches")
    _judge(relabeler, splits)
    report = write_relabeled(relabeler, splits, output, to=to)
    if controls is not None:
        _test_with_controls(relabeler, splits, controls, output, report)
    _log.info("report", extra={"report": report.to_json()})
    _show_report(report)
    if relabeler.budget is not None:
        spent, in_batches = relabeler.budget.spent_usd, relabeler.budget.in_batches_usd
        more = f"; {usd(in_batches)} more are set aside for batches" if in_batches else ""
        words = f"{usd(spent)} of the cap of {usd(max_cost_usd)} are spent{more}."
        out.print(words, highlight=False)
    out.print(f"Written to {output}.")
    if max_undecided is not None and report.negatives.undecided > max_undecided:
        err.print(
            f"{report.negatives.undecided} negatives are undecided, more than {max_undecided}. "
            "Run the same command to ask about them again."
        )
        raise typer.Exit(3)


@app.command()
def estimate(
    source: Input,
    preset: PresetName = "paper",
    base_url: BaseUrl = None,
    model: Models = None,
    screen: Screen = None,
    screen_threshold: ScreenThreshold = None,
    protocol: ProtocolName = None,
    prompt: PromptFile = None,
    cache: CacheFolder = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
    price: Price = None,
    sample: Annotated[int, typer.Option("--sample", help="Rows to look at.", min=1)] = 200,
    ask_screen: Annotated[
        bool, typer.Option("--ask-screen", help="Run the cross-encoder on the sample.")
    ] = False,
    controls: agreement_commands.Controls = None,
) -> None:
    """Estimate the calls, tokens and cost of a run, by stage; no call is made."""
    from hf_relabel.estimate import estimate as estimate_run
    from hf_relabel.files import load_source

    relabeler = relabeler_of(
        preset=preset,
        base_url=base_url,
        models=model or (),
        screen=screen,
        screen_threshold=screen_threshold,
        protocol=protocol and protocol.value,
        prompt=prompt,
        cache=cache,
        format=format,
        columns=mapping_of(column),
        prices=_prices(price),
    )
    splits = load_source(source, split=split, config=config, limit=limit)
    result = estimate_run(
        relabeler, splits, sample_rows=sample, ask_screen=ask_screen, n_controls=controls or 0
    )
    columns = map(right, ("rows", "passages", "calls", "tokens in", "tokens out", "cost"))
    table = Table("stage", "model", *columns, box=SIMPLE_HEAD)
    for stage in result.stages:
        table.add_row(
            stage.name,
            stage.model,
            number(round(result.n_rows * stage.share_of_rows)),
            number(stage.passages),
            number(stage.calls),
            number(stage.prompt_tokens),
            number(stage.completion_tokens),
            usd(stage.cost_usd),
        )
    out.print(table)
    print_cost(result)
    out.print(f"{result.n_rows:,} rows; {result.n_sampled:,} looked at.")
    if result.share_known:
        out.print(f"{result.share_known:.0%} of them are in the cache and cost nothing.")
    out.print(f"Assumed: {'; '.join(result.assumptions)}.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --output of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the report of a run."""
    from hf_relabel.files import read_report

    found = read_report(folder)
    if as_json:
        out.print_json(data=found.to_json())
    else:
        _show_report(found)


@app.command()
def convert(
    source: Input,
    to: Annotated[str, typer.Option("--to", help="The format to write.")],
    output: Annotated[Path, typer.Option("--output", help="A .parquet or .jsonl file.")],
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
    negatives: Annotated[
        int | None, typer.Option("--negatives", help="Width of an n-tuple.", min=1)
    ] = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
) -> None:
    """Convert a dataset from one format to another."""
    from hf_relabel.files import load_source, write_rows
    from hf_relabel.formats import convert as convert_rows

    splits = load_source(source, split=split, config=config, limit=limit)
    if len(splits) > 1:
        raise typer.BadParameter(f"choose one of the splits {list(splits)}", param_hint="--split")
    rows = next(iter(splits.values()))
    new = convert_rows(
        rows, to=to, format=format, columns=mapping_of(column), n_negatives=negatives
    )
    write_rows(new, output)
    out.print(f"{len(rows):,} rows read, {len(new):,} written to {output}.")


@app.command()
def demo(
    preset: PresetName = "offline",
    base_url: BaseUrl = None,
    model: Models = None,
    cache: CacheFolder = None,
) -> None:
    """Relabel the sample that comes with the library, and compare it with its answer key."""
    from hf_relabel.demo import run_demo

    relabeler = relabeler_of(preset=preset, base_url=base_url, models=model or (), cache=cache)
    result = run_demo(relabeler)
    columns = map(right, ("rows", "positives", "now", "negatives", "now"))
    table = Table("subset", *columns, box=SIMPLE_HEAD, title="The sample, before and after")
    for subset, (n_rows, n_positives, n_negatives) in result.before.items():
        _, new_positives, new_negatives = result.after.get(subset, (0, 0, 0))
        table.add_row(
            subset,
            f"{n_rows}",
            f"{n_positives}",
            f"{new_positives}",
            f"{n_negatives}",
            f"{new_negatives}",
        )
    out.print(table)
    for found in result.promotions[:: max(1, len(result.promotions) // 3)][:3]:
        agrees = "the key agrees" if found.is_in_key else "the key says: not an answer"
        out.print(f"[bold]{found.query}[/bold]", highlight=False)
        out.print(f"  promoted ({agrees}): {found.passage}\n", highlight=False)
    out.print(str(result.report))
    precision = "none promoted" if result.precision is None else f"{result.precision:.2f}"
    out.print(
        f"Against the answer key ({result.n_planted} planted false negatives): "
        f"precision {precision}, recall {result.recall:.2f}."
    )
    if preset == "offline":
        out.print(
            "This was an offline stand-in: similarity by all-MiniLM-L6-v2, not the LLM cascade. With "
            "OPENAI_API_KEY set, `hf-relabel demo --preset paper` asks the cascade."
        )


# After the commands above, which are for everybody: --help lists them in this order.
app.command()(cache_commands.stats)
app.command()(score_commands.score)
app.command("drop-by-score")(score_commands.drop_by_score)
app.command()(evaluate_commands.evaluate)
app.command()(prune_commands.prune)
app.command()(hub_commands.publish)
app.add_typer(agreement_commands.agreement, name="agreement")
app.add_typer(cache_commands.verdicts, name="verdicts")
app.add_typer(cache_commands.batches, name="batches")
app.add_typer(hub_commands.hub, name="hub")
cache_commands.verdicts.command("pull")(hub_commands.pull)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run the command line on some arguments and return its exit code."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app(arguments)
    except SystemExit as end:
        # The parser says 2 for a usage error; 2 is ours for "stopped, and can be resumed".
        return 1 if end.code == 2 else int(end.code or 0)
    except HubError as error:
        err.print(f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False)
        return 2 if error.reason in ("unavailable", "conflict") else 1
    except (
        AccountError, CacheError, StoppedError, _InterruptedRunError,
        evaluate_commands.InterruptedEvaluationError,
    ) as error:  # fmt: skip
        err.print(f"Stopped: {error}", style="red", highlight=False, markup=False)
        return 2
    except RelabelError as error:
        err.print(f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False)
        return 1
    return 0


class _InterruptedRunError(RelabelError):
    """The user pressed Ctrl-C."""


def _show_warning(message: Warning | str, *_: object) -> None:
    err.print(f"Warning: {message}", style="yellow", highlight=False, markup=False)


def _prices(given: list[str] | None) -> dict[str, tuple[float, float]]:
    from hf_relabel.judges.money import parse_price

    return dict(parse_price(text) for text in given or ())


def _budget_of(output: Path) -> str:
    """Name the budget by the folder that a run writes: the same command goes on with the same one."""
    return "output:" + hashlib.sha256(str(output.absolute()).encode()).hexdigest()


def _judge(relabeler: Any, splits: Any) -> None:
    total = sum(len(part) for part in splits.values())
    _watch(relabeler, "judging", total, lambda show: relabeler.judge(splits, progress=show))


def _test_with_controls(
    relabeler: Relabeler, splits: DatasetDict, n: int, output: Path, report: RelabelReport
) -> None:
    """Plant controls once the data is written: it does not hang on how they end."""
    from hf_relabel.controls import run_controls
    from hf_relabel.files import write_report

    def work(show: Callable[[Done], None]) -> None:
        report.controls = run_controls(relabeler, splits, n=n, progress=show)

    try:
        _watch(relabeler, "controls", 2 * n, work)
    except (AccountError, _InterruptedRunError):
        err.print(f"The data is written to {output}; only the controls are missing.")
        raise
    write_report(output, report)


def _watch(
    relabeler: Any, title: str, total: int, work: Callable[[Callable[[Done], None]], object]
) -> None:
    """Work with a progress bar; Ctrl-C lets what is in flight come in."""
    with row_bar(TextColumn("{task.fields[spent]}")) as bar:
        task = bar.add_task(title, total=total, spent="")

        shown_at = 0.0

        def show(done: Done) -> None:
            nonlocal shown_at
            if done.elapsed_s - shown_at < _REFRESH_S:
                return
            shown_at = done.elapsed_s
            tokens = done.prompt_tokens + done.completion_tokens
            spent = f"{done.n_calls:,} calls, {tokens:,} tokens"
            if done.cost_usd is not None and done.n_rows:
                projected = done.cost_usd / done.n_rows * total
                spent += f", {usd(done.cost_usd)} of about {usd(projected)}"
            bar.update(task, completed=min(done.n_rows, total), spent=spent)

        try:
            work(show)
        except KeyboardInterrupt:
            raise _InterruptedRunError(
                f"interrupted. The replies to {relabeler.cascade.counts.n_calls:,} calls of this run "
                f"are in the cache; the same command resumes: hf-relabel {shlex.join(sys.argv[1:])}."
                + _batches_left(relabeler)
            ) from None
        bar.update(task, completed=total)


def _batches_left(relabeler: Any) -> str:
    from hf_relabel.judges.batch_admin import n_under_way

    n_left = n_under_way(relabeler.cache.directory) if relabeler.batch else 0
    if not n_left:
        return ""
    return (
        f" Batches that go on without it: {n_left}; it then collects them, and `hf-relabel batches "
        "cancel` stops them."
    )


def _show_report(report: RelabelReport) -> None:
    print_report(report)
    if report.controls is not None:
        agreement_commands.print_controls(report.controls)
