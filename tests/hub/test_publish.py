"""publish: the one call, over LFS and over Xet, and the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from hf_relabel import Relabeler, publish
from hf_relabel.errors import CheckError, HubError, SettingError
from hf_relabel.hub.build import Built
from hf_relabel.hub.push import Pushed, PushSettings
from hf_relabel.hub.verify import verify
from tests.conftest import ROOT
from tests.hub.conftest import REPO
from tests.hub.double import HubDouble
from tests.rows import tevatron_rows

Build = Callable[..., Built]
Push = Callable[..., Pushed]
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def rows(relabeler: Relabeler) -> Dataset:
    dataset = Dataset.from_list(tevatron_rows())
    relabeler.judge(dataset)
    return dataset


def test_every_config_loads_at_tag_and_commit_streaming_and_not(
    rows: Dataset, relabeler: Relabeler, on_hub: HubDouble, tmp_path: Path
) -> None:
    done = publish(
        rows, REPO, relabeler=relabeler, license="mit", tag="v1", folder=tmp_path / "built"
    )

    assert done.pushed is not None
    assert on_hub.repos[REPO].tags == {"v1": done.pushed.sha}
    assert done.snippet == f'load_dataset("{REPO}", "triplet", revision="v1")'
    for config in done.built.manifest["configs"]:
        expected = load_dataset(str(tmp_path / "built"), config, split="train")
        for revision in ("v1", done.pushed.sha):
            loaded = load_dataset(REPO, config, revision=revision, split="train")
            assert loaded.features == expected.features
            assert loaded.to_list() == expected.to_list()
        stream = load_dataset(REPO, config, revision="v1", split="train", streaming=True)
        assert list(stream) == expected.to_list()


def test_relabeled_rows_are_published_with_the_rows_they_came_from(
    rows: Dataset, relabeler: Relabeler, on_hub: HubDouble, tmp_path: Path
) -> None:
    clean = rows.map(relabeler, batched=True)
    given = {"relabeler": relabeler, "license": "mit", "has_plots": False, "dry_run": True}

    with pytest.raises(SettingError, match="source_rows=rows"):
        publish(clean, REPO, folder=tmp_path / "a", **given)
    with pytest.raises(SettingError, match="expected the 12 rows"):
        publish(clean.select([0]), REPO, source_rows=rows, folder=tmp_path / "b", **given)
    done = publish(clean, REPO, source_rows=rows, folder=tmp_path / "c", **given)

    loaded = load_dataset(str(tmp_path / "c"), "tevatron", split="train")
    assert loaded.to_list() == clean.to_list()
    assert done.pushed is None
    assert on_hub.repos == {}
    assert on_hub.seen == []


def test_rows_that_nobody_judged_are_refused(relabeler: Relabeler, tmp_path: Path) -> None:
    rows = Dataset.from_list(tevatron_rows())

    with pytest.raises(SettingError, match="60 negatives that nobody was asked about"):
        publish(rows, REPO, relabeler=relabeler, license="mit", dry_run=True, folder=tmp_path / "b")


@pytest.mark.usefixtures("on_hub")
def test_splits_are_published_side_by_side(rows: Dataset, relabeler: Relabeler) -> None:
    splits = DatasetDict({"train": rows.select(range(8)), "dev": rows.select(range(8, 12))})

    done = publish(splits, REPO, relabeler=relabeler, license="mit", has_plots=False)

    assert done.pushed is not None
    loaded = load_dataset(REPO, "tevatron", revision=done.pushed.sha)
    assert {name: len(part) for name, part in loaded.items()} == {"train": 8, "dev": 4}
    assert not done.built.folder.exists()


def test_the_licence_and_revision_of_the_source_are_read_from_the_hub(
    rows: Dataset, relabeler: Relabeler, on_hub: HubDouble, tmp_path: Path
) -> None:
    card = b"---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n"
    source = on_hub.add_repo("other/rows", {"README.md": card})
    given = {"relabeler": relabeler, "has_plots": False, "dry_run": True}

    done = publish(rows, REPO, source="other/rows", folder=tmp_path / "built", **given)

    readme = (done.built.folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in readme
    assert "source_datasets:\n- other/rows" in readme
    assert f"at revision `{source.branches['main']}`" in readme
    assert "pretty_name: rows, relabeled" in readme
    with pytest.raises(SettingError, match="read the licence in the card of other/none"):
        publish(rows, REPO, source="other/none", folder=tmp_path / "b", **given)


def test_rows_of_the_hub_know_where_they_come_from(
    relabeler: Relabeler, on_hub: HubDouble, tmp_path: Path
) -> None:
    Dataset.from_list(tevatron_rows()).to_parquet(tmp_path / "train.parquet")
    files = {"train.parquet": (tmp_path / "train.parquet").read_bytes()}
    source = on_hub.add_repo("other/rows", {"README.md": b"---\nlicense: mit\n---\n", **files})
    rows = load_dataset("other/rows", split="train")
    relabeler.judge(rows)

    done = publish(rows, REPO, relabeler=relabeler, has_plots=False, dry_run=True,
                   folder=tmp_path / "built")  # fmt: skip

    assert done.built.manifest["source"]["id"] == "other/rows"
    assert done.built.manifest["source"]["revision"] == source.branches["main"]
    assert done.built.manifest["licence"] == "mit"


def test_what_comes_back_otherwise_is_found(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    built = build_rows(configs=["triplet", "calls"])
    push_built(built)
    readme = on_hub.read(REPO, "README.md").decode().replace("num_examples: 54", "num_examples: 5")
    sha = on_hub.commit(on_hub.repos[REPO], {"README.md": readme.encode()})

    with pytest.raises(CheckError, match="triplet: does not load: NonMatchingSplitsSizesError"):
        verify(built, Pushed(repo_id=REPO, sha=sha, revision="main", url="there"), PushSettings())


def test_another_hub_than_this_process_looks_at_cannot_be_verified(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    built = build_rows(configs=["triplet"])
    pushed = push_built(built)

    with pytest.raises(SettingError, match="Set it before Python starts"):
        verify(built, pushed, PushSettings(endpoint="http://127.0.0.1:9"))
    assert on_hub.repos[REPO].branches["main"] == pushed.sha


def test_pushes_to_a_hub_that_is_not_there_end(build_rows: Build, push_built: Push) -> None:
    import huggingface_hub.constants as constants

    built = build_rows(configs=["triplet"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(HubError, match="found ConnectError 4 times"):
            push_built(built, endpoint="http://127.0.0.1:9", token="hf_me")


def test_over_xet_the_same_files_arrive(
    build_rows: Build, push_built: Push, on_hub: HubDouble, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """`local://` is a test feature of hf_xet: one test, with LFS in all the others."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    on_hub.xet_cas = f"local://{tmp_path / 'cas'}"
    built = build_rows(configs=["triplet", "verdicts"])

    pushed = push_built(built)
    again = push_built(built)

    assert on_hub.blobs == {}
    assert again.is_unchanged
    verify(built, pushed, PushSettings())
    for name in built.manifest["files"]:
        assert on_hub.read(REPO, name) == (built.folder / name).read_bytes()


