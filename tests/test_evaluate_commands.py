"""`hf-relabel evaluate`, as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.retrieval import own, write_beir

Run = Callable[..., CompletedProcess[str]]


def test_two_models_are_measured_and_compared(run_cli: Run, tmp_path: Path) -> None:
    write_beir(own(), tmp_path / "own")
    shared = ("evaluate", "all-MiniLM-L6-v2", "--benchmark", "own", "--device", "cpu")

    first = run_cli(*shared, "--output", "a", "--max-seq-length", "3")
    second = run_cli(*shared, "--output", "b", "--metric", "nDCG@10", "--metric", "P@1")
    compared = run_cli("evaluate", "--compare", "a", "b/own.json", "--plot", "plot.png")
    seeds = run_cli("evaluate", "--compare", "a,a", "b,b", "--plot", "seeds.svg")

    assert first.returncode == second.returncode == compared.returncode == 0, first.stderr
    assert "all-MiniLM-L6-v2" in first.stdout
    assert " ".join(first.stdout.split()).count("nDCG@10 R@100 RR@10") == 1
    assert "own: nDCG@10 0." in first.stderr
    assert "P@1" in second.stdout
    assert "B - A" in compared.stdout
    assert "95% interval" in compared.stdout
    assert "Plot: plot.png" in compared.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "own, B - A of each seed: +" in seeds.stdout


def test_a_suite_with_private_sets_says_what_is_missing(run_cli: Run) -> None:
    done = run_cli("evaluate", "all-MiniLM-L6-v2", "--benchmark", "beir-ood")

    assert done.returncode == 1
    assert "--local trec-news=FOLDER" in done.stderr.replace("\n", " ")


def test_what_is_missing_on_the_command_line_is_said(run_cli: Run) -> None:
    for arguments, complaint in (
        (["all-MiniLM-L6-v2"], "expected MODEL and --benchmark"),
        (["m", "--compare", "a", "b"], "expected saved results alone"),
        (["m", "--benchmark", "b", "--save-runs"], "--output"),
        (["m", "--benchmark", "b", "--local", "x"], "NAME=FOLDER"),
    ):
        done = run_cli("evaluate", *arguments)

        assert done.returncode == 1
        assert complaint in done.stderr
