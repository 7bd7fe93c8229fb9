"""Facts: all that the card says, computed from a run and from what was written; no prose here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_relabel import __version__
from hf_relabel.formats import NORMALIZATION
from hf_relabel.hub.licences import Licence
from hf_relabel.hub.runs import RunFolder
from hf_relabel.hub.settings import ROW_CONFIGS, BuildSettings
from hf_relabel.hub.shards import Written

__all__ = ["ConfigFacts", "card_facts", "metadata"]

_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"),
)  # fmt: skip
_TASKS = ["text-retrieval", "text-ranking", "sentence-similarity", "feature-extraction"]
_TAGS = ["retrieval", "hard-negatives", "false-negatives", "relabeled", "llm-as-a-judge"]
_ABOUT = {
    "triplet": "anchor, positive, negative: one negative a row",
    "n-tuple": "anchor, positive and a fixed number of negatives",
    "labeled-list": "a query with all its passages and their labels",
    "tevatron": "a query with its positive and negative passages, with ids and titles",
    "bge": "a query with lists of positive and negative texts",
    "qrels": "grades of passages by id: 2 positive or better, 1 worse, 0 not relevant",
    "decisions": "one row for each negative of the source: verdict and what became of it",
    "verdicts": "what each judge said of each passage, by hash",
    "calls": "one row for each call to a judge: tokens, time, fault",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """One config as it was written.

    Attributes:
        name: One of `CONFIGS`.
        features: Its columns, as `datasets` writes them to YAML.
        splits: Split → what was written.
        example: One row as JSON text; empty where the text must not be shown.
    """

    name: str
    features: list[dict[str, Any]]
    splits: Mapping[str, Written]
    example: str = ""

    @property
    def about(self) -> str:
        return _ABOUT[self.name]

    @property
    def n_rows(self) -> int:
        return sum(written.n_rows for written in self.splits.values())


def card_facts(
    run: RunFolder,
    repo_id: str,
    settings: BuildSettings,
    configs: Sequence[ConfigFacts],
    licence: Licence,
    *,
    run_id: str,
    plots: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Collect what the templates print.

    Args:
        run: The run.
        repo_id: Where it goes.
        settings: What was asked for.
        configs: What was written.
        licence: What it goes out under.
        run_id: Names the run's JSON file.
        plots: File, title and alternative text of each plot.
    """
    report = run.report
    asked = report["settings"]
    source = source_of(run, settings)
    return {
        "repo_id": repo_id,
        "pretty_name": settings.pretty_name or _pretty_name(repo_id, source),
        "version": asked.get("version", __version__),
        "source": source,
        "report": report,
        "settings": asked,
        "action": _action(asked),
        "totals": _totals(run),
        "subsets": _by_subset(run),
        "stages": _stages(run),
        "agreement": _agreement(run),
        "prompts": run.run["prompts"],
        "configs": list(configs),
        "names": [config.name for config in configs],
        "default": next((c.name for c in configs if c.name in ROW_CONFIGS), configs[0].name),
        "splits": run.run["splits"],
        "licence": licence,
        "text_free": settings.text_free,
        "languages": list(settings.languages or _as_list(settings.source_card.get("language"))),
        "normalization": NORMALIZATION,
        "run_id": run_id,
        "date": run.last_call,
        "plots": list(plots),
        "is_relabeled_by_paper": asked.get("preset") == "paper",
    }


def source_of(run: RunFolder, settings: BuildSettings) -> dict[str, str]:
    """Return the source's Hub id, revision and config, as far as they are known."""
    known = dict(run.run.get("source") or {})
    if settings.source and settings.source != known.get("id"):
        known = {"id": settings.source}
    if settings.source_revision:
        known["revision"] = settings.source_revision
    return known


