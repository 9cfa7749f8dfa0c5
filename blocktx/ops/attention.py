"""Softmax attention: the plain formulation, and others for a cache.

All compute the same function up to rounding. Queries are `[T, H * C]`, keys and values of G heads
`[S, G * C]`, heads side by side as in the cache; query head h reads key-value head h // (H / G).
`mask_TxS` is True where a query attends to a key. A fully masked query attends uniformly to all
keys. Scores and softmax are float32, the result has the dtype of the values.

Keys and values in int8 come with scales `[S, G]`, by which scores and weights are multiplied. The
products read integers, converted to the dtype of the queries, which the result has.

Per-head vector-matrix products leave a TPU's matrix unit idle: for one query of 12 heads over 544
slots at batch 64, XLA's estimate for `attend_by_head` is 3 times that for `attend_block_diagonal`.
On a CPU the latter is faster alone, but not in the loop: block_170m generates 1.0 to 1.4 times as
many tokens a second with the former (64 slots, batches of 1, 8, 32; 544 slots, batches of 1, 8).
There XLA copies a layer's keys and values to have heads first; in a loop over heads, at the same
speed, it copies those of one head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.config import Formulations, StackConfig
from blocktx.ops.rotary import rotary_by_head, rotary_by_product
from blocktx.parallel import axis_parts

_FEW_SLOTS = 16  # the token decoder's cache
_MATRIX_UNIT = 128  # rows or columns of a TPU's


def choose_attention(
    formulations: Formulations, queries: int, slots: int, stack: StackConfig
) -> tuple[Callable, Callable, Callable]:
    """Choose how to rotate queries and keys, and how to attend to a cache.

    Returns:
      `rotate_q(q_TxD, position_T)`, `rotate_k(k_TxE, position_T)` and
      `attend(q_TxD, k_SxE, v_SxE, mask_TxS)`, also with `k_scale_SxG, v_scale_SxG`.
    """
    parts = axis_parts("heads")
    heads, kv_heads = stack.heads // parts, stack.kv_heads // parts
    name = formulations.cached_attention
    if slots <= _FEW_SLOTS:
        name = formulations.token_cached_attention
    elif name == "block_diagonal" and queries * heads > _MATRIX_UNIT:
        name = "by_head"
    attend = functools.partial(ATTENTION[name], heads=heads, kv_heads=kv_heads)
    rotate = rotary_by_product if formulations.cached_rotary == "product" else rotary_by_head
    rotate_q = functools.partial(rotate, stack=stack, heads=heads)
    rotate_k = functools.partial(rotate, stack=stack, heads=kv_heads)
    whole = ((rotate_q, 1), (rotate_k, 1), (attend, 3))
    return tuple(_for_each_part(function, parts, index) for function, index in whole)


def _for_each_part(function: Callable, parts: int, whole: int) -> Callable:
    """Apply `function` to each device's heads, without communication.

    Its argument number `whole` is not split.
    """

    def lifted(*args: jax.Array) -> jax.Array:
        axes = [None if i == whole else 1 for i in range(len(args))]
        split = [
            x if axis is None else x.reshape(len(x), parts, -1)
            for x, axis in zip(args, axes, strict=True)
        ]
        y = jax.vmap(function, axes, out_axes=1)(*split)
        return y.reshape(args[0].shape)

    return function if parts == 1 else lifted


def attend(
    q_TxHxC: jax.Array,
    k_SxGxC: jax.Array,
    v_SxGxC: jax.Array,
    mask_TxS: jax.Array,
    k_scale_SxG: jax.Array | None = None,
    v_scale_SxG: jax.Array | None = None,
) -> jax.Array:
    """Return softmax attention `[T, H, C]`: the reference, and the best for many queries."""
    heads, kv_heads, size = q_TxHxC.shape[1], k_SxGxC.shape[1], q_TxHxC.shape[2]
    wide, scales = dict(preferred_element_type=jnp.float32), ()
    if k_scale_SxG is not None:
        k_SxGxC, v_SxGxC = (x.astype(q_TxHxC.dtype) for x in (k_SxGxC, v_SxGxC))
        scales = [x_SxG.T[:, None] for x_SxG in (k_scale_SxG, v_scale_SxG)]
    if heads == kv_heads:
        scores_HxTxS = jnp.einsum("thc,shc->hts", q_TxHxC, k_SxGxC, **wide)
        weights_HxTxS = _softmax(scores_HxTxS, size, mask_TxS, -1, *scales)
        return jnp.einsum("hts,shc->thc", weights_HxTxS.astype(v_SxGxC.dtype), v_SxGxC)
    q_TxGxRxC = q_TxHxC.reshape(len(q_TxHxC), kv_heads, -1, size)
    scores_GxRxTxS = jnp.einsum("tgrc,sgc->grts", q_TxGxRxC, k_SxGxC, **wide)
    scales = [x_Gx1xS[:, None] for x_Gx1xS in scales]
    weights_GxRxTxS = _softmax(scores_GxRxTxS, size, mask_TxS, -1, *scales)
    y_TxGxRxC = jnp.einsum("grts,sgc->tgrc", weights_GxRxTxS.astype(v_SxGxC.dtype), v_SxGxC)
    return y_TxGxRxC.reshape(q_TxHxC.shape)


def attend_by_products(
    q_TxHxC: jax.Array, k_SxGxC: jax.Array, v_SxGxC: jax.Array, mask_TxS: jax.Array
) -> jax.Array:
    """`attend` for few queries without matrix products: by channel, then summed, in float32.

    XLA for GPUs fuses it and reads queries, keys and values where they lie. For a library's batched
    product it copies them, to have heads first; not so with one query.
    """
    # Without an axis for the queries of a group, which XLA for CPU miscompiles if its size is 1.
    heads, size = q_TxHxC.shape[1:]
    repeats = heads // k_SxGxC.shape[1]
    k_SxHxC, v_SxHxC = (
        jnp.repeat(x.astype(jnp.float32), repeats, axis=1) for x in (k_SxGxC, v_SxGxC)
    )
    scores_TxSxH = (q_TxHxC[:, None].astype(jnp.float32) * k_SxHxC).sum(-1)
    weights_TxSxH = _softmax(scores_TxSxH, size, mask_TxS[..., None], axis=1)
    return (weights_TxSxH[..., None] * v_SxHxC).sum(1)


def attend_by_head(
    q_TxD: jax.Array,
    k_SxE: jax.Array,
    v_SxE: jax.Array,
    mask_TxS: jax.Array,
    k_scale_SxG: jax.Array | None = None,
    v_scale_SxG: jax.Array | None = None,
    *,
    heads: int,
    kv_heads: int,
) -> jax.Array:
    """`attend` of heads side by side."""
    q_TxHxC = q_TxD.reshape(len(q_TxD), heads, -1)
    k_SxGxC, v_SxGxC = (x.reshape(len(x), kv_heads, -1) for x in (k_SxE, v_SxE))
    y_TxHxC = attend(q_TxHxC, k_SxGxC, v_SxGxC, mask_TxS, k_scale_SxG, v_scale_SxG)
    return y_TxHxC.reshape(q_TxD.shape)


def attend_head_by_head(
    q_TxD: jax.Array,
    k_SxE: jax.Array,
    v_SxE: jax.Array,
    mask_TxS: jax.Array,
    k_scale_SxG: jax.Array | None = None,
    v_scale_SxG: jax.Array | None = None,
    *,
    heads: int,
    kv_heads: int,
) -> jax.Array:
    """For a CPU and many slots: no copy of the cache is larger than one head."""
    size = q_TxD.shape[-1] // heads

    def one(head: jax.Array) -> jax.Array:
        def part(x: jax.Array, width: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, head * width, width, axis=1)

        def own(x: jax.Array, count: int) -> jax.Array:
            return part(x, count * size).reshape(len(x), count, size)

        scales = () if k_scale_SxG is None else (part(k_scale_SxG, 1), part(v_scale_SxG, 1))
        q_TxRxC = own(q_TxD, heads // kv_heads)
        return attend(q_TxRxC, own(k_SxE, 1), own(v_SxE, 1), mask_TxS, *scales)

    y_GxTxRxC = jax.lax.map(one, jnp.arange(kv_heads))
    return y_GxTxRxC.swapaxes(0, 1).reshape(q_TxD.shape)


def attend_block_diagonal(
    q_TxD: jax.Array,
    k_SxE: jax.Array,
    v_SxE: jax.Array,
    mask_TxS: jax.Array,
    k_scale_SxG: jax.Array | None = None,
    v_scale_SxG: jax.Array | None = None,
    *,
    heads: int,
    kv_heads: int,
) -> jax.Array:
    """For few queries and many slots: all heads in two matrix products.

    Each head's query is a row of its own, zero outside its key-value head's channels, so that its
    product with whole keys is its score. Of its sum of whole values its own channels are kept. That
    is G times the arithmetic, in rows and columns of the matrix unit that would be empty.
    """
    size = q_TxD.shape[-1] // heads
    own_HxE = _own_channels(heads, kv_heads, size, q_TxD.dtype)
    if heads == kv_heads:
        q_TxHxE = q_TxD[:, None] * own_HxE
    else:
        q_TxHxC = q_TxD.reshape(len(q_TxD), heads, size)
        q_TxHxE = jnp.tile(q_TxHxC, (1, 1, kv_heads)) * own_HxE
    q_THxE, scales = q_TxHxE.reshape(-1, own_HxE.shape[1]), ()
    if k_scale_SxG is not None:
        k_SxE, v_SxE = (x.astype(q_TxD.dtype) for x in (k_SxE, v_SxE))
        repeats = (len(q_TxD), heads // kv_heads)
        scales = [
            jnp.tile(jnp.repeat(x_SxG.T, repeats[1], axis=0), (repeats[0], 1))
            for x_SxG in (k_scale_SxG, v_scale_SxG)
        ]
    scores_THxS = jnp.einsum("nd,sd->ns", q_THxE, k_SxE, preferred_element_type=jnp.float32)
    mask_THxS = jnp.repeat(mask_TxS, heads, axis=0)
    weights_THxS = _softmax(scores_THxS, size, mask_THxS, -1, *scales)
    sums_THxE = jnp.einsum("ns,sd->nd", weights_THxS.astype(v_SxE.dtype), v_SxE)
    sums_TxHxE = sums_THxE.reshape(-1, *own_HxE.shape) * own_HxE
    if heads == kv_heads:
        return sums_TxHxE.sum(1)
    return sums_TxHxE.reshape(-1, heads, kv_heads, size).sum(2).reshape(q_TxD.shape)


def attend_elementwise(
    q_TxD: jax.Array,
    k_SxE: jax.Array,
    v_SxE: jax.Array,
    mask_TxS: jax.Array,
    k_scale_SxG: jax.Array | None = None,
    v_scale_SxG: jax.Array | None = None,
    *,
    heads: int,
    kv_heads: int,
) -> jax.Array:
    """For few slots: products by channel, which a matrix of 0 and 1 sums by head."""
    size, scales = q_TxD.shape[-1] // heads, ()
    if k_scale_SxG is not None:
        k_SxE, v_SxE = (x.astype(q_TxD.dtype) for x in (k_SxE, v_SxE))
        scales = [
            jnp.repeat(x_SxG, heads // kv_heads, axis=1)[:, None]
            for x_SxG in (k_scale_SxG, v_scale_SxG)
        ]
    if heads != kv_heads:
        k_SxE, v_SxE = (repeat_heads(x, heads, kv_heads) for x in (k_SxE, v_SxE))
    own_HxD = _own_channels(heads, heads, size, q_TxD.dtype)
    sums = dict(preferred_element_type=jnp.float32)
    scores_SxTxH = jnp.einsum("std,hd->sth", k_SxE[:, None] * q_TxD, own_HxD, **sums)
    mask_SxTx1 = mask_TxS.T[..., None]
    weights_SxTxH = _softmax(scores_SxTxH, size, mask_SxTx1, 0, *scales)
    weights_SxTxD = jnp.einsum("sth,hd->std", weights_SxTxH.astype(v_SxE.dtype), own_HxD, **sums)
    return (weights_SxTxD * v_SxE[:, None]).sum(0).astype(v_SxE.dtype)


ATTENTION: dict[str, Callable] = {
    "by_head": attend_by_head,
    "head_by_head": attend_head_by_head,
    "block_diagonal": attend_block_diagonal,
    "elementwise": attend_elementwise,
}


def repeat_heads(x_xE: jax.Array, heads: int, kv_heads: int) -> jax.Array:
    """Return key-value heads `[..., G * C]` once for each query head, `[..., H * C]`."""
    x_xGxC = x_xE.reshape(*x_xE.shape[:-1], kv_heads, -1)
    return jnp.repeat(x_xGxC, heads // kv_heads, axis=-2).reshape(*x_xE.shape[:-1], -1)


def _own_channels(heads: int, kv_heads: int, size: int, dtype: jnp.dtype) -> jax.Array:
    """Return `[H, G * C]`: 1 at the channels of each head's key-value head."""
    own_HxG = np.repeat(np.eye(kv_heads), heads // kv_heads, axis=0)
    return jnp.asarray(np.repeat(own_HxG, size, axis=1), dtype)


def _softmax(
    scores: jax.Array,
    head_size: int,
    mask: jax.Array,
    axis: int,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Return weights of values; the scales, in the shape of the scores, are of integers."""
    if k_scale is not None:
        scores = scores * k_scale
    scores = jnp.where(mask, scores * head_size**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=axis)
    return weights if v_scale is None else weights * v_scale
