"""Runs of random weights that are evaluated, and how likely their tokens are, one by one."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from blocktx.checkpoint.params import save_params
from blocktx.config.model import BlockConfig, ModelConfig, StackConfig, VanillaConfig
from blocktx.config.run import DataConfig, RunConfig
from blocktx.data.tokenizer import Tokenizer
from blocktx.model.build import Model, build
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=32, heads=4)
SIZES = dict(vocab_size=300, context_length=128)
BLOCK = BlockConfig(**SIZES, block_decoder=STACK, token_decoder=STACK)
VANILLA = VanillaConfig(**SIZES, decoder=STACK)


@functools.cache
def random_model(config: ModelConfig) -> tuple[Model, dict]:
    model = build(config)
    return model, random_params(model, 0.15)


def save_run(folder: pathlib.Path, config: ModelConfig, random_padding: bool = True) -> str:
    """A run folder with a tokenizer; returns its path."""
    texts = ["the cat sat on the mat and the dog sat on the log"]
    Tokenizer.train(texts, 300, "<|endoftext|>", "<|padding|>").save(folder / "tokenizer.json")
    run = RunConfig(model=config, data=DataConfig(random_padding=random_padding))
    _, params = random_model(config)
    save_params(folder / "run", run, params, tokenizer=folder / "tokenizer.json")
    return str(folder / "run")


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(model, params, tokens, mask):
    return jax.nn.log_softmax(model.apply({"params": params}, tokens, mask), axis=-1)


def log_probabilities(
    model: Model, params: dict, row: Sequence[int], padding: int = 0, mask: np.ndarray | None = None
) -> np.ndarray:
    """`[T, V]` of each token of a row from those before it; nan where there are none.

    The row is alone in a full context, behind so many tokens of padding and before as many as fit.
    """
    config = model.config
    length = config.context_length + (config.kind == "vanilla" and mask is None)
    tokens, real = np.full(length, 1, np.int32), np.zeros(length, bool)
    place = slice(padding, padding + len(row))
    tokens[place], real[place] = row, True if mask is None else mask
    if config.kind == "vanilla":
        known = _log_softmax(model, params, tokens[None, :-1], real[None, :-1])[0]
    else:
        shape = (1, -1, config.block_length)
        known = _log_softmax(model, params, tokens.reshape(shape), real.reshape(shape))
        known = np.asarray(known).reshape(-1, config.vocab_size)
    none = np.full((config.block_length, config.vocab_size), np.nan, np.float32)
    return np.concatenate([none, known])[place]