@pytest.fixture
def cli(run_cli: Run, hub: HubDouble) -> Run:
    """Run a command against the double, online."""

    def run(*args: str | Path) -> CompletedProcess[str]:
        return run_cli(
            *args, HF_ENDPOINT=hub.url, HF_TOKEN="hf_me", HF_HUB_OFFLINE=None,
            HF_HUB_DISABLE_XET="1",
        )  # fmt: skip

    return run


@pytest.mark.slow  # a process for each command
def test_the_steps_one_at_a_time(
    cli: Run, hub: HubDouble, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run()

    built = cli("hub", "build", run, REPO, "--output", "b", "--license", "mit", "--no-plots")
    checked = cli("hub", "check", "b")
    pushed = cli("hub", "push", "b", "--tag", "v1")
    verified = cli("hub", "verify", "b", "--revision", "v1")
    again = cli("hub", "push", "b", "--tag", "v1")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    refused = cli("hub", "check", "b")

    codes = [done.returncode for done in (built, checked, pushed, verified, again, refused)]
    assert codes == [0, 0, 0, 0, 0, 1], (built.stderr, checked.stderr, pushed.stderr)
    assert "holds all of this already" in again.stdout
    assert "notes.txt: not built by us" in refused.stderr
    assert set(hub.repos[REPO].tags) == {"v1"}


def test_a_dry_run_needs_no_name_and_sends_nothing(
    cli: Run, hub: HubDouble, make_run: Callable[..., Path]
) -> None:
    done = cli("publish", "--dry-run", make_run(), "--license", "mit", "--no-plots")

    assert done.returncode == 0, done.stderr
    assert "nothing was sent" in done.stdout
    assert hub.seen == []
    manifest = json.loads((make_run().with_name("run-hub") / "hf_relabel.json").read_text())
    assert manifest["repo_id"] == "your-name/run"


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        ((REPO,), "expected a licence in the source's card, found none", 1),
        ((REPO, "--license", "mit", "--token", "hf_reader"), "has the role 'read'", 1),
    ],
)
def test_what_cannot_be_published_ends_with_one_message(
    cli: Run, hub: HubDouble, make_run: Callable[..., Path], args: tuple[str, ...], words: str,
    code: int,
) -> None:  # fmt: skip
    hub.add_repo(REPO)

    done = cli("publish", make_run(), "--no-plots", *args)

    assert done.returncode == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "hf_reader" not in done.stderr + done.stdout


@pytest.mark.slow  # the offline judge's model takes its time to load
@pytest.mark.parametrize("push", [False, True])
def test_the_example_runs(
    hub: HubDouble, subprocess_env: Callable[..., dict[str, str]], tmp_path: Path, push: bool
) -> None:
    env = subprocess_env(
        HF_ENDPOINT=hub.url, HF_TOKEN="hf_me", HF_HUB_OFFLINE=None, HF_HUB_DISABLE_XET="1",
        HOME=str(tmp_path),
    )  # fmt: skip
    args = ["--push", REPO, "--tag", "v1"] if push else []

    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/publish_dataset.py"), *args],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert ('revision="v1"' if push else "Nothing was sent") in done.stdout
    assert set(hub.repos) == ({REPO} if push else set())
