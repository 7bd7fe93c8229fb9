"""The command line: arguments to calls, nothing else.

Exit codes: 0 done; 1 a usage or data error; 2 stopped with work left, and the same command resumes;
3 finished with more undecided passages than allowed.
"""

from __future__ import annotations

import hashlib
import json
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hf_relabel import (
    agreement_commands,
    evaluate_commands,
    hub_commands,
    prune_commands,
    score_commands,
)
from hf_relabel.arguments import (
    Columns,
    Config,
    FormatName,
    Input,
    Limit,
    Split,
    mapping_of,
    shard_of,
)
from hf_relabel.errors import AccountError, CacheError, HubError, RelabelError, StoppedError

if TYPE_CHECKING:
    from datasets import DatasetDict

    from hf_relabel.report import RelabelReport
    from hf_relabel.transform import Progress as Done
    from hf_relabel.transform import Relabeler

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-relabel",
    help="Find the false negatives in retrieval training data, and drop or promote them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
verdicts = typer.Typer(no_args_is_help=True, help="Exchange and count cached verdicts.")
app.add_typer(verdicts, name="verdicts")
batches = typer.Typer(no_args_is_help=True, help="Look at batches on a server, and cancel them.")
app.add_typer(batches, name="batches")
app.add_typer(agreement_commands.agreement, name="agreement")
app.command()(hub_commands.publish)
app.command()(evaluate_commands.evaluate)
app.add_typer(hub_commands.hub, name="hub")
app.command()(score_commands.score)
app.command("drop-by-score")(score_commands.drop_by_score)
verdicts.command("pull")(hub_commands.pull)
app.command()(prune_commands.prune)
out = Console()
err = Console(stderr=True)
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


class Level(str, Enum):
    """What goes to the next stage."""

    ROW = "row"
    PASSAGE = "passage"


class Form(str, Enum):
    """How judges reply."""

    XML = "xml"
    JSON = "json"


PresetName = Annotated[str, typer.Option("--preset", help="paper, current, screened or offline.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url", envvar="OPENAI_BASE_URL", help="An OpenAI-compatible address, ending in /v1."
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="A stage's model, cheap to strong; once for each stage."),
]
Screen = Annotated[
    str | None,
    typer.Option("--screen", help="The cross-encoder of preset screened: a name or a folder."),
]
ScreenThreshold = Annotated[
    float | None,
    typer.Option("--screen-threshold", help="The lowest score that it passes on.", min=0, max=1),
]
ProtocolName = Annotated[Form | None, typer.Option("--protocol", help="How judges reply.")]
PromptFile = Annotated[
    str | None, typer.Option("--prompt", help="One prompt for all stages: a name or a file.")
]
ActionOption = Annotated[
    RowAction | None, typer.Option("--action", help="What false negatives become.")
]
CountOption = Annotated[Count | None, typer.Option("--count", help="What makes a false negative.")]
Escalate = Annotated[Level | None, typer.Option("--escalate", help="What the next stage sees.")]
MaxFalse = Annotated[
    int | None,
    typer.Option("--max-false-negatives", help="Rows with more are dropped.", min=0),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar="HF_RELABEL_CACHE", help="Folder of verdicts  [~/.cache/hf_relabel]."
    ),
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
    relabeler = _relabeler(
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
        _log_to(log_file)
    _log.info("run", extra={"source": source, "output": str(output), **relabeler.settings()})
    if batch:
        _tell_what_is_logged("hf_relabel.judges.batches")
    _judge(relabeler, splits)
    report = write_relabeled(relabeler, splits, output, to=to)
    if controls is not None:
        _test_with_controls(relabeler, splits, controls, output, report)
    _log.info("report", extra={"report": report.to_json()})
    _print_report(report)
    if relabeler.budget is not None:
        spent, in_batches = relabeler.budget.spent_usd, relabeler.budget.in_batches_usd
        more = f"; {_usd(in_batches)} more are set aside for batches" if in_batches else ""
        words = f"{_usd(spent)} of the cap of {_usd(max_cost_usd)} are spent{more}."
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

    relabeler = _relabeler(
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
    columns = map(_right, ("rows", "passages", "calls", "tokens in", "tokens out", "cost"))
    table = Table("stage", "model", *columns, box=SIMPLE_HEAD)
    for stage in result.stages:
        table.add_row(
            stage.name,
            stage.model,
            _number(round(result.n_rows * stage.share_of_rows)),
            _number(stage.passages),
            _number(stage.calls),
            _number(stage.prompt_tokens),
            _number(stage.completion_tokens),
            _usd(stage.cost_usd),
        )
    out.print(table)
    _print_cost(result)
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
        _print_report(found)


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

    relabeler = _relabeler(preset=preset, base_url=base_url, models=model or (), cache=cache)
    result = run_demo(relabeler)
    columns = map(_right, ("rows", "positives", "now", "negatives", "now"))
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


@verdicts.command("export")
def export_verdicts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tables go.")],
    cache: CacheFolder = None,
) -> None:
    """Write the cached replies and verdicts to Parquet tables, safe to share."""
    from hf_relabel.exchange import export_cache

    counts = export_cache(_cache(cache), folder)
    out.print(f"{counts.n_calls:,} calls and {counts.n_pairs:,} pairs written to {folder}.")


@verdicts.command("import")
def import_verdicts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tables are.")],
    cache: CacheFolder = None,
) -> None:
    """Add exported replies and verdicts to the cache; what is there already stays."""
    from hf_relabel.exchange import import_cache

    counts = import_cache(folder, _cache(cache))
    out.print(f"{counts.n_calls:,} calls and {counts.n_pairs:,} pairs read from {folder}.")


