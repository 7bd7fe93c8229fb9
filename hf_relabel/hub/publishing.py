"""Publish: build, check, push and verify, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_relabel.errors import HubError, SettingError
from hf_relabel.files import write_relabeled
from hf_relabel.formats import content_hash
from hf_relabel.hub.build import Built, Progress, build
from hf_relabel.hub.check import check
from hf_relabel.hub.facts import source_of
from hf_relabel.hub.push import Pushed, PushSettings, push
from hf_relabel.hub.retries import Retries
from hf_relabel.hub.runs import RunFolder
from hf_relabel.hub.settings import BuildSettings
from hf_relabel.hub.verify import snippet
from hf_relabel.hub.verify import verify as verify_pushed
from hf_relabel.transform import Relabeler

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    AnyDatasets: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict

__all__ = ["Published", "publish", "publish_folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was published, or would be.

    Attributes:
        built: The folder and its manifest. Where no folder was named, it is gone again.
        pushed: What the push left behind; None after a dry run.
        snippet: A line that loads exactly this; empty after a dry run.
    """

    built: Built
    pushed: Pushed | None = None
    snippet: str = ""

    @property
    def url(self) -> str:
        """The page to look at; the folder, after a dry run."""
        return self.pushed.url if self.pushed else str(self.built.folder)


def publish(
    dataset: AnyDatasets,
    repo_id: str,
    *,
    relabeler: Relabeler,
    source_rows: AnyDatasets | None = None,
    configs: Sequence[str] = (),
    license: str | Mapping[str, str] = "",  # noqa: A002  the word of every card
    source: str = "",
    source_revision: str = "",
    pretty_name: str = "",
    languages: Sequence[str] = (),
    text_free: bool = False,
    n_negatives: int | None = None,
    has_plots: bool = True,
    create_pr: bool = False,
    tag: str | None = None,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    folder: str | Path | None = None,
    dry_run: bool = False,
    verify: bool = True,
    retries: Retries | None = None,
) -> Published:
    """Publish a relabeled dataset with its verdicts and a card, in one commit.

    Verdicts come from the relabeler's cache; no judge is asked. What is published is what
    `rows.map(relabeler, batched=True)` gives.

    Args:
        dataset: The rows as they were judged; or relabeled ones, together with `source_rows`.
        repo_id: owner/name; made where it is not there.
        relabeler: Who judged them.
        source_rows: The rows as they were judged, where `dataset` is their relabeled result.
        configs: Which shapes and tables; empty for all.
        license: An id, or subset → id; empty for the one in the source's card.
        source: The source's Hub id, where the rows were not loaded from the Hub by this process.
        source_revision: Its commit.
        pretty_name: The dataset's name for people.
        languages: Codes such as "en"; empty for the source's.
        text_free: Publish verdicts and decisions by hash, without a word of the source.
        n_negatives: Width of the n-tuples; None for the most common number.
        has_plots: Whether the card has plots; they need the extra `report`.
        create_pr: Propose the change in a pull request; later calls add to it.
        tag: A tag for the commit, such as "v1.0"; never moved.
        private: Make a new repository private.
        revision: A branch other than main.
        endpoint: The Hub's address; None is the client's own (HF_ENDPOINT).
        token: A token; None is the one logged in with.
        folder: Where to build; None builds in a temporary folder.
        dry_run: Stop after the check: nothing is sent.
        verify: Load everything back from the commit.
        retries: What to do when the Hub does not answer.

    Returns:
        The commit, its page and a line to load it; or the folder, after a dry run.

    Raises:
        SettingError: Names, licence and options cannot work, or rows were not judged.
        CheckError: What was built, or what came back, is not as it should be.
        HubError: The Hub refused, or did not answer; nothing is half done.
        MissingExtraError: Plots are asked for, and matplotlib is not installed.
    """
    build_settings = BuildSettings(
        configs=configs, license=license, source=source, source_revision=source_revision,
        pretty_name=pretty_name, languages=languages, text_free=text_free,
        n_negatives=n_negatives, has_plots=has_plots,
    )  # fmt: skip
    push_settings = PushSettings(
        endpoint=endpoint, token=token, revision=revision, create_pr=create_pr, tag=tag,
        private=private, discards=folder is None, retries=retries or Retries(),
    )  # fmt: skip
    if dry_run and folder is None:
        raise SettingError(
            "expected a folder to build in, found none: dry_run leaves nothing else."
        )
    with tempfile.TemporaryDirectory(prefix="hf-relabel-") as scratch:
        run = Path(scratch) / "run"
        splits = _splits(dataset if source_rows is None else source_rows)
        _write_run(run, splits, relabeler, None if source_rows is None else _splits(dataset))
        target = Path(folder) if folder is not None else Path(scratch) / "built"
        return publish_folder(
            run, repo_id, build_settings, push_settings, folder=target, dry_run=dry_run,
            verify=verify,
        )  # fmt: skip


