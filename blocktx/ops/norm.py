"""LayerNorm."""

import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig

_Weights = list[tuple[jax.Array, jax.Array]]


def normalize(config: ModelConfig, x_TxD: jax.Array, weights: _Weights) -> list[jax.Array]:
    """For each scale and bias, the LayerNorm of `x_TxD` by them.

    A scan over layers keeps for the gradient all that differentiation asks for, here several
    float32 arrays of the size of `x_TxD`; on TPU, which they would keep busy, only `x_TxD` is kept.
    """
    return (_lean_normalize if config.platform == "tpu" else _normalize)(x_TxD, weights)


def _standardize(x_TxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean_Tx1 = x_TxD.mean(-1, keepdims=True, dtype=jnp.float32)
    centred_TxD = x_TxD - mean_Tx1
    # Not E[x^2] - E[x]^2, which loses digits that the golden tests see.
    rate_Tx1 = jax.lax.rsqrt(jnp.square(centred_TxD).mean(-1, keepdims=True) + 1e-5)
    return centred_TxD * rate_Tx1, mean_Tx1, rate_Tx1


def _normalize(x_TxD: jax.Array, weights: _Weights) -> list[jax.Array]:
    normed_TxD = _standardize(x_TxD)[0]
    return [normed_TxD * scale + bias for scale, bias in weights]


_lean_normalize = jax.custom_vjp(_normalize)


def _normalize_forward(x_TxD: jax.Array, weights: _Weights) -> tuple[list[jax.Array], tuple]:
    normed_TxD, mean_Tx1, rate_Tx1 = _standardize(x_TxD)
    outputs = [normed_TxD * scale + bias for scale, bias in weights]
    return outputs, (x_TxD, mean_Tx1, rate_Tx1, weights)


def _normalize_backward(kept: tuple, dy_TxD: list[jax.Array]) -> tuple[jax.Array, _Weights]:
    x_TxD, mean_Tx1, rate_Tx1, weights = kept
    normed_TxD = (x_TxD - mean_Tx1) * rate_Tx1
    rows = tuple(range(x_TxD.ndim - 1))
    dweights = [((dy * normed_TxD).sum(rows), dy.sum(rows)) for dy in dy_TxD]
    slope_TxD = sum(dy * scale for dy, (scale, _) in zip(dy_TxD, weights, strict=True))
    along_Tx1 = (slope_TxD * normed_TxD).mean(-1, keepdims=True)
    across_Tx1 = slope_TxD.mean(-1, keepdims=True)
    dx_TxD = rate_Tx1 * (slope_TxD - across_Tx1 - normed_TxD * along_Tx1)
    return dx_TxD.astype(x_TxD.dtype), dweights


_lean_normalize.defvjp(_normalize_forward, _normalize_backward)
