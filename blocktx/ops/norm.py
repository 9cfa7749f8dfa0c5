"""LayerNorm and RMSNorm."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

Kind = Literal["layer", "rms"]
Weights = list[tuple[jax.Array, jax.Array | None]]


def normalize(
    x_TxD: jax.Array, weights: Weights, *, kind: Kind, epsilon: float, lean: bool = False
) -> list[jax.Array]:
    """Return one norm of `x_TxD` for each scale and bias, float32.

    Differentiation would save several float32 arrays of the size of `x_TxD` for each layer of a
    scan. The lean formulation saves only `x_TxD`; on TPU the traffic of the others dominates.

    Args:
      x_TxD: inputs.
      weights: a scale `[D]` and a bias `[D]` for each output, float32. RMSNorm has no bias: None.
      kind: layer, or rms.
      epsilon: added to the variance, or to the mean square.
      lean: whether the gradient recomputes.
    """
    return (_lean if lean else _normalize)(x_TxD, weights, kind, epsilon)


def _standardize(x_TxD: jax.Array, kind: Kind, epsilon: float) -> tuple[jax.Array, ...]:
    """Return the normalized `x_TxD`, the mean (0 for RMSNorm) and the rate."""
    if kind == "rms":
        mean_Tx1 = jnp.float32(0)
        centred_TxD = x_TxD.astype(jnp.float32)
    else:
        mean_Tx1 = x_TxD.mean(-1, keepdims=True, dtype=jnp.float32)
        centred_TxD = x_TxD - mean_Tx1
    # Not E[x^2] - E[x]^2, which loses digits that the golden tests compare.
    rate_Tx1 = jax.lax.rsqrt(jnp.square(centred_TxD).mean(-1, keepdims=True) + epsilon)
    return centred_TxD * rate_Tx1, mean_Tx1, rate_Tx1


def _apply(normed_TxD: jax.Array, weights: Weights) -> list[jax.Array]:
    return [
        normed_TxD * scale if bias is None else normed_TxD * scale + bias for scale, bias in weights
    ]


def _normalize(x_TxD: jax.Array, weights: Weights, kind: Kind, epsilon: float) -> list[jax.Array]:
    return _apply(_standardize(x_TxD, kind, epsilon)[0], weights)


_lean = functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))(_normalize)


def _forward(x_TxD: jax.Array, weights: Weights, kind: Kind, epsilon: float):
    normed_TxD, mean_Tx1, rate_Tx1 = _standardize(x_TxD, kind, epsilon)
    return _apply(normed_TxD, weights), (x_TxD, mean_Tx1, rate_Tx1, weights)


def _backward(kind: Kind, epsilon: float, kept: tuple, dy_TxD: list[jax.Array]):
    x_TxD, mean_Tx1, rate_Tx1, weights = kept
    normed_TxD = (x_TxD - mean_Tx1) * rate_Tx1
    rows = tuple(range(x_TxD.ndim - 1))
    dweights = [
        ((dy * normed_TxD).sum(rows), None if bias is None else dy.sum(rows))
        for dy, (_, bias) in zip(dy_TxD, weights, strict=True)
    ]
    slope_TxD = sum(dy * scale for dy, (scale, _) in zip(dy_TxD, weights, strict=True))
    along_Tx1 = (slope_TxD * normed_TxD).mean(-1, keepdims=True)
    dx_TxD = slope_TxD - normed_TxD * along_Tx1
    if kind == "layer":
        across_Tx1 = slope_TxD.mean(-1, keepdims=True)
        dx_TxD = slope_TxD - across_Tx1 - normed_TxD * along_Tx1
    return (rate_Tx1 * dx_TxD).astype(x_TxD.dtype), dweights


_lean.defvjp(_forward, _backward)
