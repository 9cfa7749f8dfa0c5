"""The stack of layers that block decoder, token decoder and vanilla model share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, StackConfig
from blocktx.model.attention import Attention, CrossAttention
from blocktx.model.cache import Cache, LayerCache
from blocktx.model.layers import MLP, WIDE, layer_norm
from blocktx.ops import normalize
from blocktx.parallel import constrain

_KEPT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Layer(nn.Module):
    """A GPT-NeoX layer: attention and MLP side by side, each on a norm of its own of the input.

    With a memory it is a layer of an encoder-decoder: attention, cross-attention and MLP one after
    the other, each adding to what came before.
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
    ) -> tuple[jax.Array, LayerCache | None]:
        attention = Attention(self.config, self.stack, self.window, name="attention")
        mlp = MLP(self.config, self.stack.mlp_size, name="mlp")
        norms = [layer_norm(self.config, name=f"{part}_norm") for part in ("attention", "mlp")]
        if memory_MxD is None:
            width = x_TxD.shape[-1]
            inputs = normalize(self.config, x_TxD, [norm.weights(width) for norm in norms])
            attended_TxD, cache = attention(inputs[0], position_T, mask_TxS, cache, slot)
            return constrain(x_TxD + attended_TxD + mlp(inputs[1]), None, None), cache
        attended_TxD, cache = attention(norms[0](x_TxD), position_T, mask_TxS, cache, slot)
        x_TxD += attended_TxD
        cross = CrossAttention(self.config, self.stack, name="cross_attention")
        cross_norm = layer_norm(self.config, name="cross_attention_norm")
        x_TxD += cross(cross_norm(x_TxD), memory_MxD)
        return constrain(x_TxD + mlp(norms[1](x_TxD)), None, None), cache


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
        keep: int | None = None,
    ) -> tuple[jax.Array, Cache | jax.Array | None]:
        """Args and results as of `Attention`, and what `CrossAttention` attends to, if anything.

        A cache needs `scan_layers` to be False. With `keep` the second result is the hidden state
        `[T, D]` after that many layers, before any norm, in place of a cache.
        """
        layers, scan = self.stack.layers, self.config.scan_layers
        # What a loop keeps for the gradient it copies, which takes narrow layers on TPU as long as
        # a third of their work; wide ones a smaller part, and a loop compiles faster.
        unroll = self.config.platform == "tpu" and self.stack.width < WIDE
        layer = Layer
        if self.config.remat != "none":
            barrier = not scan or unroll  # a loop is one of its own
            layer = nn.remat(Layer, prevent_cse=barrier, policy=_KEPT[self.config.remat])
        if scan:
            if cache is not None:
                raise ValueError(
                    "decoding takes separate layers; see blocktx.model.params.unstack_layers"
                )
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
                    x_TxD, position_T, mask_TxS, memory_MxD, cache and cache[i], slot
                )
                written.append(layer_cache)
                if i + 1 == keep:
                    kept_TxD = x_TxD
            cache = None if cache is None else tuple(written)
        x_TxD = layer_norm(self.config, name="final_norm")(x_TxD)
        return x_TxD, cache if keep is None else kept_TxD


def _keep(
    keep: int, layer: Layer, carry: tuple[jax.Array, jax.Array, jax.Array], *inputs: Any
) -> tuple[Any, None]:
    """Apply one layer of a scan, and carry the hidden state after layer `keep` along."""
    x_TxD, kept_TxD, index = carry
    x_TxD, _ = layer(x_TxD, *inputs)
    return (x_TxD, jnp.where(index + 1 == keep, x_TxD, kept_TxD), index + 1), None
