"""The commands of publishing: arguments to calls, nothing else. `cli` adds them to its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from hf_relabel.console import err, out

__all__ = ["hub", "publish", "pull"]

hub = typer.Typer(no_args_is_help=True, help="The steps of publish, one at a time.")

RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="The --output of a run.")]
BuiltDir = Annotated[Path, typer.Argument(metavar="BUILT", help="A folder that was built.")]
RepoId = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The dataset on the Hub.")]
Configs = Annotated[
    list[str] | None,
    typer.Option("--configs", help="A shape or table to publish; once for each  [all]."),
]
LicenseOption = Annotated[
    list[str] | None,
    typer.Option("--license", help="A licence id, or SUBSET=ID for each  [the source's]."),
]
Source = Annotated[
    str | None, typer.Option("--source", help="The source's Hub id, or ID@REVISION.")
]
PrettyName = Annotated[str, typer.Option("--pretty-name", help="The dataset's name for people.")]
Languages = Annotated[
    list[str] | None, typer.Option("--language", help="A code such as en  [the source's].")
]
TextFree = Annotated[
    bool, typer.Option("--text-free", help="Verdicts and decisions by hash, without any text.")
]
Negatives = Annotated[int | None, typer.Option("--negatives", help="Width of the n-tuples.", min=1)]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Plots in the card.")]
Pr = Annotated[bool, typer.Option("--pr", help="Propose it in a pull request.")]
Tag = Annotated[str | None, typer.Option("--tag", help="A tag such as v1.0; never moved.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit.")]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="HF_TOKEN", show_envvar=False, help="A token  [HF_TOKEN]."),
]
Address = Annotated[
    str | None, typer.Option("--endpoint", envvar="HF_ENDPOINT", help="The Hub's address.")
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar="HF_RELABEL_CACHE", help="Folder of verdicts  [~/.cache/hf_relabel]."
    ),
]


def publish(
    folder: RunDir,
    repo_id: Annotated[
        str | None, typer.Argument(metavar="OWNER/NAME", help="Where it goes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build and check; send nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where to build  [DIR-hub in a dry run].")
    ] = None,
    configs: Configs = None,
    license: LicenseOption = None,  # noqa: A002
    source: Source = None,
    pretty_name: PrettyName = "",
    language: Languages = None,
    text_free: TextFree = False,
    negatives: Negatives = None,
    plots: Plots = True,
    pr: Pr = False,
    tag: Tag = None,
    private: Private = False,
    revision: Revision = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load it back from its commit.")
    ] = True,
    token: Token = None,
    endpoint: Address = None,
) -> None:
    """Publish the output of a run on the Hub: data, verdicts and a card, in one commit."""
    from hf_relabel.hub.publishing import publish_folder
    from hf_relabel.hub.push import PushSettings

    if repo_id is None:
        if not dry_run:
            raise typer.BadParameter("expected OWNER/NAME, found none", param_hint="OWNER/NAME")
        repo_id = f"your-name/{_as_name(folder)}"
    if dry_run and output is None:
        # Beside the run, not in it: `load_dataset(folder)` must not see it.
        beside = folder if folder.name else folder.resolve()
        output = beside.with_name(f"{beside.name}-hub")
    settings = _build_settings(
        configs, license, source, pretty_name, language, text_free, negatives, plots
    )
    push_settings = PushSettings(
        endpoint=endpoint, token=token, revision=revision, create_pr=pr, tag=tag, private=private
    )
    with _progress() as show:
        done = publish_folder(
            folder, repo_id, settings, push_settings,
            folder=output, dry_run=dry_run, verify=verify, progress=show,
        )  # fmt: skip
    if done.pushed is None:
        out.print(f"Built and checked in {output}; nothing was sent.", soft_wrap=True)
        return
    _print_pushed(done.pushed, done.snippet)


@hub.command("build")
def build_command(
    folder: RunDir,
    repo_id: RepoId,
    output: Annotated[Path, typer.Option("--output", help="Where to build.")],
    configs: Configs = None,
    license: LicenseOption = None,  # noqa: A002
    source: Source = None,
    pretty_name: PrettyName = "",
    language: Languages = None,
    text_free: TextFree = False,
    negatives: Negatives = None,
    plots: Plots = True,
) -> None:
    """Build the folder to publish. Opens no connection: give --license."""
    from hf_relabel.hub.build import build

    settings = _build_settings(
        configs, license, source, pretty_name, language, text_free, negatives, plots
    )
    with _progress() as show:
        built = build(folder, output, repo_id, settings, progress=show)
    out.print(f"Built in {output}: {', '.join(built.manifest['configs'])}.")


@hub.command("check")
def check_command(folder: BuiltDir) -> None:
    """Check a built folder: it loads, its numbers agree, no secret is in it."""
    from hf_relabel.hub.check import check

    check(folder)
    out.print(f"{folder} can be published.")


@hub.command("push")
def push_command(
    folder: BuiltDir,
    pr: Pr = False,
    tag: Tag = None,
    private: Private = False,
    revision: Revision = None,
    token: Token = None,
    endpoint: Address = None,
) -> None:
    """Check a built folder and push it in one commit, to the repository that it was built for."""
    from hf_relabel.hub.build import open_built
    from hf_relabel.hub.check import check
    from hf_relabel.hub.push import PushSettings, push
    from hf_relabel.hub.verify import snippet

    check(folder)
    built = open_built(folder)
    settings = PushSettings(
        endpoint=endpoint, token=token, revision=revision, create_pr=pr, tag=tag, private=private
    )
    pushed = push(built, settings)
    _print_pushed(pushed, snippet(built, pushed))


@hub.command("verify")
def verify_command(
    folder: BuiltDir,
    revision: Annotated[str, typer.Option("--revision", help="A commit or tag.")],
    token: Token = None,
) -> None:
    """Load what was pushed at a revision, with a fresh cache, and compare it with the folder."""
    from hf_relabel.hub.build import open_built
    from hf_relabel.hub.push import Pushed, PushSettings
    from hf_relabel.hub.verify import verify

    built = open_built(folder)
    pushed = Pushed(repo_id=built.repo_id, sha=revision, revision=revision, url=built.repo_id)
    verify(built, pushed, PushSettings(token=token))
    out.print(f"{built.repo_id} at {revision} loads as it was built.")


def pull(
    repo_id: RepoId,
    revision: Revision = None,
    cache: CacheFolder = None,
    token: Token = None,
    endpoint: Address = None,
) -> None:
    """Read the verdicts that a dataset was published with into the cache."""
    from hf_relabel.cache import default_directory
    from hf_relabel.published import pull_verdicts

    found = pull_verdicts(
        repo_id, revision=revision, cache=cache or default_directory(), token=token,
        endpoint=endpoint,
    )  # fmt: skip
    judges = ", then ".join(stage.judge.model for stage in found.cascade.stages)
    out.print(
        f"{found.n_pairs:,} verdicts of {judges} read from {repo_id} at {found.sha[:8]} into "
        f"{found.cache.directory}. A run with the same judges finds them; any other does with "
        f"--verdicts {repo_id}."
    )


def _build_settings(
    configs: list[str] | None,
    licences: list[str] | None,
    source: str | None,
    pretty_name: str,
    languages: list[str] | None,
    text_free: bool,
    n_negatives: int | None,
    has_plots: bool,
) -> Any:
    from hf_relabel.hub.settings import BuildSettings

    source_id, _, source_revision = (source or "").partition("@")
    return BuildSettings(
        configs=[name for names in configs or () for name in names.split(",")],
        license=_licence(licences or []),
        source=source_id,
        source_revision=source_revision,
        pretty_name=pretty_name,
        languages=languages or (),
        text_free=text_free,
        n_negatives=n_negatives,
        has_plots=has_plots,
    )


def _licence(given: list[str]) -> str | dict[str, str]:
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [entry.partition("=") for entry in given]
    if any(not (subset and id_) for subset, _, id_ in pairs):
        raise typer.BadParameter(f"expected one ID, or SUBSET=ID each, found {given}")
    return {subset: id_ for subset, _, id_ in pairs}


def _as_name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", folder.resolve().name).strip("-.") or "dataset"


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """Show how far the build is."""
    from datasets import disable_progress_bars

    disable_progress_bars()  # one line is enough, and it is ours
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("building")
        yield lambda split, n_rows: bar.update(task, description=f"{split}: {n_rows:,} rows built")


def _print_pushed(pushed: Any, line: str) -> None:
    if pushed.is_unchanged:
        out.print(f"{pushed.url} holds all of this already.", soft_wrap=True)
    else:
        counts = f"{pushed.n_added} files written, {pushed.n_deleted} stale ones deleted"
        out.print(f"{pushed.url}: {counts}.", soft_wrap=True)
    out.print(line, soft_wrap=True, highlight=False, markup=False)
