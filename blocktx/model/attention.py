"""Attention of a layer: over its own positions, into a cache, over a cache, over a memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, StackConfig
from blocktx.model.cache import LayerCache
from blocktx.model.layers import Heads, Norm, linear
from blocktx.ops import (
    attend,
    attend_by_products,
    attend_cudnn,
    attend_short,
    attend_splash,
    choose_attention,
    fits_products,
    fits_short,
    fits_splash,
    rotary,
    rotary_by_product,
    why_not_cudnn,
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

        def project(name: str, heads: tuple[int, ...], axes: tuple[str, ...]) -> nn.DenseGeneral:
            features, axes = (*heads, stack.head_size), ("width", *axes, *_HEADS)
            bias = stack.attention_bias
            return linear(self.config, features, name=name, axes=axes, use_bias=bias)

        q_TxHxC = project("q", (stack.heads,), ())(x_TxD)
        kv_Mx2xGxC = project("kv", (2, stack.kv_heads), ("qkv",))(memory_MxD)
        mask_TxM = jnp.ones((x_TxD.shape[0], memory_MxD.shape[0]), bool)
        y_TxHxC = attend(q_TxHxC, kv_Mx2xGxC[:, 0], kv_Mx2xGxC[:, 1], mask_TxM)
        return _out(self.config, stack)(y_TxHxC)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, with grouped key-value heads if configured.

    Three methods cover training, prefill and decoding. Each takes inputs `x_TxD`, their consecutive
    positions `position_T`, and a mask, True where a query attends to a key.

    Parameters: qkv, or q and kv if there are fewer key-value heads than heads; q_norm and k_norm if
    configured; out.
    """

    config: ModelConfig
    stack: StackConfig
    window: bool = False  # over a block's positions: causal, and the first is real

    def setup(self):
        stack = self.stack

        def heads(parts: int, count: int) -> Heads:
            return Heads(self.config, parts, count, stack.head_size, stack.attention_bias)

        if stack.kv_heads == stack.heads:
            self.qkv = heads(3, stack.heads)
        else:
            self.q, self.kv = heads(1, stack.heads), heads(2, stack.kv_heads)
        if stack.qk_norm:
            self.q_norm = Norm(self.config, "rms", stack.norm_epsilon)
            self.k_norm = Norm(self.config, "rms", stack.norm_epsilon)
        self.out = _out(self.config, stack)

    def over_itself(
        self, x_TxD: jax.Array, position_T: jax.Array, mask_TxT: jax.Array
    ) -> jax.Array:
        """Return the attention `[T, D]` of T positions over themselves."""
        chosen, positions = self.config.formulations, len(position_T)
        if self.window and chosen.token_attention == "pallas" and fits_short(self.stack, positions):
            return self._short(x_TxD, mask_TxT[-1])
        causal = self.config.embeddings_per_block == 1  # else the embeddings of a block are not
        if causal and chosen.self_attention == "splash" and fits_splash(positions):
            q_k_v = self._rotated_apart(x_TxD, position_T)
            interpret = chosen.pallas == "interpreted"
            y_TxHxC = attend_splash(*q_k_v, mask_TxT[-1], interpret=interpret)
        elif uses_cudnn(self.config, self.stack) and not self.window:
            q_k_v = self.rotated(x_TxD, position_T)
            emulate = chosen.pallas == "interpreted"
            y_TxHxC = attend_cudnn(*q_k_v, mask_TxT[-1].sum(), emulate=emulate)
        elif self._by_products(positions):
            # Saved, the products would be as many times larger than queries as there are keys.
            among = jax.checkpoint(attend_by_products)
            y_TxHxC = among(*self.rotated(x_TxD, position_T), mask_TxT)
        else:
            q_k_v = self.rotated(x_TxD, position_T)
            # Scores and weights are larger than their inputs: cheaper recomputed on TPU.
            among = jax.checkpoint(attend) if chosen.scores == "recomputed" else attend
            y_TxHxC = among(*q_k_v, mask_TxT)
        return self._project_out(y_TxHxC)

    def _by_products(self, positions: int) -> bool:
        chosen = self.config.formulations.token_attention == "products"
        return self.window and chosen and fits_products(positions)

    def into_cache(
        self,
        x_TxD: jax.Array,
        position_T: jax.Array,
        mask_TxT: jax.Array,
        cache: LayerCache,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache]:
        """Return the attention `[T, D]` of T positions over themselves, written to a cache.

        The cache is not read. The mask is causal, and masks nothing else: a prompt's padding comes
        last.
        """
        q_TxHxC, k_TxGxC, v_TxGxC = self.rotated(x_TxD, position_T)
        if uses_cudnn(self.config, self.stack):
            emulate = self.config.formulations.pallas == "interpreted"
            y_TxHxC = attend_cudnn(q_TxHxC, k_TxGxC, v_TxGxC, emulate=emulate)
        else:
            y_TxHxC = attend(q_TxHxC, k_TxGxC, v_TxGxC, mask_TxT)
        k_TxE, v_TxE = (x.reshape(len(x), -1) for x in (k_TxGxC, v_TxGxC))
        return self._project_out(y_TxHxC), cache.write(k_TxE, v_TxE, slot)

    def over_cache(
        self,
        x_TxD: jax.Array,
        position_T: jax.Array,
        mask_TxS: jax.Array,
        cache: LayerCache,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache]:
        """Return the attention `[T, D]` of T positions over a cache that they are written to.

        Args:
          x_TxD, position_T: inputs.
          mask_TxS: over the slots of the cache.
          cache: keys and values of earlier positions.
          slot: the first of the T slots to write to.
        """
        q_TxD, k_TxE, v_TxE = self._projected(x_TxD)
        formulations = self.config.formulations
        rotate_q, rotate_k, attend_to = choose_attention(formulations, *mask_TxS.shape, self.stack)
        tile = formulations.cache_write == "tile"
        cache = cache.write(rotate_k(k_TxE, position_T), v_TxE, slot, tile)
        q_TxD = rotate_q(q_TxD, position_T)
        y_TxD = attend_to(q_TxD, cache.k_SxE, cache.v_SxE, mask_TxS, *cache.scales)
        return self._project_out(y_TxD), cache

    def rotated(self, x_TxD: jax.Array, position_T: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries `[T, H, C]`, keys and values `[T, G, C]`, with rotary positions."""
        q_TxHxC, k_TxGxC, v_TxGxC = map(self._split, self._projected(x_TxD))
        q_TxHxC, k_TxGxC = (rotary(x, position_T, self.stack) for x in (q_TxHxC, k_TxGxC))
        return q_TxHxC, k_TxGxC, v_TxGxC

    def _projected(self, x_TxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries `[T, H * C]`, keys and values `[T, G * C]`, before rotary positions."""
        if self.stack.kv_heads == self.stack.heads:
            qkv = constrain(self.qkv(x_TxD), None, None, "heads")
            q_TxD, k_TxE, v_TxE = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        else:
            q_TxD = constrain(self.q(x_TxD)[:, 0], None, "heads")
            kv_Tx2xE = constrain(self.kv(x_TxD), None, None, "heads")
            k_TxE, v_TxE = kv_Tx2xE[:, 0], kv_Tx2xE[:, 1]
        return *self._normed(q_TxD, k_TxE), v_TxE

    def _normed(self, q_TxD: jax.Array, k_TxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the norms of each head's queries and keys, if configured."""
        if not self.stack.qk_norm:
            return q_TxD, k_TxE
        q_TxHxC, k_TxGxC = self.q_norm(self._split(q_TxD)), self.k_norm(self._split(k_TxE))
        q_TxD, k_TxE = (
            new.reshape(old.shape).astype(old.dtype)
            for new, old in ((q_TxHxC, q_TxD), (k_TxGxC, k_TxE))
        )
        return q_TxD, k_TxE

    def _apart(self, x_TxD: jax.Array, repeat: int = 1) -> tuple[list, list]:
        """Return queries, keys and values by a product each, without biases, and the biases.

        Args:
          x_TxD: inputs.
          repeat: times that each key-value head is repeated.
        """
        if self.stack.kv_heads == self.stack.heads:
            return self.qkv.apart(x_TxD)
        q, q_bias = self.q.apart(x_TxD)
        kv, kv_bias = self.kv.apart(x_TxD, repeat)
        return [*q, *kv], [*q_bias, *kv_bias]

    def _rotated_apart(self, x_TxD: jax.Array, position_T: jax.Array) -> list[jax.Array]:
        """`rotated`, in formulations for TPU."""
        stack = self.stack
        q_TxD, k_TxE, v_TxE = (
            x if b is None else x + b.astype(x.dtype)
            for x, b in zip(*self._apart(x_TxD), strict=True)
        )
        q_TxD, k_TxE = self._normed(q_TxD, k_TxE)
        q_TxD = rotary_by_product(q_TxD, position_T, stack, stack.heads)
        k_TxE = rotary_by_product(k_TxE, position_T, stack, stack.kv_heads)
        return [self._split(x) for x in (q_TxD, k_TxE, v_TxE)]

    def _short(self, x_TxD: jax.Array, real_T: jax.Array) -> jax.Array:
        """Attention within a block by the kernel, which takes a key-value head for each query's."""
        stack = self.stack
        q_k_v, biases = self._apart(x_TxD, stack.heads // stack.kv_heads)
        if biases[0] is None:
            bias_3xD = jnp.zeros((3, stack.query_width), jnp.float32)
        else:
            bias_3xD = jnp.stack(biases)
        return self._project_out(attend_short(*q_k_v, bias_3xD, real_T, stack))

    def _split(self, x_TxD: jax.Array) -> jax.Array:
        return x_TxD.reshape(*x_TxD.shape[:-1], -1, self.stack.head_size)

    def _project_out(self, y: jax.Array) -> jax.Array:
        """Project heads, apart or side by side."""
        y_TxHxC = y.reshape(-1, self.stack.heads, self.stack.head_size)
        return self.out(y_TxHxC.astype(self.config.compute_dtype))


def uses_cudnn(config: ModelConfig, stack: StackConfig) -> bool:
    """Return whether self-attention over a whole sequence is by cuDNN."""
    return config.formulations.self_attention == "cudnn" and not cudnn_problem(config, stack)


def cudnn_problem(config: ModelConfig, stack: StackConfig) -> str:
    """Return why self-attention over a whole sequence cannot be by cuDNN; empty if it can."""
    if config.embeddings_per_block > 1:
        return f"cuDNN's is causal, and embeddings_per_block is {config.embeddings_per_block}"
    return why_not_cudnn(stack, config.compute_dtype)


def _out(config: ModelConfig, stack: StackConfig) -> nn.DenseGeneral:
    axes = (*_HEADS, "width")
    bias = stack.biases == "all"
    return linear(config, stack.width, axis=(-2, -1), name="out", axes=axes, use_bias=bias)
