"""One attention for training, prefill and decoding: cache in, cache out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, StackConfig
from blocktx.model.cache import LayerCache
from blocktx.model.layers import Heads, linear
from blocktx.ops import (
    attend,
    flash_attention,
    formulation,
    is_long,
    is_short,
    rotary,
    rotary_by_product,
    short_attention,
)
from blocktx.parallel import constrain

_HEADS = ("heads", "head_size")


class CrossAttention(nn.Module):
    """Multi-head attention of a block's positions to the M vectors of its memory, without order."""

    config: ModelConfig
    stack: StackConfig

    @nn.compact
    def __call__(self, x_TxD: jax.Array, memory_MxD: jax.Array) -> jax.Array:
        stack = self.stack
        shape = (stack.heads, stack.head_size)
        q_TxHxC = linear(self.config, shape, name="q", axes=("width", *_HEADS))(x_TxD)
        kv = linear(self.config, (2, *shape), name="kv", axes=("width", "qkv", *_HEADS))(memory_MxD)
        mask_TxM = jnp.ones((x_TxD.shape[0], memory_MxD.shape[0]), bool)
        y_TxHxC = attend(q_TxHxC, kv[:, 0], kv[:, 1], mask_TxM)
        return _out(self.config, stack.width)(y_TxHxC)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions (GPT-NeoX)."""

    config: ModelConfig
    stack: StackConfig
    window: bool = False  # over a block's positions: causal, and the first is real

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
          position_T: their positions, consecutive.
          mask_TxS: bool, True where a query may see a key; S is T where they see nothing but
            themselves, or else the slots of the cache.
          cache: keys and values of earlier positions.
          slot: where in the cache the T positions are written.

        Returns:
          `[T, D]`, and the cache with the T positions written (None without one).
        """
        config, stack = self.config, self.stack
        heads = Heads(config, 3, stack.heads, stack.head_size, name="qkv")
        if config.platform == "tpu" and self.window and cache is None and is_short(stack, x_TxD):
            q_k_v, bias_3xD = heads.apart(x_TxD)
            return self._out(short_attention(*q_k_v, bias_3xD, mask_TxS[-1], stack)), None
        causal = config.embeddings_per_block == 1  # else those of a block see each other
        if config.platform == "tpu" and causal and cache is None and is_long(x_TxD):
            q_k_v, bias_3xD = heads.apart(x_TxD)
            q, k, v = (x + b.astype(x.dtype) for x, b in zip(q_k_v, bias_3xD, strict=True))
            turn = (stack.heads, stack.rotary_dims, stack.rotary_base)
            q, k = (rotary_by_product(x, position_T, *turn) for x in (q, k))
            q, k, v = (x.reshape(-1, stack.heads, stack.head_size) for x in (q, k, v))
            return self._out(flash_attention(q, k, v, mask_TxS[-1])), None
        qkv = constrain(heads(x_TxD), None, None, "heads")
        q_TxD, k_TxD, v_TxD = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if mask_TxS.shape[0] != mask_TxS.shape[1]:
            rotate, attend_to_cache = formulation(config.platform, *mask_TxS.shape, stack)
            cache = cache.write(rotate(k_TxD, position_T), v_TxD, slot)
            y_TxD = attend_to_cache(rotate(q_TxD, position_T), cache.k_SxD, cache.v_SxD, mask_TxS)
            return self._out(y_TxD), cache
        q_TxHxC, k_TxHxC, v_TxHxC = (
            x_TxD.reshape(-1, stack.heads, stack.head_size) for x_TxD in (q_TxD, k_TxD, v_TxD)
        )
        q_TxHxC = rotary(q_TxHxC, position_T, stack.rotary_dims, stack.rotary_base)
        k_TxHxC = rotary(k_TxHxC, position_T, stack.rotary_dims, stack.rotary_base)
        # Scores and weights are larger than what they come from: on TPU, cheaper made again.
        among = jax.checkpoint(attend) if config.platform == "tpu" else attend
        y_TxHxC = among(q_TxHxC, k_TxHxC, v_TxHxC, mask_TxS)
        if cache is not None:
            cache = cache.write(k_TxHxC.reshape(v_TxD.shape), v_TxD, slot)
        return self._out(y_TxHxC), cache

    def _out(self, y: jax.Array) -> jax.Array:
        """From heads apart or side by side."""
        y_TxHxC = y.reshape(-1, self.stack.heads, self.stack.head_size)
        return _out(self.config, self.stack.width)(y_TxHxC.astype(self.config.compute_dtype))


def _out(config: ModelConfig, width: int) -> nn.DenseGeneral:
    return linear(config, width, axis=(-2, -1), name="out", axes=(*_HEADS, "width"))
