"""Measure how much of a context a model uses: does the far part of it lower the loss?

Both tests compare losses of the *same* tokens, those of the last quarter of a context, so that the
difficulty of the text cancels:

- fall: the same tokens predicted from the second quarter of a context that begins half a context
  later. Positive if the loss falls along the context.
- exchange: the same tokens where the first half of the context comes from another place in the
  corpus. Positive if the far half of the context is used.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blocktx.data import Documents
from blocktx.evaluate import position_curve
from blocktx.model import Model, token_losses
from blocktx.parallel import HostRows, batch_parts, constrain

_BINS = 16  # of the loss by place
_MAX_ROWS = 512  # contexts that are scored, spread over the documents


def context_use(
    model: Model, params: dict[str, Any], documents: Documents, mesh: Mesh, *, batch_size: int
) -> dict[str, Any]:
    """Return `loss_by_place`, `fall` and `exchange` of held-out documents, as JSON values.

    Args:
      model: any model; its context is 4 blocks or longer.
      params: its parameters, placed on `mesh`, which is set.
      documents: the held-out documents.
      mesh: the device mesh.
      batch_size: contexts scored at once; it does not change the result.

    Returns:
      `loss_by_place`: [first token of a bin, nats per token] pairs; `fall` and `exchange`: mean and
      standard error over contexts, in nats per token. Empty if the documents are too short.
    """
    parts = batch_parts(mesh)
    rows_RxT = _rows(documents, model.config.context_length, model.config.block_length)
    size = -(-min(batch_size, len(rows_RxT)) // parts) * parts
    if len(rows_RxT) < max(size, 2):
        return {}
    host_rows = HostRows(size, mesh)
    sums, moments, count = 0.0, np.zeros((2, 2)), 0
    for begin in range(0, len(rows_RxT) - size + 1, size):
        tokens = rows_RxT[begin : begin + size][host_rows.rows]
        tokens = tokens.reshape(len(tokens), -1, model.config.block_length)
        batch = host_rows.place({"tokens": tokens})
        sums_2xMxK, moments_2x2 = _score(model, params, batch["tokens"])
        sums = sums + np.asarray(sums_2xMxK, np.float64)
        moments += np.asarray(moments_2x2, np.float64)
        count += size
    width = model.config.context_length // _BINS or 1
    means = moments[:, 0] / count
    variances = (moments[:, 1] / count - means**2) * count / (count - 1)
    errors = [math.sqrt(max(0.0, variance) / count) for variance in variances]
    fall, exchange = ([float(m), e] for m, e in zip(means, errors, strict=True))
    curve = [[b.begin, b.loss] for b in position_curve(sums, width) if b.tokens]
    return {"loss_by_place": curve, "fall": fall, "exchange": exchange}


def _rows(documents: Documents, context: int, block: int) -> np.ndarray:
    """Int32 `[R, 1.5 contexts]`: pieces of documents, one context apart, in random order."""
    length = context + context // block // 2 * block
    begins = [
        begin
        for document in documents.ids()
        for begin in range(
            int(documents.offsets[document]),
            int(documents.offsets[document + 1]) - length + 1,
            context,
        )
    ]
    begins = np.random.default_rng(0).permutation(begins)[:_MAX_ROWS].tolist()
    pieces = documents.read([(begin, begin + length) for begin in begins])
    return np.stack(pieces).astype(np.int32) if pieces else np.zeros((0, length), np.int32)


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: Model, params: dict[str, Any], tokens_BxLxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return sums `[2, N-1, K]` of nats and tokens, and `[2, 2]` sums of effects and squares."""
    blocks = model.config.blocks
    half, quarter = blocks // 2, blocks // 4

    def nats(tokens_BxNxK: jax.Array) -> jax.Array:
        return token_losses(model, params, tokens_BxNxK, jnp.ones(tokens_BxNxK.shape, bool))[0]

    whole_BxNxK = tokens_BxLxK[:, :blocks]
    exchanged_BxNxK = whole_BxNxK.at[:, :half].set(jnp.roll(whole_BxNxK[:, :half], 1, 0))
    true_BxMxK = nats(whole_BxNxK)
    later_BxMxK = nats(tokens_BxLxK[:, half : half + blocks])
    last = slice(blocks - quarter - 1, None)  # entry j is block j + 1
    second = slice(blocks - quarter - half - 1, blocks - half - 1)
    true_B = true_BxMxK[:, last].mean((1, 2))
    effects_2xB = jnp.stack(
        [
            later_BxMxK[:, second].mean((1, 2)) - true_B,
            nats(exchanged_BxNxK)[:, last].mean((1, 2)) - true_B,
        ]
    )
    sums_2xMxK = jnp.stack([true_BxMxK.sum(0), jnp.ones_like(true_BxMxK).sum(0)])
    moments_2x2 = jnp.stack([effects_2xB.sum(1), (effects_2xB**2).sum(1)], axis=1)
    return constrain(sums_2xMxK, None, None, None), constrain(moments_2x2, None, None)
