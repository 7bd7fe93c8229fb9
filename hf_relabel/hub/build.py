"""Build: a run's folder becomes the folder that is published. No network; always the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel import __version__
from hf_relabel.errors import SourceError
from hf_relabel.formats import NORMALIZATION
from hf_relabel.hub.batches import iter_batches
from hf_relabel.hub.configs import (
    QRELS_COLUMNS,
    Flagged,
    Shapes,
    common_width,
    features_of,
    qrels_of_decisions,
)
from hf_relabel.hub.croissant import croissant
from hf_relabel.hub.facts import ConfigFacts, card_facts, metadata, source_of
from hf_relabel.hub.licences import Licence, decide_licence, licence_text
from hf_relabel.hub.runs import RunFolder
from hf_relabel.hub.settings import ROW_CONFIGS, BuildSettings, check_repo_id
from hf_relabel.hub.shards import SplitWriter, Written, sha256_of
from hf_relabel.hub_cards import render_dataset_card
from hf_relabel.hub_cards.plots import draw_plots

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

__all__ = ["MANIFEST", "Built", "build", "open_built", "read_manifest"]

MANIFEST = "hf_relabel.json"
"""The file that says what is ours in a repository."""
LAYOUT = 1
SCHEMA_VERSION = 1
"""Version of the columns of verdicts and calls."""
_MAX_SHOWN_CHARS = 200

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A folder that can be checked and pushed.

    Attributes:
        folder: Where it lies.
        repo_id: Where it goes.
        manifest: What `hf_relabel.json` says.
        title: The commit's title.
        description: The commit's description: where the data comes from.
    """

    folder: Path
    repo_id: str
    manifest: dict[str, Any]
    title: str
    description: str


