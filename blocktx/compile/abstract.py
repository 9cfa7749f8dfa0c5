"""Arguments of the decoding programs as ShapeDtypeStructs."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blocktx.config import ModelConfig
from blocktx.decode import Prompts
from blocktx.model import abstract_params, build, for_decoding, quantize
from blocktx.parallel import replicated


def prompts(config: ModelConfig, rows: int, slots: int) -> Prompts:
    """Return prompts that fill their cache."""
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, slots, config.block_length), jnp.int32)
    return Prompts(tokens, numbers, numbers, numbers, numbers, cache_blocks=slots)


def decoding_params(
    config: ModelConfig, mesh: Mesh, kind: Literal["int8"] | None
) -> dict[str, Any]:
    """Return parameters as `for_decoding` and `quantize` return them.

    Args:
      config: of a model with `scan_layers` False.
      mesh: over which they are sharded.
      kind: of `quantize`.
    """
    wide, model = abstract_params(config, mesh), build(config)
    shapes = jax.eval_shape(lambda params: for_decoding(model, params)[1], wide)
    params = jax.tree.map(lambda x, like: like.update(sharding=x.sharding), wide, shapes)
    if kind is None:
        return params

    def place(old: jax.ShapeDtypeStruct, new: Any) -> Any:
        def like(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # The axes that share a scale are not sharded.
            axes = (*old.sharding.spec, *[None] * x.ndim)[: x.ndim]
            kept = PartitionSpec(
                *(a if n > 1 else None for a, n in zip(axes, x.shape, strict=True))
            )
            return jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(old.sharding.mesh, kept)
            )

        return jax.tree.map(like, new)

    shapes = jax.eval_shape(functools.partial(quantize, config, kind=kind), params)
    return jax.tree.map(place, params, shapes)


def placed(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Return a tree of ShapeDtypeStructs; those without rows, such as a count, are replicated."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        where = sharding if x.ndim else replicated(sharding.mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def bytes_on_a_chip(tree: Any) -> int:
    """Return the bytes of a tree of ShapeDtypeStructs that one chip holds."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        part = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        return part.size * part.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
