"""One attention for training, prefill and decoding: cache in, cache out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.cache import LayerCache
from blocktx.cached_attention import attend, attend_by_head, formulation, rotary_by_head
from blocktx.layers import linear
from blocktx.model_config import ModelConfig, StackConfig


class CrossAttention(nn.Module):
    """Multi-head attention of a block's positions to the M vectors of its memory, without order."""

    config: ModelConfig
    stack: StackConfig

    @nn.compact
    def __call__(self, x_TxD: jax.Array, memory_MxD: jax.Array) -> jax.Array:
        stack = self.stack
        shape = (stack.heads, stack.head_size)
        q_TxHxC = linear(self.config, shape, name="q")(x_TxD)
        kv = linear(self.config, (2, *shape), name="kv")(memory_MxD)
        mask_TxM = jnp.ones((x_TxD.shape[0], memory_MxD.shape[0]), bool)
        y_TxHxC = attend(q_TxHxC, kv[:, 0], kv[:, 1], mask_TxM)
        return linear(self.config, stack.width, axis=(-2, -1), name="out")(y_TxHxC)


class QKV(nn.Module):
    """The projection to queries, keys and values, `[T, 3, D]`, heads side by side.

    Its parameters are those of a projection to `(3, H, C)`. A result with these axes would be
    copied to another layout on a TPU, at the price of the projection itself.
    """

    config: ModelConfig
    stack: StackConfig

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        config, width = self.config, x_TxD.shape[-1]
        shape = (3, self.stack.heads, self.stack.head_size)
        init = nn.initializers.normal(config.initializer_range)
        kernel = self.param("kernel", init, (width, *shape), config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, config.param_dtype)
        x_TxD, kernel, bias = nn.dtypes.promote_dtype(
            x_TxD, kernel, bias, dtype=config.compute_dtype
        )
        return jnp.einsum("td,dne->tne", x_TxD, kernel.reshape(width, 3, -1)) + bias.reshape(3, -1)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions (GPT-NeoX)."""

    config: ModelConfig
    stack: StackConfig

    @nn.compact
    def __call__(
        self,
        x_TxD: jax.Array,
        position_T: jax.Array,
        mask_TxS: jax.Array,
        cache: LayerCache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention of T positions over themselves, or over a cache that they are written to.

        Args:
          x_TxD: inputs.
          position_T: their positions.
          mask_TxS: bool, True where a query may see a key; S is T where they see nothing but
            themselves, or else the slots of the cache.
          cache: keys and values of earlier positions.
          slot: where in the cache the T positions are written.

        Returns:
          `[T, D]`, and the cache with the T positions written (None without one).
        """
        stack, (queries, slots) = self.stack, mask_TxS.shape
        from_cache = cache is not None and slots != queries
        rotate, attend_ = rotary_by_head, attend_by_head
        if from_cache:
            rotate, attend_ = formulation(self.config.platform, queries, slots, stack.heads)
        qkv = QKV(self.config, stack, name="qkv")(x_TxD)
        q_TxD, k_SxD = (
            rotate(qkv[:, i], position_T, stack.heads, stack.rotary_dims, stack.rotary_base)
            for i in (0, 1)
        )
        v_SxD = qkv[:, 2]
        if cache is not None:
            cache = cache.write(k_SxD, v_SxD, slot)
        if from_cache:
            k_SxD, v_SxD = cache.k_SxD, cache.v_SxD
        y_TxD = attend_(q_TxD, k_SxD, v_SxD, mask_TxS, stack.heads)
        y_TxHxC = y_TxD.astype(self.config.compute_dtype).reshape(
            queries, stack.heads, stack.head_size
        )
        return linear(self.config, stack.width, axis=(-2, -1), name="out")(y_TxHxC), cache
