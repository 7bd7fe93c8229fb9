"""Suites: BEIR and AIR-Bench by name, as groups of benchmarks, and their evaluation one by one.

BEIR comes through mteb, AIR-Bench from its own datasets on the Hub, and any of them from a folder
in BEIR's layout instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.benchmark import Benchmark, load_benchmark
from hf_relabel.errors import MissingExtraError, SettingError, SourceError
from hf_relabel.evaluate import (
    METRICS,
    Evaluation,
    check_metrics,
    evaluate_with,
    noted_settings,
)
from hf_relabel.judges.embedding import digest_of_folder
from hf_relabel.search import (
    Progress,
    SearchSettings,
    load_model,
    model_name,
    model_source,
    read_run,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "GROUPS",
    "average",
    "evaluate_all",
    "from_mteb",
    "load",
    "members",
    "read_evaluations",
    "weights",
]

_TASKS = {
    "trec-covid": "TRECCOVID",
    "nfcorpus": "NFCorpus",
    "nq": "NQ",
    "hotpotqa": "HotpotQA",
    "fiqa": "FiQA2018",
    "arguana": "ArguAna",
    "touche": "Touche2020",
    "dbpedia": "DBPedia",
    "scidocs": "SCIDOCS",
    "fever": "FEVER",
    "climate-fever": "ClimateFEVER",
    "scifact": "SciFact",
    "quora": "QuoraRetrieval",
    "cqadupstack-android": "CQADupstackAndroidRetrieval",
    "cqadupstack-english": "CQADupstackEnglishRetrieval",
    "cqadupstack-gaming": "CQADupstackGamingRetrieval",
    "cqadupstack-gis": "CQADupstackGisRetrieval",
    "cqadupstack-mathematica": "CQADupstackMathematicaRetrieval",
    "cqadupstack-physics": "CQADupstackPhysicsRetrieval",
    "cqadupstack-programmers": "CQADupstackProgrammersRetrieval",
    "cqadupstack-stats": "CQADupstackStatsRetrieval",
    "cqadupstack-tex": "CQADupstackTexRetrieval",
    "cqadupstack-unix": "CQADupstackUnixRetrieval",
    "cqadupstack-webmasters": "CQADupstackWebmastersRetrieval",
    "cqadupstack-wordpress": "CQADupstackWordpressRetrieval",
}
_BEIR = tuple(_TASKS)[:12]
# Their texts may not be handed on, so neither BEIR nor mteb has them. (What mteb has of Robust04,
# Robust04InstructionRetrieval, is another task on a part of it.)
_PRIVATE = ("trec-news", "robust04", "signal-1m", "bioasq")
_AIR_BENCH = tuple(
    f"air-bench-{name}" for name in ("arxiv", "finance", "healthcare", "law", "news")
)
# As mteb has it. In the first two the queries are passages of the corpus themselves.
_IDENTICAL_IDS = {"arguana", "quora", "fiqa", "fever"}
_AIR_BENCH_VERSION = "AIR-Bench_24.05"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "beir": (*_BEIR, *_PRIVATE),
    "beir-public": _BEIR,
    "beir-ood": ("trec-covid", "nfcorpus", "touche", *_PRIVATE),
    "beir-14": (*_BEIR, "quora", "cqadupstack"),
    "cqadupstack": tuple(name for name in _TASKS if name.startswith("cqadupstack")),
    "air-bench": _AIR_BENCH,
}
"""Named groups of benchmarks; a group within a group counts as one.

    beir         the 16 sets of the RLHN paper's tables, four of which are not public
    beir-public  those 12 of them that can be downloaded
    beir-ood     the 7 of them whose domain no training set of the paper has
    beir-14      the 14 public test sets of BEIR without MS MARCO, the usual average elsewhere
    air-bench    AIR-Bench 24.05, development split, English QA: the paper's 5 domains

The paper prunes its training sets by an average over 14 sets of BEIR. The facts that this was
written from (its figures per left-out set, 0.529 for the 7 kept) do not name them. They are hardly
those of `beir-14`: with the paper's 12 public sets at what its main table gives, Quora and
CQADupStack would have to average 0.42, well below what such models do on Quora. Of its 16 sets,
leaving out Touché and TREC-NEWS would give 0.529, and Robust04 and Signal-1M 0.530. So `beir-14`
compares with other work, not with that figure.

References:
    Thakur et al. (2025), arXiv:2505.16967, tables 3, 4 and 12.
