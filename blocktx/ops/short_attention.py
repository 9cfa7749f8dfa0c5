"""Causal self-attention over the few positions of a block, as a Pallas kernel for TPU.

XLA gives the T x T scores of each head of each block a tile of 8 x 128 of their own, of which T = 5
leaves 39 of 40 places empty. Here blocks lie along sublanes and the width along lanes, so that
every tile is full, and positions are unrolled: the scores of all blocks for one query and one key
are products along lanes, summed within each head by a matrix of ones that also spreads the sum over
the head's lanes. Softmax and what follows are then elementwise. Rotary positions are applied
inside, and only the inputs are kept for the gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from blocktx.config import StackConfig

MAX_POSITIONS = 16  # all pairs of positions are unrolled


_LANES = 128


_ROWS = 256  # blocks in a tile of the grid


_UNROLL = 2


_CHUNK = 16  # blocks worked on at a time: a tile of bfloat16


def is_short(stack: StackConfig, x_TxD: jax.Array) -> bool:
    """Whether `short_attention` can do it: few positions, and whole heads in whole tiles."""
    whole = stack.head_size % _LANES == 0 or _LANES % stack.head_size == 0
    return x_TxD.shape[0] <= MAX_POSITIONS and whole and stack.width % _lanes(stack) == 0


def _lanes(stack: StackConfig) -> int:
    return max(_LANES, stack.head_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def short_attention(
    q_TxD: jax.Array,
    k_TxD: jax.Array,
    v_TxD: jax.Array,
    bias_3xD: jax.Array,
    real_T: jax.Array,
    stack: StackConfig,
) -> jax.Array:
    """Outputs `[T, D]` of causal attention with rotary positions over one block; lift by `vmap`.

    Args:
      q_TxD, k_TxD, v_TxD: before bias and rotary positions, heads side by side.
      bias_3xD: added to them; the same for all blocks. It is added here because its gradient, a sum
        over all that there is, costs XLA as much as the matrix products that it belongs to.
      real_T: bool, False for keys that are padding. The first must be real, so that every query has
        a key: without one, `blocktx.model.attention.attend` lets it see all alike, later ones too.
      stack: one for which `is_short` holds.
    """
    return _lifted(_forward_kernel, stack)(bias_3xD, real_T, q_TxD, k_TxD, v_TxD)[0]


def _vjp_forward(q_TxD, k_TxD, v_TxD, bias_3xD, real_T, stack):
    kept = q_TxD, k_TxD, v_TxD, bias_3xD, real_T
    return short_attention(*kept, stack), kept


def _vjp_backward(stack, kept, dy_TxD):
    q_TxD, k_TxD, v_TxD, bias_3xD, real_T = kept
    *dq_k_v, dbias_3xD = _lifted(_backward_kernel, stack)(
        bias_3xD, real_T, q_TxD, k_TxD, v_TxD, dy_TxD
    )
    return *dq_k_v, dbias_3xD.astype(bias_3xD.dtype), None


short_attention.defvjp(_vjp_forward, _vjp_backward)


@functools.cache
def _lifted(kernel, stack: StackConfig):
    """A kernel over arrays `[*leading, T, D]`, which `vmap` gives more leading axes.

    The biases, which come first, get none, and neither does their gradient, which comes last: to
    JAX, a gradient without the mapped axis is that of all along it together.
    """
    lifted = custom_vmap(functools.partial(_call, kernel, stack))

    @lifted.def_vmap
    def _(size, batched, bias_3xD, *args):
        args = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(args, batched[1:], strict=True)
        ]
        if batched[0]:  # not one model's blocks, but models side by side
            out = jax.lax.map(lambda xs: lifted(*xs), (bias_3xD, *args))
            return out, [True] * len(out)
        out = lifted(bias_3xD, *args)
        return out, [True] * _WIDE_OUTPUTS[kernel] + [False] * (len(out) - _WIDE_OUTPUTS[kernel])

    return lifted


def _call(kernel, stack, bias_3xD, real, q, k, v, *dy) -> list[jax.Array]:
    batch = q.shape[0] if q.ndim > 2 else 1

    def inward(x: jax.Array) -> jax.Array:  # [B, *leading, T, D] -> [B, T, N, D]
        # Blocks become rows of tiles; XLA makes the arrays in this order in the first place.
        return x.reshape(batch, -1, *x.shape[-2:]).swapaxes(1, 2)

    real_BxNxT = real.reshape(batch, -1, real.shape[-1]).astype(jnp.float32)
    run = _sharded(functools.partial(_run, kernel, stack), kernel, stack, batch)
    out = run(bias_3xD.astype(jnp.float32), real_BxNxT, *map(inward, (q, k, v, *dy)))
    wide = [x.swapaxes(1, 2).reshape(q.shape) for x in out[: _WIDE_OUTPUTS[kernel]]]
    return wide + [sums_Bx3xD.sum(0) for sums_Bx3xD in out[_WIDE_OUTPUTS[kernel] :]]


def _sharded(run, kernel, stack: StackConfig, batch: int):
    """`run` on each device's rows and heads, where a mesh is set: XLA cannot divide a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run
    rows = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    if batch % math.prod(mesh.shape[name] for name in rows):
        rows = None  # a batch of one, as for new parameters
    whole = stack.width % (mesh.shape.get("tensor", 1) * _lanes(stack)) == 0
    heads = "tensor" if "tensor" in mesh.axis_names and whole else None
    wide = PartitionSpec(rows, None, None, heads)
    sums = [PartitionSpec(rows, None, heads)] * _SUMS[kernel]

    def sharded(bias_3xD, real_BxNxT, *wide_BxTxNxD):
        specs = (PartitionSpec(None, heads), PartitionSpec(rows), *[wide] * len(wide_BxTxNxD))
        out_specs = [wide] * _WIDE_OUTPUTS[kernel] + sums
        call = jax.shard_map(run, in_specs=specs, out_specs=out_specs, check_vma=False)
        return call(bias_3xD, real_BxNxT, *wide_BxTxNxD)

    return sharded


