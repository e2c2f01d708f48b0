"""The notebooks run offline, print what is checked in, and have no training code of their own."""

import ast
import importlib.util
import re
from pathlib import Path

import jupytext
import matplotlib.font_manager  # noqa: F401  (builds its cache, so that no notebook prints a notice)
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SCRIPTS = ("kto", "dpo", "slic", "ppo_offline", "sft")


def load_execute():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def said(notebook: nbformat.NotebookNode) -> list[tuple[int, str, str]]:
    """(cell, kind, text) of all outputs. The text of a picture is empty."""
    lines = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = "" if "image/png" in data else data.get("text/plain", output.get("text", ""))
            lines.append((number, output.get("name", output.output_type), text))
    return lines


def code_cells(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_all_are_here():
    assert NAMES == load_execute().NAMES
    assert NAMES == [
        "1_value_functions",
        "2_equations_to_code",
        "3_one_kto_step",
        "4_archangel_on_a_laptop",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_says_what_is_checked_in(name):
    """After an intended change, run notebooks/execute.py and look at the new outputs."""
    assert said(load_execute().execute(name)) == said(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_says_the_same(name):
    plain = jupytext.read(FOLDER / f"{name}.py")
    notebook = read(name)
    assert [(cell.cell_type, cell.source) for cell in plain.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


@pytest.mark.parametrize("name", NAMES)
def test_checked_in_outputs_are_whole_and_of_no_machine(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = said(notebook)
    assert {kind for _, kind, _ in outputs} <= {"stdout", "display_data", "execute_result"}
    for _, _, text in outputs:
        assert not re.search(r"/tmp|/home|/root|site-packages|Warning|it/s\]|0x[0-9a-f]{6}", text)
    assert "language_info" not in notebook.metadata  # the version of Python


@pytest.mark.parametrize("name", NAMES)
def test_trains_by_the_project_alone(name):
    """No optimizer and no backward pass: kto.train takes the steps. (autograd.grad is allowed.)"""
    tree = ast.parse("\n".join(code_cells(read(name))))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"backward", "optim", "step", "zero_grad", "make_optimizer"}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & {*SCRIPTS, "archangel"}
    assert "matplotlib.pyplot" not in imported  # plots.py and archangel/figures.py draw


def test_every_equation_is_read_from_its_file():
    """Lines tagged with an equation's number are in notebook 2's outputs, not in its cells."""
    notebook = read("2_equations_to_code")
    outputs = "\n".join(text for _, _, text in said(notebook))
    tags = set()
    for script in SCRIPTS:
        for line in (ROOT / f"{script}.py").read_text().splitlines():
            tag = re.search(r"  # \((\d)\)", line)
            if tag:
                tags.add(tag[1])
                assert line.strip() in outputs
                assert line.strip() not in "\n".join(code_cells(notebook))
    assert tags == set("14567")  # (2) is computed nowhere, (3) is a metric
    for tag in "1234567":
        assert any(re.match(rf"## .*\({tag}\)", cell.source) for cell in notebook.cells), tag
