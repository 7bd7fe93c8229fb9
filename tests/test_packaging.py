"""The wheel: everything is in it, under the installed names, and it imports from nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Folders of the checkout, and where a wheel puts them.
PACKAGES = {
    "hf_relabel": "hf_relabel",
    "callbacks": "hf_relabel/callbacks",
    "hub_cards": "hf_relabel/hub_cards",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once, offline, from a copy: a build leaves files beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source))
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone, without what it depends on, into a folder of its own."""
    target = tmp_path_factory.mktemp("target")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    _run(*pip, "--no-deps", "--target", str(target), str(wheel))
    return target


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    """A module or a data file that the packaging settings forget would be missed by users only."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    assert {name for name in names if ".dist-info/" not in name} == set(_expected_files())
    assert "hf_relabel/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_packages_import_from_the_wheel_alone(installed: Path) -> None:
    """No dependency is needed to import them: heavy ones load where they are used."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hf_relabel, hf_relabel.callbacks, hf_relabel.hub_cards as cards\n"
        "print(hf_relabel.__file__, hf_relabel.callbacks.__file__, cards.__file__, sep='\\n')"
    )
    # -I -S: neither the checkout, nor PYTHONPATH, nor the environment's own packages are seen.
    files = _run("-I", "-S", "-c", code, str(installed)).splitlines()

    assert [Path(file).relative_to(installed).as_posix() for file in files] == [
        f"{place}/__init__.py" for place in PACKAGES.values()
    ]


def test_data_files_are_found_beside_the_installed_package(installed: Path) -> None:
    data = {file for file in _expected_files() if not file.endswith(".py")}

    assert data
    assert [file for file in sorted(data) if not (installed / file).is_file()] == []


def test_the_command_is_declared(installed: Path) -> None:
    (entry_points,) = installed.glob("hf_relabel-*.dist-info/entry_points.txt")

    assert "hf-relabel = hf_relabel.cli:main" in entry_points.read_text()


def test_the_metadata_names_the_license_and_each_extra(installed: Path) -> None:
    (file,) = installed.glob("hf_relabel-*.dist-info/METADATA")
    metadata = HeaderParser().parsestr(file.read_text())

    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = metadata.get_all("Provides-Extra", [])
    assert {"train", "prices", "local", "report", "dev"} <= set(extras)


def test_the_checkout_imports_under_the_installed_names(
    subprocess_env: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """An editable install maps callbacks/ and hub_cards/ where the wheel puts them."""
    code = (
        "import hf_relabel.callbacks, hf_relabel.hub_cards\n"
        "print(hf_relabel.callbacks.__file__, hf_relabel.hub_cards.__file__, sep='\\n')"
    )
    env = subprocess_env(PYTHONPATH=None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines() == [
        str(ROOT / "callbacks/__init__.py"),
        str(ROOT / "hub_cards/__init__.py"),
    ]


def _expected_files() -> list[str]:
    """List the files of the checkout's packages under their installed names."""
    return [
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PACKAGES.items()
        for file in sorted((ROOT / folder).rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    ]


def _run(*args: str) -> str:
    """Run this Python and return what it printed; on failure say what it complained about."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
