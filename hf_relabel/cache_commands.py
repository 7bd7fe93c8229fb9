"""The commands of caches and batches: arguments to calls, nothing else. `cli` adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

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
    cache_of,
    mapping_of,
    relabeler_of,
)
from hf_relabel.console import number, out, right, usd

__all__ = ["batches", "stats", "verdicts"]

verdicts = typer.Typer(no_args_is_help=True, help="Exchange and count cached verdicts.")
batches = typer.Typer(no_args_is_help=True, help="Look at batches on a server, and cancel them.")


@verdicts.command("export")
def export_verdicts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tables go.")],
    cache: CacheFolder = None,
) -> None:
    """Write the cached replies and verdicts to Parquet tables, safe to share."""
    from hf_relabel.exchange import export_cache

    counts = export_cache(cache_of(cache), folder)
    out.print(f"{counts.n_calls:,} calls and {counts.n_pairs:,} pairs written to {folder}.")


@verdicts.command("import")
def import_verdicts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tables are.")],
    cache: CacheFolder = None,
) -> None:
    """Add exported replies and verdicts to the cache; what is there already stays."""
    from hf_relabel.exchange import import_cache

    counts = import_cache(folder, cache_of(cache))
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

    relabeler = relabeler_of(
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

    relabeler = relabeler_of(
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
        table.add_row(view.id, view.status, model, made, *map(number, numbers), place)
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
    opened = cache_of(cache)
    found = opened.stats()
    out.print(
        f"{opened.directory}: {found.n_calls:,} calls, {found.n_failed_calls:,} calls with "
        f"failures, verdicts on {found.n_queries:,} queries; {found.n_bytes / 1e6:,.1f} MB."
    )


def stats(
    cache: Annotated[
        Path | None, typer.Argument(metavar="[CACHE]", help="Folder  [~/.cache/hf_relabel].")
    ] = None,
) -> None:
    """Count a cache's calls, tokens and failures by judge, and what capped runs spent."""
    from hf_relabel.judges.ledger import PICO, BatchLedger, ledger_file

    opened = cache_of(cache)
    table = Table("judge", *map(right, ("calls", "tokens", "failed")), box=SIMPLE_HEAD)
    for judge, found in opened.stats_by_judge().items():
        table.add_row(judge, *map(number, (found.n_calls, found.n_tokens, found.n_failures)))
    out.print(table)
    reasons = ", ".join(f"{count:,} {why}" for why, count in opened.failure_reasons().items())
    out.print(f"Failures: {reasons or 'none'}.")
    if (totals := BatchLedger(ledger_file(opened.directory)).totals()) is not None:
        out.print(
            f"Spent under a cap: {usd(totals.spent / PICO)}; set aside for {totals.n_batches:,} "
            f"batches under way: {usd(totals.in_batches / PICO)}.",
            highlight=False,
        )
    verdict_stats(cache)
