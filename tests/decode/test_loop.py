"""What the jitted loop promises besides its tokens (for those see test_generate.py)."""

import dataclasses
import functools
import gc

import jax
import numpy as np
import pytest

from blocktx.config.model import StackConfig
from blocktx.decode.generate import generate, generate_blocks
from blocktx.decode.loop import decode_blocks, prefill
from blocktx.decode.prompts import layout_prompts
from blocktx.decode.sampling import Sampling, SamplingConfig
from blocktx.model.build import build, init_params
from tests.helpers.compile_events import compilations
from tests.helpers.tiny_net import NET, PARAMS

PROMPTS = np.random.default_rng(0).integers(0, 53, (3, 9))
REAL = np.ones_like(PROMPTS)


def run(tokens=PROMPTS, mask=REAL, **options):
    options = dict(max_new_tokens=12) | options
    return generate(NET, PARAMS, tokens, mask, **options)


def test_second_call_in_a_bucket_compiles_nothing():
    jax.clear_caches()
    with compilations() as compiled:
        run()
        assert len(compiled) == 2  # the prefill and the loop, and nothing around them
        mask = REAL.copy()
        mask[0, :3] = 0
        run(PROMPTS[::-1, :6], mask[:, :6])
        run(np.tile(PROMPTS[:1], (4, 1)), np.tile(REAL[:1], (4, 1)), seed=[3, 4, 5, 6])
        run(max_new_tokens=30, temperature=0.7, placement="force")
        run(max_new_tokens=[11, 5, 40], top_k=5, top_p=0.9, min_p=0.1, seed=3, stop=[4, 7])
        run(temperature=0.0, pad_id=1)
        list(generate_blocks(NET, PARAMS, PROMPTS, REAL, max_new_tokens=9, every=1))
    assert len(compiled) == 2


def test_neither_other_rows_nor_padding_nor_budget_change_a_row():
    tokens, logprobs = run(seed=1, return_logprobs=True, max_new_tokens=24)

    def same(row, others, **options):
        got, theirs = run(seed=1, return_logprobs=True, **options)
        count = got.shape[1]
        np.testing.assert_array_equal(got[row], tokens[row, :count])
        np.testing.assert_array_equal(theirs[row], logprobs[row, :count])  # to the last bit
        assert (got[others] != tokens[others, :count]).any(1).all()

    other = PROMPTS.copy()
    other[1:] = 7
    same(0, [1, 2], tokens=other)
    four = other[[0, 1, 2, 1]]
    same(0, [1, 2], tokens=four, mask=np.ones_like(four))  # in the place of a row of padding
    stop = int(tokens[2, 3])
    cut = run(seed=1, max_new_tokens=[24, 2, 24], stop=[stop])  # others that finish early
    before = tokens[0].tolist().index(stop) if stop in tokens[0] else 24
    np.testing.assert_array_equal(cut[0, :before], tokens[0, :before])
    longer = np.concatenate([np.full((3, 6), [[0], [9], [9]]), PROMPTS], axis=1)
    mask = np.ones_like(longer)
    mask[0, :6] = 0
    same(0, [1, 2], tokens=longer, mask=mask)  # beside longer prompts


def test_64_bit_types_change_nothing():
    options = dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=3, return_logprobs=True)
    expected = run(**options)
    with jax.enable_x64(True):
        got = run(**options)
    assert [x.dtype for x in got] == [np.int32, np.float32]
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_draw_is_a_new_one():
    rows = run(np.tile(PROMPTS[:1], (3, 1)), temperature=1e6)  # all 53 tokens alike
    assert all(len(set(row)) > 7 for row in rows.tolist())
    assert (rows[0] != rows[1]).mean() > 0.5


def test_placement_does_not_change_a_prompt_of_whole_blocks():
    whole, real = PROMPTS[:, :8], REAL[:, :8]
    np.testing.assert_array_equal(run(whole, real, placement="force"), run(whole, real))
    assert (run(placement="force") != run()).any()


