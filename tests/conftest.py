"""Settings of the whole suite: no network, one thread, the same examples on every run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two gain nothing at these sizes

from hypothesis import settings  # noqa: E402

# No deadline, because torch's first call of a function is slow.
settings.register_profile("halos", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("halos")
