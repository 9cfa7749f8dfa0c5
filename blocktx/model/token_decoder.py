"""The token decoder: a causal transformer over the tokens of one block, given its context."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blocktx.config import BlockConfig
from blocktx.model.cache import Cache, causal_mask
from blocktx.model.layers import classifier, embedding, linear
from blocktx.model.stack import Stack
from blocktx.parallel import constrain


@flax.struct.dataclass
class TokenCache:
    """State of the token decoder within a block."""

    layers: Cache
    condition_KxE: jax.Array | None  # the context, one vector a token; None for a prefix


class TokenDecoder(nn.Module):
    """The tokens of a block from its context embedding, by one of three conditionings (section 2).

    prefix: the context becomes P embeddings before the tokens; the last of them predicts token 0.
    summation: it becomes K embeddings, added to those of `[BOS, token_0 .. token_K-2]`.
    cross_attention: it becomes K embeddings, which those positions attend to.
    """

    config: BlockConfig

    def setup(self):
        config = self.config
        self.embed = embedding(config, config.token_decoder.width, name="embed")
        self.stack = Stack(config, config.token_decoder, window=True)
        self.classifier = classifier(config, self.embed, name="classifier")
        # P or K vectors from one context, by one linear map.
        self.expansion = linear(
            config,
            (config.condition_vectors, config.token_decoder.width),
            name="expansion",
            axes=("width", "positions", "width"),
        )

    def __call__(self, context_D: jax.Array, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        """Return logits `[K, V]` of a block's tokens, each from the context and earlier tokens."""
        logits_KxV = self.classifier(self.hidden(context_D, tokens_K, mask_K))
        return constrain(logits_KxV, None, "vocab")

    def hidden(self, context_D: jax.Array, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        """Return the hidden states before the classifier, float32 `[K, E]`."""
        first_PxE, condition_KxE = self._begin(context_D)
        x_TxE = jnp.concatenate([first_PxE, self.embed(tokens_K[:-1])])
        first = first_PxE.shape[0]
        position_T = jnp.arange(x_TxE.shape[0])
        real_T = jnp.concatenate([jnp.ones(first, bool), mask_K[:-1]])
        mask_TxT = real_T & causal_mask(position_T, position_T.size)
        hidden_TxE, _ = self._run(x_TxE, position_T, mask_TxT, condition_KxE, None)
        return hidden_TxE[first - 1 :]

    def bag(self, context_D: jax.Array) -> jax.Array:
        """Return the mean of the vectors that the context becomes, float32 `[E]`."""
        return self.expansion(context_D).astype(jnp.float32).mean(0)

    def start(self, context_D: jax.Array, cache: Cache) -> tuple[jax.Array, TokenCache]:
        """Return logits `[V]` of a block's first token, and the cache after the context."""
        first_PxE, condition_KxE = self._begin(context_D)
        return self._extend(first_PxE, 0, TokenCache(cache, condition_KxE))

    def step(
        self, token: jax.Array, index: jax.Array, cache: TokenCache
    ) -> tuple[jax.Array, TokenCache]:
        """Return logits `[V]` of token `index + 1` from `token`, token `index` of its block."""
        position = self.config.positions_before + index
        return self._extend(self.embed(token)[None], position, cache)

    def _begin(self, context_D: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the inputs before the tokens, and the vectors that condition them."""
        if self.config.conditioning == "prefix":
            return self.expansion(context_D), None
        return self.embed(jnp.array([self.config.bos_id])), self.expansion(context_D)

    def _extend(
        self, x_TxE: jax.Array, start: jax.Array | int, cache: TokenCache
    ) -> tuple[jax.Array, TokenCache]:
        position_T = start + jnp.arange(x_TxE.shape[0])
        slots = cache.layers[0].k_SxE.shape[0] if cache.layers else 1
        mask_TxS = causal_mask(position_T, slots)
        hidden_TxE, layers = self._run(
            x_TxE, position_T, mask_TxS, cache.condition_KxE, cache.layers, start
        )
        return self.classifier(hidden_TxE[-1]), cache.replace(layers=layers)

    def _run(
        self,
        x_TxE: jax.Array,
        position_T: jax.Array,
        mask_TxS: jax.Array,
        condition_KxE: jax.Array | None,
        cache: Cache | None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        memory_KxE = None
        if self.config.conditioning == "summation":
            x_TxE += condition_KxE[position_T]
        elif self.config.conditioning == "cross_attention":
            memory_KxE = condition_KxE
        return self.stack(
            x_TxE, position_T, mask_TxS, memory_MxD=memory_KxE, cache=cache, slot=slot
        )
