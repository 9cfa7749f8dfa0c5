import os

# Most of the suite's time is compilation; results are the same to the tests' tolerances.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