def _run(kernel, stack: StackConfig, bias_3xD, real_BxNxT, *wide_BxTxNxD) -> list[jax.Array]:
    batch, positions, blocks, width = wide_BxTxNxD[0].shape
    lanes = _lanes(stack)
    rows = min(_ROWS, pl.cdiv(blocks, _CHUNK) * _CHUNK)
    wide = pl.BlockSpec((1, positions, rows, lanes), lambda b, n, d: (b, 0, n, d))
    tiles = pl.cdiv(blocks, rows)
    outputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wide_BxTxNxD[: _WIDE_OUTPUTS[kernel]]
    ]
    sums = [jax.ShapeDtypeStruct((batch, tiles, 3, width), jnp.float32)] * _SUMS[kernel]
    call = functools.partial(
        pl.pallas_call,
        functools.partial(kernel, stack, blocks),
        grid=(batch, tiles, width // lanes),
        in_specs=[
            pl.BlockSpec((3, positions, lanes), lambda b, n, d: (0, 0, 0)),
            pl.BlockSpec((3, lanes), lambda b, n, d: (0, d)),
            pl.BlockSpec((1, rows, positions), lambda b, n, d: (b, n, 0)),
            *[wide] * len(wide_BxTxNxD),
        ],
        out_specs=[wide] * len(outputs)
        + [pl.BlockSpec((1, 1, 3, lanes), lambda b, n, d: (b, n, 0, d))] * len(sums),
        out_shape=outputs + sums,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name=f"short_attention{kernel.__name__}",
    )
    out = jax.lax.platform_dependent(
        _turns(stack, positions),
        bias_3xD,
        real_BxNxT,
        *wide_BxTxNxD,
        cpu=call(interpret=True),
        default=call(),
    )
    return [*out[: len(outputs)], *(x.sum(1) for x in out[len(outputs) :])]


def _turns(stack: StackConfig, positions: int) -> jax.Array:
    """`[3, T, lanes]`: what a lane, and those half a rotated head above and below, count for."""
    half = stack.rotary_dims // 2
    place = jnp.arange(_lanes(stack)) % stack.head_size
    frequency = stack.rotary_base ** (-(place % max(half, 1)).astype(jnp.float32) / max(half, 1))
    angle = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack(
        [
            jnp.where(place < 2 * half, cos, 1),
            jnp.where(place < half, -sin, 0),
            jnp.where((place >= half) & (place < 2 * half), sin, 0),
        ]
    )


def _forward_kernel(stack, blocks, turns_ref, bias_ref, real_ref, q_ref, k_ref, v_ref, y_ref):
    del blocks
    tile = _Tile(stack, turns_ref, bias_ref, y_ref.dtype)

    def chunk(rows, carry):
        q, k, v = tile.inputs((q_ref, k_ref, v_ref), rows)
        for i, (weights, total) in enumerate(tile.weights(q, k, real_ref[0, rows])):
            y = _dot(weights, v) * total
            y_ref[0, i, rows] = y.astype(y_ref.dtype)
        return carry

    _for_chunks(chunk, q_ref.shape[2], ())


def _backward_kernel(
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
    row = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, lanes), 0)

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

    zero = [jnp.zeros((_CHUNK, lanes), jnp.float32)] * 3
    for part, total in enumerate(_for_chunks(chunk, tile_rows, zero)):
        dbias_ref[0, 0, part] = total.sum(0)


