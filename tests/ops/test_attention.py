"""Every formulation of attention to a cache against softmax attention written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.formulations import Formulations
from blocktx.config.stack import RotaryScaling, StackConfig
from blocktx.ops import attention
from blocktx.ops.attention import (
    ATTENTION,
    attend_by_products,
    choose_attention,
)
from blocktx.ops.rotary import rotary, rotary_by_product


def reference(q, k, v, mask, heads, kv_heads):
    """Float64, one head after the other."""
    q, k, v = (
        np.split(np.asarray(x, np.float64), n, 1)
        for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    k, v = ([x[h * kv_heads // heads] for h in range(heads)] for x in (k, v))
    out = []
    for q_TxC, k_SxC, v_SxC in zip(q, k, v, strict=True):
        scores = np.where(mask, q_TxC @ k_SxC.T / np.sqrt(q_TxC.shape[1]), -1e30)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out.append(weights / weights.sum(1, keepdims=True) @ v_SxC)
    return np.concatenate(out, axis=1)


def by_products(q_TxD, k_SxE, v_SxE, mask_TxS, *, heads, kv_heads):
    q, k, v = (
        x.reshape(len(x), n, -1) for x, n in ((q_TxD, heads), (k_SxE, kv_heads), (v_SxE, kv_heads))
    )
    return attend_by_products(q, k, v, mask_TxS).reshape(q_TxD.shape).astype(v_SxE.dtype)


@pytest.mark.parametrize(
    ("queries", "slots", "heads", "kv_heads", "size"),
    [
        (1, 5, 2, 2, 4),
        (2, 5, 3, 3, 8),
        (1, 40, 1, 1, 4),
        (3, 37, 4, 4, 16),
        (4, 4, 2, 2, 2),
        (2, 5, 6, 2, 4),
        (3, 37, 4, 1, 6),
    ],
)
@pytest.mark.parametrize("name", [*ATTENTION, "products"])
def test_formulations_equal_softmax_attention(name, queries, slots, heads, kv_heads, size):
    rng = np.random.default_rng(0)
    shapes = (queries, heads), (slots, kv_heads), (slots, kv_heads)
    q, k, v = (rng.normal(size=(n, count * size), scale=2) for n, count in shapes)
    mask = rng.random((queries, slots)) < 0.6
    mask[:, 0] = True
    mask[-1] = False  # a query that may see nothing sees all alike
    attend = functools.partial(ATTENTION.get(name, by_products), heads=heads, kv_heads=kv_heads)
    with jax.default_matmul_precision("float32"):
        got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(got, reference(q, k, v, mask, heads, kv_heads), atol=2e-5)
    low = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask)
    assert low.dtype == jnp.bfloat16
    exact = reference(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask, heads, kv_heads)
    np.testing.assert_allclose(low.astype(np.float32), exact, atol=0.12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ATTENTION)
def test_integers_with_scales_are_what_they_stand_for(name, kv_heads):
    rng, heads, size = np.random.default_rng(0), 4, 8
    q = rng.normal(size=(3, heads * size)).astype(np.float32)
    k, v = rng.integers(-127, 128, (2, 19, kv_heads * size), np.int8)
    scales = rng.uniform(0.005, 0.02, (2, 19, kv_heads)).astype(np.float32)
    mask = rng.random((3, 19)) < 0.6
    attend = functools.partial(ATTENTION[name], heads=heads, kv_heads=kv_heads)
    exact = (x * np.repeat(scale, size, axis=1) for x, scale in zip((k, v), scales, strict=True))
    expected = reference(q, *exact, mask, heads, kv_heads)
    np.testing.assert_allclose(attend(q, k, v, mask, *scales), expected, atol=2e-5)
    low = attend(jnp.asarray(q, jnp.bfloat16), k, v, mask, *scales)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), expected, atol=0.05)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_heads_of_two_devices_are_those_of_one(platform, monkeypatch):
    rng, stack = np.random.default_rng(0), StackConfig.llama(1, 32, 8, key_value_heads=4)
    q = rng.normal(size=(1, 32)).astype(np.float32)
    k, v = rng.integers(-127, 128, (2, 19, stack.kv_width), np.int8)
    scales = rng.uniform(0.005, 0.02, (2, 19, 4)).astype(np.float32)
    mask, found = rng.random((1, 19)) < 0.6, []
    for parts in (1, 2):
        monkeypatch.setattr(attention, "axis_parts", lambda axis, parts=parts: parts)
        chosen = choose_attention(Formulations().resolved(platform), 1, 19, stack)
        found.append(chosen[2](q, k, v, mask, *scales))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


SCALINGS = [
    RotaryScaling(),
    RotaryScaling("linear", factor=4.0),
    RotaryScaling("llama3", factor=8.0, original_context=64),
    RotaryScaling("yarn", factor=4.0, original_context=64),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
@pytest.mark.parametrize("dims", [0, 2, 4, 8])
def test_rotary_by_product_equals_rotary(dims, scaling):
    stack = StackConfig(1, 24, 3, rotary_fraction=dims / 8, rotary_scaling=scaling)
    x_TxHxC = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    position = np.array([0, 1, 7, 500, 2000])
    got = rotary_by_product(x_TxHxC.reshape(5, -1), position, stack, 3)
    expected = rotary(x_TxHxC, position, stack)
    np.testing.assert_allclose(got, expected.reshape(5, -1), atol=2e-3)  # angles of up to 2000
    np.testing.assert_allclose(got[:3], expected.reshape(5, -1)[:3], atol=1e-5)


def test_choice_of_attention():
    def chosen(platform, *args):
        return choose_attention(Formulations().resolved(platform), *args)[2].func.__name__

    stack = StackConfig(layers=1, width=768, heads=12)

    assert chosen("tpu", 1, 544, stack) == "attend_block_diagonal"
    assert chosen("tpu", 1, 5, stack) == "attend_elementwise"
    assert chosen("tpu", 256, 544, stack) == "attend_by_head"
    assert chosen("cpu", 1, 544, stack) == "attend_head_by_head"
    assert chosen("cpu", 1, 5, stack) == "attend_by_head"
    assert chosen("gpu", 1, 544, stack) == "attend_by_head"