def build(
    run_folder: Path,
    folder: Path,
    repo_id: str,
    settings: BuildSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Built:
    """Build the folder to publish from a run's folder.

    Args:
        run_folder: The --output of a run.
        folder: Where to build; an earlier build there is replaced.
        repo_id: Where it will go, as owner/name; named in the card.
        settings: What to build.
        progress: Called with the split and the rows read so far.

    Raises:
        SettingError: A name, licence or config cannot be published.
        SourceError: The run's folder is not whole, or the target holds other files.
        MissingExtraError: Plots are asked for, and matplotlib is not installed.
    """
    check_repo_id(repo_id)
    settings = settings or BuildSettings()
    run = RunFolder.open(run_folder)
    subsets = sorted({part["subset"] or "" for part in run.run["subsets"]})
    licence = decide_licence(
        settings.license, settings.source_card, subsets, text_free=settings.text_free
    )
    _clear(folder)
    try:
        return _Builder(run, folder, repo_id, settings, licence, progress).build()
    except BaseException:  # half a build is none; raised again
        shutil.rmtree(folder, ignore_errors=True)
        raise


def open_built(folder: Path) -> Built:
    """Open a folder that was built before.

    Raises:
        SourceError: It is none.
    """
    manifest = read_manifest(folder)
    return Built(
        folder=folder, repo_id=manifest["repo_id"], manifest=manifest, **manifest["commit"]
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a built folder's manifest.

    Raises:
        SourceError: There is none.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        manifest = {}
    if not {"repo_id", "files", "configs"} <= manifest.keys():
        raise SourceError(
            f"expected a built folder with {MANIFEST}, found none in {str(folder)!r}."
        )
    return manifest


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        try:
            read_manifest(folder)
        except SourceError:
            raise SourceError(
                f"expected an empty folder or an earlier build in {str(folder)!r}, found other "
                "files. Name another folder."
            ) from None
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


class _Builder:
    """The steps of one build."""

    def __init__(
        self,
        run: RunFolder,
        folder: Path,
        repo_id: str,
        settings: BuildSettings,
        licence: Licence,
        progress: Progress | None,
    ) -> None:
        self.run, self.folder, self.repo_id = run, folder, repo_id
        self.settings, self.licence = settings, licence
        self.progress = progress
        self.source = source_of(run, settings)
        self.run_id = self._run_id()
        self.width = 0
        self.configs: dict[str, dict[str, Written]] = {}

    def build(self) -> Built:
        self._write_rows()
        self._write_tables()
        if not self.configs:
            raise SourceError("expected rows to publish, found none: every config would be empty.")
        facts = self._write_card()
        self._write_manifest(facts)
        return open_built(self.folder)

    @property
    def _about(self) -> str:
        return self.source.get("id") or self.repo_id.split("/")[1]

    def _run_id(self) -> str:
        parts = [self.run.report["settings"], self.run.run["subsets"], self.source]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    # Data ------------------------------------------------------------------------------------

    def _write_rows(self) -> None:
        """Write every config that is made of rows, in one pass over them."""
        names = [name for name in self.settings.chosen if name in (*ROW_CONFIGS, "qrels")]
        if "n-tuple" in names:
            first = self.run.run["splits"][0]
            self.width = self.settings.n_negatives or common_width(self.run, first)
            names = [name for name in names if name != "n-tuple" or self.width]
        if not names:
            return
        shapes = Shapes(width=self.width, flagged=Flagged(self.run), seed=self.settings.seed)
        for split in self.run.run["splits"]:
            writers = {name: self._writer(name, split) for name in names}
            n_rows = 0
            for batch in iter_batches(self.run, split):
                for name, writer in writers.items():
                    writer.write(shapes.table(name, batch))
                n_rows += len(batch)
                if self.progress is not None:
                    self.progress(split, n_rows)
            if "qrels" in writers:
                self._write_grades(split, writers["qrels"])
            for name, writer in writers.items():
                self._close(name, split, writer)

    def _write_grades(self, split: str, writer: SplitWriter) -> None:
        """Add what the judges said to the positives that are there."""
        import pyarrow.compute as pc

        for batch in self.run.table("decisions", QRELS_COLUMNS):
            writer.write(qrels_of_decisions(batch.filter(pc.equal(batch["split"], split))))

    def _write_tables(self) -> None:
        for name in ("decisions", "verdicts", "calls"):
            if name in self.settings.chosen:
                writer = self._writer(name, "train")
                for batch in self.run.table(name):
                    writer.write(self._completed(name, batch))
                self._close(name, "train", writer)

    def _completed(self, name: str, batch: pa.RecordBatch) -> pa.Table:
        """Add the columns that are the same in every row, and leave out those with words."""
        import pyarrow as pa

        schema = self._features(name).arrow_schema
        constants = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "source_dataset": self.source.get("id"),
            "source_revision": self.source.get("revision"),
            "original_role": "negative",
        }
        columns = [
            batch[field.name].cast(field.type)
            if field.name in batch.schema.names
            else pa.repeat(pa.scalar(constants[field.name], field.type), len(batch))
            for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _features(self, name: str) -> Features:
        return features_of(name, width=self.width, text_free=self.settings.text_free)

    def _writer(self, name: str, split: str) -> SplitWriter:
        return SplitWriter(self.folder / name, split, self._features(name))

    def _close(self, name: str, split: str, writer: SplitWriter) -> None:
        # A split without rows cannot be loaded again: it is left out, and so is its config.
        if (written := writer.close()) is not None:
            self.configs.setdefault(name, {})[split] = written

    # Card ------------------------------------------------------------------------------------

    def _write_card(self) -> dict[str, Any]:
        plots: Sequence[Mapping[str, str]] = []
        if self.settings.has_plots:
            stages = [stage["name"] for stage in self.run.report["stages"]]
            plots = draw_plots(self.folder / "plots", self.run.run["subsets"], stages)
        configs = [self._config_facts(n) for n in self.settings.chosen if n in self.configs]
        facts = card_facts(
            self.run, self.repo_id, self.settings, configs, self.licence,
            run_id=self.run_id, plots=plots,
        )  # fmt: skip
        header = metadata(facts, self.run)
        _write(self.folder / "README.md", join_card(header, render_dataset_card(facts)))
        description = (
            f"Retrieval training data of {facts['totals']['queries']:,} queries, with its false "
            "negatives looked for by a cascade of judges."
        )
        _write_json(self.folder / "croissant.json", croissant(facts, description))
        for prompt in self.run.run["prompts"]:
            _write(self.folder / "prompts" / f"{prompt['sha256'][:16]}.txt", prompt["text"])
        if self.licence.has_file:
            _write(self.folder / "LICENSE", licence_text(self.licence, self.source.get("id", "")))
        _write_json(self.folder / "runs" / f"{self.run_id}.json", self._run_json())
        return facts

    def _config_facts(self, name: str) -> ConfigFacts:
        features = self._features(name)
        splits = self.configs[name]
        first = next(iter(splits.values())).paths[0]
        return ConfigFacts(
            name=name,
            features=features._to_yaml_list(),
            splits=splits,
            example="" if self.settings.text_free else _example(first),
        )

    def _run_json(self) -> dict[str, Any]:
        hidden = ("prompts", "layout", "source")
        run = {name: value for name, value in self.run.run.items() if name not in hidden}
        prompts = [
            {name: value for name, value in prompt.items() if name != "text"}
            for prompt in self.run.run["prompts"]
        ]
        return {"report": self.run.report, "source": self.source, "prompts": prompts, **run}

    # Manifest --------------------------------------------------------------------------------

    def _write_manifest(self, facts: Mapping[str, Any]) -> None:
        manifest = {
            "layout": LAYOUT,
            "version": __version__,
            "repo_id": self.repo_id,
            "run_id": self.run_id,
            "source": self.source,
            "licence": self.licence.id,
            "normalization": NORMALIZATION,
            "schema_version": SCHEMA_VERSION,
            "text_free": self.settings.text_free,
            "cascade_fingerprint": self.run.report["settings"]["cascade_fingerprint"],
            "escalate": self.run.report["settings"]["escalate"],
            "policy": _policy(self.run.report["settings"]),
            "stages": self.run.run["stages"],
            "rows": self._accounting(),
            "default": facts["default"],
            "configs": {
                config.name: {split: w.n_rows for split, w in config.splits.items()}
                for config in facts["configs"]
            },
            "commit": {"title": self._title(facts), "description": self._description()},
            "files": self._files(),
        }
        _write_json(self.folder / MANIFEST, manifest)

    def _accounting(self) -> dict[str, Any]:
        report = self.run.report
        names = ("rows_in", "rows_out", "rows_added", "rows_dropped")
        return {
            **{name: report[name] for name in names},
            "negatives": report["negatives"],
            "data_rows": self._data_rows(),
            "is_converted": self.run.run["is_converted"],
        }

    def _data_rows(self) -> int:
        import pyarrow.parquet as pq

        shards = [path for split in self.run.run["splits"] for path in self.run.shards(split)]
        return sum(pq.read_metadata(path).num_rows for path in shards)

    def _files(self) -> dict[str, dict[str, Any]]:
        return {
            path.relative_to(self.folder).as_posix(): {
                "sha256": sha256_of(path),
                "size": path.stat().st_size,
            }
            for path in _walk(self.folder)
            if path.name not in (MANIFEST, "README.md")
        }

    def _title(self, facts: Mapping[str, Any]) -> str:
        n_queries = facts["totals"]["queries"]
        return f"hf_relabel {__version__}: relabel {self._about} ({n_queries:,} queries)"

    def _description(self) -> str:
        asked, counts = self.run.report["settings"], self.run.report["negatives"]
        models = ", then ".join(stage["model"] for stage in self.run.run["stages"])
        revision = f" at {self.source['revision']}" if "revision" in self.source else ""
        return (
            f"Source: {self.source.get('id', 'rows of the publisher')}{revision}\n"
            f"Run: {self.run_id}\nJudges: {models}\n"
            f"Cascade: {asked['cascade_fingerprint']}\n"
            f"Negatives: {counts['seen']:,} seen, {counts['promoted']:,} promoted, "
            f"{counts['dropped']:,} dropped"
        )


def join_card(header: Mapping[str, Any], body: str) -> str:
    """Return a card's file: its YAML header, then its body."""
    import yaml

    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n{body}"


def _policy(asked: Mapping[str, Any]) -> dict[str, Any]:
    names = ("action", "count", "max_false_negatives", "skip_subsets", "min_negatives")
    return {name: asked[name] for name in names}


def _example(path: Path) -> str:
    """Return the first row as JSON, its long texts cut."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        row = next(file.iter_batches(batch_size=1)).to_pylist()[0]
    return json.dumps(_shortened(row), indent=2, ensure_ascii=False, default=str)


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_SHOWN_CHARS:
        return value[:_MAX_SHOWN_CHARS] + "…"
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    if isinstance(value, list):
        shown = [_shortened(inner) for inner in value[:2]]
        return [*shown, f"… {len(value) - 2} more"] if len(value) > 2 else shown
    return value


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8", newline="\n")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
