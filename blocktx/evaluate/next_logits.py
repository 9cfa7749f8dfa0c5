"""Next-token logits, one chunk of a context at a time.

Float32 logits `[B, N-1, K, V]` of a batch of whole contexts take gigabytes (6.6 GB for 16 contexts
of 2,048 tokens and a vocabulary of 50,304). What evaluation needs of them is a number or two for
each token. Blocks are independent once their contexts are known, so the token decoder and the
classifier run on a few blocks at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blocktx.model import Cache, Model, for_decoding
from blocktx.parallel import batch_parts, constrain

_CHUNK_BYTES = 2**28  # of a chunk's logits and hidden states, on each device

Logits = Callable[[jax.Array | int, int], jax.Array]


def map_logits(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    function: Callable[[jax.Array, jax.Array], Any],
) -> Any:
    """Return `function(logits, tokens)` of blocks 1 to N-1, computed chunk by chunk.

    Args:
      model: a block or vanilla model; a vanilla model has K = 1.
      params: its parameters.
      tokens_BxNxK: int32.
      mask_BxNxK: bool, True for real tokens.
      function: maps float32 logits `[B, C, K, V]` and the int32 tokens `[B, C, K]` that they
        predict to arrays `[B, C, K]`, each token independently of the others.

    Returns:
      The arrays of `function`, `[B, N-1, K]`.
    """
    rows, blocks, length = tokens_BxNxK.shape
    predicted = blocks - 1
    chunk, chunks = split(predicted, rows * length * token_bytes(model))
    logits = next_logits(model, params, tokens_BxNxK, mask_BxNxK, chunk * chunks)
    tokens_BxMxK = pad_blocks(tokens_BxNxK[:, 1:], chunk * chunks)

    def one(begin: jax.Array | int) -> Any:
        tokens_BxCxK = jax.lax.dynamic_slice_in_dim(tokens_BxMxK, begin, chunk, axis=1)
        return function(logits(begin, chunk), tokens_BxCxK)

    if chunks == 1:
        return one(0)

    def joined(x_ixBxCxK: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_ixBxCxK, 0, 1).reshape(rows, -1, length)[:, :predicted]

    return jax.tree.map(joined, jax.lax.map(one, jnp.arange(chunks) * chunk))


def token_bytes(model: Model) -> int:
    """Return the bytes of a token's logits and of about as many hidden states as a layer holds."""
    config = model.config
    width = (config.token_decoder if config.kind == "block" else config.decoder).width
    return 4 * (config.vocab_size + 12 * width)


def split(places: int, place_bytes: int) -> tuple[int, int]:
    """Return the size and the number of equal chunks that cover `places`.

    Args:
      places: blocks or tokens of a context, one or more.
      place_bytes: bytes of a place in all rows of the batch, which devices share.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else batch_parts(mesh)
    chunks = -(-places // max(_CHUNK_BYTES * parts // place_bytes, 1))
    return -(-places // chunks), chunks


def next_logits(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    size: int,
) -> Logits:
    """Return a function of `begin` and `count` that computes float32 logits `[B, count, K, V]`.

    They predict blocks `1 + begin` to `begin + count`, of which there are `size`; those after block
    N-1 are padding.
    """
    context_BxNxnD = contexts(model, params, tokens_BxNxK, mask_BxNxK)
    if model.config.kind == "vanilla":
        hidden_BxMxD = pad_blocks(context_BxNxnD[:, :-1], size)

        def of_tokens(begin: jax.Array | int, count: int) -> jax.Array:
            hidden_BxCxD = jax.lax.dynamic_slice_in_dim(hidden_BxMxD, begin, count, axis=1)
            # Classifies the hidden states, with a cache of nothing.
            logits, _ = model.apply({"params": params}, hidden_BxCxD, (), method="start_block")
            return constrain(logits, "batch", "positions", "vocab")[:, :, None]

        return of_tokens

    context_BxNxnD = constrain(context_BxNxnD, "batch", "positions", "features")
    inputs = [
        pad_blocks(x, size)
        for x in (context_BxNxnD[:, :-1], tokens_BxNxK[:, 1:], mask_BxNxK[:, 1:])
    ]

    def of_blocks(begin: jax.Array | int, count: int) -> jax.Array:
        chunk = [jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1) for x in inputs]
        return model.apply({"params": params}, *chunk, method="decode_blocks")

    return of_blocks


def contexts(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> jax.Array:
    """Return context embeddings `[B, N, n * D]`, of a vanilla model its hidden states.

    With a cache in int8 they are computed as in decoding, block by block over the cache.
    """
    if model.formulations.cache_dtype == "int8":
        return cached_contexts(model, params, tokens_BxNxK, mask_BxNxK)
    if model.config.kind == "vanilla":
        tokens_BxNxK, mask_BxNxK = tokens_BxNxK[..., 0], mask_BxNxK[..., 0]
        return model.apply({"params": params}, tokens_BxNxK, mask_BxNxK, method="hidden")
    return model.apply({"params": params}, tokens_BxNxK, mask_BxNxK, method="contexts")


def cached_contexts(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> jax.Array:
    """Return `contexts`, block by block over the cache."""
    if model.config.scan_layers:
        model, params = for_decoding(model, params)
    rows, blocks, _ = tokens_BxNxK.shape
    real_BxN = mask_BxNxK.any(-1)

    def extend(cache: Cache, index: jax.Array) -> tuple[Cache, jax.Array]:
        block, mask = (
            jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1) for x in (tokens_BxNxK, mask_BxNxK)
        )
        seen_BxN = real_BxN & (jnp.arange(blocks) < index)
        arguments = (block, mask, jnp.full(rows, index), cache, index, seen_BxN)
        context_Bx1xnD, cache = model.apply({"params": params}, *arguments, method="extend")
        return cache, context_Bx1xnD[:, 0]

    _, context_NxBxnD = jax.lax.scan(extend, model.create_cache(rows, blocks), jnp.arange(blocks))
    return context_NxBxnD.swapaxes(0, 1)


def pad_blocks(x_BxM: jax.Array, size: int) -> jax.Array:
    """Return `x_BxM...` with zeros after axis 1, up to `size`."""
    widths = [(0, 0)] * x_BxM.ndim
    widths[1] = (0, size - x_BxM.shape[1])
    return jnp.pad(x_BxM, widths) if widths[1][1] else x_BxM


def cross_entropy(logits_BxCxKxV: jax.Array, tokens_BxCxK: jax.Array) -> jax.Array:
    """Return the float32 cross-entropy of each token in nats, `[B, C, K]`."""
    chosen = jnp.take_along_axis(logits_BxCxKxV, tokens_BxCxK[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxCxKxV, axis=-1) - chosen
