"""Run the notebooks: each plain-text .py here becomes the .ipynb beside it, with its outputs.

    python notebooks/execute.py                       # all of them, after a change
    python notebooks/execute.py 1_value_functions     # one

The .py is what is written and reviewed (cells between `# %%` lines, which Jupyter opens by
jupytext); the .ipynb is made from it, to be read where it lies. Offline, on the CPU.
"""

import argparse
import os
import tempfile
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))


def execute(name: str) -> nbformat.NotebookNode:
    """The notebook of `name`.py, run from its first cell to its last, its outputs in it.

    Nothing in it tells when, where or by which Python it ran. Raises CellExecutionError where a
    cell fails.
    """
    paired = jupytext.read(FOLDER / f"{name}.py")
    paired.metadata = {key: paired.metadata[key] for key in ("jupytext", "kernelspec")}
    notebook = nbformat.from_dict({**paired, "nbformat": 4, "nbformat_minor": 5})
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"  # the same at every run, where the library would draw one
    # No folder to look for kernels in: what is left is the Python that runs this.
    kernels = KernelSpecManager(kernel_dirs=[])
    with tempfile.TemporaryDirectory() as sockets:  # of files, not ports that others can reach
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=kernels,
            transport="ipc",
            ip=f"{sockets}/kernel",
        )
        where = {"metadata": {"path": str(FOLDER)}}
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=600,  # seconds a cell: for one that hangs
            resources=where,
            record_timing=False,
            coalesce_streams=True,
        )
        settings = {
            "OMP_NUM_THREADS": "1",  # two gain nothing at these sizes
            # A library warns that it cannot draw a progress bar in a notebook; none is wanted.
            "PYTHONWARNINGS": "ignore:IProgress not found",
        }
        client.execute(cleanup_kc=True, env={**os.environ, **settings})
    del notebook.metadata["language_info"]  # names the version of Python
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks and write their .ipynb.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    names = parser.parse_args().names or NAMES
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"no notebook {', '.join(unknown)} in {FOLDER}")
    for name in names:
        nbformat.write(execute(name), FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb")


if __name__ == "__main__":
    main()
