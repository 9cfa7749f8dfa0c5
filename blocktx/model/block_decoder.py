"""The block decoder: a causal transformer over the block embeddings of one sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, StackConfig
from blocktx.model.attention import uses_cudnn
from blocktx.model.cache import Cache, causal_mask
from blocktx.model.stack import Stack


def extend_axes(slot: jax.Array | int) -> tuple[int | None, ...]:
    """Return the batch axes of `BlockDecoder.extend`; `slot` is one for all rows, or one per row.

    One for all is an update slice. One per row is a scatter, which a TPU does row after row.
    """
    return (0, 0, 0, 0 if jnp.ndim(slot) else None, 0)


class BlockDecoder(nn.Module):
    """Causal attention over blocks of n embeddings, full inside a block (appendix B.2).

    The vanilla model is the same over blocks of one token.
    """

    config: ModelConfig
    stack_config: StackConfig

    def setup(self):
        self.stack = Stack(self.config, self.stack_config)

    def __call__(self, embeddings_NxnxD: jax.Array, real_N: jax.Array) -> jax.Array:
        """Return the context embeddings `[N, n * D]` of a sequence; entry i predicts block i+1.

        `real_N` is False for blocks of padding, to which no other block attends.
        """
        return self.with_layer(embeddings_NxnxD, real_N, None)[0]

    def with_layer(
        self, embeddings_NxnxD: jax.Array, real_N: jax.Array, layer: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the context embeddings, and the hidden state `[N * n, D]` after `layer` layers."""
        blocks, group, width = embeddings_NxnxD.shape
        position_T = jnp.arange(blocks * group)
        mask_TxT = jnp.repeat(real_N, group) & causal_mask(position_T, position_T.size, group)
        # Leading padding attends to itself; a fully masked row would attend to the future.
        alone_Tx1 = ~mask_TxT.any(-1, keepdims=True)
        mask_TxT |= alone_Tx1 & jnp.eye(position_T.size, dtype=bool)
        x_TxD = embeddings_NxnxD.reshape(-1, width)
        if not uses_cudnn(self.config, self.stack_config):
            contexts_TxD, kept_TxD = self.stack(x_TxD, position_T, mask_TxT, keep=layer)
            return contexts_TxD.reshape(blocks, -1), kept_TxD
        # cuDNN takes the number of real positions, which come first: leading padding goes last.
        leading = jnp.argmax(real_N)
        mask_1xT = jnp.roll(real_N, -leading)[None]
        position_T = jnp.roll(position_T, -leading)
        outputs = self.stack(jnp.roll(x_TxD, -leading, axis=0), position_T, mask_1xT, keep=layer)
        contexts_TxD, kept_TxD = (None if x is None else jnp.roll(x, leading, 0) for x in outputs)
        return contexts_TxD.reshape(blocks, -1), kept_TxD

    def extend(
        self,
        embeddings_NxnxD: jax.Array,
        start: jax.Array | int,
        cache: Cache,
        slot: jax.Array | int,
        seen_S: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Return the context embeddings `[N, n * D]` of N more blocks, and the extended cache.

        Args:
          embeddings_NxnxD: inputs.
          start: the position of the first, in blocks.
          cache: n slots a block.
          slot: the first block of the cache to write.
          seen_S: bool by block of the cache; written blocks that the new ones attend to, besides
            each other in causal order. None: no others, and the cache is not read.
        """
        blocks, group, width = embeddings_NxnxD.shape
        order_T = jnp.arange(blocks * group)
        mask_TxS = causal_mask(order_T, order_T.size, group)
        if seen_S is not None:
            # A select, because a slice at a slot of each row is a loop over rows on a TPU.
            at_S = jnp.arange(seen_S.size * group) - slot * group
            causal_TxS = at_S < (order_T[:, None] // group + 1) * group
            new_S = (at_S >= 0) & (at_S < order_T.size)
            mask_TxS = jnp.where(new_S, causal_TxS, jnp.repeat(seen_S, group))
        x_TxD, cache = self.stack(
            embeddings_NxnxD.reshape(-1, width),
            start * group + order_T,
            mask_TxS,
            cache=cache,
            slot=slot * group,
            fresh=seen_S is None,
        )
        return x_TxD.reshape(blocks, -1), cache
