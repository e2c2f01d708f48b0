"""Settings of the whole suite: no network, one thread, a cache of its own, the same examples."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two gain nothing at these sizes
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:  # the workers and all commands inherit it: data is tokenized once
    os.environ["HALOS_CACHE"] = tempfile.mkdtemp(prefix="halos_tests_")

from hypothesis import settings  # noqa: E402

# No deadline, because torch's first call of a function is slow.
settings.register_profile("halos", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("halos")

CACHE = Path(os.environ["HALOS_CACHE"])


def pytest_unconfigure() -> None:
    """Remove the cache, when all workers have ended."""
    if not IS_WORKER:
        shutil.rmtree(CACHE, ignore_errors=True)


# The files that take longest, in the order in which they should begin: with `-n 2 --dist loadfile`
# a long file that begins last keeps one worker busy while the other has nothing left to do.
LONG_FILES = (
    "test_golden.py",
    "test_readme.py",
    "test_resume.py",
    "test_processes.py",
    "test_suite.py",
    "test_hard.py",
    "test_train.py",
    "test_kills.py",
    "test_gpu_check.py",
    "test_benchmark.py",
    "test_notebooks.py",
    "test_errors.py",
    "test_data.py",
    "test_tokens.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    """Begin with the files that take longest."""

    def rank(item) -> int:
        name = item.path.name
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)

    items.sort(key=rank)  # within a file, the order stays