@verdicts.command("export-batch")
def export_batch(
    source: Input,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .jsonl file to write.")],
    preset: PresetName = "paper",
    base_url: BaseUrl = None,
    model: Models = None,
    screen: Screen = None,
    screen_threshold: ScreenThreshold = None,
    protocol: ProtocolName = None,
    prompt: PromptFile = None,
    escalate: Escalate = None,
    cache: CacheFolder = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
) -> None:
    """Write what a run would ask next, for `vllm run-batch`; no call is made."""
    from hf_relabel.batch_exchange import export_requests
    from hf_relabel.files import load_source

    relabeler = _relabeler(
        preset=preset,
        base_url=base_url,
        models=model or (),
        screen=screen,
        screen_threshold=screen_threshold,
        protocol=protocol and protocol.value,
        prompt=prompt,
        escalate=escalate and escalate.value,
        cache=cache,
        format=format,
        columns=mapping_of(column),
    )
    splits = load_source(source, split=split, config=config, limit=limit)
    written = export_requests(relabeler, splits, file)
    for path, count in written.items():
        out.print(f"{count:,} requests written to {path}.")
    if not written:
        out.print("Nothing is open: `hf-relabel run` with the same options makes no call.")


@verdicts.command("import-batch")
def import_batch(
    source: Input,
    replies: Annotated[Path, typer.Argument(metavar="REPLIES", help="The engine's output file.")],
    preset: PresetName = "paper",
    base_url: BaseUrl = None,
    model: Models = None,
    screen: Screen = None,
    screen_threshold: ScreenThreshold = None,
    protocol: ProtocolName = None,
    prompt: PromptFile = None,
    escalate: Escalate = None,
    cache: CacheFolder = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
) -> None:
    """Read replies to an exported file into the cache; give the options of the export."""
    from hf_relabel.batch_exchange import import_replies
    from hf_relabel.files import load_source

    relabeler = _relabeler(
        preset=preset,
        base_url=base_url,
        models=model or (),
        screen=screen,
        screen_threshold=screen_threshold,
        protocol=protocol and protocol.value,
        prompt=prompt,
        escalate=escalate and escalate.value,
        cache=cache,
        format=format,
        columns=mapping_of(column),
    )
    splits = load_source(source, split=split, config=config, limit=limit)
    counts = import_replies(relabeler, splits, replies)
    out.print(
        f"{counts.n_lines:,} lines: {counts.n_read:,} replies read, {counts.n_unusable:,} unusable. "
        f"Rows with open questions: {counts.n_open:,}."
    )


