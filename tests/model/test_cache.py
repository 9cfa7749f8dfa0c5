"""Writes to a cache: all rows at one slot, in place, without a scatter; in int8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.model import StackConfig
from blocktx.model.cache import LayerCache, create_cache

STACK = StackConfig(layers=1, width=16, heads=2)
write = jax.vmap(LayerCache.write, (0, 0, 0, None))


def test_write_of_a_batch_is_one_update_in_place():
    (cache,) = create_cache(STACK, 3, 6, "bfloat16")
    new = np.random.default_rng(0).normal(size=(2, 3, 2, 16)).astype(np.float32)
    lowered = jax.jit(write, donate_argnums=0).lower(cache, *new, jnp.int32(3))
    assert "scatter" not in lowered.as_text()
    program = lowered.compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache.k_SxE.nbytes + cache.v_SxE.nbytes
    written = program(cache, *new, jnp.int32(3))
    for buffer, expected in zip((written.k_SxE, written.v_SxE), new, strict=True):
        assert buffer.dtype == jnp.bfloat16
        np.testing.assert_array_equal(buffer[:, 3:5], expected.astype(jnp.bfloat16))
        assert not np.delete(np.asarray(buffer), [3, 4], axis=1).any()


def test_rows_with_slots_of_their_own():
    (cache,) = create_cache(STACK, 2, 4, "float32")
    new = np.random.default_rng(0).normal(size=(2, 1, 16)).astype(np.float32)
    written = jax.vmap(LayerCache.write)(cache, new, -new, jnp.array([3, 1]))
    for buffer, expected in ((written.k_SxE, new), (written.v_SxE, -new)):
        for row, slot in enumerate((3, 1)):
            np.testing.assert_array_equal(buffer[row, slot], expected[row, 0])
            assert not np.delete(np.asarray(buffer[row]), slot, axis=0).any()


def test_heads_of_int8_are_within_half_a_step():
    stack = StackConfig.llama(1, 16, 4, key_value_heads=2)
    (cache,) = create_cache(stack, 3, 6, "int8")
    new = np.random.default_rng(0).normal(size=(2, 3, 2, stack.kv_width)).astype(np.float32)
    new[0, :, 0, :4] *= 1000  # of one head, on which others do not depend
    new[1, 1, 1, 4:] = 0
    lowered = jax.jit(write, donate_argnums=0).lower(cache, *new, jnp.int32(3))
    assert "scatter" not in lowered.as_text()
    written = lowered.compile()(cache, *new, jnp.int32(3))
    arrays = ((written.k_SxE, written.k_scale_SxG), (written.v_SxE, written.v_scale_SxG))
    for (integers, scale), expected in zip(arrays, new, strict=True):
        assert integers.dtype == jnp.int8
        step = np.repeat(scale, 4, axis=2)
        error = np.abs(integers * step - np.pad(expected, ((0, 0), (3, 1), (0, 0))))
        assert (error <= 0.501 * step).all()
        largest = np.abs(expected.reshape(3, 2, 2, 4)).max(-1)
        np.testing.assert_allclose(scale[:, 3:5], np.where(largest, largest / 127, 1), rtol=1e-6)


@pytest.mark.parametrize("slot", [0, 31, 45, np.array([63, 2, 40])], ids=str)
def test_write_with_a_tile_is_that_of_a_slot(slot):
    new = np.random.default_rng(0).normal(size=(2, 3, 1, 16)).astype(np.float32)
    (cache,) = create_cache(STACK, 3, 64, "int8")
    filled = jax.tree.map(lambda x: jnp.ones_like(x) * 5, cache)
    axes, written = (0, 0, 0, 0 if np.ndim(slot) else None), []
    for tile in (False, True):
        one = functools.partial(LayerCache.write, tile=tile)
        lowered = jax.jit(jax.vmap(one, axes), donate_argnums=0).lower(filled, *new, slot)
        assert "scatter" not in lowered.as_text() or np.ndim(slot)
        program = lowered.compile()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(filled))
        assert program.memory_analysis().alias_size_in_bytes == held
        written.append(program(jax.tree.map(jnp.copy, filled), *new, slot))
    jax.tree.map(np.testing.assert_array_equal, *written)
    assert not (np.asarray(written[0].k_SxE) == 5).all()
