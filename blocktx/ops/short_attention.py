"""Causal self-attention over the few positions of a block, a Pallas kernel for TPU.

XLA pads the T x T scores of each head of each block to a tile of 8 x 128, which T = 5 fills to one
part in 40. Here blocks are along sublanes and the width along lanes, so that every tile is full,
and positions are unrolled. The scores of all blocks for one query and one key are products along
lanes. A matrix of ones sums them within each head and broadcasts the sum over the head's lanes.
Softmax and the rest are elementwise. Rotary positions are applied inside, and only the inputs are
saved for the gradient.
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
from blocktx.ops.rotary import attention_factor, frequency_scales
from blocktx.ops.short_attention_kernels import BACKWARD, CHUNK, FORWARD, Kernel, lanes_of
from blocktx.parallel import BATCH_AXES

_ROWS = 256  # blocks in a tile of the grid


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def short_attention(
    q_TxD: jax.Array,
    k_TxD: jax.Array,
    v_TxD: jax.Array,
    bias_3xD: jax.Array,
    real_T: jax.Array,
    stack: StackConfig,
) -> jax.Array:
    """Return causal attention `[T, D]` with rotary positions over one block; batch it with `vmap`.

    Args:
      q_TxD, k_TxD, v_TxD: before bias and rotary positions, H heads each, side by side.
      bias_3xD: added to them; the same for all blocks. It is added here because its gradient, a sum
        over all blocks, costs XLA as much as the matrix products that it belongs to.
      real_T: bool, False for keys that are padding. The first must be real: a query without a key
        would attend to all, later ones too.
      stack: one for which `fits_short` holds.
    """
    return _lifted(FORWARD, stack)(bias_3xD, real_T, q_TxD, k_TxD, v_TxD)[0]


def _vjp_forward(q_TxD, k_TxD, v_TxD, bias_3xD, real_T, stack):
    kept = q_TxD, k_TxD, v_TxD, bias_3xD, real_T
    return short_attention(*kept, stack), kept


def _vjp_backward(stack, kept, dy_TxD):
    q_TxD, k_TxD, v_TxD, bias_3xD, real_T = kept
    *dq_k_v, dbias_3xD = _lifted(BACKWARD, stack)(bias_3xD, real_T, q_TxD, k_TxD, v_TxD, dy_TxD)
    return *dq_k_v, dbias_3xD.astype(bias_3xD.dtype), None


short_attention.defvjp(_vjp_forward, _vjp_backward)


@functools.cache
def _lifted(kernel: Kernel, stack: StackConfig):
    """Return a kernel over arrays `[*leading, T, D]`, to which `vmap` adds leading axes.

    The bias is not batched. Its cotangent is returned unbatched, which JAX takes as already summed
    over the mapped axis.
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
        return out, [True] * kernel.wide + [False] * (len(out) - kernel.wide)

    return lifted


def _call(kernel, stack, bias_3xD, real, q, k, v, *dy) -> list[jax.Array]:
    batch = q.shape[0] if q.ndim > 2 else 1

    def inward(x: jax.Array) -> jax.Array:  # [B, *leading, T, D] -> [B, T, N, D]
        # Blocks become rows of tiles; XLA makes the arrays in this order in the first place.
        return x.reshape(batch, -1, *x.shape[-2:]).swapaxes(1, 2)

    real_BxNxT = real.reshape(batch, -1, real.shape[-1]).astype(jnp.float32)
    run = _sharded(functools.partial(_run, kernel, stack), kernel, stack, batch)
    out = run(bias_3xD.astype(jnp.float32), real_BxNxT, *map(inward, (q, k, v, *dy)))
    wide = [x.swapaxes(1, 2).reshape(q.shape) for x in out[: kernel.wide]]
    return wide + [sums_Bx3xD.sum(0) for sums_Bx3xD in out[kernel.wide :]]


def _sharded(run, kernel: Kernel, stack: StackConfig, batch: int):
    """Return `run` on each device's rows and heads, if a mesh is set: XLA cannot shard a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run
    rows = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    if batch % math.prod(mesh.shape[name] for name in rows):
        rows = None  # a batch of one, as for new parameters
    whole = stack.query_width % (mesh.shape.get("tensor", 1) * lanes_of(stack)) == 0
    heads = "tensor" if "tensor" in mesh.axis_names and whole else None
    wide = PartitionSpec(rows, None, None, heads)
    sums = [PartitionSpec(rows, None, heads)] * kernel.sums

    def sharded(bias_3xD, real_BxNxT, *wide_BxTxNxD):
        specs = (PartitionSpec(None, heads), PartitionSpec(rows), *[wide] * len(wide_BxTxNxD))
        out_specs = [wide] * kernel.wide + sums
        call = jax.shard_map(run, in_specs=specs, out_specs=out_specs, check_vma=False)
        return call(bias_3xD, real_BxNxT, *wide_BxTxNxD)

    return sharded


def _run(
    kernel: Kernel, stack: StackConfig, bias_3xD, real_BxNxT, *wide_BxTxNxD
) -> list[jax.Array]:
    batch, positions, blocks, width = wide_BxTxNxD[0].shape
    lanes = lanes_of(stack)
    rows = min(_ROWS, pl.cdiv(blocks, CHUNK) * CHUNK)
    wide = pl.BlockSpec((1, positions, rows, lanes), lambda b, n, d: (b, 0, n, d))
    tiles = pl.cdiv(blocks, rows)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wide_BxTxNxD[: kernel.wide]]
    sums = [jax.ShapeDtypeStruct((batch, tiles, 3, width), jnp.float32)] * kernel.sums
    call = functools.partial(
        pl.pallas_call,
        functools.partial(kernel.body, stack, blocks),
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
        name=kernel.name,
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
    """Return `[3, T, lanes]`: the factors of each lane and of those half a rotation apart."""
    half = stack.rotary_dims // 2
    place = jnp.arange(lanes_of(stack)) % stack.head_size
    frequency = stack.rotary_base ** (-(place % max(half, 1)).astype(jnp.float32) / max(half, 1))
    if stack.rotary_scaling.kind != "none":
        frequency *= jnp.asarray(frequency_scales(stack), jnp.float32)[place % max(half, 1)]
    angle = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequency
    factor = attention_factor(stack)
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    return jnp.stack(
        [
            jnp.where(place < 2 * half, cos, 1),
            jnp.where(place < half, -sin, 0),
            jnp.where((place >= half) & (place < 2 * half), sin, 0),
        ]
    )
