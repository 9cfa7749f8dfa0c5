"""Bodies of the Pallas kernels of `short_attention`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from blocktx.config import StackConfig
from blocktx.ops.attention_kernels import LANES
from blocktx.ops.rotary import attention_factor

CHUNK = 16  # blocks computed at a time: a tile of bfloat16
_UNROLL = 2


class Kernel(NamedTuple):
    """A kernel body, and its outputs: as wide as the inputs, and sums over blocks."""

    name: str
    body: Callable
    wide: int
    sums: int


def lanes_of(stack: StackConfig) -> int:
    """Return the lanes of a tile: whole heads."""
    return max(LANES, stack.head_size)


def _forward(stack, blocks, turns_ref, bias_ref, real_ref, q_ref, k_ref, v_ref, y_ref):
    del blocks
    tile = _Tile(stack, turns_ref, bias_ref, y_ref.dtype)

    def chunk(rows, carry):
        q, k, v = tile.inputs((q_ref, k_ref, v_ref), rows)
        for i, (weights, total) in enumerate(tile.weights(q, k, real_ref[0, rows])):
            y = _dot(weights, v) * total
            y_ref[0, i, rows] = y.astype(y_ref.dtype)
        return carry

    _for_chunks(chunk, q_ref.shape[2], ())


def _backward(
    stack,
    blocks,
    turns_ref,
    bias_ref,
    real_ref,
    q_ref,
    k_ref,
    v_ref,
    dy_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dbias_ref,
):
    tile = _Tile(stack, turns_ref, bias_ref, dy_ref.dtype)
    tile_rows, lanes = q_ref.shape[2:]

    left = blocks - pl.program_id(1) * tile_rows  # the last tile may reach beyond all blocks
    row = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, lanes), 0)

    def chunk(rows, sums):
        q, k, v = tile.inputs((q_ref, k_ref, v_ref), rows)
        dq, dk, dv = [], [0.0] * tile.positions, [0.0] * tile.positions
        for i, (weights, total) in enumerate(tile.weights(q, k, real_ref[0, rows])):
            weights = [w * total for w in weights]
            dy = dy_ref[0, i, rows].astype(jnp.float32)
            dweights = tile.sum_heads([dy * v[j] for j in range(i + 1)])
            mean = _dot(weights, dweights)
            dscores = [w * (dw - mean) for w, dw in zip(weights, dweights, strict=True)]
            for j in range(i + 1):
                dk[j] += dscores[j] * q[i]
                dv[j] += weights[j] * dy
            dq.append(tile.turn(_dot(dscores, k) * tile.scale, i, back=True))
        dk = [tile.turn(x * math.log(2), j, back=True) for j, x in enumerate(dk)]
        gradients = (dq, dk, dv)
        for ref, xs in zip((dq_ref, dk_ref, dv_ref), gradients, strict=True):
            for j, x in enumerate(xs):
                ref[0, j, rows] = x.astype(ref.dtype)
        new = [functools.reduce(jnp.add, xs) for xs in gradients]
        if blocks % tile_rows:
            new = [jnp.where(row < left - rows.start, x, 0) for x in new]
        return [total + x for total, x in zip(sums, new, strict=True)]

    zero = [jnp.zeros((CHUNK, lanes), jnp.float32)] * 3
    for part, total in enumerate(_for_chunks(chunk, tile_rows, zero)):
        dbias_ref[0, 0, part] = total.sum(0)


def _for_chunks(chunk, rows: int, carry):
    def body(i, carry):
        return chunk(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK), carry)

    return jax.lax.fori_loop(0, rows // CHUNK, body, carry, unroll=_UNROLL)


def _dot(xs, ys):
    return functools.reduce(jnp.add, [x * y for x, y in zip(xs, ys, strict=False)])


class _Tile:
    """Operations of both kernels on a chunk: lists over positions of float32 `[rows, lanes]`."""

    def __init__(self, stack: StackConfig, turns_ref, bias_ref, dtype):
        lanes = lanes_of(stack)
        self.positions = turns_ref.shape[1]
        self.scale = stack.head_size**-0.5
        self._half = stack.rotary_dims // 2
        self._turns_first = attention_factor(stack) != 1  # position 0 too is scaled
        self._turns_ref, self._bias_ref, self._dtype = turns_ref, bias_ref, dtype
        head = [jax.lax.broadcasted_iota(jnp.int32, (lanes, lanes), a) for a in (0, 1)]
        head = [jax.lax.div(h, stack.head_size) for h in head]
        self._same_head = (head[0] == head[1]).astype(dtype)

    def inputs(self, refs, rows):
        """Return rotated queries and keys, and values. Queries are scaled for scores of base 2."""
        q, k, v = (
            [
                ref[0, i, rows].astype(jnp.float32) + self._bias_ref[part][None]
                for i in range(self.positions)
            ]
            for part, ref in enumerate(refs)
        )
        q = [self.turn(x * (self.scale * math.log2(math.e)), i) for i, x in enumerate(q)]
        return q, [self.turn(x, i) for i, x in enumerate(k)], v

    def turn(self, x, position: int, back: bool = False):
        """Apply the rotary position, or its transpose."""
        if not self._half or not (position or self._turns_first):
            return x
        same, above, below = (self._turns_ref[part, position][None] for part in range(3))
        from_above = pltpu.roll(x, x.shape[-1] - self._half, 1) * above
        from_below = pltpu.roll(x, self._half, 1) * below
        turned = from_above + from_below
        return x * same - turned if back else x * same + turned

    def sum_heads(self, products):
        """Return sums over each head's lanes, at each of these lanes."""
        stacked = jnp.concatenate([x.astype(self._dtype) for x in products])
        sums = jnp.dot(stacked, self._same_head, preferred_element_type=jnp.float32)
        return jnp.split(sums, len(products))

    def weights(self, q, k, real):
        """Yield for each query the weights of the keys up to it, and their normaliser."""
        shape = (real.shape[0], self._same_head.shape[0])
        hidden = jnp.where(real > 0, 0, jnp.finfo(jnp.float32).min)
        hidden = [
            jnp.broadcast_to(hidden[:, j : j + 1], shape) if j else 0 for j in range(self.positions)
        ]
        yield [jnp.ones(shape, jnp.float32)], 1.0
        for i in range(1, self.positions):
            scores = self.sum_heads([q[i] * k[j] for j in range(i + 1)])
            scores = [score + hidden[j] for j, score in enumerate(scores)]
            most = functools.reduce(jnp.maximum, scores)
            powers = [jnp.exp2(score - most) for score in scores]
            yield powers, 1 / functools.reduce(jnp.add, powers)


FORWARD = Kernel("short_attention_forward_kernel", _forward, wide=1, sums=0)
BACKWARD = Kernel("short_attention_backward_kernel", _backward, wide=3, sums=1)
