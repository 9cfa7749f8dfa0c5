"""Softmax attention in the formulations that decoding needs, one of them for each kind of work.

All are the same function to rounding: queries `[T, D]` over keys and values `[S, D]`, whose heads
lie side by side as in the cache. `mask_TxS` is True where a query may see a key; a query that may
see none sees all alike. Scores and softmax are float32, the result has the dtype of the values.

A TPU multiplies matrices, and a vector by a matrix for each head is none: for one query of 12 heads
over 544 slots at batch 64, XLA's estimate for `attend_by_head` is 3 times that for
`attend_block_diagonal`. On a CPU the latter is faster alone, but not in the loop: block_170m
generates 1.0 to 1.4 times as many tokens a second with the former (64 slots, batches of 1, 8, 32;
544 slots, batches of 1, 8). There XLA copies a layer's keys and values to have heads first; one
head after the other, at the same speed, it copies those of one head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.config import StackConfig
from blocktx.ops.rotary import rotary_by_head, rotary_by_product
from blocktx.parallel import axis_parts

_FEW_SLOTS = 16  # the token decoder's cache


_MATRIX_UNIT = 128  # rows or columns of a TPU's


def formulation(
    platform: str, queries: int, slots: int, stack: StackConfig
) -> tuple[Callable, Callable]:
    """How to rotate queries and keys, and how to attend to a cache.

    On a CPU and a GPU, where nothing was measured, all is by head.

    Returns:
      `rotate(x_TxD, position_T)` and `attend(q_TxD, k_SxD, v_SxD, mask_TxS)`, both `[T, D]`.
    """
    parts = axis_parts("heads")
    heads = stack.heads // parts
    attend_ = attend_by_head
    if slots <= _FEW_SLOTS:
        if platform == "tpu":
            attend_ = attend_elementwise
    elif platform == "tpu" and queries * heads <= _MATRIX_UNIT:
        attend_ = attend_block_diagonal
    elif platform == "cpu":
        attend_ = attend_head_after_head
    rotate = rotary_by_product if platform == "tpu" else rotary_by_head
    turn = dict(heads=heads, dims=stack.rotary_dims, base=stack.rotary_base)
    return (
        _of_each_part(functools.partial(rotate, **turn), parts),
        _of_each_part(functools.partial(attend_, heads=heads), parts),
    )


def _of_each_part(function: Callable, parts: int) -> Callable:
    """`function` of the heads on each of `parts` devices, which then tell each other nothing.

    Its last argument is the same for all.
    """

    def lifted(*args: jax.Array) -> jax.Array:
        *wide, last = args
        cut = [x.reshape(len(x), parts, -1) for x in wide]
        y = jax.vmap(function, (*[1] * len(cut), None), out_axes=1)(*cut, last)
        return y.reshape(wide[0].shape)

    return function if parts == 1 else lifted


def attend_by_head(
    q_TxD: jax.Array, k_SxD: jax.Array, v_SxD: jax.Array, mask_TxS: jax.Array, heads: int
) -> jax.Array:
    """The reference, and the best there is for many queries."""
    q_TxHxC, k_SxHxC, v_SxHxC = (x.reshape(len(x), heads, -1) for x in (q_TxD, k_SxD, v_SxD))
    return attend(q_TxHxC, k_SxHxC, v_SxHxC, mask_TxS).reshape(q_TxD.shape).astype(v_SxD.dtype)


def attend_head_after_head(
    q_TxD: jax.Array, k_SxD: jax.Array, v_SxD: jax.Array, mask_TxS: jax.Array, heads: int
) -> jax.Array:
    """For a CPU and many slots: no copy of the cache is larger than one head."""
    size = q_TxD.shape[-1] // heads

    def one(head: jax.Array) -> jax.Array:
        q_k_v = (
            jax.lax.dynamic_slice_in_dim(x, head * size, size, axis=1)[:, None]
            for x in (q_TxD, k_SxD, v_SxD)
        )
        return attend(*q_k_v, mask_TxS)[:, 0]

    y_HxTxC = jax.lax.map(one, jnp.arange(heads))
    return y_HxTxC.swapaxes(0, 1).reshape(q_TxD.shape).astype(v_SxD.dtype)


def attend(
    q_TxHxC: jax.Array, k_SxHxC: jax.Array, v_SxHxC: jax.Array, mask_TxS: jax.Array
) -> jax.Array:
    """Softmax attention, `[T, H, C]`. A query without a key that it may see sees all alike."""
    scores_HxTxS = jnp.einsum("thc,shc->hts", q_TxHxC, k_SxHxC, preferred_element_type=jnp.float32)
    weights_HxTxS = _softmax(scores_HxTxS, q_TxHxC.shape[-1], mask_TxS, axis=-1)
    return jnp.einsum("hts,shc->thc", weights_HxTxS.astype(v_SxHxC.dtype), v_SxHxC)


def attend_block_diagonal(
    q_TxD: jax.Array, k_SxD: jax.Array, v_SxD: jax.Array, mask_TxS: jax.Array, heads: int
) -> jax.Array:
    """For few queries and many slots: all heads in two matrix products.

    Each head's query stands alone in a row of zeros, so that its product with whole keys is its
    score; of its sum of whole values its own part is kept. That is H times the arithmetic, in
    rows and columns that the matrix unit would leave empty.
    """
    own_HxD = _own_channels(heads, q_TxD.shape[-1], q_TxD.dtype)
    q_THxD = (q_TxD[:, None] * own_HxD).reshape(-1, q_TxD.shape[-1])
    scores_THxS = jnp.einsum("nd,sd->ns", q_THxD, k_SxD, preferred_element_type=jnp.float32)
    mask_THxS = jnp.repeat(mask_TxS, heads, axis=0)
    weights_THxS = _softmax(scores_THxS, q_TxD.shape[-1] // heads, mask_THxS, axis=-1)
    sums_THxD = jnp.einsum("ns,sd->nd", weights_THxS.astype(v_SxD.dtype), v_SxD)
    return (sums_THxD.reshape(-1, *own_HxD.shape) * own_HxD).sum(1)


def attend_elementwise(
    q_TxD: jax.Array, k_SxD: jax.Array, v_SxD: jax.Array, mask_TxS: jax.Array, heads: int
) -> jax.Array:
    """For few slots: products channel by channel, which a matrix of 0 and 1 sums up by head."""
    own_HxD = _own_channels(heads, q_TxD.shape[-1], q_TxD.dtype)
    sums = dict(preferred_element_type=jnp.float32)
    scores_SxTxH = jnp.einsum("std,hd->sth", k_SxD[:, None] * q_TxD, own_HxD, **sums)
    mask_SxTx1 = mask_TxS.T[..., None]
    weights_SxTxH = _softmax(scores_SxTxH, q_TxD.shape[-1] // heads, mask_SxTx1, axis=0)
    weights_SxTxD = jnp.einsum("sth,hd->std", weights_SxTxH.astype(v_SxD.dtype), own_HxD, **sums)
    return (weights_SxTxD * v_SxD[:, None]).sum(0).astype(v_SxD.dtype)


def _own_channels(heads: int, width: int, dtype: jnp.dtype) -> jax.Array:
    """`[H, D]`: 1 at the channels of each head."""
    return jnp.asarray(np.repeat(np.eye(heads), width // heads, axis=1), dtype)


def _softmax(scores: jax.Array, head_size: int, mask: jax.Array, axis: int) -> jax.Array:
    scores = jnp.where(mask, scores * head_size**-0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=axis)
