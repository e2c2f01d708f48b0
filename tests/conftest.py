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
