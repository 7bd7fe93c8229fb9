"""Arguments that several commands take, and how they are read."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "BaseUrl", "CacheFolder", "Columns", "Config", "Escalate", "FormatName", "Input", "Limit",
    "Models", "PresetName", "PromptFile", "ProtocolName", "Screen", "ScreenThreshold", "Split",
    "cache_of", "mapping_of", "relabeler_of", "shard_of",
]  # fmt: skip

Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A JSONL, Parquet or CSV file, a folder saved by save_to_disk, or a Hub id.",
    ),
]
Split = Annotated[str | None, typer.Option("--split", help="One split only.")]
Config = Annotated[str | None, typer.Option("--config", help="The Hub dataset's subset.")]
Limit = Annotated[int | None, typer.Option("--limit", help="The first N rows.", min=1)]
FormatName = Annotated[
    str | None, typer.Option("--format", help="The rows' format, if columns do not tell.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="role=column, where columns have names of their own."),
]


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
Escalate = Annotated[Level | None, typer.Option("--escalate", help="What the next stage sees.")]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar="HF_RELABEL_CACHE", help="Folder of verdicts  [~/.cache/hf_relabel]."
    ),
]


def mapping_of(columns: list[str] | None) -> dict[str, str]:
    """Read role=column pairs."""
    pairs = [column.partition("=") for column in columns or ()]
    for role, equals, name in pairs:
        if not (role and equals and name):
            raise typer.BadParameter(f"expected role=column, found {role!r}", param_hint="--column")
    return {role: name for role, _, name in pairs}


def shard_of(text: str | None) -> tuple[int, int | None]:
    """Read "i/n", i counted from 0."""
    if text is None:
        return 0, None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise typer.BadParameter(
            f"expected i/n with i from 0 to n-1, found {text!r}", param_hint="--shard"
        )
    return int(index), int(count)


def relabeler_of(**settings: Any) -> Any:
    """Build a relabeler from what the options say; `published` is OWNER/NAME[@REVISION]."""
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


def cache_of(folder: Path | None) -> Any:
    """Open the cache in a folder; None is the default one."""
    from hf_relabel.cache import VerdictCache, default_directory

    return VerdictCache(folder or default_directory())
