"""Key-value caches: zero-filled buffers of fixed shape, written in place.

A cache is one `LayerCache` a layer, in a tuple. The layers see one sequence; across a batch the
buffers carry a leading axis. What the slots hold is not kept here: the caller passes the slot that
a write begins at, and masks out what a query may not see. All rows of a batch are written at the
same slot, however many positions each has before it: a slot of its own for each row would make the
write a scatter, which a TPU does row after row.
"""

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.config import StackConfig
from blocktx.parallel import constrain

CACHE_AXES = ("batch", "positions", "heads")  # whole heads, side by side


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer for one sequence, all heads side by side."""

    k_SxD: jax.Array
    v_SxD: jax.Array

    def write(self, k_TxD: jax.Array, v_TxD: jax.Array, slot: jax.Array | int) -> "LayerCache":
        """Keys and values of T positions put at slots `slot` to `slot + T - 1`.

        The caller guarantees that they fit: XLA would move a write that does not.
        """

        def put(buffer_SxD: jax.Array, new_TxD: jax.Array) -> jax.Array:
            new_TxD = constrain(new_TxD.astype(buffer_SxD.dtype), "positions", "heads")
            written_SxD = _put(buffer_SxD, new_TxD, jnp.asarray(slot))
            return constrain(written_SxD, "positions", "heads")

        return LayerCache(put(self.k_SxD, k_TxD), put(self.v_SxD, v_TxD))


@jax.custom_batching.custom_vmap
def _put(buffer_SxD: jax.Array, new_TxD: jax.Array, slot: jax.Array) -> jax.Array:
    """Of any batch, all rows at the same slot.

    JAX's rule for a batch makes a scatter of it, even though the slot is one: XLA then copies the
    whole cache to another layout and back. Where rows have slots of their own, it is one.
    """
    return _update(buffer_SxD, new_TxD, slot)


def _update(buffer_SxD: jax.Array, new_TxD: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer_SxD, new_TxD, slot, axis=-2)


@_put.def_vmap
def _put_in_batch(axis_size, in_batched, buffer_BxSxD, new_BxTxD, slot):
    buffer_BxSxD, new_BxTxD = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip((buffer_BxSxD, new_BxTxD), in_batched, strict=False)
    )
    put = jax.vmap(_update) if in_batched[2] else _put
    return put(buffer_BxSxD, new_BxTxD, slot), True


Cache = tuple[LayerCache, ...]


def create_cache(stack: StackConfig, batch: int, slots: int, dtype: str) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences: `[batch, S, D]`."""

    def empty() -> jax.Array:
        return constrain(jnp.zeros((batch, slots, stack.width), dtype), *CACHE_AXES)

    return tuple(LayerCache(empty(), empty()) for _ in range(stack.layers))


def causal_mask(position_T: jax.Array, slots: int, group: int = 1) -> jax.Array:
    """`[T, S]` bool: the slots that a query at each position may see.

    They are its own and all before; of positions in groups (the embeddings of one block), also the
    others of its own group.
    """
    return jnp.arange(slots) < (position_T[:, None] // group + 1) * group
