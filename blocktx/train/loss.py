"""Training losses: next-token loss and auxiliary losses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from blocktx.config import LossConfig, UserError
from blocktx.model import (
    BlockTransformer,
    Model,
    classifier_kernel,
    loss_by_position,
    loss_mask,
    masked_cross_entropy,
)
from blocktx.ops import cross_entropy_sum

_TEMPERATURE = 0.07  # of the contrastive loss; the authors'
_LEAST = jnp.finfo(jnp.float32).min


def training_sums(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    config: LossConfig,
) -> dict[str, jax.Array]:
    """Return the sums of the enabled losses by name; `loss` is always enabled.

    block_decoding_loss: predicts the input embedding of block i+1 from the context embedding of
      block i. `mse`: the mean squared difference, summed over blocks. `contrastive`: the cross
      entropy of the right embedding among those of all scored blocks in `tokens_BxNxK`, with the
      cosine over a temperature of 0.07 as logits. With several embeddings per block, each has its
      own target, and the mean is taken. The target is stop-gradiented, as in the authors' code;
      otherwise a constant embedding would minimise the loss.
    auto_encoding_loss: cross entropy of the same tokens as `loss`, with the block's own input
      embedding in place of the context embedding. It trains embedder and token decoder.

    The contrastive loss needs a matrix of scored blocks by scored blocks. More
    `training.microbatches` make it smaller, with fewer negatives.

    Raises:
      UserError: an auxiliary loss is enabled for a vanilla model.
    """
    if config.weights and model.config.kind == "vanilla":
        raise UserError(f"loss: {', '.join(config.weights)} is for block models only; turn it off")
    fused = model.formulations.loss != "logits"
    if not config.weights and not fused:
        return {"loss": loss_by_position(model, params, tokens_BxNxK, mask_BxNxK)[0].sum()}
    mask_BxNxK = mask_BxNxK.astype(bool)
    scored_BxMxK = loss_mask(mask_BxNxK)
    if model.config.kind == "vanilla":
        hidden_BxTxD = model.apply(
            {"params": params}, tokens_BxNxK[..., 0], mask_BxNxK[..., 0], method="hidden"
        )
        classifier = classifier_kernel(model.config, params)
        return {
            "loss": _fused_nats(
                model, classifier, hidden_BxTxD[:, :, None], tokens_BxNxK, scored_BxMxK
            )
        }

    def sums(net: BlockTransformer) -> dict[str, jax.Array]:
        def nats(contexts_BxMxnD: jax.Array) -> jax.Array:
            if fused:  # a last block that predicts nothing makes N of the N-1: whole tiles
                contexts_BxNxnD = jnp.pad(contexts_BxMxnD, ((0, 0), (0, 1), (0, 0)))
                next_BxNxK, real_BxNxK = (
                    jnp.roll(x, -1, axis=1) for x in (tokens_BxNxK, mask_BxNxK)
                )
                hidden_BxNxKxE = net.hidden_blocks(contexts_BxNxnD, next_BxNxK, real_BxNxK)
                classifier = classifier_kernel(model.config, params)
                return _fused_nats(model, classifier, hidden_BxNxKxE, tokens_BxNxK, scored_BxMxK)
            logits = net.decode_blocks(contexts_BxMxnD, tokens_BxNxK[:, 1:], mask_BxNxK[:, 1:])
            return masked_cross_entropy(logits, tokens_BxNxK, scored_BxMxK).sum()

        embeddings_BxNxnxD = net.embed_blocks(tokens_BxNxK, mask_BxNxK)
        contexts_BxNxnD = net.decode_embeddings(embeddings_BxNxnxD, mask_BxNxK)
        out = {"loss": nats(contexts_BxNxnD[:, :-1])}
        next_BxMxnxD = embeddings_BxNxnxD[:, 1:]
        if "block_decoding_loss" in config.weights:
            block_sum = _square_sum if config.block_decoding == "mse" else _contrastive_sum
            context_BxMxnxD = contexts_BxNxnD[:, :-1].reshape(next_BxMxnxD.shape)
            out["block_decoding_loss"] = block_sum(
                context_BxMxnxD, next_BxMxnxD, scored_BxMxK.any(-1)
            )
        if "auto_encoding_loss" in config.weights:
            out["auto_encoding_loss"] = nats(next_BxMxnxD.reshape(contexts_BxNxnD[:, 1:].shape))
        return out

    return model.apply({"params": params}, method=sums)


def bag_sums(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> dict[str, jax.Array]:
    """Return the bag-of-next-block loss as the sum `loss`, in nats, float32.

    The tokens of block i+1 are scored, whatever their order, by one distribution: the classifier on
    the mean of the vectors that the context embedding of block i becomes for the token decoder. The
    layers of the token decoder are not run. This is the first phase of token superposition training
    (arXiv 2605.06546), with the embedder in place of a mean.
    """
    mask_BxNxK = mask_BxNxK.astype(bool)
    scored_BxMxK = loss_mask(mask_BxNxK)
    hidden_BxMxE = model.apply({"params": params}, tokens_BxNxK, mask_BxNxK, method="bags")
    classifier_ExV = classifier_kernel(model.config, params)
    if model.formulations.loss != "logits":
        hidden_BxNxE = jnp.pad(hidden_BxMxE, ((0, 0), (0, 1), (0, 0)))
        shape = *tokens_BxNxK.shape, hidden_BxNxE.shape[-1]
        hidden_BxNxKxE = jnp.broadcast_to(hidden_BxNxE[:, :, None], shape)
        nats = _fused_nats(model, classifier_ExV, hidden_BxNxKxE, tokens_BxNxK, scored_BxMxK)
        return {"loss": nats}
    dtype = model.config.compute_dtype
    logits_BxMxV = jnp.einsum(
        "bme,ev->bmv",
        hidden_BxMxE.astype(dtype),
        classifier_ExV.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    logs_BxMxK = jnp.take_along_axis(jax.nn.log_softmax(logits_BxMxV), tokens_BxNxK[:, 1:], axis=-1)
    return {"loss": -jnp.where(scored_BxMxK, logs_BxMxK, 0).sum()}


def training_counts(mask_BxNxK: jax.Array, config: LossConfig) -> dict[str, jax.Array]:
    """Return the denominators of `training_sums`: numbers of tokens or blocks, at least 1."""
    scored_BxMxK = loss_mask(mask_BxNxK.astype(bool))
    tokens = scored_BxMxK.sum(dtype=jnp.float32)
    blocks = scored_BxMxK.any(-1).sum(dtype=jnp.float32)
    counts = {"loss": tokens, "block_decoding_loss": blocks, "auto_encoding_loss": tokens}
    return {name: jnp.maximum(counts[name], 1) for name in ("loss", *config.weights)}


def _fused_nats(
    model: Model,
    classifier_ExV: jax.Array,
    hidden_BxNxKxE: jax.Array,
    tokens_BxNxK: jax.Array,
    scored_BxMxK: jax.Array,
) -> jax.Array:
    """Return the cross entropy of N - 1 blocks from the hidden states of N; the last is unused."""
    return cross_entropy_sum(
        hidden_BxNxKxE.astype(model.config.compute_dtype),
        classifier_ExV,
        jnp.roll(tokens_BxNxK, -1, axis=1),
        jnp.pad(scored_BxMxK, ((0, 0), (0, 1), (0, 0))),
        model.formulations.loss_tokens,
        model.formulations.loss == "scattered",
    )


def _square_sum(context_BxMxnxD: jax.Array, next_BxMxnxD: jax.Array, real_BxM: jax.Array):
    wanted_BxMxnxD = jax.lax.stop_gradient(next_BxMxnxD).astype(jnp.float32)
    square_BxM = jnp.square(context_BxMxnxD.astype(jnp.float32) - wanted_BxMxnxD).mean((-2, -1))
    return jnp.where(real_BxM, square_BxM, 0).sum()


def _contrastive_sum(context_BxMxnxD: jax.Array, next_BxMxnxD: jax.Array, real_BxM: jax.Array):
    group, width = next_BxMxnxD.shape[-2:]

    def unit(x: jax.Array) -> jax.Array:  # with a gradient at 0 too
        x = x.astype(jnp.float32).reshape(-1, width)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

    real_T = jnp.repeat(real_BxM.reshape(-1), group)
    wanted_TxD = jax.lax.stop_gradient(unit(next_BxMxnxD))
    cosine_TxT = unit(context_BxMxnxD) @ wanted_TxD.T
    logits_TxT = jnp.where(real_T, cosine_TxT / _TEMPERATURE, _LEAST)
    nats_T = optax.softmax_cross_entropy_with_integer_labels(logits_TxT, jnp.arange(real_T.size))
    return jnp.where(real_T, nats_T, 0).sum() / group
