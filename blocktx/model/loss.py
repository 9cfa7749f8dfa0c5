"""Next-token loss, summed by position in the block."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from blocktx.model.build import Model


def loss_by_position(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the number of its tokens, for each position in a block.

    Scored are the real tokens of blocks 1 to N-1 that have a real token in an earlier block: the
    first block is never predicted. A vanilla model takes the same batches, with K = 1.

    Returns:
      Float32 `[K]` sums in nats and float32 `[K]` counts; the loss is `nats.sum() / counts.sum()`.
    """
    nats_BxMxK, scored_BxMxK = token_losses(model, params, tokens_BxNxK, mask_BxNxK)
    return nats_BxMxK.sum((0, 1)), scored_BxMxK.sum((0, 1), dtype=jnp.float32)


def token_losses(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each token of blocks 1 to N-1, which `loss_by_position` sums.

    Returns:
      Float32 `[B, N-1, K]` nats, 0 where nothing is scored, and bool `[B, N-1, K]`, what is scored.
    """
    mask_BxNxK = mask_BxNxK.astype(bool)
    scored_BxMxK = loss_mask(mask_BxNxK)
    logits_BxMxKxV = next_logits(model, params, tokens_BxNxK, mask_BxNxK)
    return masked_cross_entropy(logits_BxMxKxV, tokens_BxNxK, scored_BxMxK), scored_BxMxK


def next_logits(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> jax.Array:
    """Return float32 logits `[B, N-1, K, V]` of blocks 1 to N-1; K is 1 for vanilla models."""
    if model.config.kind == "block":
        return model.apply({"params": params}, tokens_BxNxK, mask_BxNxK)
    logits_BxTxV = model.apply({"params": params}, tokens_BxNxK[..., 0], mask_BxNxK[..., 0])
    return logits_BxTxV[:, :-1, None, :]


def loss_mask(mask_BxNxK: jax.Array) -> jax.Array:
    """Return bool `[B, N-1, K]`, True for the scored tokens of blocks 1 to N-1."""
    begun_BxN = jnp.cumsum(mask_BxNxK.any(-1), axis=1) > 0
    return mask_BxNxK[:, 1:] & begun_BxN[:, :-1, None]


def masked_cross_entropy(
    logits_BxMxKxV: jax.Array, tokens_BxNxK: jax.Array, scored_BxMxK: jax.Array
) -> jax.Array:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits_BxMxKxV, tokens_BxNxK[:, 1:])
    return jnp.where(scored_BxMxK, nats, 0)