def publish_folder(
    run_folder: Path,
    repo_id: str,
    build_settings: BuildSettings,
    push_settings: PushSettings,
    *,
    folder: Path | None = None,
    dry_run: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Published:
    """Publish the --output of a run; see `publish`.

    Args:
        run_folder: What the run wrote.
        repo_id: owner/name.
        build_settings: What to build.
        push_settings: Where to push, and how.
        folder: Where to build; None builds in a temporary folder.
        dry_run: Stop after the check.
        verify: Load everything back from the commit.
        progress: Called with the split and the rows built so far.
    """
    with ExitStack() as stack:
        if folder is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-relabel-"))
            folder = Path(scratch) / "built"
            push_settings = replace(push_settings, discards=True)
        settings = _with_source_card(run_folder, build_settings, push_settings)
        built = build(run_folder, folder, repo_id, settings, progress=progress)
        check(built.folder)
        if dry_run:
            return Published(built=built)
        pushed = push(built, push_settings)
        if verify:
            verify_pushed(built, pushed, push_settings)
        return Published(built=built, pushed=pushed, snippet=snippet(built, pushed))


def _with_source_card(
    run_folder: Path, settings: BuildSettings, push_settings: PushSettings
) -> BuildSettings:
    """Fetch the metadata of the source's card: its licence and languages are inherited."""
    from huggingface_hub import HfApi

    source = source_of(RunFolder.open(run_folder), settings)
    if "id" not in source or (settings.license and settings.languages):
        return settings
    api = HfApi(endpoint=push_settings.endpoint, token=push_settings.token)
    try:
        info = push_settings.retries.run(
            lambda: api.dataset_info(source["id"], revision=source.get("revision"))
        )
    except (HubError, OSError) as error:  # offline mode is a kind of OSError
        if not settings.license:
            raise SettingError(
                f"expected to read the licence in the card of {source['id']}, found: {error}. "
                "Give it with license= (--license)."
            ) from error
        return settings
    known = {"revision": info.sha} if "revision" not in source else {}
    card = dict(info.card_data.to_dict()) if info.card_data else {}  # type: ignore[no-untyped-call]
    return replace(
        settings,
        source_card=card,
        source_revision=settings.source_revision or str(known.get("revision") or ""),
    )


def _splits(dataset: AnyDatasets) -> dict[str, Any]:
    if isinstance(dataset, dict):
        return dict(dataset)
    return {str(dataset.split or "train"): dataset}


def _write_run(
    folder: Path,
    splits: Mapping[str, Any],
    relabeler: Relabeler,
    relabeled: Mapping[str, Any] | None,
) -> None:
    """Write what `hf-relabel run` would, and see that the rows were judged, and not relabeled."""
    report = write_relabeled(relabeler, splits, folder)
    if not_asked := report.undecided_reasons.get("not asked"):
        raise SettingError(
            f"expected rows that were judged, found {not_asked} negatives that nobody was asked "
            "about. Call relabeler.judge(dataset) first."
        )
    if relabeled is not None:
        _compare(report.rows_out, relabeled)
    elif not report.rows_changed and _is_relabeled(splits.values(), relabeler):
        raise SettingError(
            "expected the rows as they were judged, found rows that this relabeler has put right "
            "already: what was done could not be counted. Give both: "
            "publish(clean, repo_id, relabeler=relabeler, source_rows=rows)."
        )


def _compare(rows_out: int, relabeled: Mapping[str, Any]) -> None:
    found = sum(sum(1 for _ in part) for part in relabeled.values())
    if found != rows_out:
        raise SettingError(
            f"expected the {rows_out} rows that the relabeler makes of source_rows, found {found}. "
            "Publish source_rows alone, or relabel again with the same settings."
        )


def _is_relabeled(parts: Iterable[Any], relabeler: Relabeler) -> bool:
    """Whether a positive of the rows was promoted, or a false negative of theirs is gone."""
    for part in parts:
        for row in relabeler.rows(part):
            traces = relabeler.cache.traces(relabeler.cascade.fingerprint, content_hash(row.query))
            own = {passage.key for passage in row.negatives}
            gone = [trace for key, trace in traces.items() if key not in own]
            if any(trace[-1].relevance.is_relevant for trace in gone):
                return True
    return False
