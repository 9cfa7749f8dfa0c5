"""One attention for training, prefill and decoding: cache in, cache out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.cache import LayerCache
from blocktx.flash_attention import flash_attention, is_long
from blocktx.layers import Heads, linear, rotary, rotary_by_product
from blocktx.model_config import ModelConfig, StackConfig
from blocktx.sharding import constrain
from blocktx.short_attention import is_short, short_attention

_HEADS = ("heads", "head_size")


def attend(
    q_TxHxC: jax.Array, k_SxHxC: jax.Array, v_SxHxC: jax.Array, mask_TxS: jax.Array
) -> jax.Array:
    """Softmax attention, `[T, H, C]`. A query without a key that it may see sees all alike."""
    scores_HxTxS = jnp.einsum("thc,shc->hts", q_TxHxC, k_SxHxC, preferred_element_type=jnp.float32)
    scores_HxTxS *= q_TxHxC.shape[-1] ** -0.5
    scores_HxTxS = jnp.where(mask_TxS, scores_HxTxS, jnp.finfo(jnp.float32).min)
    weights_HxTxS = jax.nn.softmax(scores_HxTxS, axis=-1).astype(v_SxHxC.dtype)
    return jnp.einsum("hts,shc->thc", weights_HxTxS, v_SxHxC)


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
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention of T positions over themselves, or over a cache that they are written to.

        Args:
          x_TxD: inputs.
          position_T: positions, consecutive; with a cache also the slots to write.
          mask_TxS: bool, True where a query may see a key; S is T, or the slots of the cache.
          cache: keys and values of earlier positions.

        Returns:
          `[T, D]`, and the cache with the T positions written (None without one).
        """
        config, stack = self.config, self.stack
        out = _out(config, stack.width)
        if config.platform == "tpu" and self.window and cache is None and is_short(stack, x_TxD):
            q_k_v, bias_3xD = Heads(config, 3, stack.heads, stack.head_size, name="qkv")(x_TxD)
            y_TxD = short_attention(*q_k_v, bias_3xD, mask_TxS[-1], stack)
            return out(y_TxD.reshape(-1, stack.heads, stack.head_size)), None
        causal = getattr(config, "embeddings_per_block", 1) == 1
        if config.platform == "tpu" and causal and cache is None and is_long(x_TxD):
            q_k_v, bias_3xD = Heads(config, 3, stack.heads, stack.head_size, name="qkv")(x_TxD)
            q, k, v = (
                x + bias for x, bias in zip(q_k_v, bias_3xD.astype(x_TxD.dtype), strict=True)
            )
            q, k = (rotary_by_product(x, position_T, stack) for x in (q, k))
            heads = (-1, stack.heads, stack.head_size)
            y_TxHxC = flash_attention(*(x.reshape(heads) for x in (q, k, v)), mask_TxS[-1])
            return out(y_TxHxC), None
        shape = (3, stack.heads, stack.head_size)
        qkv = linear(config, shape, name="qkv", axes=("width", "qkv", *_HEADS))(x_TxD)
        qkv = constrain(qkv, None, None, *_HEADS)
        q_TxHxC, k_TxHxC, v_TxHxC = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        q_TxHxC = rotary(q_TxHxC, position_T, stack.rotary_dims, stack.rotary_base)
        k_TxHxC = rotary(k_TxHxC, position_T, stack.rotary_dims, stack.rotary_base)
        if cache is None:
            y_TxHxC = attend(q_TxHxC, k_TxHxC, v_TxHxC, mask_TxS)
        else:
            cache = cache.write(k_TxHxC, v_TxHxC, position_T[0])
            y_TxHxC = attend(q_TxHxC, cache.k_SxHxC, cache.v_SxHxC, mask_TxS)
        y_TxHxC = y_TxHxC.astype(config.compute_dtype)
        return out(y_TxHxC), cache


def _out(config: ModelConfig, width: int) -> nn.DenseGeneral:
    return linear(config, width, axis=(-2, -1), name="out", axes=(*_HEADS, "width"))
