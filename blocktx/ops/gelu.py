"""Exact GELU."""

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return the exact GELU, x * Phi(x). The gradient saves only its slope, in the dtype of `x`.

    `jax.nn.gelu(approximate=False)` goes through erfc, which takes 1.5 times as long on a CPU and
    gains digits only where the result is below 1e-6.
    """
    return _gelu(x)[0]


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    share = 0.5 * (1 + jax.lax.erf(wide * (1 / math.sqrt(2))))
    slope = share + wide * jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (wide * share).astype(x.dtype), slope.astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    y, slope = _gelu(*primals)
    return y, slope * tangents[0]
