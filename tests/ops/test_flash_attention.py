"""Attention over long sequences on TPU against the plain formulation, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.ops.attention import attend
from blocktx.ops.flash_attention import flash_attention, is_long


def plain(q, k, v, real):
    return attend(q, k, v, real & np.tri(len(q), dtype=bool))


def flash(q, k, v, real):
    return flash_attention(q, k, v, real, interpret=True)


@pytest.mark.parametrize(("length", "heads", "size"), [(128, 2, 16), (256, 1, 64)])
def test_equals_plain_attention(length, heads, size):
    rng = np.random.default_rng(0)
    q, k, v, dy = rng.normal(size=(4, 2, length, heads, size)).astype(np.float32)
    real = rng.random((2, length)) > 0.2
    real[:, 0] = True
    assert is_long(q[0].reshape(length, -1))

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
    assert not is_long(np.zeros((127, 8)))
    assert not is_long(np.zeros((192, 8)))
