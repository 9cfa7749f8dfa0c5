"""Models from their configuration, and their parameters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, Sharding

from blocktx.config import ModelConfig
from blocktx.model.block_transformer import BlockTransformer
from blocktx.model.vanilla import Vanilla
from blocktx.parallel import shardings

Model = BlockTransformer | Vanilla


def build(config: ModelConfig) -> Model:
    """The module that `config` describes, its `platform` settled."""
    if config.platform == "auto":
        config = dataclasses.replace(config, platform=jax.default_backend())
    return BlockTransformer(config) if config.kind == "block" else Vanilla(config)


def abstract_params(config: ModelConfig, place: Mesh | AbstractMesh | Sharding) -> dict[str, Any]:
    """The parameters of a model as ShapeDtypeStructs, over a mesh by `blocktx.parallel`'s rules.

    A sharding in place of a mesh is that of all of them.
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
    """New parameters as nested dicts of arrays: normal weights, zero biases, unit norm scales."""
    return nn.meta.unbox(_init(model, key))


def _init(model: Model, key: jax.Array) -> dict[str, Any]:
    """Those, each in a box with the names of its axes."""
    shape = (1, 2, model.config.block_length) if model.config.kind == "block" else (1, 2)
    tokens = jnp.zeros(shape, jnp.int32)
    return model.init(key, tokens, tokens)["params"]