_WIDE_OUTPUTS = {_forward_kernel: 1, _backward_kernel: 3}


_SUMS = {_forward_kernel: 0, _backward_kernel: 1}


def _for_chunks(chunk, rows: int, carry):
    def body(i, carry):
        return chunk(pl.ds(pl.multiple_of(i * _CHUNK, _CHUNK), _CHUNK), carry)

    return jax.lax.fori_loop(0, rows // _CHUNK, body, carry, unroll=_UNROLL)


def _dot(xs, ys):
    return functools.reduce(jnp.add, [x * y for x, y in zip(xs, ys, strict=False)])


class _Tile:
    """What both kernels do with a chunk: lists over positions of float32 `[rows, lanes]`."""

    def __init__(self, stack: StackConfig, turns_ref, bias_ref, dtype):
        lanes = _lanes(stack)
        self.positions = turns_ref.shape[1]
        self.scale = stack.head_size**-0.5
        self._half = stack.rotary_dims // 2
        self._turns_ref, self._bias_ref, self._dtype = turns_ref, bias_ref, dtype
        head = [jax.lax.broadcasted_iota(jnp.int32, (lanes, lanes), a) for a in (0, 1)]
        head = [jax.lax.div(h, stack.head_size) for h in head]
        self._same_head = (head[0] == head[1]).astype(dtype)

    def inputs(self, refs, rows):
        """Queries and keys, turned, and values; queries are scaled for scores to be of base 2."""
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
        """Rotary position, or its transpose, which turns back."""
        if not self._half or not position:
            return x
        same, above, below = (self._turns_ref[part, position][None] for part in range(3))
        from_above = pltpu.roll(x, x.shape[-1] - self._half, 1) * above
        from_below = pltpu.roll(x, self._half, 1) * below
        turned = from_above + from_below
        return x * same - turned if back else x * same + turned

    def sum_heads(self, products):
        """Sums over each head's lanes, at all of these lanes."""
        stacked = jnp.concatenate([x.astype(self._dtype) for x in products])
        sums = jnp.dot(stacked, self._same_head, preferred_element_type=jnp.float32)
        return jnp.split(sums, len(products))

    def weights(self, q, k, real):
        """For each query the weights of the keys up to it, and what makes them sum to 1."""
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
