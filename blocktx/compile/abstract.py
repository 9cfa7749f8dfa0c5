"""Arguments of the decoding programs as ShapeDtypeStructs."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from blocktx.config import ModelConfig
from blocktx.decode import Prompts
from blocktx.model import quantize
from blocktx.parallel import replicated


def prompts(config: ModelConfig, rows: int, slots: int) -> Prompts:
    """Return prompts that fill their cache."""
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, slots, config.block_length), jnp.int32)
    return Prompts(tokens, numbers, numbers, numbers, numbers, cache_blocks=slots)


def quantized_params(
    config: ModelConfig, params: dict[str, Any], kind: Literal["int8"] | None
) -> dict[str, Any]:
    """Return `blocktx.model.quantize` of ShapeDtypeStructs."""
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
