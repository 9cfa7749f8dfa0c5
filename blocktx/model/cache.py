"""Key-value caches: zero-filled buffers of fixed shape, written in place.

A cache is a tuple of one `LayerCache` a layer, with a leading batch axis. It stores key-value heads
only, side by side. It does not record which slots are in use: the caller passes the first slot of
each write, and masks. All rows of a batch are written at the same slot, although they have
different numbers of positions: a slot for each row would make the write a scatter, which a TPU does
row by row.
"""

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.config import StackConfig
from blocktx.parallel import constrain

CACHE_AXES = ("batch", "positions", "heads")  # whole heads, side by side


@flax.struct.dataclass
class LayerCache:
    """Keys and values `[S, G * C]` of one layer for one sequence."""

    k_SxE: jax.Array
    v_SxE: jax.Array

    def write(self, k_TxE: jax.Array, v_TxE: jax.Array, slot: jax.Array | int) -> "LayerCache":
        """Return the cache with T positions written to slots `slot` to `slot + T - 1`.

        The caller ensures that they fit: XLA clamps the slot of a write that does not.
        """

        def put(buffer_SxE: jax.Array, new_TxE: jax.Array) -> jax.Array:
            new_TxE = constrain(new_TxE.astype(buffer_SxE.dtype), "positions", "heads")
            written_SxE = _put(buffer_SxE, new_TxE, jnp.asarray(slot))
            return constrain(written_SxE, "positions", "heads")

        return LayerCache(put(self.k_SxE, k_TxE), put(self.v_SxE, v_TxE))


@jax.custom_batching.custom_vmap
def _put(buffer_SxE: jax.Array, new_TxE: jax.Array, slot: jax.Array) -> jax.Array:
    """Write all rows of a batch at the same slot.

    JAX batches a dynamic slot to a scatter even if the slot is not batched. XLA then copies the
    whole cache to another layout and back. If rows have slots of their own, it is a scatter.
    """
    return _update(buffer_SxE, new_TxE, slot)


def _update(buffer_SxE: jax.Array, new_TxE: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer_SxE, new_TxE, slot, axis=-2)


@_put.def_vmap
def _put_in_batch(axis_size, in_batched, buffer_BxSxE, new_BxTxE, slot):
    buffer_BxSxE, new_BxTxE = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip((buffer_BxSxE, new_BxTxE), in_batched, strict=False)
    )
    put = jax.vmap(_update) if in_batched[2] else _put
    return put(buffer_BxSxE, new_BxTxE, slot), True


Cache = tuple[LayerCache, ...]


def create_cache(stack: StackConfig, batch: int, slots: int, dtype: str) -> Cache:
    """Return an empty cache `[batch, S, G * C]` of `slots` positions a sequence."""

    def empty() -> jax.Array:
        return constrain(jnp.zeros((batch, slots, stack.kv_width), dtype), *CACHE_AXES)

    return tuple(LayerCache(empty(), empty()) for _ in range(stack.layers))


def causal_mask(position_T: jax.Array, slots: int, group: int = 1) -> jax.Array:
    """Return `[T, S]` bool, True for slots up to each position.

    Positions in groups (the embeddings of one block) also attend to later ones of their group.
    """
    return jnp.arange(slots) < (position_T[:, None] // group + 1) * group
