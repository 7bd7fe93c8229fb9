"""Pushing: one commit, whole at every moment, whatever the Hub answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, get_dataset_config_names, load_dataset

from hf_relabel.errors import HubError
from hf_relabel.hub.build import MANIFEST, Built
from hf_relabel.hub.check import read_card
from hf_relabel.hub.push import Pushed, PushSettings
from hf_relabel.hub.verify import verify
from tests.hub.conftest import REPO, Waits
from tests.hub.double import HubDouble

Build = Callable[..., Built]
Push = Callable[..., Pushed]


def is_whole(built: Built, pushed: Pushed, hub: HubDouble) -> bool:
    """Whether the repository holds exactly what was built, and loads."""
    verify(built, pushed, PushSettings())
    expected = {*built.manifest["files"], "README.md", MANIFEST}
    return hub.paths(pushed.repo_id, pushed.revision) == expected


def is_consistent(hub: HubDouble, repo_id: str, revision: str) -> bool:
    """Whether a commit's card, manifest and files belong together."""
    paths = hub.paths(repo_id, revision)
    if not paths:
        return True
    manifest = json.loads(hub.read(repo_id, MANIFEST, revision))
    header, _ = read_card(hub.read(repo_id, "README.md", revision).decode())
    names = {config["config_name"] for config in header["configs"]}
    infos = {info["config_name"] for info in header["dataset_info"]}
    return set(manifest["files"]) <= paths and names == infos == set(manifest["configs"])