@batches.command("list")
def show_batches(base_url: BaseUrl = None, cache: CacheFolder = None) -> None:
    """List the batches that hf-relabel made, newest first."""
    from datetime import UTC, datetime

    from hf_relabel import background
    from hf_relabel.cache import default_directory
    from hf_relabel.judges.batch_admin import list_batches
    from hf_relabel.judges.endpoint import Endpoint

    endpoint, folder = Endpoint(base_url=base_url), cache or default_directory()
    table = Table("batch", "status", "model", "made", "done", "failed", "of", box=SIMPLE_HEAD)
    table.add_column("cache")
    for view, is_here in background.run(list_batches(endpoint, folder)):
        total, completed, failed = view.counts
        made = datetime.fromtimestamp(view.created_at, UTC).strftime("%Y-%m-%d %H:%M")
        numbers = (completed, failed, total or int(view.metadata.get("requests", 0)))
        model = view.metadata.get("model", "")
        place = "this" if is_here else "another"
        table.add_row(view.id, view.status, model, made, *map(_number, numbers), place)
    out.print(table)


@batches.command("cancel")
def stop_batches(
    batch_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One batch; else all of this cache.")
    ] = None,
    base_url: BaseUrl = None,
    cache: CacheFolder = None,
) -> None:
    """Cancel batches; what they had answered is kept, and booked under a cap, by the next run."""
    from hf_relabel import background
    from hf_relabel.cache import default_directory
    from hf_relabel.judges.batch_admin import cancel_batches
    from hf_relabel.judges.endpoint import Endpoint

    endpoint, folder = Endpoint(base_url=base_url), cache or default_directory()
    cancelled = background.run(cancel_batches(endpoint, folder, batch_id))
    for view in cancelled:
        out.print(f"{view.id}: {view.status}")
    out.print(f"{len(cancelled)} cancelled.")


@verdicts.command("stats")
def verdict_stats(cache: CacheFolder = None) -> None:
    """Count what the cache holds."""
    opened = _cache(cache)
    found = opened.stats()
    out.print(
        f"{opened.directory}: {found.n_calls:,} calls, {found.n_failed_calls:,} calls with "
        f"failures, verdicts on {found.n_queries:,} queries; {found.n_bytes / 1e6:,.1f} MB."
    )


@app.command()
def stats(
    cache: Annotated[
        Path | None, typer.Argument(metavar="[CACHE]", help="Folder  [~/.cache/hf_relabel].")
    ] = None,
) -> None:
    """Count a cache's calls, tokens and failures by judge, and what capped runs spent."""
    from hf_relabel.judges.ledger import PICO, BatchLedger, ledger_file

    opened = _cache(cache)
    table = Table("judge", *map(_right, ("calls", "tokens", "failed")), box=SIMPLE_HEAD)
    for judge, found in opened.stats_by_judge().items():
        table.add_row(judge, *map(_number, (found.n_calls, found.n_tokens, found.n_failures)))
    out.print(table)
    reasons = ", ".join(f"{count:,} {why}" for why, count in opened.failure_reasons().items())
    out.print(f"Failures: {reasons or 'none'}.")
    if (totals := BatchLedger(ledger_file(opened.directory)).totals()) is not None:
        out.print(
            f"Spent under a cap: {_usd(totals.spent / PICO)}; set aside for {totals.n_batches:,} "
            f"batches under way: {_usd(totals.in_batches / PICO)}.",
            highlight=False,
        )
    verdict_stats(cache)


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


