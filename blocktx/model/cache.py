"""Key-value caches: zero-filled buffers of fixed shape, written in place.

A cache is a tuple of one `LayerCache` a layer, with a leading batch axis. It stores key-value heads
only, side by side. It does not record which slots are in use: the caller passes the first slot of
each write, and masks. All rows of a batch are written at the same slot, although they have
different numbers of positions: a slot for each row would make the write a scatter, which a TPU does
row by row.

A cache in int8 holds a scale for each head of a slot, so a slot is written without reading others.
Attention multiplies scores and weights by the scales, and reads keys and values as integers.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.config import Formulations, ModelConfig, StackConfig
from blocktx.parallel import constrain

_TILE = 32  # slots of 8-bit integers in a TPU's tile
_SELECTED = 1024  # slots up to which selecting in the whole cache is faster on TPU than a scatter
CACHE_AXES = ("batch", "positions", "heads")  # whole heads, side by side


@flax.struct.dataclass
class LayerCache:
    """Keys and values `[S, G * C]` of one layer for one sequence; those of int8 have scales."""

    k_SxE: jax.Array
    v_SxE: jax.Array
    k_scale_SxG: jax.Array | None = None  # float32
    v_scale_SxG: jax.Array | None = None

    @property
    def scales(self) -> tuple[jax.Array, ...]:
        """The scales of keys and values, if any."""
        return () if self.k_scale_SxG is None else (self.k_scale_SxG, self.v_scale_SxG)

    def write(
        self, k_TxE: jax.Array, v_TxE: jax.Array, slot: jax.Array | int, tile: bool = False
    ) -> "LayerCache":
        """Return the cache with T positions written to slots `slot` to `slot + T - 1`.

        The caller ensures that they fit: XLA clamps the slot of a write that does not.

        Args:
          k_TxE, v_TxE: keys and values.
          slot: the first slot.
          tile: write one slot of integers together with the others of its tile, see
            `Formulations.cache_write`.
        """

        def put(buffer_SxE: jax.Array, new_TxE: jax.Array) -> jax.Array:
            new_TxE = constrain(new_TxE.astype(buffer_SxE.dtype), "positions", "heads")
            write = _put
            if tile and self.scales and len(new_TxE) == 1 and len(buffer_SxE) % _TILE == 0:
                write = _put_tile if buffer_SxE.dtype == jnp.int8 else _put_scale
            return constrain(write(buffer_SxE, new_TxE, jnp.asarray(slot)), "positions", "heads")

        new = LayerCache(k_TxE, v_TxE)
        if self.scales:
            heads = self.k_scale_SxG.shape[1]
            (k_TxE, k_scale_TxG), (v_TxE, v_scale_TxG) = (_int8(x, heads) for x in (k_TxE, v_TxE))
            new = LayerCache(k_TxE, v_TxE, k_scale_TxG, v_scale_TxG)
        return jax.tree.map(put, self, new)


def _int8(x_TxE: jax.Array, kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Return integers and float32 scales `[T, G]`, whose product is about `x_TxE`."""
    x_TxGxC = x_TxE.astype(jnp.float32).reshape(len(x_TxE), kv_heads, -1)
    largest_TxG = jnp.abs(x_TxGxC).max(-1)
    scale_TxG = jnp.where(largest_TxG == 0, 1, largest_TxG / 127)
    rounded_TxGxC = jnp.round(x_TxGxC / scale_TxG[..., None])
    return rounded_TxGxC.astype(jnp.int8).reshape(x_TxE.shape), scale_TxG


def _scatter(
    update: Callable, buffer_BxSxE: jax.Array, new_BxTxE: jax.Array, slot_B: jax.Array
) -> jax.Array:
    """Write each row at its own slot."""
    return jax.vmap(update)(buffer_BxSxE, new_BxTxE, slot_B)


def _select(
    update: Callable, buffer_BxSxE: jax.Array, new_Bx1xE: jax.Array, slot_B: jax.Array
) -> jax.Array:
    """Write each row at its own slot. A few slots are read and written whole: see `_SELECTED`."""
    slots = buffer_BxSxE.shape[1]
    if slots > _SELECTED:
        return _scatter(update, buffer_BxSxE, new_Bx1xE, slot_B)
    here_BxSx1 = jnp.arange(slots)[:, None] == slot_B[:, None, None]
    return jnp.where(here_BxSx1, new_Bx1xE, buffer_BxSxE)


def _at_one_slot(update: Callable, at_own_slots: Callable) -> Callable:
    """Return a function that writes all rows of a batch at the same slot.

    JAX batches a dynamic slot to a scatter even if the slot is not batched. XLA then copies the
    whole cache to another layout and back.

    Args:
      update: writes `[..., T, E]` to `[..., S, E]` at a slot.
      at_own_slots: writes `[B, T, E]` to `[B, S, E]` if rows have slots of their own.
    """
    put = jax.custom_batching.custom_vmap(update)

    @put.def_vmap
    def put_in_batch(axis_size, in_batched, buffer_BxSxE, new_BxTxE, slot):
        buffer_BxSxE, new_BxTxE = (
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip((buffer_BxSxE, new_BxTxE), in_batched, strict=False)
        )
        write = functools.partial(at_own_slots, update) if in_batched[2] else put
        return write(buffer_BxSxE, new_BxTxE, slot), True

    return put


def _slice(buffer_xSxE: jax.Array, new_xTxE: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer_xSxE, new_xTxE, slot, axis=-2)


def _tile(buffer_xSxE: jax.Array, new_x1xE: jax.Array, slot: jax.Array) -> jax.Array:
    *rows, slots, width = buffer_xSxE.shape
    tiles_xIxRxE = buffer_xSxE.reshape(*rows, slots // _TILE, _TILE, width)
    old_x1xRxE = jax.lax.dynamic_slice_in_dim(tiles_xIxRxE, slot // _TILE, 1, axis=-3)
    here_Rx1 = jnp.arange(_TILE)[:, None] == slot % _TILE
    tile_x1xRxE = jnp.where(here_Rx1, new_x1xE[..., None, :, :], old_x1xRxE)
    written = jax.lax.dynamic_update_slice_in_dim(tiles_xIxRxE, tile_x1xRxE, slot // _TILE, axis=-3)
    return written.reshape(buffer_xSxE.shape)


_put = _at_one_slot(_slice, _scatter)
_put_scale = _at_one_slot(_slice, _select)
_put_tile = _at_one_slot(_tile, _select)

Cache = tuple[LayerCache, ...]


def create_cache(stack: StackConfig, batch: int, slots: int, dtype: str) -> Cache:
    """Return an empty cache `[batch, S, G * C]` of `slots` positions a sequence."""
    arrays = [(stack.kv_width, dtype)] * 2
    if dtype == "int8":
        arrays += [(stack.kv_heads, "float32")] * 2

    def empty(width: int, dtype: str) -> jax.Array:
        return constrain(jnp.zeros((batch, slots, width), dtype), *CACHE_AXES)

    return tuple(LayerCache(*(empty(*x) for x in arrays)) for _ in range(stack.layers))


def cache_dtype(config: ModelConfig, formulations: Formulations) -> str:
    """Return the dtype of a cache over blocks, or of a vanilla model's over tokens."""
    chosen = formulations.cache_dtype
    return config.compute_dtype if chosen == "compute_dtype" else chosen


def causal_mask(position_T: jax.Array, slots: int, group: int = 1) -> jax.Array:
    """Return `[T, S]` bool, True for slots up to each position.

    Positions in groups (the embeddings of one block) also attend to later ones of their group.
    """
    return jnp.arange(slots) < (position_T[:, None] // group + 1) * group
