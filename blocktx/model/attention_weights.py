"""Attention weights of a forward pass, read by intercepting the modules' methods."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import StackConfig
from blocktx.model.attention import Attention
from blocktx.ops import rotary


def recorded_attention(call: Callable[[], Any]) -> tuple[Any, jax.Array]:
    """Return the result of `call`, and the attention weights `[layers, H, T, S]` of its stack.

    `call` runs a method of a bound module with one stack, whose layers are not scanned and use
    plain attention.
    """
    projected, weights = [], []

    def record(next_function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result, module = next_function(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return result
        if module.name == "qkv" and isinstance(module.parent, Attention):
            projected.append(result)
        elif isinstance(module, Attention):
            _, position_T, mask_TxS = args[:3]
            weights.append(_weights(projected.pop(), position_T, mask_TxS, module.stack))
        return result

    with nn.intercept_methods(record):
        result = call()
    return result, jnp.stack(weights)


def _weights(
    qkv_Tx3xD: jax.Array, position_T: jax.Array, mask_TxT: jax.Array, stack: StackConfig
) -> jax.Array:
    """Return the softmax over keys, `[H, T, T]`."""
    qkv_Tx3xHxC = qkv_Tx3xD.reshape(-1, 3, stack.heads, stack.head_size)
    q_TxHxC, k_TxHxC = (
        rotary(qkv_Tx3xHxC[:, i], position_T, stack.rotary_dims, stack.rotary_base) for i in (0, 1)
    )
    scores_HxTxT = jnp.einsum("thc,shc->hts", q_TxHxC, k_TxHxC, preferred_element_type=jnp.float32)
    scores_HxTxT *= stack.head_size**-0.5
    return jax.nn.softmax(scores_HxTxT, axis=-1, where=mask_TxT)
