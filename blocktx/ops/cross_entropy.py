"""Next-token loss over a large vocabulary, with its gradient formed beside the logits.

Differentiating logits and softmax saves float32 logits `[tokens, V]` for the backward pass, reads
them twice more, and takes the exponential of each three times. Here logits are formed for one chunk
of tokens at a time. exp(logits), in the compute dtype, yields both gradients and, by a product with
ones, which costs the matrix unit less than a reduction costs the vector units, the normaliser. Only
the gradients outlive the chunk.
"""

import functools

import jax
import jax.numpy as jnp

from blocktx.parallel import batch_parts, constrain

_ROWS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden_BxMxKxE: jax.Array,
    kernel_ExV: jax.Array,
    labels_BxMxK: jax.Array,
    scored_BxMxK: jax.Array,
    chunk: int,
    scatter: bool = False,
) -> jax.Array:
    """Return the sum of the cross-entropies of the scored tokens, float32, in nats.

    Args:
      hidden_BxMxKxE: inputs of the classifier, in the compute dtype.
      kernel_ExV: the classifier; the logits are hidden @ kernel.
      labels_BxMxK: int tokens.
      scored_BxMxK: bool, True for tokens that count.
      chunk: tokens of a device whose logits exist at the same time.
      scatter: whether the labels' part of the classifier's gradient is a scatter of hidden states.
        That saves a copy of the probabilities without the labels. On a TPU a scatter takes longer.
    """
    arrays = hidden_BxMxKxE, kernel_ExV, labels_BxMxK, scored_BxMxK
    return _with_gradients(*arrays, chunk, scatter)[0]


def _with_gradients(hidden_BxMxKxE, kernel_ExV, labels_BxMxK, scored_BxMxK, chunk, scatter):
    rows, blocks, positions, width = hidden_BxMxKxE.shape
    mesh = jax.sharding.get_abstract_mesh()
    rows_here = rows if mesh.empty else max(rows // batch_parts(mesh), 1)
    size = max(chunk // (rows_here * positions), 1)
    # One conversion and transposition for all chunks. A sharded kernel is gathered, else XLA moves
    # activations to its shards.
    kernel_VxE = constrain(kernel_ExV.astype(hidden_BxMxKxE.dtype).T, "vocab", "features")
    kernel_VxE = jax.lax.optimization_barrier(kernel_VxE)
    nats, dkernel_ExV, dhidden = jnp.float32(0), jnp.zeros(kernel_ExV.shape, jnp.float32), []

    def tokens(x_BxMxKx: jax.Array, begin: int) -> jax.Array:
        # By position, as in memory; never across the batch, which is sharded.
        x_BxMxKx = x_BxMxKx[:, begin : begin + size].swapaxes(1, 2)
        return x_BxMxKx.reshape(rows, -1, *x_BxMxKx.shape[3:])

    for begin in range(0, blocks, size):
        part_nats, dx_BxTxE, part_dkernel_ExV = _chunk(
            tokens(hidden_BxMxKxE, begin),
            kernel_VxE,
            tokens(labels_BxMxK, begin),
            tokens(scored_BxMxK, begin),
            scatter,
        )
        nats += part_nats
        dkernel_ExV += part_dkernel_ExV
        dhidden.append(dx_BxTxE.reshape(rows, positions, -1, width).swapaxes(1, 2))
    if scatter:
        hits_BxMxKxE = hidden_BxMxKxE * scored_BxMxK[..., None]
        hits_VxE = jnp.zeros(kernel_VxE.shape, jnp.float32).at[labels_BxMxK].add(hits_BxMxKxE)
        dkernel_ExV -= hits_VxE.T
    return nats, (jnp.concatenate(dhidden, axis=1), dkernel_ExV.astype(kernel_ExV.dtype))


def _chunk(x_BxMxE, kernel_VxE, labels_BxM, scored_BxM, scatter):
    """Return the loss of some tokens, and its gradients by their `x_BxMxE` and by the kernel.

    With `scatter` the latter lacks the labels' part.
    """
    dtype, (vocabulary, width) = x_BxMxE.dtype, kernel_VxE.shape
    logits_BxMxV = jnp.einsum(
        "bme,ve->bmv", x_BxMxE, kernel_VxE, preferred_element_type=jnp.float32
    )
    most_BxMx1 = logits_BxMxV.max(-1, keepdims=True)
    logits_BxMxV, most_BxMx1 = jax.lax.optimization_barrier((logits_BxMxV, most_BxMx1))
    powers_BxMxV = jnp.exp(logits_BxMxV - most_BxMx1).astype(dtype)

    # The kernel on the left: there the ones take 8 rows of the matrix unit, on the right 128.
    ones = jnp.ones((vocabulary, _ROWS), dtype)
    sums = jnp.einsum(
        "ve,bmv->ebm",
        jnp.concatenate([kernel_VxE, ones], axis=1),
        powers_BxMxV,
        preferred_element_type=jnp.float32,
    ).transpose(1, 2, 0)
    total_BxMx1 = sums[..., width : width + 1]
    # Without the barrier XLA converts it once, into twice the bytes, for its two readers.
    label_BxMxE = jax.lax.optimization_barrier(kernel_VxE[labels_BxM])
    label_logit_BxM = (x_BxMxE.astype(jnp.float32) * label_BxMxE).sum(-1)
    nats_BxM = jnp.log(total_BxMx1[..., 0]) + most_BxMx1[..., 0] - label_logit_BxM

    scored_BxMx1 = scored_BxM[..., None].astype(jnp.float32)
    share_BxMx1 = scored_BxMx1 / total_BxMx1
    dx_BxMxE = sums[..., :width] * share_BxMx1 - label_BxMxE * scored_BxMx1
    if not scatter:
        is_label_BxMxV = jnp.arange(vocabulary) == labels_BxM[..., None]
        powers_BxMxV = jnp.where(
            is_label_BxMxV, (powers_BxMxV - total_BxMx1).astype(dtype), powers_BxMxV
        )
    dkernel_ExV = jnp.einsum(
        "bme,bmv->ev",
        (x_BxMxE * share_BxMx1).astype(dtype),
        powers_BxMxV,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(scored_BxM, nats_BxM, 0).sum(), dx_BxMxE.astype(dtype), dkernel_ExV


def _backward(chunk, scatter, gradients, g):
    del chunk, scatter
    dhidden, dkernel = gradients
    return (dhidden * g).astype(dhidden.dtype), (dkernel * g).astype(dkernel.dtype), None, None


cross_entropy_sum.defvjp(_with_gradients, _backward)