def metadata(facts: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    """Return the card's YAML header, in the order in which it is written."""
    configs: list[ConfigFacts] = facts["configs"]
    subsets = run.run["subsets"]
    tags = ["sentence-transformers"] if "triplet" in facts["names"] else []
    values = {
        "pretty_name": facts["pretty_name"],
        "language": facts["languages"],
        **facts["licence"].metadata(),
        "task_categories": _TASKS,
        "tags": [*tags, *_TAGS, "hf_relabel"],
        "source_datasets": [facts["source"]["id"]] if facts["source"] else [],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["found"],
        "multilinguality": ["monolingual"] if len(facts["languages"]) == 1 else [],
        "size_categories": [_size(sum(part["queries_after"] for part in subsets))],
        "configs": [_config(config, config.name == facts["default"]) for config in configs],
        "dataset_info": [_info(config) for config in configs],
    }
    return {key: value for key, value in values.items() if value}


def _config(config: ConfigFacts, is_default: bool) -> dict[str, Any]:
    files = [{"split": s, "path": f"{config.name}/{s}-*"} for s in config.splits]
    default = {"default": True} if is_default else {}
    return {"config_name": config.name, "data_files": files, **default}


def _info(config: ConfigFacts) -> dict[str, Any]:
    sizes = [path.stat().st_size for w in config.splits.values() for path in w.paths]
    return {
        "config_name": config.name,
        "features": config.features,
        "splits": [
            {"name": split, "num_bytes": written.n_bytes, "num_examples": written.n_rows}
            for split, written in config.splits.items()
        ],
        "download_size": sum(sizes),
        "dataset_size": sum(written.n_bytes for written in config.splits.values()),
    }


def _size(n_rows: int) -> str:
    return next((name for limit, name in _SIZES if n_rows < limit), "n>1B")


def _pretty_name(repo_id: str, source: Mapping[str, str]) -> str:
    if source:
        return f"{source['id'].split('/')[1]}, relabeled"
    return repo_id.split("/")[1]


def _as_list(value: object) -> list[str]:
    return (
        [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []
    )


def _action(asked: Mapping[str, Any]) -> str:
    action = asked["action"]
    if isinstance(action, Mapping):
        return ", ".join(f"{relevance}: {name}" for relevance, name in sorted(action.items()))
    return str(action)


_COUNTS = (
    "queries", "queries_after", "positives", "positives_after", "negatives", "negatives_after",
    "promoted", "dropped", "undecided",
)  # fmt: skip


def _totals(run: RunFolder) -> dict[str, int]:
    return {name: sum(part[name] for part in run.run["subsets"]) for name in _COUNTS}


def _by_subset(run: RunFolder) -> list[dict[str, Any]]:
    """Return the counts of each subset over all splits, the largest first."""
    merged: dict[str, dict[str, Any]] = {}
    for part in run.run["subsets"]:
        name = part["subset"] or "all rows"
        line = merged.setdefault(name, {"name": name, **dict.fromkeys(_COUNTS, 0), "judged": 0})
        for count in _COUNTS:
            line[count] += part[count]
        line["judged"] += sum(part["seen_at"].values())
        line["false"] = line.get("false", 0) + sum(part["false_at"].values())
        flows = line.setdefault("stages", [Counter[str]() for _ in part["stages"]])
        for flow, stage in zip(flows, part["stages"], strict=True):
            flow.update(stage)
    return sorted(merged.values(), key=lambda line: (-line["queries"], line["name"]))


def _stages(run: RunFolder) -> list[dict[str, Any]]:
    """Join what `report.json` counted of each stage with who it was."""
    stages = []
    for index, (counts, stage) in enumerate(
        zip(run.report["stages"], run.run["stages"], strict=True)
    ):
        flows = [part["stages"][index] for part in run.run["subsets"]]
        asked = sum(flow["passages_asked"] for flow in flows)
        answered = _models_answered(run, index)
        total = {"total_calls": counts["calls"] + counts["cached"], "passages_asked": asked}
        stages.append({**counts, **stage, **total, "answered": answered})
    return stages


def _models_answered(run: RunFolder, stage: int) -> list[str]:
    """Return the models as they named themselves in replies: revisions that the alias hides."""
    names: set[str] = set()
    for batch in run.table("calls", ["stage", "model_answered"]):
        pairs = zip(batch["stage"].to_pylist(), batch["model_answered"].to_pylist(), strict=True)
        names.update(name for number, name in pairs if number == stage and name)
    return sorted(names)


def _agreement(run: RunFolder) -> list[dict[str, Any]]:
    """Return, for each stage and the next, how many flagged passages the next one confirmed."""
    if len(run.report["stages"]) == 1:
        return []
    counts: list[Counter[str]] = [Counter() for _ in run.report["stages"]]
    before: dict[str, Any] = {}
    for batch in run.table("verdicts", ["stage", "verdict"]):
        for verdict in batch.to_pylist():
            stage, is_false = verdict["stage"], verdict["verdict"] in ("better", "worse")
            if stage and before.get("is_false"):
                counts[stage]["asked"] += 1
                counts[stage]["confirmed"] += is_false
            before = {"is_false": is_false}
    names = [stage["name"] for stage in run.report["stages"]]
    return [
        {"first": first, "second": second, **count}
        for (first, second), count in zip(pairwise(names), counts[1:], strict=True)
        if count["asked"]
    ]
