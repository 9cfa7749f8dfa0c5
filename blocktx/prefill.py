"""Prompts into an empty cache, a few rows at a time, so that activations stay small beside it."""

from typing import Any

import jax
import jax.numpy as jnp

from blocktx.cache import CACHE_AXES, Cache
from blocktx.model import Model
from blocktx.sharding import axis_parts, constrain

# Of a device: enough to keep matrix products busy; the scores of 2048 are 200 MB.
_POSITIONS_AT_ONCE = 1024


def fill_cache(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    slots: int,
) -> Cache:
    """A cache of `slots` blocks, with the N blocks of every row in the first N. No logit is made.

    What a row's blocks of padding leave there is for the caller to hide.
    """
    rows, blocks, _ = tokens_BxNxK.shape
    at_once = _rows_at_once(rows, blocks * model.config.embeddings_per_block)

    def extend(tokens_RxNxK: jax.Array, mask_RxNxK: jax.Array, cache: Cache) -> Cache:
        start_R = jnp.zeros(len(tokens_RxNxK), jnp.int32)
        arguments = (tokens_RxNxK, mask_RxNxK, start_R, cache, 0, None)
        return model.apply({"params": params}, *arguments, method="extend")[1]

    cache = model.create_cache(rows, slots)
    if at_once == rows:
        return extend(tokens_BxNxK, mask_BxNxK, cache)

    # Group g has rows g, g + groups, ...: rows spread over devices are so within each.
    def by_group(x_B: jax.Array) -> jax.Array:
        return x_B.reshape(at_once, rows // at_once, *x_B.shape[1:])

    def fill(group: jax.Array, cache: Cache) -> Cache:
        tokens_RxNxK, mask_RxNxK = (
            jax.lax.dynamic_index_in_dim(by_group(x), group, axis=1, keepdims=False)
            for x in (tokens_BxNxK, mask_BxNxK)
        )
        filled = extend(tokens_RxNxK, mask_RxNxK, model.create_cache(at_once, blocks))

        def put(buffer_BxSxD: jax.Array, new_RxTxD: jax.Array) -> jax.Array:
            start = (0, group, 0, 0)
            buffer_RxGxSxD = by_group(buffer_BxSxD)
            written = jax.lax.dynamic_update_slice(buffer_RxGxSxD, new_RxTxD[:, None], start)
            return constrain(written.reshape(buffer_BxSxD.shape), *CACHE_AXES)

        return jax.tree.map(put, cache, filled)

    return jax.lax.fori_loop(0, rows // at_once, fill, cache)


def _rows_at_once(rows: int, positions: int) -> int:
    """The most rows that are few enough for a device, and of which there is a whole number."""
    most = max(1, _POSITIONS_AT_ONCE // positions) * axis_parts("batch")
    return max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)
