"""Models to measure."""

import dataclasses
from typing import Any

import jax

from blocktx import cost
from blocktx.config import BlockConfig, ModelConfig, VanillaConfig
from blocktx.model import Model, build, for_decoding, init_params


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to measure, with one subtree of parameters per layer."""

    name: str
    model: Model
    params: dict[str, Any]
    loss: float | None = None  # held-out, where it is known


def equal_vanilla(config: BlockConfig) -> VanillaConfig:
    """Return the vanilla model of the block decoder's width with about as many parameters.

    Non-embedding parameters are counted. If both decoders are equally wide, it has the layers of
    both (paper, table 1).
    """
    wanted = cost.count_params(config).non_embedding

    def vanilla(layers: int) -> VanillaConfig:
        return VanillaConfig(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            initializer_range=config.initializer_range,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            tied_classifier=config.tied_classifier,
            platform=config.platform,
            formulations=config.formulations,
            decoder=dataclasses.replace(config.block_decoder, layers=layers),
        )

    one, two = (cost.count_params(vanilla(layers)).non_embedding for layers in (1, 2))
    return vanilla(max(1, round((wanted - one) / (two - one)) + 1))


def random_model(config: ModelConfig) -> tuple[Model, dict]:
    """Return a model with random weights, ready to decode: its speed does not depend on them."""
    model = build(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    return for_decoding(model, params)


def with_room(config: ModelConfig, tokens: int, dtype: str | None = None) -> ModelConfig:
    """Return `config` with a context of `tokens` or more, in `dtype` (None: `compute_dtype`).

    Parameters get the dtype of the computation.
    """
    length = config.block_length
    context = max(config.context_length, -(-tokens // length) * length)
    dtype = dtype or config.compute_dtype
    return dataclasses.replace(
        config, context_length=context, compute_dtype=dtype, param_dtype=dtype
    )
