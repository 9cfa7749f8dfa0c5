"""Settings of the whole suite, and the tiny run that several files look at."""

import os

# Most of the suite's time is compilation; results are the same to the tests' tolerances.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest
from tiny_run import run_config, write_corpus

from blocktx.config import DataConfig
from blocktx.train import train


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Configuration, folder and final state of a run of four steps with checkpoints at 2 and 4."""
    config = run_config(data, checkpoint_every=2)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return config, workdir, train(config, workdir)
