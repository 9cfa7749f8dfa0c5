"""Models from their configuration, and their parameters."""

import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, Sharding

from blocktx.config import ModelConfig
from blocktx.model.attention import cudnn_problem
from blocktx.model.block_transformer import BlockTransformer
from blocktx.model.sharding import shardings
from blocktx.model.vanilla import Vanilla

Model = BlockTransformer | Vanilla

_log = logging.getLogger("blocktx.model")


def build(config: ModelConfig) -> Model:
    """Return the module that `config` describes.

    Its `formulations` are those of the backend, but for the ones chosen by hand. Its `config` is
    `config`. A warning is logged once if they name cuDNN's attention and it does not apply.
    """
    platform = jax.default_backend() if config.platform == "auto" else config.platform
    formulations = config.formulations.resolved(platform)
    if formulations.self_attention == "cudnn":
        stack = config.block_decoder if config.kind == "block" else config.decoder
        _log_fallback(cudnn_problem(config, stack))
    cls = BlockTransformer if config.kind == "block" else Vanilla
    return cls(config, formulations)


@functools.cache
def _log_fallback(problem: str) -> None:
    if problem:
        _log.warning("attention over whole sequences stores all scores: %s", problem)


def abstract_params(config: ModelConfig, place: Mesh | AbstractMesh | Sharding) -> dict[str, Any]:
    """Return the parameters of a model as ShapeDtypeStructs with shardings.

    Args:
      config: of the model.
      place: a mesh, over which they are sharded by the rules of `blocktx.parallel`, or a sharding
        for all of them.
    """
    model = build(config)
    boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    shapes = nn.meta.unbox(boxed)
    if isinstance(place, Sharding):
        places = jax.tree.map(lambda _: place, shapes)
    else:
        places = shardings(boxed, place)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        places,
    )


def init_params(model: Model, key: jax.Array) -> dict[str, Any]:
    """Return new parameters, nested dicts: normal weights, zero biases, unit norm scales."""
    return nn.meta.unbox(_init(model, key))


def _init(model: Model, key: jax.Array) -> dict[str, Any]:
    """Return parameters boxed with the names of their axes."""
    shape = (1, 2, model.config.block_length) if model.config.kind == "block" else (1, 2)
    tokens = jnp.zeros(shape, jnp.int32)
    return model.init(key, tokens, tokens)["params"]
