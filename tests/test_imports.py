"""Imports point one way: scripts import common, common imports the leaves, and there is no cycle.

The leaves are the modules of archangel/ that a training run needs. An import inside a function
counts like any other.
"""

import ast
import graphlib
from pathlib import Path

import pytest
from test_alike import COPIES, SCRIPTS

ROOT = Path(__file__).parent.parent
LEAF_NAMES = ("errors", "records", "tokens", "tokenized", "run", "packed", "data")
LEAVES = [f"archangel.{name}" for name in LEAF_NAMES]


def project_modules() -> dict[str, Path]:
    """The project's modules, by the names that import them."""
    modules = {path.stem: path for path in ROOT.glob("*.py")}
    for path in (ROOT / "archangel").glob("*.py"):
        if path.stem != "__init__":
            modules[f"archangel.{path.stem}"] = path
    return modules


def find_imports(text: str, modules: set[str]) -> set[str]:
    """Which of these modules some source text imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(node.module)
            for alias in node.names:  # each may be a module
                names.add(f"{node.module}.{alias.name}")
    return names & modules


def import_graph() -> dict[str, set[str]]:
    """Every module of the project, and which modules of the project it imports."""
    modules = project_modules()
    graph = {}
    for name, path in modules.items():
        graph[name] = find_imports(path.read_text(), modules.keys())
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that are imported with `start`, directly or by what it imports."""
    found = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()]:
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def test_find_imports():
    text = """
import os, a
import a.b as c
from a import d, value
from e import f

def g():
    from a.h import i
    if True:
        import j.k
"""
    modules = {"a", "a.b", "a.d", "a.h", "e", "j", "j.k", "os.path", "value"}
    assert find_imports(text, modules) == {"a", "a.b", "a.d", "a.h", "e", "j.k"}


def test_graph_has_the_imports():
    """Also those inside functions. An empty graph would pass all the tests below."""
    graph = import_graph()
    assert graph["common"] == set(LEAVES) - {"archangel.tokens"}
    assert graph["archangel.tokens"] == {"archangel.errors", "archangel.records"}
    assert "archangel.tokens" in graph["archangel.tokenized"]
    assert graph["archangel.run"] == {"archangel.errors", "archangel.records"}
    assert graph["archangel.records"] == {"archangel.errors"}


def test_no_cycle():
    graph = import_graph()
    assert graph.keys() >= {"common", *SCRIPTS, *LEAVES, "archangel.benchmark"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_imports_leaves(leaf):
    """It never imports common, neither directly nor through another module."""
    assert reachable(import_graph(), leaf) <= set(LEAVES)


@pytest.mark.parametrize("script", [*SCRIPTS, *COPIES])
def test_script_imports_common(script):
    """And nothing else of the project."""
    text = (ROOT / f"{script}.py").read_text()
    assert find_imports(text, project_modules().keys()) == {"common"}


def test_package_imports_nothing():
    """Its __init__.py is imported with each of its modules."""
    assert (ROOT / "archangel" / "__init__.py").read_text() == ""