def test_a_first_push_makes_the_repository_in_one_commit(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    built = build_rows()

    pushed = push_built(built)

    assert is_whole(built, pushed, on_hub)
    commits = on_hub.repos[REPO].history()
    assert [commit.title for commit in commits] == [built.title, "initial commit"]
    assert "Judges: cheap, then strong" in commits[0].message
    assert pushed.url == f"{on_hub.url}/datasets/{REPO}/tree/{pushed.sha}"
    assert not on_hub.repos[REPO].private


def test_the_same_push_again_changes_nothing(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    first = push_built(build_rows())
    on_hub.seen.clear()

    again = push_built(build_rows())

    assert again.is_unchanged
    assert again.sha == first.sha
    assert [seen for seen in on_hub.seen if seen.method == "PUT" or "/commit/" in seen.path] == []


def test_a_push_of_fewer_shards_and_other_columns_leaves_nothing_stale(
    build_rows: Build, push_built: Push, on_hub: HubDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr("hf_relabel.hub.shards._GROUP_BYTES", 1)
        small.setattr("hf_relabel.hub.shards.SHARD_BYTES", 1)
        small.setattr("hf_relabel.hub.batches.BATCH_ROWS", 4)
        push_built(build_rows(n_negatives=3))
    assert sum(path.startswith("n-tuple/") for path in on_hub.paths(REPO)) == 3
    built = build_rows(n_negatives=2, configs=["n-tuple", "verdicts"])

    pushed = push_built(built)

    assert pushed.n_deleted > 3
    assert is_whole(built, pushed, on_hub)
    rows = load_dataset(REPO, "n-tuple", split="train", revision=pushed.sha)
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert get_dataset_config_names(REPO, revision=pushed.sha) == ["n-tuple", "verdicts"]


def test_what_is_not_ours_survives(
    build_rows: Build, push_built: Push, on_hub: HubDouble, tmp_path: Path
) -> None:
    """Their keys, their configs, their default, and their words outside our markers."""
    readme = (
        "---\nlicense: mit\ngated: auto\ntags: [mine]\nconfigs:\n- config_name: theirs\n"
        "  default: true\n  data_files: [{split: train, path: theirs/*}]\n---\n"
        "# My words\n\nFirst.\n"
    )
    rows = tmp_path / "theirs.parquet"
    Dataset.from_dict({"a": [1]}).to_parquet(rows)
    files = {"README.md": readme.encode(), "theirs/a.parquet": rows.read_bytes(), "n.txt": b"x"}
    repo = on_hub.add_repo(REPO, files)
    built = build_rows(configs=["triplet", "verdicts"])

    push_built(built)
    text = on_hub.read(REPO, "README.md").decode()
    on_hub.commit(repo, {"README.md": f"{text}\nLast words.\n".encode()})
    pushed = push_built(build_rows(configs=["triplet"]))

    header, body = read_card(on_hub.read(REPO, "README.md").decode())
    assert header["gated"] == "auto"
    assert header["license"] == "cc-by-4.0"
    assert {"mine", "hf_relabel"} <= set(header["tags"])
    assert [config["config_name"] for config in header["configs"]] == ["triplet", "theirs"]
    assert body.index("First.") < body.index("hf_relabel:start") < body.index("Last words.")
    assert body.count("hf_relabel:start") == 1
    assert {"theirs/a.parquet", "n.txt"} <= on_hub.paths(REPO)
    assert load_dataset(REPO, revision=pushed.sha, split="train").to_list() == [{"a": 1}]
    assert len(load_dataset(REPO, "triplet", revision=pushed.sha, split="train")) == 54


def test_files_of_others_in_our_folders_are_never_overwritten(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    repo = on_hub.add_repo(REPO, {"triplet/train-00000-of-00002.parquet": b"theirs"})

    with pytest.raises(HubError, match="no files of others in the folders") as caught:
        push_built(build_rows())

    assert caught.value.reason == "foreign"
    assert len(repo.history()) == 2


@pytest.mark.parametrize(
    "files",
    [
        {"data/train.jsonl": b"{}"},
        {
            "README.md": b"---\nconfigs:\n- config_name: a\n  data_files: a/*.csv\n---\n",
            "a/x.csv": b"x",
        },
    ],
)
def test_data_that_would_not_load_any_more_is_not_published_over(
    build_rows: Build, push_built: Push, on_hub: HubDouble, files: dict[str, bytes]
) -> None:
    """One reader serves all configs of a repository, and a card's configs hide all other data."""
    on_hub.add_repo(REPO, files)

    with pytest.raises(HubError, match="could not be loaded any more"):
        push_built(build_rows())


def test_a_head_that_moved_is_read_and_merged_again(
    build_rows: Build, push_built: Push, on_hub: HubDouble, waits: Waits
) -> None:
    repo = on_hub.add_repo(REPO)
    card = b"---\npretty: true\n---\nTheir words.\n"
    on_hub.before_commit = lambda _: on_hub.commit(repo, {"README.md": card})
    built = build_rows()

    pushed = push_built(built)

    assert len(waits) == 1
    assert is_whole(built, pushed, on_hub)
    assert "Their words." in on_hub.read(REPO, "README.md").decode()
    assert [commit.author for commit in repo.history()] == ["me", "somebody", "me"]


def test_pull_requests_are_opened_once_and_added_to(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    repo = on_hub.add_repo("other/plants")
    built = build_rows(configs=["triplet"])
    object.__setattr__(built, "repo_id", "other/plants")

    first = push_built(built, create_pr=True)
    more = build_rows(configs=["triplet", "verdicts"])
    object.__setattr__(more, "repo_id", "other/plants")
    second = push_built(more, create_pr=True)
    third = push_built(more, create_pr=True)

    assert list(repo.prs) == [1]
    assert first.revision == second.revision == "refs/pr/1"
    assert second.pr_url == f"{on_hub.url}/datasets/other/plants/discussions/1"
    assert third.is_unchanged
    assert is_whole(more, second, on_hub)
    assert on_hub.paths("other/plants") == set()
    rows = load_dataset("other/plants", "triplet", revision="refs/pr/1", split="train")
    assert len(rows) == 54


def test_a_tag_is_set_once_and_never_moved(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    pushed = push_built(build_rows(), tag="v1.0")

    assert on_hub.repos[REPO].tags == {"v1.0": pushed.sha}
    assert push_built(build_rows(), tag="v1.0").is_unchanged
    n_commits = len(on_hub.repos[REPO].history())
    with pytest.raises(HubError, match="A tag is never moved"):
        push_built(build_rows(configs=["triplet"]), tag="v1.0")
    assert len(on_hub.repos[REPO].history()) == n_commits
    assert len(load_dataset(REPO, revision="v1.0", split="train")) == 54


def test_a_branch_is_made_from_main(build_rows: Build, push_built: Push, on_hub: HubDouble) -> None:
    built = build_rows()

    pushed = push_built(built, revision="next")

    assert is_whole(built, pushed, on_hub)
    assert on_hub.paths(REPO) == set()


def test_a_private_repository_is_private_from_its_first_moment(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    built = build_rows()

    pushed = push_built(built, private=True)

    assert on_hub.repos[REPO].private
    assert is_whole(built, pushed, on_hub)
    assert push_built(built).is_unchanged
    assert on_hub.repos[REPO].private


def test_a_public_repository_is_not_made_private(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    on_hub.add_repo(REPO)

    with pytest.raises(HubError, match="found it public"):
        push_built(build_rows(), private=True)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_wrong", "Log in with `hf auth login`"),
        ("hf_reader", "The token 'test' of me has the role 'read'"),
        ("hf_other", "propose the change to its owner with create_pr=True"),
    ],
)
def test_a_token_that_may_not_write_is_told_so_and_never_shown(
    build_rows: Build, push_built: Push, on_hub: HubDouble, waits: Waits, token: str, words: str
) -> None:
    repo = on_hub.add_repo(REPO)

    with pytest.raises(HubError) as caught:
        push_built(build_rows(), token=token)

    assert words in str(caught.value)
    assert token not in str(caught.value)
    assert caught.value.reason == "denied"
    assert waits == []
    assert len(repo.history()) == 1


def test_tokens_never_reach_the_storage_servers(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    pushed = push_built(build_rows())
    load_dataset(REPO, revision=pushed.sha, split="train")

    storage = [seen for seen in on_hub.seen if "/_cdn/" in seen.path]
    assert storage
    assert not any(seen.has_token for seen in storage)


STEPS = {
    "whoami": ("GET", "/api/whoami"),
    "repo info": ("GET", "/api/datasets/me/plants$"),
    "create repo": ("POST", "/api/repos/create"),
    "head": ("GET", "/revision/main"),
    "tree": ("GET", "/tree/"),
    "validate": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/_lfs/"),
    "verify": ("POST", "/_lfs/.*/verify"),
    "commit": ("POST", "/commit/"),
    "refs": ("GET", "/refs"),
    "tag": ("POST", "/tag/"),
}


@pytest.mark.parametrize("status", [409, 412, 429, 500, 503, 504])
@pytest.mark.parametrize("step", STEPS)
def test_a_passing_fault_at_any_step_ends_in_one_whole_commit(
    build_rows: Build, push_built: Push, on_hub: HubDouble, step: str, status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's own waits
    built = build_rows(configs=["triplet", "verdicts"])
    on_hub.fail(*STEPS[step], status)

    pushed = push_built(built, tag="v1")

    assert not any(fault.times for fault in on_hub.faults)
    expected = {*built.manifest["files"], "README.md", MANIFEST}
    assert on_hub.paths(REPO) == expected
    assert on_hub.repos[REPO].tags == {"v1": pushed.sha}
    assert len(on_hub.repos[REPO].history()) == 2
    if status == 504:  # once for each step is enough: loading takes a second
        verify(built, pushed, PushSettings())


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_lost_reply_is_not_sent_twice(
    build_rows: Build, push_built: Push, on_hub: HubDouble, create_pr: bool
) -> None:
    repo = on_hub.add_repo(REPO)
    built = build_rows(configs=["triplet"])
    on_hub.fail("POST", "/commit/", 504, after=True)

    pushed = push_built(built, create_pr=create_pr)

    assert len(repo.prs) == create_pr
    assert pushed.revision == ("refs/pr/1" if create_pr else "main")
    assert len(repo.history(pushed.revision)) == 2
    assert is_whole(built, pushed, on_hub)


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [({}, 1.0), ({"Retry-After": "7"}, 7.0), ({"RateLimit": '"api";r=0;t=9'}, 9.0)],
)
def test_waits_are_what_the_hub_asks_for(
    build_rows: Build, push_built: Push, on_hub: HubDouble, waits: Waits,
    headers: dict[str, str], expected_s: float,
) -> None:  # fmt: skip
    on_hub.fail("POST", "/commit/", 429, headers=headers)

    push_built(build_rows(configs=["triplet"]))

    assert waits == [expected_s]


def test_a_quota_for_the_hour_stops_the_push_at_once(
    build_rows: Build, push_built: Push, on_hub: HubDouble, waits: Waits
) -> None:
    on_hub.fail("POST", "/commit/", 429, headers={"Retry-After": "3000"})

    with pytest.raises(HubError, match="asks to wait 3,000 s") as caught:
        push_built(build_rows(configs=["triplet"]))

    assert waits == []
    assert caught.value.reason == "unavailable"


@pytest.mark.parametrize(("status", "reason"), [(503, "unavailable"), (412, "conflict")])
def test_retries_end_and_the_next_push_sends_only_what_is_missing(
    build_rows: Build, push_built: Push, on_hub: HubDouble, waits: Waits, status: int, reason: str
) -> None:
    built = build_rows(configs=["triplet", "verdicts"])
    on_hub.fail("POST", "/commit/", status, times=99)

    with pytest.raises(HubError, match="run the same command again") as caught:
        push_built(built)
    on_hub.faults.clear()
    on_hub.seen.clear()
    pushed = push_built(built)

    assert caught.value.reason == reason
    assert waits == [1.0, 2.0, 4.0]
    assert [seen for seen in on_hub.seen if seen.method == "PUT"] == []
    assert is_whole(built, pushed, on_hub)


def test_every_commit_of_a_history_is_whole(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    push_built(build_rows(n_rows=6))
    on_hub.fail("POST", "/commit/", 504, after=True)
    push_built(build_rows(n_rows=12))
    on_hub.fail("POST", "/commit/", 500)
    push_built(build_rows(n_rows=9, configs=["triplet", "calls"]))

    commits = on_hub.repos[REPO].history()
    assert len(commits) == 4
    assert all(is_consistent(on_hub, REPO, commit.oid) for commit in commits)


def test_large_files_leave_the_disk_as_they_go_up(
    build_rows: Build, push_built: Push, on_hub: HubDouble
) -> None:
    built = build_rows()

    pushed = push_built(built, discards=True)

    assert list(Path(built.folder).rglob("*.parquet")) == []
    assert is_whole(built, pushed, on_hub)
    assert push_built(built).is_unchanged
