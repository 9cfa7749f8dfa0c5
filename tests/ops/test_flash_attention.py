"""Attention over long sequences on TPU against the plain formulation, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.ops.attention import attend
from blocktx.ops.attention_kernels import fits_splash
from blocktx.ops.flash_attention import flash_attention


def plain(q, k, v, real):
    return attend(q, k, v, real & np.tri(len(q), dtype=bool))


def flash(q, k, v, real):
    return flash_attention(q, k, v, real, interpret=True)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "size"), [(128, 2, 2, 16), (256, 1, 1, 64), (200, 4, 2, 16)]
)
def test_equals_plain_attention(length, heads, kv_heads, size):
    rng = np.random.default_rng(0)
    q, dy = rng.normal(size=(2, 2, length, heads, size)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, size)).astype(np.float32)
    real = rng.random((2, length)) > 0.2
    real[:, 0] = True
    assert fits_splash(length)

    @jax.jit
    def both(q, k, v, real):
        results = []
        for function in (plain, flash):
            y, pullback = jax.vjp(lambda *x, f=function: jax.vmap(f)(*x, real), q, k, v)
            results.append((y, *pullback(dy)))
        return results

    for wanted, got in zip(*both(q, k, v, jnp.asarray(real)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=2e-5)


def test_others_are_left_to_plain_attention():
    assert not fits_splash(127)
