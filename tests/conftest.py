"""Settings of the whole suite."""

from hypothesis import settings

# The same examples on every run; no deadline, because torch's first call of a function is slow.
settings.register_profile("halos", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("halos")