"""


def members(name: str) -> tuple[str, ...]:
    """Return the benchmarks in a group, and in the groups within it; of any other name, itself."""
    if name not in GROUPS:
        return (name,)
    return tuple(leaf for member in GROUPS[name] for leaf in members(member))


def weights(name: str) -> dict[str, float]:
    """Return the weight of each benchmark in a group's average; they sum to 1."""
    if name not in GROUPS:
        return {name: 1.0}
    share = 1 / len(GROUPS[name])
    return {
        leaf: weight * share for member in GROUPS[name] for leaf, weight in weights(member).items()
    }


def average(group: str, evaluations: Sequence[Evaluation], metric: str = METRICS[0]) -> float:
    """Return a group's average of a metric: of benchmarks, each weighing the same.

    Raises:
        SettingError: An evaluation is missing: an average of fewer is another number.
    """
    found = {evaluation.benchmark: evaluation for evaluation in evaluations}
    if missing := [name for name in members(group) if name not in found]:
        raise SettingError(
            f"expected evaluations on all {len(members(group))} benchmarks of {group!r}, found "
            f"none on {', '.join(missing)}."
        )
    return sum(weight * found[name].mean(metric) for name, weight in weights(group).items())


def load(
    name: str,
    *,
    split: str = "test",
    local: Mapping[str, str | Path] | None = None,
    ignores_identical_ids: bool = False,
) -> Benchmark:
    """Load one benchmark.

    Args:
        name: A folder in BEIR's layout, a benchmark of `GROUPS`, or any retrieval task of mteb.
        split: Of a folder.
        local: Name → folder, for benchmarks that are not to be downloaded, or cannot be.
        ignores_identical_ids: Of a folder, see `Benchmark`; named ones know for themselves.

    Raises:
        SettingError: The name is unknown, a group's, or a benchmark that nobody may hand on.
        SourceError: It cannot be read, or downloaded.
        MissingExtraError: mteb is not installed.
    """
    folder = (local or {}).get(name)
    if folder is not None or (Path(name) / "corpus.jsonl").exists():
        ignores = ignores_identical_ids or name in _IDENTICAL_IDS
        short = None if folder is None else name
        return load_benchmark(folder or name, split, name=short, ignores_identical_ids=ignores)
    if name in GROUPS:
        raise SettingError(
            f"expected one benchmark, found the group {name!r}: {', '.join(GROUPS[name])}."
        )
    if name in _PRIVATE:
        raise SettingError(_private_message([name]))
    if name in _AIR_BENCH:
        return _from_air_bench(name)
    return from_mteb(_TASKS.get(name, name), name=name)


def from_mteb(task: Any, *, name: str | None = None, split: str | None = None) -> Benchmark:
    """Load a benchmark through mteb.

    The corpus stays on disk, and is read a chunk at a time.

    Args:
        task: A retrieval task, or its name.
        name: The benchmark's name; None takes the task's.
        split: None takes the task's only one.

    Raises:
        SettingError: There is no such task, it is none of retrieval in one language, or it has
            several splits.
        SourceError: It cannot be downloaded.
        MissingExtraError: mteb is not installed.
    """
    if isinstance(task, str):
        task = _mteb_task(task)
    name = name or str(task.metadata.name)
    try:
        task.load_data()
    except (OSError, ValueError) as error:
        raise SourceError(_download_message(name, error)) from error
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    data = _only_part(task, name, split)
    return Benchmark(
        name=name,
        queries=dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True)),
        corpus=Passages(data["corpus"]),
        qrels=data["relevant_docs"],
        ignores_identical_ids=bool(task.ignore_identical_ids),
    )


class Passages(Mapping[str, str]):
    """A corpus that stays in its Arrow files: id → title and text.

    Args:
        rows: With the columns `id` and `text`, and perhaps `title`.
    """

    def __init__(self, rows: Dataset) -> None:
        names = [name for name in ("title", "text") if name in rows.column_names]
        self._rows = rows.select_columns(names)
        self._places = {str(id_): place for place, id_ in enumerate(rows["id"])}

    def __getitem__(self, id_: str) -> str:
        return self.many([id_])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def many(self, ids: Sequence[str]) -> list[str]:
        """Return several texts, reading once."""
        rows = self._rows[[self._places[id_] for id_ in ids]]
        titles = rows.get("title") or [""] * len(ids)
        return [
            f"{title or ''} {text}".strip()
            for title, text in zip(titles, rows["text"], strict=True)
        ]


