"""The decoder-only baseline: one stack over tokens.

It decodes by the same methods as `BlockTransformer`: its blocks are one token long, and its context
embedding only has to be classified.
"""

import dataclasses

import flax.linen as nn
import jax

from blocktx.config import Formulations, VanillaConfig
from blocktx.model.block_decoder import BlockDecoder, extend_axes
from blocktx.model.cache import Cache, cache_dtype, create_cache
from blocktx.model.layers import classifier, embedding, over_batch
from blocktx.parallel import constrain


class Vanilla(nn.Module):
    """A decoder-only model. The decoding methods are those of `BlockTransformer`, with K = 1."""

    config: VanillaConfig
    formulations: Formulations  # resolved, see `build`

    def setup(self):
        config = dataclasses.replace(self.config, formulations=self.formulations)
        self.embed = embedding(config, config.decoder.width, name="embed")
        self.decoder = BlockDecoder(config, config.decoder)
        self.classifier = classifier(config, self.embed, name="classifier")

    def __call__(self, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Return float32 logits `[B, T, V]`; entry t predicts token t+1 from tokens 0..t.

        `mask_BxT` is 1 for real tokens; no other token attends to padding. Nothing is checked in
        compiled code: a token id of `vocab_size` or more makes the logits NaN.
        """
        logits_BxTxV = self.classifier(self.hidden(tokens_BxT, mask_BxT))
        return constrain(logits_BxTxV, "batch", "positions", "vocab")

    def hidden(self, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Return the hidden states before the classifier, float32 `[B, T, D]`."""
        return over_batch(BlockDecoder.__call__)(
            self.decoder, self.embed(tokens_BxT)[:, :, None], mask_BxT.astype(bool)
        )

    def hidden_and_layer(
        self, tokens_BxT: jax.Array, mask_BxT: jax.Array, layer: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return `hidden`, and the hidden state `[B, T, D]` after `layer` layers (None: none).

        The latter is the residual stream, before the final norm.
        """
        decode = over_batch(BlockDecoder.with_layer, (0, 0, None))
        return decode(
            self.decoder, self.embed(tokens_BxT)[:, :, None], mask_BxT.astype(bool), layer
        )

    def create_cache(self, batch: int, slots: int) -> Cache:
        dtype = cache_dtype(self.config, self.formulations)
        return create_cache(self.config.decoder, batch, slots, dtype)

    def extend(
        self,
        tokens_BxNxK: jax.Array,
        mask_BxNxK: jax.Array,
        start_B: jax.Array,
        cache: Cache,
        slot: jax.Array | int,
        seen_BxS: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        del mask_BxNxK  # a token of padding is never in `seen_BxS`
        return over_batch(BlockDecoder.extend, extend_axes(slot))(
            self.decoder, self.embed(tokens_BxNxK), start_B, cache, slot, seen_BxS
        )

    def create_token_cache(self, batch: int) -> Cache:
        del batch
        return ()

    def start_block(self, context_BxD: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return self.classifier(context_BxD), cache
