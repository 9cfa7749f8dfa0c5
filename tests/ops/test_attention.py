"""Every formulation of attention to a cache against softmax attention written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.model import StackConfig
from blocktx.ops.attention import (
    attend_block_diagonal,
    attend_by_head,
    attend_elementwise,
    attend_head_after_head,
    formulation,
)
from blocktx.ops.rotary import rotary, rotary_by_product

FORMULATIONS = [
    attend_by_head,
    attend_head_after_head,
    attend_block_diagonal,
    attend_elementwise,
]


def reference(q, k, v, mask, heads):
    """Float64, one head after the other."""
    by_head = (np.split(np.asarray(x, np.float64), heads, axis=1) for x in (q, k, v))
    out = []
    for q_TxC, k_SxC, v_SxC in zip(*by_head, strict=True):
        scores = np.where(mask, q_TxC @ k_SxC.T / np.sqrt(q_TxC.shape[1]), -1e30)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out.append(weights / weights.sum(1, keepdims=True) @ v_SxC)
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(
    ("queries", "slots", "heads", "size"),
    [(1, 5, 2, 4), (2, 5, 3, 8), (1, 40, 1, 4), (3, 37, 4, 16), (4, 4, 2, 2)],
)
@pytest.mark.parametrize("attend", FORMULATIONS, ids=lambda f: f.__name__)
def test_formulations_equal_softmax_attention(attend, queries, slots, heads, size):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(n, heads * size), scale=2) for n in (queries, slots, slots))
    mask = rng.random((queries, slots)) < 0.6
    mask[:, 0] = True
    mask[-1] = False  # a query that may see nothing sees all alike
    with jax.default_matmul_precision("float32"):
        got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask, heads)
    np.testing.assert_allclose(got, reference(q, k, v, mask, heads), atol=2e-5)
    low = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask, heads)
    assert low.dtype == jnp.bfloat16
    exact = reference(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask, heads)
    np.testing.assert_allclose(low.astype(np.float32), exact, atol=0.12)


@pytest.mark.parametrize("dims", [0, 2, 4, 8])
def test_rotary_by_product_equals_rotary(dims):
    x_TxHxC = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    position = np.array([0, 1, 7, 500, 2000])
    got = rotary_by_product(x_TxHxC.reshape(5, -1), position, 3, dims, 1e4)
    expected = rotary(x_TxHxC, position, dims, 1e4)
    np.testing.assert_allclose(got, expected.reshape(5, -1), atol=2e-3)  # angles of up to 2000
    np.testing.assert_allclose(got[:3], expected.reshape(5, -1)[:3], atol=1e-5)


def test_choice_of_formulation():
    def chosen(*args):
        return formulation(*args)[1].func.__name__

    stack = StackConfig(layers=1, width=768, heads=12)

    assert chosen("tpu", 1, 544, stack) == "attend_block_diagonal"
    assert chosen("tpu", 1, 5, stack) == "attend_elementwise"
    assert chosen("tpu", 256, 544, stack) == "attend_by_head"
    assert chosen("cpu", 1, 544, stack) == "attend_head_after_head"
    assert chosen("cpu", 1, 5, stack) == "attend_by_head"
    assert chosen("gpu", 1, 544, stack) == "attend_by_head"