def evaluate_all(
    model: str,
    names: Sequence[str],
    settings: SearchSettings | None = None,
    *,
    folder: str | Path | None = None,
    first_stage: str | None = None,
    metrics: Sequence[str] = METRICS,
    split: str = "test",
    local: Mapping[str, str | Path] | None = None,
    ignores_identical_ids: bool = False,
    save_runs: bool = False,
    device: str | None = None,
    progress: Callable[[str], Progress] | None = None,
    done: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Measure a model on benchmarks and groups of them, and save each result before the next.

    A result that `folder` holds already, of the same model with the same settings, is read
    instead: so the same call goes on where it stopped.

    Args:
        model: A name or folder.
        names: Benchmarks, groups, folders or tasks of mteb; each benchmark is measured once.
        settings: How the model is asked.
        folder: Where `NAME.json` is written for each benchmark, and with `save_runs` `NAME.run`.
        first_stage: For a cross-encoder: a bi-encoder's name or folder, a run's file, or the
            folder of an earlier call with `save_runs`.
        metrics: As ir-measures writes them.
        split: Of folders.
        local: Name → folder, see `load`.
        ignores_identical_ids: Of folders.
        save_runs: Whether to write what was found, in TREC's format.
        device: Where models run, as torch names it.
        progress: Called with each benchmark's name, it returns what is told how far that is.
        done: Called with each result, measured or read.

    Returns:
        Evaluations in the order of `names`, groups unfolded.

    Raises:
        SettingError: A benchmark cannot be had without a folder of one's own, or `folder` holds
            the result of another model or of other settings. Nothing was measured.
        SourceError: A benchmark or model cannot be loaded; what was measured is saved.
    """
    settings = settings or SearchSettings()
    check_metrics(metrics, settings.top_k)
    leaves = list(dict.fromkeys(leaf for name in names for leaf in members(name)))
    _check_at_hand(leaves, local or {})
    noted = {
        "first_stage": first_stage and model_name(first_stage),
        "first_stage_digest": first_stage and _digest(first_stage),
        "model_digest": _digest(model),
        "split": None if split == "test" else split,
    }
    results = _Results(folder, model_name(model), noted_settings(settings, noted), metrics)
    results.check(leaves)
    loaded: dict[str, Any] = {}
    found = []
    for leaf in leaves:
        evaluation = results.read(leaf)
        if evaluation is None:
            benchmark = load(
                leaf, split=split, local=local, ignores_identical_ids=ignores_identical_ids
            )
            if not loaded:
                loaded["model"] = load_model(
                    model, is_reranker=first_stage is not None, device=device
                )
            evaluation = evaluate_with(
                loaded["model"],
                benchmark,
                settings,
                first_stage=_first_stage(first_stage, benchmark.name, loaded, device),
                metrics=metrics,
                name=results.model,
                noted=noted,
                run_file=results.path(leaf, ".run") if save_runs else None,
                progress=progress and progress(benchmark.name),
            )
            results.write(leaf, evaluation)
        found.append(evaluation)
        if done is not None:
            done(evaluation)
    return found


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """Read a saved evaluation, or all those in a folder, by name.

    Raises:
        SourceError: There is nothing to read, or it is no saved evaluation.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise SourceError(
            f"expected evaluations saved by `hf-relabel evaluate --output`, found no .json in "
            f"{path.name}."
        )
    return [_read(file) for file in files]


class _Results:
    """A folder of saved evaluations, or nothing at all."""

    def __init__(
        self,
        folder: str | Path | None,
        model: str,
        settings: Mapping[str, Any],
        metrics: Sequence[str],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.model = model
        self.settings = settings
        self.metrics = metrics
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, leaf: str, suffix: str) -> Path | None:
        """Return a benchmark's file: of a folder, under the folder's own name."""
        if self.folder is None:
            return None
        name = Path(leaf).resolve().name if (Path(leaf) / "corpus.jsonl").exists() else leaf
        return self.folder / f"{name}{suffix}"

    def check(self, leaves: Sequence[str]) -> None:
        """Compare what is there with what is asked for, before hours are spent.

        Raises:
            SettingError: It is of another model, or was measured otherwise.
        """
        paths = [self.path(leaf, ".json") for leaf in leaves]
        if twice := [path.stem for path in paths if path and paths.count(path) > 1]:
            raise SettingError(
                f"expected benchmarks of different names, found {twice[0]!r} more than once. Give "
                "them different folders to save to."
            )
        for leaf in leaves:
            self.read(leaf)

    def read(self, leaf: str) -> Evaluation | None:
        """Return a benchmark's result, or None where all metrics asked for are not there yet."""
        path = self.path(leaf, ".json")
        if path is None or not path.exists():
            return None
        found = _read(path)
        expected, there = [self.model, self.settings], [found.model, dict(found.settings)]
        if there != expected:
            raise SettingError(
                f"expected in {path.name} the result of {expected}, found that of {there}. Give "
                "another folder, or delete the file to measure again."
            )
        return found if set(self.metrics) <= set(found.per_query) else None

    def write(self, leaf: str, evaluation: Evaluation) -> None:
        path = self.path(leaf, ".json")
        if path is None:
            return
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(evaluation.to_json(), indent=1) + "\n", "utf-8")
        temporary.replace(path)


