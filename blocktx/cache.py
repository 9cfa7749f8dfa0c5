"""Key-value caches: zero-filled buffers of fixed shape, written in place.

A cache is one `LayerCache` a layer, in a tuple. The layers see one sequence; across a batch the
buffers carry a leading axis. How many slots are filled is not kept here: the caller passes the slot
that a write begins at, and masks out what lies behind.
"""

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.model_config import StackConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer for one sequence."""

    k_SxHxC: jax.Array
    v_SxHxC: jax.Array

    def write(self, k_TxHxC: jax.Array, v_TxHxC: jax.Array, slot: jax.Array | int) -> "LayerCache":
        """Keys and values of T positions put at slots `slot` to `slot + T - 1`.

        The caller guarantees that they fit: XLA would move a write that does not.
        """

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (slot, 0, 0))

        return LayerCache(put(self.k_SxHxC, k_TxHxC), put(self.v_SxHxC, v_TxHxC))


Cache = tuple[LayerCache, ...]


def create_cache(stack: StackConfig, batch: int, slots: int, dtype: str) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences: `[batch, S, H, C]`."""
    shape = (batch, slots, stack.heads, stack.head_size)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(stack.layers)
    )


def causal_mask(position_T: jax.Array, slots: int, group: int = 1) -> jax.Array:
    """`[T, S]` bool: the slots that a query at each position may see.

    They are its own and all before; of positions in groups (the embeddings of one block), also the
    others of its own group.
    """
    return jnp.arange(slots) < (position_T[:, None] // group + 1) * group
