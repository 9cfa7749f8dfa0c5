"""Prompts into an empty cache, a few rows at a time, so that activations stay small beside it."""

from typing import Any

import jax
import jax.numpy as jnp

from blocktx.cache import Cache
from blocktx.model import Model

_POSITIONS_AT_ONCE = 1024  # enough to keep matrix products busy; the scores of 2048 are 200 MB


def prefill(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    cache: Cache,
) -> Cache:
    """The cache with the blocks of every row in slots 0 to N - 1. No context is handed over."""
    rows, blocks, _ = tokens_BxNxK.shape
    positions = blocks * getattr(model.config, "embeddings_per_block", 1)
    most = max(1, _POSITIONS_AT_ONCE // positions)
    at_once = max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)

    def extend(tokens_RxNxK: jax.Array, mask_RxNxK: jax.Array, cache: Cache) -> Cache:
        start_R = jnp.zeros(len(tokens_RxNxK), jnp.int32)
        arguments = (tokens_RxNxK, mask_RxNxK, start_R, cache, 0, None)
        return model.apply({"params": params}, *arguments, method="extend")[1]

    if at_once == rows:
        return extend(tokens_BxNxK, mask_BxNxK, cache)

    # Group g has rows g, g + groups, ...: a sharded batch stays sharded within each.
    def group_axis(x_B: jax.Array) -> jax.Array:
        return x_B.reshape(at_once, rows // at_once, *x_B.shape[1:])

    def fill(group: jax.Array, cache: Cache) -> Cache:
        tokens_RxNxK, mask_RxNxK = (
            jax.lax.dynamic_index_in_dim(group_axis(x), group, axis=1, keepdims=False)
            for x in (tokens_BxNxK, mask_BxNxK)
        )
        filled = extend(tokens_RxNxK, mask_RxNxK, model.create_cache(at_once, blocks))

        def put(buffer_BxSxD: jax.Array, new_RxTxD: jax.Array) -> jax.Array:
            start = (0, group, 0, 0)
            buffer_RxGxSxD = group_axis(buffer_BxSxD)
            written = jax.lax.dynamic_update_slice(buffer_RxGxSxD, new_RxTxD[:, None], start)
            return written.reshape(buffer_BxSxD.shape)

        return jax.tree.map(put, cache, filled)

    return jax.lax.fori_loop(0, rows // at_once, fill, cache)
