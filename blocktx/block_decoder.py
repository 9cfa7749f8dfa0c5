"""The block decoder: a causal transformer over the block embeddings of one sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.cache import Cache, filled_mask
from blocktx.config import ModelConfig, StackConfig
from blocktx.stack import Stack


class BlockDecoder(nn.Module):
    """Causal over blocks. The vanilla model is the same over blocks of one token."""

    config: ModelConfig
    stack_config: StackConfig

    def setup(self):
        self.stack = Stack(self.config, self.stack_config)

    def __call__(self, embeddings_NxD: jax.Array, real_N: jax.Array) -> jax.Array:
        """Context embeddings `[N, D]` of a whole sequence; entry i is all that block i+1 will know.

        `real_N` is False for blocks of nothing but padding, which no other block sees.
        """
        position_N = jnp.arange(embeddings_NxD.shape[0])
        mask_NxN = real_N & filled_mask(position_N, position_N.size)
        # Padding with nothing real before it sees itself: a query without a key would see them all.
        alone_Nx1 = ~mask_NxN.any(-1, keepdims=True)
        mask_NxN |= alone_Nx1 & jnp.eye(position_N.size, dtype=bool)
        return self.stack(embeddings_NxD, position_N, mask_NxN)[0]

    def extend(
        self, embeddings_NxD: jax.Array, start: jax.Array | int, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Context embeddings `[N, D]` of N more blocks, at slots from `start`; the longer cache."""
        position_N = start + jnp.arange(embeddings_NxD.shape[0])
        mask_NxS = filled_mask(position_N, cache[0].k_SxHxC.shape[0])
        return self.stack(embeddings_NxD, position_N, mask_NxS, cache)