def _read(path: Path) -> Evaluation:
    try:
        return Evaluation.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"expected an evaluation saved by `hf-relabel evaluate --output`, found {path.name}: "
            f"{error}"
        ) from error


def _first_stage(
    given: str | None, benchmark: str, loaded: dict[str, Any], device: str | None
) -> Any:
    """Return what a cross-encoder reorders: a run from a file, or a model, loaded once."""
    if given is None:
        return None
    path = Path(given)
    if path.is_file():
        return read_run(path)
    if (path / f"{benchmark}.run").is_file():
        return read_run(path / f"{benchmark}.run")
    if any(path.glob("*.run")):
        raise SourceError(
            f"expected {benchmark}.run in the folder {path.name}, found other runs. Make it with "
            "`hf-relabel evaluate --save-runs`, or give the first stage as a model."
        )
    if "first_stage" not in loaded:
        loaded["first_stage"] = load_model(given, device=device)
    return loaded["first_stage"]


def _check_at_hand(leaves: Sequence[str], local: Mapping[str, str | Path]) -> None:
    missing = [leaf for leaf in leaves if leaf in _PRIVATE and leaf not in local]
    if missing:
        raise SettingError(_private_message(missing))
    if unknown := [name for name in local if name not in leaves]:
        raise SettingError(
            f"expected folders for the benchmarks {', '.join(leaves)}, found one for "
            f"{unknown[0]!r}, which is not asked for."
        )


def _private_message(names: Sequence[str]) -> str:
    options = " ".join(f"--local {name}=FOLDER" for name in names)
    return (
        f"expected a folder for {', '.join(names)}, found none: their texts may not be handed on, "
        "so no library has them. Get them from their owners, bring them into BEIR's layout "
        f"(corpus.jsonl, queries.jsonl, qrels/test.tsv), and give {options}; or take the group "
        "beir-public."
    )


def _download_message(name: str, error: Exception) -> str:
    return (
        f"expected to download {name!r}, found no way to: {error} Without a network, give its "
        f"folder in BEIR's layout with --local {name}=FOLDER."
    )


def _mteb_task(name: str) -> Any:
    try:
        import mteb
    except ImportError as error:
        raise MissingExtraError.of(error.name or "mteb", "mteb", f"Benchmark {name!r}") from error
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise SettingError(
            f"expected a folder with corpus.jsonl, a task of mteb, a benchmark or a group "
            f"({', '.join(GROUPS)}), found {name!r}."
        ) from error


def _only_part(task: Any, name: str, split: str | None) -> Any:
    """Return the queries, corpus and qrels of a task's one language and split."""
    languages = getattr(task, "dataset", None) or {}
    parts: Mapping[str, Any] = next(iter(languages.values()), {})
    split = split or (next(iter(parts)) if len(parts) == 1 else None)
    data = parts.get(split or "", {}) if len(languages) == 1 else {}
    if "relevant_docs" not in data:
        raise SettingError(
            f"expected a task of text retrieval with one language and split, found {name!r} with "
            f"{ {key: list(value) for key, value in languages.items()} }."
        )
    return data


def _from_air_bench(name: str) -> Benchmark:
    """Load a domain of AIR-Bench from its datasets.

    Its own package, air-benchmark, has had no release since October 2024 and wants a scorer that
    has to be compiled; mteb does not have it.
    """
    from datasets import load_dataset

    repo = f"AIR-Bench/qa_{name.removeprefix('air-bench-')}_en"
    repo_of_qrels = repo.replace("/", "/qrels-") + "-dev"
    try:
        corpus = load_dataset(repo, _AIR_BENCH_VERSION, split="corpus_default")
        queries = load_dataset(repo, _AIR_BENCH_VERSION, split="queries_default_dev")
        judged = load_dataset(repo_of_qrels, _AIR_BENCH_VERSION, split="qrels_default_dev")
    except (OSError, ValueError) as error:
        raise SourceError(_download_message(name, error)) from error
    qrels: dict[str, dict[str, int]] = {}
    for row in judged:
        qrels.setdefault(str(row["qid"]), {})[str(row["docid"])] = int(row["relevance"])
    return Benchmark(
        name=name,
        queries={str(row["id"]): str(row["text"]) for row in queries},
        corpus=Passages(corpus),
        qrels=qrels,
    )


def _digest(model: str) -> str | None:
    """Hash the files of a model in a folder: another training saved there is another model."""
    folder = Path(model_source(model))
    # A first stage may be a folder of runs, to which more runs may come: that changes nothing.
    is_model = any((folder / name).exists() for name in ("config.json", "modules.json"))
    return digest_of_folder(folder)[:16] if is_model else None
