"""Published verdicts: pulled elsewhere, and applied with other actions, without one call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from datasets import Dataset, load_dataset

from hf_relabel import Relabeler
from hf_relabel.errors import SourceError
from hf_relabel.formats import content_hash
from hf_relabel.hub.build import Built
from hf_relabel.hub.push import Pushed
from tests.chat_server import ChatServer, replay
from tests.hub.conftest import REPO
from tests.hub.double import HubDouble
from tests.rows import KEY, tevatron_rows
from tests.test_replay import FIQA, Recorded, fiqa, own

Build = Callable[..., Built]
Push = Callable[..., Pushed]
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def published(build_rows: Build, push_built: Push, on_hub: HubDouble) -> HubDouble:
    push_built(build_rows(), tag="v1")
    return on_hub


@pytest.mark.parametrize("action", ["promote", "drop", "remove_row", {"better": "promote"}])
@pytest.mark.usefixtures("published")
def test_other_actions_give_what_the_judges_would(
    relabeler: Relabeler, tmp_path: Path, action: str | dict[str, str]
) -> None:
    rows = Dataset.from_list(tevatron_rows())
    settings = {"action": action, "cache": tmp_path / "elsewhere"}
    pulled = Relabeler.from_verdicts(REPO, revision="v1", **settings)
    local = Relabeler(relabeler.cascade, action=action, cache=relabeler.cache)

    progress = pulled.judge(rows)

    assert progress.n_calls == 0
    assert rows.map(pulled, batched=True).to_list() == rows.map(local, batched=True).to_list()
    assert pulled.fingerprint == local.fingerprint
    found, expected = pulled.report(rows), local.report(rows)
    assert found.negatives == expected.negatives
    assert [s.rows_flagged for s in found.stages] == [s.rows_flagged for s in expected.stages]
    assert pulled.decisions(rows).to_list() == local.decisions(rows).to_list()


@pytest.mark.usefixtures("published")
def test_it_keeps_the_policy_it_was_published_with_and_works_in_other_processes(
    relabeler: Relabeler, tmp_path: Path
) -> None:
    rows = Dataset.from_list(tevatron_rows())
    pulled = Relabeler.from_verdicts(REPO, cache=tmp_path / "elsewhere")

    assert pulled.policy == relabeler.policy
    clean = rows.map(pulled, batched=True, num_proc=2, batch_size=3)
    assert clean.to_list() == rows.map(relabeler, batched=True).to_list()


@pytest.mark.usefixtures("published")
def test_passages_without_a_published_verdict_stay_undecided(tmp_path: Path) -> None:
    rows = Dataset.from_list(tevatron_rows(13))
    pulled = Relabeler.from_verdicts(REPO, cache=tmp_path / "elsewhere")

    pulled.judge(rows)

    report = pulled.report(rows)
    assert report.negatives.undecided == 5
    assert report.undecided_reasons == {"not_published": 5}
    assert report.negatives.promoted == len(KEY)


@pytest.mark.usefixtures("published")
def test_the_join_by_hand_in_the_card_is_the_librarys(on_hub: HubDouble) -> None:
    card = on_hub.read(REPO, "README.md").decode()
    block = card[card.index("import hashlib") :].split("```")[0]
    names: dict[str, Callable[[str], str]] = {}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102  our own text

    verdicts = load_dataset(REPO, "verdicts", split="train")
    texts = ["Text 1 beside plant 0.", "  Text 1\u00a0beside\nplant 0. ", "e\u0301"]
    assert [names["content_hash"](text) for text in texts] == list(map(content_hash, texts))
    assert names["content_hash"](texts[1]) in verdicts["doc_sha256"]


@pytest.mark.usefixtures("published")
def test_tables_that_are_not_ours_are_refused(on_hub: HubDouble, tmp_path: Path) -> None:
    repo = on_hub.repos[REPO]
    manifest = json.loads(on_hub.read(REPO, "hf_relabel.json"))
    name = next(name for name in manifest["files"] if name.startswith("verdicts/"))
    rows = load_dataset(REPO, "verdicts", split="train")

    def refuses(words: str, files: dict[str, bytes]) -> None:
        on_hub.commit(repo, files)
        with pytest.raises(SourceError, match=words):
            Relabeler.from_verdicts(REPO, cache=tmp_path / "elsewhere")

    def table(**changes: object) -> dict[str, bytes]:
        path = tmp_path / "changed.parquet"
        rows.map(lambda _: changes).to_parquet(path)
        return {name: path.read_bytes()}

    refuses("the verdict 'yes'", table(verdict="yes"))
    refuses("the query_sha256 'a:b'", table(query_sha256="a:b"))
    refuses("stage 1 after 0 stages", table(stage=1))
    refuses("verdicts of a dataset", {name: b"no Parquet"})
    for key, value in {"layout": 9, "normalization": "nfc-ws-9"}.items():
        changed = json.dumps({**manifest, key: value}).encode()
        refuses("another version of hf_relabel", {"hf_relabel.json": changed})


def test_a_repository_without_verdicts_is_named(on_hub: HubDouble, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found 'me/nothing', which cannot be read"):
        Relabeler.from_verdicts("me/nothing", cache=tmp_path / "elsewhere")

    on_hub.add_repo("me/nothing")
    with pytest.raises(SourceError, match="cannot be read"):
        Relabeler.from_verdicts("me/nothing", cache=tmp_path / "elsewhere")


@pytest.mark.parametrize("recorded", [fiqa if FIQA.is_dir() else own])
def test_the_command_line_publishes_and_pulls_back(
    recorded: Callable[[], Recorded], hub: HubDouble, chat_server: ChatServer, run_cli: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The true commands, in processes of their own: published here, applied elsewhere, 0 calls."""
    known = recorded()
    chat_server.answer = replay(known.replies)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in known.rows), "utf-8")
    at_hub = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HUB_OFFLINE": None,
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    judged = ("run", path, "--base-url", chat_server.base_url, "--cache", "cache")

    def run(*args: str | Path, **env: str | None) -> str:
        done = run_cli(*args, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*judged, "--output", "out", OPENAI_API_KEY="x")
    run(*judged, "--output", "dropped", "--action", "drop", OPENAI_API_KEY="x")
    printed = run("publish", "out", REPO, "--license", "mit", "--tag", "v1", **at_hub)
    n_requests = len(chat_server.seen)
    run("run", path, "--output", "again", "--verdicts", f"{REPO}@v1", "--action", "drop", **at_hub)
    pulled = run("verdicts", "pull", REPO, "--cache", "elsewhere", **at_hub)
    same_judges = (*judged[:4], "--cache", "elsewhere", "--action", "drop")
    run(*same_judges, "--output", "third")

    assert len(chat_server.seen) == n_requests
    assert 'revision="v1"' in printed
    assert "gpt-4o-mini, then gpt-4o" in pulled
    expected = _actions(tmp_path / "dropped")
    assert _actions(tmp_path / "again") == _actions(tmp_path / "third") == expected
    report = json.loads((tmp_path / "again/report.json").read_text())
    assert [stage["calls"] for stage in report["stages"]] == [0, 0]
    n_false = sum(map(len, known.false_negatives.values()))
    assert report["negatives"]["dropped"] == n_false > 0


def _actions(folder: Path) -> list[tuple[str, str, str]]:
    rows = Dataset.from_parquet(str(folder / "decisions.parquet"))
    return [(row["query"], row["passage_hash"], row["action"]) for row in rows]
