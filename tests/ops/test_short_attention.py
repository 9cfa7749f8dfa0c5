"""Attention over a block's positions against the plain formulation, in value and gradient."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.stack import RotaryScaling, StackConfig
from blocktx.ops.attention import attend
from blocktx.ops.attention_kernels import fits_short
from blocktx.ops.rotary import rotary
from blocktx.ops.short_attention import short_attention


def stack(width, heads, rotated=0.25, **fields):
    return StackConfig(layers=1, width=width, heads=heads, rotary_fraction=rotated, **fields)


YARN = RotaryScaling("yarn", factor=4.0, original_context=64)


def plain(q_TxD, k_TxD, v_TxD, bias_3xD, real_T, stack):
    positions = q_TxD.shape[0]
    q_TxD, k_TxD, v_TxD = (x + b for x, b in zip((q_TxD, k_TxD, v_TxD), bias_3xD, strict=True))
    q, k, v = (x.reshape(positions, stack.heads, stack.head_size) for x in (q_TxD, k_TxD, v_TxD))
    q, k = (rotary(x, jnp.arange(positions), stack) for x in (q, k))
    mask = real_T & np.tri(positions, dtype=bool)
    return attend(q, k, v, mask).reshape(positions, -1)


def over_batch(function, stack):
    axes = (0, 0, 0, None, 0)
    return jax.vmap(jax.vmap(lambda *args: function(*args, stack), axes), axes)


@pytest.mark.parametrize(
    ("batch", "blocks", "positions", "stack"),
    [
        (2, 19, 5, stack(256, 4)),  # two tiles of lanes, two chunks, of which one is not full
        (1, 259, 2, stack(128, 4)),  # two tiles of rows
        (1, 3, 3, stack(128, 4, rotated=1.0)),
        (1, 2, 8, stack(128, 1)),  # a head as wide as a tile
        (3, 1, 1, stack(256, 1, rotated=0.5)),  # and wider
        (1, 2, 4, stack(128, 8, rotated=0.0)),
        (1, 3, 3, stack(128, 4, rotated=1.0, rotary_scaling=YARN)),
        (1, 2, 3, stack(48, 2, head_width=64)),  # heads wider than the model
    ],
)
def test_equals_plain_attention(batch, blocks, positions, stack):
    rng = np.random.default_rng(0)
    shape = (batch, blocks, positions, stack.query_width)
    q, k, v, dy = rng.normal(size=(4, *shape)).astype(np.float32)
    bias = rng.normal(size=(3, stack.query_width)).astype(np.float32)
    real = rng.random(shape[:3]) > 0.3
    real[..., 0] = True
    assert fits_short(stack, q.shape[2])

    @jax.jit
    def both(q, k, v, bias, real):
        results = []
        for function in (plain, short_attention):
            y, pullback = jax.vjp(
                lambda *x, f=function: over_batch(f, stack)(*x, real), q, k, v, bias
            )
            results.append((y, *pullback(dy)))
        return results

    for wanted, got in zip(*both(q, k, v, bias, real), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=3e-5)


def test_models_side_by_side():
    """Each with biases of its own, as in an ensemble."""
    one, rng = stack(128, 4), np.random.default_rng(0)
    q, k, v, dy = rng.normal(size=(4, 2, 3, 2, 128)).astype(np.float32)
    bias = rng.normal(size=(2, 3, 128)).astype(np.float32)
    real = jnp.ones((2, 3, 2), bool)

    @jax.jit
    def both(q, k, v, bias):
        results = []
        for function in (plain, short_attention):
            blocks = jax.vmap(lambda *x, f=function: f(*x, one), (0, 0, 0, None, 0))
            y, pullback = jax.vjp(lambda *x, f=blocks: jax.vmap(f)(*x, real), q, k, v, bias)
            results.append((y, *pullback(dy)))
        return results

    for wanted, got in zip(*both(q, k, v, bias), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=3e-5)


def test_other_shapes_are_left_to_plain_attention():
    assert not fits_short(stack(128, 2), 17)  # too many pairs to unroll
    assert not fits_short(stack(96, 2), 5)  # heads of 48 do not fill tiles
    assert not fits_short(stack(64, 1), 5)  # half a tile


@pytest.mark.slow
def test_compiles_for_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu")
    from jax.experimental import topologies

    for name, value in [
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ]:
        monkeypatch.setitem(os.environ, name, value)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def gradient(q, k, v, bias, real, dy):
        attention = over_batch(short_attention, stack(256, 4))
        return jax.vjp(lambda *x: attention(*x, real), q, k, v, bias)[1](dy)

    wide = array((2, 40, 5, 256), jnp.bfloat16)
    bias, real = array((3, 256), jnp.float32), array((2, 40, 5), bool)
    text = jax.jit(gradient).lower(wide, wide, wide, bias, real, wide).compile().as_text()
    assert text.count("tpu_custom_call") == 1  # the forward one is not needed