def _relabeler(**settings: Any) -> Any:
    from datasets import disable_progress_bars

    from hf_relabel.transform import Relabeler

    disable_progress_bars()  # one bar is enough, and it is ours
    preset = settings.pop("preset")
    if published := settings.pop("published", None):
        repo_id, _, revision = published.partition("@")
        kept = ("action", "count", "max_false_negatives", "format", "columns", "cache")
        chosen = {name: settings[name] for name in kept if settings[name] is not None}
        if chosen["max_false_negatives"] == "preset":
            del chosen["max_false_negatives"]
        return Relabeler.from_verdicts(repo_id, revision=revision or None, **chosen)
    return Relabeler(preset, **settings)


def _cache(folder: Path | None) -> Any:
    from hf_relabel.cache import VerdictCache, default_directory

    return VerdictCache(folder or default_directory())


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
    with _progress_bar() as bar:
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
                spent += f", {_usd(done.cost_usd)} of about {_usd(projected)}"
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


def _log_to(path: Path) -> None:
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


def _tell_what_is_logged(name: str) -> None:
    """Print a logger's news above the progress bar: batches take hours, and silence worries."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Printed())


def _batches_left(relabeler: Any) -> str:
    from hf_relabel.judges.batch_admin import n_under_way

    n_left = n_under_way(relabeler.cache.directory) if relabeler.batch else 0
    if not n_left:
        return ""
    return (
        f" Batches that go on without it: {n_left}; it then collects them, and `hf-relabel batches "
        "cancel` stops them."
    )


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[spent]}"),
        console=err,
    )


def _print_report(found: Any) -> None:
    names = ("rows", "flagged", "better", "worse", "undecided", "calls", "tokens", "cost")
    table = Table(
        "stage", "model", *map(_right, names), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for stage in found.stages:
        known = [stage.prompt_tokens, stage.completion_tokens]
        tokens = None if None in known else sum(known)
        numbers = (stage.rows_asked, stage.rows_flagged, stage.better, stage.worse, stage.undecided)
        calls = stage.calls + stage.cached
        cost = ("" if stage.is_cost_exact else "≥ ") + _usd(stage.cost_usd)
        table.add_row(stage.name, stage.model, *map(_number, (*numbers, calls, tokens)), cost)
    out.print(table)
    for stage in found.screens:
        out.print(
            f"{stage.name} settled {stage.passages_settled:,} of {stage.passages_asked:,} passages; "
            f"{stage.passages_asked - stage.passages_settled:,} went on."
        )
    _print_cost(found)
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
    if found.controls is not None:
        agreement_commands.print_controls(found.controls)


def _print_cost(found: Any) -> None:
    """Print the total of a report or an estimate, and where the prices come from."""
    sources = dict.fromkeys(stage.price_source for stage in found.stages if stage.price_source)
    open_stages = [stage for stage in found.stages if stage.cost_usd is None]
    if not open_stages and list(sources) not in ([], ["local"]):
        is_exact = all(getattr(stage, "is_cost_exact", True) for stage in found.stages)
        least = "" if is_exact else "at least "
        out.print(f"Cost: {least}{_usd(found.cost_usd)} ({'; '.join(sources)}).", highlight=False)
    if unpriced := {stage.model for stage in open_stages if stage.prompt_tokens is not None}:
        out.print(
            f"Cost unknown: no price for {', '.join(sorted(unpriced))}. Give it with --price "
            r"MODEL=IN,OUT (USD per million tokens), or install hf-relabel\[prices].",
            highlight=False,
        )
    if uncounted := {stage.model for stage in open_stages if stage.prompt_tokens is None}:
        out.print(f"Cost unknown: no token counts from {', '.join(sorted(uncounted))}.")


def _usd(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 2 if value >= 1 or value == 0 else 4 if value >= 0.01 else 6
    return f"${value:,.{digits}f}"


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
