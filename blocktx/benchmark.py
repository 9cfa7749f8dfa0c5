"""Measured decoding throughput, of a block model and of a vanilla model of the same size."""

import dataclasses
import statistics
import time

import jax
import numpy as np

from blocktx import decoding
from blocktx.model import Model, build, count_params, init_params
from blocktx.model_config import BlockConfig, VanillaConfig


def equal_vanilla(config: BlockConfig) -> VanillaConfig:
    """The vanilla model as wide as the block decoder whose non-embedding parameters come nearest.

    Where both decoders are equally wide, its layers are theirs together (paper, table 1).
    """
    wanted = count_params(config)[1]

    def vanilla(layers: int) -> VanillaConfig:
        return VanillaConfig(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            initializer_range=config.initializer_range,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            decoder=dataclasses.replace(config.block_decoder, layers=layers),
        )

    one, two = (count_params(vanilla(layers))[1] for layers in (1, 2))
    return vanilla(max(1, round((wanted - one) / (two - one)) + 1))


def random_model(config: BlockConfig | VanillaConfig) -> tuple[Model, dict]:
    """A model with new weights, ready to decode: speed does not depend on what they are."""
    model = build(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    return decoding.separate_layers(model, params)


def decode_throughput(
    models: list[tuple[Model, dict]],
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 3,
) -> list[float]:
    """Generated tokens a second of each model, prefill included, all rows to their last token.

    The models take turns, so that a change in the machine's speed meets all of them alike. The
    first round compiles and is not counted; the result is the median of the others.
    """
    seconds = [[] for _ in models]
    for _ in range(repeats + 1):
        for (model, params), measured in zip(models, seconds, strict=True):
            tokens_BxT = np.random.default_rng(0).integers(
                0, model.config.vocab_size, (batch_size, prompt_tokens)
            )
            begin = time.perf_counter()
            decoding.generate(
                model,
                params,
                tokens_BxT,
                np.ones_like(tokens_BxT),
                max_new_tokens=new_tokens,
                temperature=0,
            )
            measured.append(time.perf_counter() - begin)
    return [batch_size * new_tokens / statistics.median(measured[1:]) for measured in seconds]
