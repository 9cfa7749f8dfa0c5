"""Attention weights of a model's run, for inspection."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.model.attention import Attention


def record_attention(call: Callable[[], Any]) -> tuple[Any, jax.Array]:
    """Return the result of `call`, and the attention weights `[layers, H, T, T]` of its one stack.

    `call` applies a model whose layers are separate.
    """
    weights = []

    def record(next_function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if isinstance(module, Attention) and context.method_name == "over_itself":
            weights.append(_weights(module, *args))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        result = call()
    return result, jnp.stack(weights)


def _weights(
    module: Attention, x_TxD: jax.Array, position_T: jax.Array, mask_TxT: jax.Array
) -> jax.Array:
    """Return the softmax of `Attention` over keys, `[H, T, T]`."""
    q_TxHxC, k_TxGxC, _ = module.rotated(x_TxD, position_T)
    k_TxHxC = jnp.repeat(k_TxGxC, q_TxHxC.shape[1] // k_TxGxC.shape[1], axis=1)
    scores_HxTxT = jnp.einsum("thc,shc->hts", q_TxHxC, k_TxHxC, preferred_element_type=jnp.float32)
    scores_HxTxT *= module.stack.head_size**-0.5
    return jax.nn.softmax(scores_HxTxT, axis=-1, where=mask_TxT)
