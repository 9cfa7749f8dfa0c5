"""The stack of layers that block decoder, token decoder and vanilla model share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, StackConfig
from blocktx.model.attention import Attention, CrossAttention
from blocktx.model.cache import Cache, LayerCache
from blocktx.model.layers import MLP, WIDE, Norm
from blocktx.parallel import constrain

_SAVED = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Layer(nn.Module):
    """A layer of the GPT-NeoX or Llama family, see `StackConfig`.

    With a memory its residuals are sequential: attention, cross-attention, MLP.
    """

    config: ModelConfig
    stack: StackConfig
    window: bool = False  # as of `Attention`

    @nn.compact
    def __call__(
        self,
        x_TxD: jax.Array,
        position_T: jax.Array,
        mask_TxS: jax.Array,
        memory_MxD: jax.Array | None = None,
        cache: LayerCache | None = None,
        slot: jax.Array | int = 0,
        fresh: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        stack = self.stack
        attention = Attention(self.config, stack, self.window, name="attention")
        mlp = MLP(self.config, stack.mlp_size, stack.mlp, stack.mlp_bias, name="mlp")
        attention_norm, mlp_norm = (
            norm(self.config, stack, f"{part}_norm") for part in ("attention", "mlp")
        )

        def attend(x_TxD: jax.Array) -> tuple[jax.Array, LayerCache | None]:
            if cache is None:
                return attention.over_itself(x_TxD, position_T, mask_TxS), None
            method = attention.into_cache if fresh else attention.over_cache
            return method(x_TxD, position_T, mask_TxS, cache, slot)

        if memory_MxD is None and stack.residual == "parallel":
            width = x_TxD.shape[-1]
            weights = [attention_norm.weights(width), mlp_norm.weights(width)]
            attention_input, mlp_input = attention_norm.apply_all(x_TxD, weights)
            attended_TxD, cache = attend(attention_input)
            return constrain(x_TxD + attended_TxD + mlp(mlp_input), None, None), cache
        attended_TxD, cache = attend(attention_norm(x_TxD))
        x_TxD += attended_TxD
        if memory_MxD is not None:
            cross = CrossAttention(self.config, stack, name="cross_attention")
            x_TxD += cross(norm(self.config, stack, "cross_attention_norm")(x_TxD), memory_MxD)
        return constrain(x_TxD + mlp(mlp_norm(x_TxD)), None, None), cache


def norm(config: ModelConfig, stack: StackConfig, name: str) -> Norm:
    """Return a norm of the stack's kind."""
    return Norm(config, stack.norm, stack.norm_epsilon, name=name)


class Stack(nn.Module):
    """Layers and a final norm, over one sequence."""

    config: ModelConfig
    stack: StackConfig
    window: bool = False  # as of `Attention`

    @nn.compact
    def __call__(
        self,
        x_TxD: jax.Array,
        position_T: jax.Array,
        mask_TxS: jax.Array,
        *,
        memory_MxD: jax.Array | None = None,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
        fresh: bool = False,
        keep: int | None = None,
    ) -> tuple[jax.Array, Cache | jax.Array | None]:
        """Return the outputs `[T, D]`, and the cache with the T positions written, if any.

        Args:
          x_TxD, position_T, mask_TxS: as of `Attention`.
          memory_MxD: vectors that `CrossAttention` attends to.
          cache: attention is over the cache, or with `fresh` over x alone. Layers must be separate.
          slot: the first slot of the cache to write.
          fresh: whether the cache holds nothing that these positions attend to.
          keep: the second result is the hidden state `[T, D]` after so many layers, before any
            norm, in place of a cache.
        """
        layers, scan = self.stack.layers, self.config.scan_layers
        if layers == 0:  # the identity, without a final norm
            x_TxD = x_TxD.astype(jnp.float32)
            return x_TxD, cache if keep is None else x_TxD
        # A loop copies what it saves for the gradient, which on TPU costs narrow layers a third of
        # their time. It costs wide layers less, and a loop compiles faster.
        unrolled = self.config.formulations.narrow_layers == "unrolled"
        unroll = unrolled and self.stack.width < WIDE
        layer = Layer
        if self.config.remat != "none" and cache is None:
            barrier = not scan or unroll  # a loop is a barrier itself
            layer = nn.remat(Layer, prevent_cse=barrier, policy=_SAVED[self.config.remat])
        if scan:
            if cache is not None:
                raise ValueError("decoding needs separate layers; see blocktx.model.unstack_layers")
            lift = functools.partial(
                nn.scan,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=layers,
                unroll=layers if unroll else 1,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            inputs = (position_T, mask_TxS, memory_MxD)
            if keep is None:
                scanned = lift(layer)(self.config, self.stack, self.window, name="layers")
                x_TxD, _ = scanned(x_TxD, *inputs)
            else:
                one = layer(self.config, self.stack, self.window, name="layers")
                carry = (x_TxD, x_TxD, 0)
                (x_TxD, kept_TxD, _), _ = lift(functools.partial(_keep, keep))(one, carry, *inputs)
        else:
            written = []
            for i in range(layers):
                one = layer(self.config, self.stack, self.window, name=f"layers_{i}")
                x_TxD, layer_cache = one(
                    x_TxD, position_T, mask_TxS, memory_MxD, cache and cache[i], slot, fresh
                )
                written.append(layer_cache)
                if i + 1 == keep:
                    kept_TxD = x_TxD
            cache = None if cache is None else tuple(written)
        x_TxD = norm(self.config, self.stack, "final_norm")(x_TxD)
        return x_TxD, cache if keep is None else kept_TxD


def _keep(
    keep: int, layer: Layer, carry: tuple[jax.Array, jax.Array, jax.Array], *inputs: Any
) -> tuple[Any, None]:
    """Apply one layer of a scan, and carry the hidden state after layer `keep` along."""
    x_TxD, kept_TxD, index = carry
    x_TxD, _ = layer(x_TxD, *inputs)
    return (x_TxD, jnp.where(index + 1 == keep, x_TxD, kept_TxD), index + 1), None
