"""Next-token loss: masked cross-entropy, summed by position in the block."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from blocktx.model import Model


def position_sums(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of the loss and numbers of the tokens that it is over, for each position in a block.

    Scored are the real tokens of blocks 1 to N-1 that have a real token in an earlier block: the
    first block is never predicted. A vanilla model takes the same batches, with K = 1.

    Returns:
      Float32 `[K]` sums in nats and float32 `[K]` counts; the loss is `nats.sum() / counts.sum()`.
    """
    mask_BxNxK = mask_BxNxK.astype(bool)
    if model.config.kind == "block":
        logits = model.apply({"params": params}, tokens_BxNxK, mask_BxNxK)
    else:
        logits = model.apply({"params": params}, tokens_BxNxK[..., 0], mask_BxNxK[..., 0])
        logits = logits[:, :-1, None, :]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxNxK[:, 1:])
    begun_BxN = jnp.cumsum(mask_BxNxK.any(-1), axis=1) > 0
    scored = mask_BxNxK[:, 1:] & begun_BxN[:, :-1, None]
    return (
        jnp.where(scored, nats, 0).sum((0, 1)),
        scored.sum((0, 1), dtype=jnp.float32),
    )
