"""The token decoder: a causal transformer over the tokens of one block, given its context."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.cache import Cache, filled_mask
from blocktx.config import BlockConfig
from blocktx.layers import classifier, embedding, linear
from blocktx.stack import Stack


class TokenDecoder(nn.Module):
    """Prefix conditioning: the context embedding becomes P embeddings in front of the tokens.

    Inputs are `[prefix_1 .. prefix_P, token_0 .. token_K-2]`; the last prefix predicts token 0.
    """

    config: BlockConfig

    def setup(self):
        self.embed = embedding(self.config, self.config.token_decoder.width, name="embed")
        shape = (self.config.prefix_length, self.config.token_decoder.width)
        self.prefix = linear(self.config, shape, name="prefix")
        self.stack = Stack(self.config, self.config.token_decoder)
        self.classifier = classifier(self.config, name="classifier")

    def __call__(self, context_D: jax.Array, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        """Logits `[K, V]` of a block's tokens, each from the context and the tokens before it."""
        prefix_PxE = self.prefix(context_D)
        x_TxE = jnp.concatenate([prefix_PxE, self.embed(tokens_K[:-1])])
        position_T = jnp.arange(x_TxE.shape[0])
        real_T = jnp.concatenate([jnp.ones(prefix_PxE.shape[0], bool), mask_K[:-1]])
        mask_TxT = real_T & filled_mask(position_T, position_T.size)
        hidden_TxE, _ = self.stack(x_TxE, position_T, mask_TxT)
        return self.classifier(hidden_TxE[prefix_PxE.shape[0] - 1 :])

    def start(self, context_D: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits `[V]` of a block's first token, and a cache that holds the prefix."""
        return self._extend(self.prefix(context_D), 0, cache)

    def step(self, token: jax.Array, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits `[V]` of token `index + 1` from `token`, which is token `index` of its block."""
        return self._extend(self.embed(token)[None], self.config.prefix_length + index, cache)

    def _extend(
        self, x_TxE: jax.Array, start: jax.Array | int, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        position_T = start + jnp.arange(x_TxE.shape[0])
        mask_TxS = filled_mask(position_T, cache[0].k_SxHxC.shape[0])
        hidden_TxE, cache = self.stack(x_TxE, position_T, mask_TxS, cache)
        return self.classifier(hidden_TxE[-1]), cache
