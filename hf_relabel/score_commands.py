"""The commands of scores: arguments to calls, nothing else. `cli` adds them to its own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

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
from hf_relabel.console import out, row_bar

__all__ = ["drop_by_score", "score"]


class Scale(str, Enum):
    """What a score is."""

    LOGIT = "logit"
    PROBABILITY = "probability"


class Positive(str, Enum):
    """Which of several positives others are compared with."""

    LOWEST = "lowest"
    HIGHEST = "highest"


class Dtype(str, Enum):
    """What a model computes in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Output = Annotated[Path, typer.Option("--output", help="A .parquet or .jsonl file.")]


def score(
    source: Input,
    model: Annotated[
        str, typer.Option("--model", help="A cross-encoder: its name on the Hub, or its folder.")
    ],
    output: Output,
    scale: Annotated[
        Scale, typer.Option("--scale", help="The model's logits, or their sigmoid.")
    ] = Scale.LOGIT,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Pairs that the model gets at once.", min=1)
    ] = 32,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Most tokens of a pair  [the model's].")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, …  [the best there is].")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What to compute in  [the checkpoint's].")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: only this part of the queries.")
    ] = None,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
) -> None:
    """Score every passage with a cross-encoder, into FlagEmbedding's format.

    Stopped or killed, the same command goes on where it was.
    """
    from hf_relabel.judges.pair_scorer import PairScorer
    from hf_relabel.scores import write_scores

    index, n_shards = shard_of(shard)
    scorer = PairScorer(
        model,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype and dtype.value,
    )
    rows, columns = _rows(source, split, config, limit), mapping_of(column)
    with row_bar() as bar:
        task = bar.add_task("scoring", total=None)
        n_rows = write_scores(
            rows,
            output,
            scorer,
            format=format,
            columns=columns,
            scale=scale.value,
            shard=None if n_shards is None else (index, n_shards),
            progress=lambda n_done, n_all: bar.update(task, completed=n_done, total=n_all),
        )
    out.print(f"{n_rows:,} rows with scores ({scale.value}) of {scorer.model} written to {output}.")


def drop_by_score(
    source: Input,
    output: Output,
    share: Annotated[
        float, typer.Option("--share", help="Of the positive's score: above it, a negative goes.")
    ] = 0.95,
    positive: Annotated[
        Positive, typer.Option("--positive", help="Which one, where a row has several.")
    ] = Positive.LOWEST,
    scale: Annotated[
        Scale | None,
        typer.Option("--scale", help="Of the scores in the file; logits show by values beyond 1."),
    ] = None,
    min_negatives: Annotated[
        int, typer.Option("--min-negatives", help="A row left with fewer goes.", min=0)
    ] = 1,
    split: Split = None,
    config: Config = None,
    limit: Limit = None,
    format: FormatName = None,  # noqa: A002
    column: Columns = None,
) -> None:
    """Drop negatives that score above a share of their positive (TopK-PercPos)."""
    from hf_relabel.files import write_rows
    from hf_relabel.scores import count_negatives
    from hf_relabel.scores import drop_by_score as drop

    rows, columns = _rows(source, split, config, limit), mapping_of(column)
    kept = drop(
        rows,
        share=share,
        reference=positive.value,
        scale=None if scale is None else scale.value,
        min_negatives=min_negatives,
        format=format,
        columns=columns,
    )
    write_rows(kept, output)
    before, after = (count_negatives(part, format, columns) for part in (rows, kept))
    out.print(
        f"{len(rows):,} rows in, {len(kept):,} out; {before:,} negatives in, {after:,} out, "
        f"{before - after:,} gone. Written to {output}."
    )


def _rows(source: str, split: str | None, config: str | None, limit: int | None) -> Any:
    from datasets import disable_progress_bars

    from hf_relabel.files import load_source

    disable_progress_bars()  # one bar is enough, and it is ours
    splits = load_source(source, split=split, config=config, limit=limit)
    if len(splits) > 1:
        raise typer.BadParameter(f"choose one of the splits {list(splits)}", param_hint="--split")
    return next(iter(splits.values()))