def test_prefill_and_loop_in_a_program_of_the_caller():
    """`generate` cannot be traced. The functions below it can, and their state is a pytree."""
    options = dict(max_new_tokens=12, placement="pad", pad_id=0)
    prompts = layout_prompts(PROMPTS, REAL, NET.config, **options)
    sampling = Sampling.create(SamplingConfig(temperature=0), rows=len(prompts.end_B))

    @jax.jit
    def complete(params, prompts, sampling, blocks):
        state = prefill(NET, params, prompts)
        state = decode_blocks(NET, params, state, sampling, 1, 0)
        return decode_blocks(NET, params, state, sampling, blocks, 0)

    state = complete(PARAMS, prompts, sampling, 1)
    assert not state.finished_B[:3].any()
    state = decode_blocks(NET, PARAMS, state, sampling, 100, 0)
    assert state.finished_B.all()
    row_BxT = np.asarray(state.tokens_BxSxK).reshape(len(prompts.end_B), -1)
    begin_B, wanted_BxM = prompts.begin_B, run(temperature=0)
    got_BxM = np.stack([row_BxT[b, begin_B[b] : begin_B[b] + 12] for b in range(3)])
    np.testing.assert_array_equal(got_BxM, wanted_BxM)


def begin(max_new_tokens=64, **options):
    """The state after a prefill of a full bucket, and the sampling for it."""
    tokens = np.tile(np.random.default_rng(1).integers(0, 53, (1, 64)), (2, 1))
    prompts = layout_prompts(
        tokens,
        np.ones_like(tokens),
        NET.config,
        max_new_tokens=max_new_tokens,
        placement="pad",
        pad_id=0,
    )
    sampling = Sampling.create(SamplingConfig(temperature=0), rows=2, **options)
    return prefill(NET, PARAMS, prompts), sampling


def go(state, sampling, blocks):
    return decode_blocks(NET, PARAMS, state, sampling, np.int32(blocks), np.int32(0))


def full_slots(state):
    return np.flatnonzero(np.any(state.cache[0].k_SxE, (0, 2)))


def test_loop_stops_when_all_rows_have_finished():
    state = go(*begin(), 100)
    tokens = np.asarray(state.tokens_BxSxK)[0, 16:].ravel()
    # The prompt's 16 blocks, and for each new block the one before it.
    np.testing.assert_array_equal(full_slots(state), np.arange(16 + 16))
    state = go(*begin(stop=[int(tokens[5])]), 100)
    end_block = tokens.tolist().index(tokens[5]) // 4
    np.testing.assert_array_equal(full_slots(state), np.arange(16 + end_block + 1))
    state = go(*begin(max_new_tokens=[9, 3]), 100)
    np.testing.assert_array_equal(full_slots(state), np.arange(16 + 3))


def addresses(state):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache)]


def test_cache_is_written_in_place():
    state, sampling = begin()
    for _ in range(3):
        before, given = addresses(state), state
        state = go(state, sampling, 1)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.cache))
        assert addresses(state) == before
        np.asarray(state.tokens_BxSxK)  # to look is no hindrance


def test_program_holds_one_copy_of_the_cache():
    stack = StackConfig(layers=4, width=32, heads=2)
    config = dataclasses.replace(NET.config, context_length=1024, block_decoder=stack)
    net, tokens = build(config), np.zeros((1, 512), int)
    params = jax.eval_shape(functools.partial(init_params, net), jax.random.key(0))
    options = dict(max_new_tokens=512, placement="pad", pad_id=0)
    prompts = layout_prompts(tokens, np.ones_like(tokens), config, **options)
    state = jax.eval_shape(functools.partial(prefill, net), params, prompts)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert cache == 4 * 2 * 4 * 32 * 256  # keys and values of 256 blocks in 4 layers
    sampling = Sampling.create(rows=1)
    lowered = decode_blocks.lower(net, params, state, sampling, np.int32(1), np.int32(0))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


def live():
    gc.collect()
    return len(jax.live_arrays())


def test_nothing_is_left_behind():
    run()
    baseline = live()
    for seed in range(20):
        run(seed=seed)
        blocks = generate_blocks(NET, PARAMS, PROMPTS, REAL, max_new_tokens=40, every=1)
        next(blocks)
        assert live() > baseline
        if seed % 2:
            blocks.close()
        del blocks
        with pytest.raises(ValueError, match="do not fit"):
            run(max_new_tokens=1000)
    assert live() == baseline
