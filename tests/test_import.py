"""`import hf_relabel` stays light."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

# Packages that cost time or memory to load, or bring much along: each is loaded where it is used.
HEAVY = [
    "accelerate",
    "aiohttp",
    "datasets",
    "diskcache",
    "genai_prices",
    "huggingface_hub",
    "ir_measures",
    "jinja2",
    "matplotlib",
    "mteb",
    "numpy",
    "openai",
    "pandas",
    "pyarrow",
    "rich",
    "scipy",
    "sentence_transformers",
    "torch",
    "transformers",
    "typer",
]
# The promise of the README: seconds over a bare interpreter's start.
MAX_IMPORT_S = 0.5


@pytest.fixture
def python(subprocess_env: Callable[..., dict[str, str]]) -> Callable[[str], str]:
    """Run one line in a fresh interpreter and return what it printed."""

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=subprocess_env(),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    return run


def test_import_takes_less_than_half_a_second(python: Callable[[str], str]) -> None:
    """The median of five fresh interpreters, each next to a bare one: load weighs on both alike."""
    bare_s, import_s = [], []
    python("import hf_relabel")  # the first one writes the bytecode
    for _ in range(5):
        bare_s.append(_time_s(python, "pass"))
        import_s.append(_time_s(python, "import hf_relabel"))

    assert statistics.median(import_s) - statistics.median(bare_s) < MAX_IMPORT_S


def test_import_loads_nothing_heavy(python: Callable[[str], str]) -> None:
    loaded = python("import hf_relabel, sys; print(*sys.modules)").split()

    assert "hf_relabel" in loaded
    assert sorted(set(loaded) & set(HEAVY)) == []


def _time_s(python: Callable[[str], str], code: str) -> float:
    start = time.perf_counter()
    python(code)
    return time.perf_counter() - start
