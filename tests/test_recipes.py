"""The paper's trainings run as users run them, tiny, on CPU: the loss falls, and the model loads."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")

SCRIPTS = {
    "e5-base": "train_retriever",
    "qwen2.5-7b": "train_retriever",
    "qwen2.5-3b": "train_reranker",
    "modernbert": "train_reranker",
}
_PATIENCE_S = 600  # seconds are enough on a quiet machine
Env = Callable[..., dict[str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
MARGINS = {"e5-base": 0.5, "qwen2.5-7b": 0.6, "qwen2.5-3b": 0.85, "modernbert": 0.85}
LONG = ("--save-steps", "5", "--epochs", "4")
_DONE: dict[str, Run] = {}
PAIRS = [
    ("which part of the cell makes ATP", "Most ATP is made by the mitochondria. " * n)
    for n in (1, 40)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a script left behind."""

    output: str
    folder: Path

    @property
    def losses(self) -> dict[int, float]:
        """Step → loss, as the trainer logged it."""
        state = json.loads((self.folder / "trainer_state.json").read_text())
        return {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}

    @property
    def model(self) -> str:
        return str(self.folder / "final")


def _start(
    recipe: str, *options: str | Path, folder: Path, env: Env, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start a recipe's smoke in a folder."""
    script = ROOT / f"examples/paper/{SCRIPTS[recipe]}.py"
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), "--recipe", recipe, "--smoke", *map(str, options)],
        cwd=folder, env=env(OMP_NUM_THREADS="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture
def start(subprocess_env: Env, tmp_path: Path) -> Start:
    return partial(_start, folder=tmp_path, env=subprocess_env)


@pytest.fixture
def whole(subprocess_env: Env, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the retriever with adapters from its beginning to its end, once for all tests."""
    if "whole" not in _DONE:
        folder = tmp_path_factory.mktemp("whole")
        options = [*LONG, "--output", "whole"]
        process = _start("qwen2.5-7b", *options, folder=folder, env=subprocess_env)
        _DONE["whole"] = _finished(process, folder / "whole")
    return _DONE["whole"]


def _finished(process: subprocess.Popen[str], folder: Path) -> Run:
    output, _ = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 0, output
    return Run(output=output, folder=folder)


def _falls(run: Run, *, to: float) -> None:
    """Check that the mean of the last quarter of the losses is no more than a share of the first."""
    losses = [loss for _, loss in sorted(run.losses.items())]
    quarter = len(losses) // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    assert last <= to * first, losses


def test_e5(start: Start, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = _finished(start("e5-base"), tmp_path / "runs/e5-base-default")

    _falls(run, to=MARGINS["e5-base"])
    assert f"hf-relabel evaluate {Path('runs/e5-base-default/final')}" in run.output
    model = SentenceTransformer(run.model, device="cpu")
    assert model.prompts == {"query": "query: ", "document": "passage: "}
    assert model[1].pooling_mode == "mean"
    assert model.encode_query(["what makes ATP"]).shape == (1, 384)


def test_qwen_retriever_with_adapters(whole: Run) -> None:
    """Texts end in EOS, cut or not, and are no chat; adapters are merged, and moved the weights."""
    import torch
    from sentence_transformers import SentenceTransformer

    _falls(whole, to=MARGINS["qwen2.5-7b"])
    model = SentenceTransformer(whole.model, device="cpu")
    assert model[1].pooling_mode == "lasttoken"  # by the recipe, not by the name of a path
    features = model.preprocess(["one", "one " * 200])
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        assert ids[mask.sum() - 1] == model.tokenizer.eos_token_id
    assert "im_start" not in model.tokenizer.decode(features["input_ids"][0])
    before = SentenceTransformer(str(whole.folder / "tiny"), device="cpu")[0].model.state_dict()
    after = model[0].model.state_dict()
    assert before.keys() == after.keys()
    moved = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}


def test_qwen_reranker_with_adapters(start: Start, tmp_path: Path) -> None:
    """The score is read at a token that stays when the passage is cut."""
    from sentence_transformers import CrossEncoder

    run = _finished(start("qwen2.5-3b"), tmp_path / "runs/qwen2.5-3b-default")

    _falls(run, to=MARGINS["qwen2.5-3b"])
    model = CrossEncoder(run.model, device="cpu")
    features = model.preprocess(PAIRS)
    rows = zip(features["input_ids"], features["attention_mask"], strict=True)
    texts = [model.tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]
    assert texts[0].startswith("query: which part of the cell makes ATP\ndocument: Most ATP")
    assert all(text.endswith("<|im_end|>") for text in texts)
    alone = [float(model.predict([pair])[0]) for pair in PAIRS]
    assert model.predict(PAIRS).tolist() == pytest.approx(alone, abs=1e-5)


def test_modernbert_reranker(start: Start, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    run = _finished(start("modernbert"), tmp_path / "runs/modernbert-default")

    _falls(run, to=MARGINS["modernbert"])
    assert "--first-stage" in run.output
    assert CrossEncoder(run.model, device="cpu").predict(PAIRS).shape == (2,)


def test_a_killed_run_goes_on_where_it_was(whole: Run, start: Start, tmp_path: Path) -> None:
    """Killed in the second epoch, adapters and dropout included: the later losses are the same."""
    options = [*LONG, "--output", "cut"]
    process = start("qwen2.5-7b", *options)
    try:
        _wait_for(tmp_path / "cut/checkpoint-5/trainer_state.json", process)
    finally:
        process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    again = start("qwen2.5-7b", *options)
    refused, _ = again.communicate(timeout=_PATIENCE_S)
    resumed = _finished(start("qwen2.5-7b", *options, "--resume"), tmp_path / "cut")  # fmt: skip

    assert again.returncode == 1
    assert "Go on with --resume" in refused
    assert "Goes on from cut/checkpoint-" in resumed.output
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)
    assert len(whole.losses) == 16


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.002)


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_two_processes_under_torchrun(recipe: str, start: Start, tmp_path: Path) -> None:
    """One of them prints and saves, both train: no weight is left waiting for a gradient."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(recipe, "--batch-size", "3", "--gather", "--workers", "1", launcher=launcher)
    run = _finished(process, tmp_path / f"runs/{recipe}-default")

    assert (
        len(run.losses) % 4 == 0
    )  # four steps an epoch, as one process takes with twice the batch
    _falls(run, to=MARGINS[recipe])
    assert run.output.count("24 rows (default).") == 1
    assert run.output.count("Saved in") == 1


def test_variants_by_cached_verdicts(
    start: Start, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """What `run` judged is applied without a call; without verdicts the training does not begin."""
    rows = ROOT / "hf_relabel/data/sample/rows.jsonl"
    common = ["--limit", "24", "--preset", "offline", "--cache", tmp_path / "cache"]
    options = ["--data", rows, *common]
    nothing = start("modernbert", *options, "--variant", "rlhn")
    refused, _ = nothing.communicate(timeout=_PATIENCE_S)
    judged = run_cli("run", rows, *common, "--output", tmp_path / "judged", timeout_s=_PATIENCE_S)
    assert judged.returncode == 0, judged.stderr

    removed = _finished(
        start("modernbert", *options, "--variant", "remove", "--epochs", "1", "--batch-size", "2"),
        tmp_path / "runs/modernbert-remove",
    )

    assert nothing.returncode == 1
    assert "expected verdicts for --variant rlhn, found none for" in refused
    report = json.loads((tmp_path / "judged/report.json").read_text())
    assert report["negatives"]["promoted"] > 0
    [n_rows] = re.findall(r"^(\d+) rows \(remove\)\.", removed.output, flags=re.MULTILINE)
    assert 0 < int(n_rows) < 24
