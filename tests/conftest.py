"""Settings of the whole suite, and the tiny run that several files look at."""

import importlib.util
import os
import pathlib
from collections.abc import Callable

# Most of the suite's time is compilation; results are the same to the tests' tolerances.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from blocktx.config.run import DataConfig
from blocktx.parallel.backend import choose_backend
from blocktx.train.loop import train
from tests.helpers.fake_devices import FAST_COMPILATION
from tests.helpers.tiny_run import run_config, write_corpus

choose_backend()  # libtpu without a TPU prints errors
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    # XLA reads the variable at its first compilation. libtpu, which may be loaded later, would end
    # the process: it does not know the flag.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {FAST_COMPILATION}".strip()
    jax.jit(lambda: 0)()
    os.environ["XLA_FLAGS"] = flags


# Files that take longest, which workers are given first.
LONG = (
    "tests/train/test_multihost.py",
    "tests/model/test_formulations.py",
    "tests/parallel/test_sharding.py",
    "tests/train/test_distill.py",
    "tests/model/test_golden.py",
    "tests/reproduce/test_reproduce.py",
    "tests/model/test_variants.py",
    "tests/train/test_endings.py",
    "tests/train/test_loop.py",
    "tests/decode/test_continuous.py",
    "tests/decode/test_platforms.py",
    "tests/launch/test_restart.py",
    "tests/serve/test_server.py",
    "tests/convert/test_uptrain.py",
    "tests/test_cost.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """A process of Linux has 65,530 mappings of memory, and a compiled program several of them.

    `test_variants.py` alone leaves 9,000.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Configuration, folder and final state of a run of four steps with checkpoints at 2 and 4."""
    config = run_config(data, checkpoint_every=2)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return config, workdir, train(config, workdir)


@pytest.fixture(scope="session")
def convert() -> Callable[..., None]:
    """`launch/convert.py`, called with the arguments of a command line."""
    script = pathlib.Path(__file__).parents[1] / "launch" / "convert.py"
    spec = importlib.util.spec_from_file_location("launch_convert", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(arg) for arg in argv])
