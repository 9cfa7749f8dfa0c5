"""The Block Transformer (Ho et al., NeurIPS 2024): teacher-forced forward and stepwise decoding.

Shape legend, used in all suffixes and einsum letters:

    B batch           N blocks             K tokens in a block     P prefix length
    n embeddings in a block, nD all of them together
    S cache slots     D block width        E token or cache width  H heads
    G key-value heads R heads for each     C head size             F MLP width
    V vocabulary      T tokens or positions

Modules below this one are written for one block or one sequence and lifted here with `vmap`: the
token decoder over batch and blocks, which are independent once their contexts are known, the block
decoder over the batch.
"""

import dataclasses

import flax.linen as nn
import jax

from blocktx.config import BlockConfig, Formulations
from blocktx.model.block_decoder import BlockDecoder, extend_axes
from blocktx.model.cache import Cache, cache_dtype, create_cache
from blocktx.model.embedder import Embedder
from blocktx.model.layers import over_batch, over_blocks
from blocktx.model.token_decoder import TokenCache, TokenDecoder
from blocktx.parallel import constrain


class BlockTransformer(nn.Module):
    """Embedder, block decoder and token decoder.

    `__call__` is for training. Decoding goes `extend` (the prompt's blocks, then each new block),
    and for every block `start_block` and K - 1 times `step_token`.
    """

    config: BlockConfig
    formulations: Formulations  # resolved, see `build`

    def setup(self):
        config = dataclasses.replace(self.config, formulations=self.formulations)
        self.embedder = Embedder(config)
        self.block_decoder = BlockDecoder(config, config.block_decoder)
        self.token_decoder = TokenDecoder(config)

    def __call__(self, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array) -> jax.Array:
        """Return float32 logits `[B, N-1, K, V]`; entry j predicts block j+1 from blocks 0..j.

        `mask_BxNxK` is 1 for real tokens. Positions count padding. Nothing is checked in compiled
        code: a token id of `vocab_size` or more makes the logits NaN.
        """
        context_BxNxnD = constrain(
            self.contexts(tokens_BxNxK, mask_BxNxK), "batch", "positions", "features"
        )
        return self.decode_blocks(context_BxNxnD[:, :-1], tokens_BxNxK[:, 1:], mask_BxNxK[:, 1:])

    def contexts(self, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array) -> jax.Array:
        """Return context embeddings `[B, N, n * D]`; entry i is computed from blocks 0..i."""
        return self.decode_embeddings(self.embed_blocks(tokens_BxNxK, mask_BxNxK), mask_BxNxK)

    def decode_embeddings(self, embeddings_BxNxnxD: jax.Array, mask_BxNxK: jax.Array) -> jax.Array:
        """Return context embeddings `[B, N, n * D]` from input block embeddings."""
        real_BxN = mask_BxNxK.astype(bool).any(-1)
        decode = over_batch(BlockDecoder.__call__)
        return decode(self.block_decoder, embeddings_BxNxnxD, real_BxN)

    def decode_blocks(
        self, context_BxNxnD: jax.Array, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
    ) -> jax.Array:
        """Return float32 logits `[B, N, K, V]` of blocks, each from a context embedding."""
        decode = over_batch(over_blocks(TokenDecoder.__call__))
        return decode(self.token_decoder, context_BxNxnD, tokens_BxNxK, mask_BxNxK.astype(bool))

    def hidden_blocks(
        self, context_BxNxnD: jax.Array, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
    ) -> jax.Array:
        """Return the hidden states of `decode_blocks` before the classifier, float32."""
        decode = over_batch(over_blocks(TokenDecoder.hidden))
        return decode(self.token_decoder, context_BxNxnD, tokens_BxNxK, mask_BxNxK.astype(bool))

    def bags(self, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array) -> jax.Array:
        """Return the classifier's inputs `[B, N-1, E]`; entry j is of block j+1 as a bag of tokens.

        They depend on embedder, block decoder and the expansion of contexts alone; see
        `blocktx.train.loss.bag_sums`.
        """
        bag = over_batch(over_blocks(TokenDecoder.bag))
        return bag(self.token_decoder, self.contexts(tokens_BxNxK, mask_BxNxK)[:, :-1])

    def embed_blocks(self, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array) -> jax.Array:
        """Return input block embeddings `[B, N, n, D]`."""
        embed = over_batch(over_blocks(Embedder.__call__))
        return embed(self.embedder, tokens_BxNxK, mask_BxNxK.astype(bool))

    def create_cache(self, batch: int, slots: int) -> Cache:
        """Return an empty cache for up to `slots` blocks a row."""
        slots *= self.config.embeddings_per_block
        dtype = cache_dtype(self.config, self.formulations)
        return create_cache(self.config.block_decoder, batch, slots, dtype)

    def extend(
        self,
        tokens_BxNxK: jax.Array,
        mask_BxNxK: jax.Array,
        start_B: jax.Array,
        cache: Cache,
        slot: jax.Array | int,
        seen_BxS: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Context embeddings `[B, N, n * D]` of N more blocks, and the cache with them in it.

        Row b's blocks are its blocks `start_B[b]` to `start_B[b] + N - 1`. They go to slots `slot`
        to `slot + N - 1` (one number, or one per row), for all of which the cache must have room,
        and see each other in causal order and the slots that `seen_BxS` marks; None: no others.
        """
        return over_batch(BlockDecoder.extend, extend_axes(slot))(
            self.block_decoder,
            self.embed_blocks(tokens_BxNxK, mask_BxNxK),
            start_B,
            cache,
            slot,
            seen_BxS,
        )

    def create_token_cache(self, batch: int) -> Cache:
        """Return an empty cache for one block: what is before it and all tokens but the last."""
        slots = self.config.positions_before + self.config.block_length - 1
        return create_cache(self.config.token_decoder, batch, slots, self.config.compute_dtype)

    def start_block(self, context_BxnD: jax.Array, cache: Cache) -> tuple[jax.Array, TokenCache]:
        """Return logits `[B, V]` of the first token after a context, and the block's cache."""
        return over_batch(TokenDecoder.start)(self.token_decoder, context_BxnD, cache)

    def step_token(
        self, token_B: jax.Array, index: jax.Array | int, cache: TokenCache
    ) -> tuple[jax.Array, TokenCache]:
        """Logits `[B, V]` of token `index + 1`, from `token_B`, which is token `index`."""
        return over_batch(TokenDecoder.step, (0, None, 0))(
            self.token_decoder, token_B, index, cache
        )
