"""Who may import whom: a module imports only from modules above it, wherever the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the top; a new module is added here, at the highest place that its imports allow.
ORDER = [
    "errors",
    "texts",
    "verdicts",
    "questions",
    "rates",
    "formats",
    "policy",
    "prompts",
    "presence",
    "cache",
    "row_index",
    "exchange",
    "background",
    "judges",
    "cascade",
    "judging",
    "decisions",
    "records",
    "presets",
    "report",
    "summary",
    "published",
    "transform",
    "controls",
    "estimate",
    "batch_exchange",
    "files",
    "demo",
    "benchmark",
    "search",
    "scores",
    "evaluate",
    "compare",
    "suites",
    "sampling",
    "annotation",
    "agreement",
    "prune",
    "callbacks",
    "hub_cards",
    "hub",
    "arguments",
    "console",
    "logs",
    "cache_commands",
    "agreement_commands",
    "hub_commands",
    "evaluate_commands",
    "score_commands",
    "prune_commands",
    "cli",
]
# Inside a package modules import each other freely, without a circle; these stand above the rest.
FIRST = {"judges": "protocol"}
# Values of the package itself, which need no module of it.
ROOT_VALUES = {"__version__"}


def _modules() -> dict[str, Path]:
    """Map each module's dotted name, under the installed names, to its file."""
    places = {"hf_relabel": "hf_relabel", "callbacks": "hf_relabel.callbacks"}
    places["hub_cards"] = "hf_relabel.hub_cards"
    modules = {}
    for folder, package in places.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            modules[name] = file
    return modules


MODULES = _modules()


def _imports(source: str) -> Iterator[str]:
    """Yield the modules of hf_relabel that a source imports, also inside functions.

    A value that is imported through the package itself yields "hf_relabel".

    Raises:
        ValueError: An import is relative.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: a relative import; use the installed name")
            found = [_target(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] == "hf_relabel")


def _target(module: str, name: str) -> str:
    """Return what `from module import name` leads to: a module of that name, or the one named."""
    if module == "hf_relabel" and name in ROOT_VALUES:
        return "nothing"
    full = f"{module}.{name}"
    return full if full in MODULES or (module == "hf_relabel" and name in ORDER) else module


def _layer(module: str) -> str:
    return module.split(".")[1]


def _complaints(module: str, source: str) -> list[str]:
    """Say what is wrong with a module's imports."""
    try:
        return [f"{module} {fault}" for name in _imports(source) if (fault := _fault(module, name))]
    except ValueError as error:
        return [f"{module}: {error}"]


def _fault(module: str, target: str) -> str:
    """Say what is wrong with one import, or nothing."""
    if target == "hf_relabel":
        return "imports a name through the package; name its module"
    layer, own = _layer(target), _layer(module)
    if layer not in ORDER:
        return f"imports {target}, which has no place in ORDER"
    if layer == own and module == f"hf_relabel.{own}.{FIRST.get(own)}":
        return f"imports {target}, but stands first in its package"
    if layer != own and ORDER.index(layer) > ORDER.index(own):
        return f"imports {target}, which stands below it"
    return ""


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = [name for name in MODULES if name != "hf_relabel" and _layer(name) not in ORDER]

    assert unknown == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"hf_relabel"}))
def test_a_module_imports_only_from_above(module: str) -> None:
    assert _complaints(module, MODULES[module].read_text()) == []


def test_no_imports_go_in_a_circle() -> None:
    """Raises CycleError, which names the circle; the order alone allows one inside a package."""
    graph = {
        module: set(_imports(file.read_text()))
        for module, file in MODULES.items()
        if module != "hf_relabel"
    }
    TopologicalSorter(graph).prepare()


def test_the_package_imports_none_of_its_modules_at_once() -> None:
    """Names of hf_relabel load where they are first used; for type checkers they are all there."""
    tree = ast.parse(MODULES["hf_relabel"].read_text())
    eager = [
        name
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) and not _is_type_checking(node)
        for name in _imports(ast.unparse(node))
    ]

    assert eager == []


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("cache", "from hf_relabel.cli import main", "stands below"),
        ("cache", "def f():\n    import hf_relabel.hub", "stands below"),
        ("cache", "if TYPE_CHECKING:\n    from hf_relabel.hub import publish", "stands below"),
        ("cache", "from hf_relabel.judges.protocol import Judge", "stands below"),
        ("cache", "from hf_relabel.novel import thing", "no place"),
        ("cache", "from hf_relabel import Relabeler", "name its module"),
        ("cache", "import hf_relabel", "name its module"),
        ("cache", "from . import errors", "relative"),
        ("judges.protocol", "from hf_relabel.judges.scripted import ScriptedJudge", "stands first"),
    ],
)
def test_the_check_itself_catches(module: str, source: str, complaint: str) -> None:
    found = _complaints(f"hf_relabel.{module}", source)

    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cache", "from hf_relabel.errors import CacheError"),
        ("cli", "from hf_relabel import __version__, errors"),
        ("cli", "import hf_relabel_other, hf_relabel.hub"),
        ("judges.remote", "from hf_relabel.judges.protocol import Judge"),
    ],
)
def test_the_check_itself_allows(module: str, source: str) -> None:
    assert _complaints(f"hf_relabel.{module}", source) == []
