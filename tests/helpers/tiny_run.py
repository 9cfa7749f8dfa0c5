"""A corpus of two files and a model of 1 + 1 layers, for tests that train."""

import pathlib
import random

from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

STACK = StackConfig(layers=1, width=32, heads=4)
MODEL = BlockConfig(vocab_size=300, context_length=32, block_decoder=STACK, token_decoder=STACK)


def write_corpus(folder: pathlib.Path) -> DataConfig:
    """Writes a corpus below `folder`, and returns the data configuration for it."""
    rng = random.Random(0)
    (folder / "corpus").mkdir()
    for name in "ab":
        words = rng.choices(["block", "token", "context", "lookup", "prefix", "cache"], k=600)
        (folder / "corpus" / f"{name}.txt").write_text(" ".join(words))
    return DataConfig(
        source=str(folder / "corpus"), holdout_every=2, cache_dir=str(folder / "cache")
    )


def run_config(data: DataConfig, *, optimizer: dict | None = None, **training) -> RunConfig:
    """Four steps that log each and save and evaluate at the end, but for what is given."""
    settings = dict(steps=4, batch_size=4, log_every=1) | training
    return RunConfig(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(**(optimizer or {})),
        training=TrainingConfig(**settings),
    )
