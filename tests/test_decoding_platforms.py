"""Decoding in the formulations for a TPU, on a CPU; and what the compilers make of the loop."""

import dataclasses

import jax
import numpy as np
import pytest
from random_weights import random_params

from blocktx import cost, prefill, sampling
from blocktx.model import build
from blocktx.model_config import BlockConfig, StackConfig, VanillaConfig

SHARED = dict(vocab_size=53, context_length=256, scan_layers=False)
STACKS = dict(
    block_decoder=StackConfig(1, width=48, heads=2), token_decoder=StackConfig(1, width=16, heads=2)
)
CONFIGS = {
    "prefix": BlockConfig(**SHARED, **STACKS),
    "summation": BlockConfig(**SHARED, **STACKS, conditioning="summation"),
    "three embeddings": BlockConfig(
        **SHARED | dict(context_length=255),
        **STACKS,
        block_length=3,
        embeddings_per_block=3,
    ),
    "vanilla": VanillaConfig(**SHARED, decoder=StackConfig(2, width=32, heads=2)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_formulations_for_a_tpu_generate_the_same(config):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 53, (3, 30))
    mask = np.arange(30)[::-1] < np.array([[30], [1], [17]])
    tokens = {}
    for platform in ("cpu", "tpu"):
        model = build(dataclasses.replace(config, platform=platform))
        tokens[platform] = sampling.generate(
            model, random_params(model), prompts, mask, max_new_tokens=24, temperature=0
        )
    np.testing.assert_array_equal(tokens["tpu"], tokens["cpu"])
    assert len(np.unique(tokens["cpu"])) > 5


def test_prefill_by_groups_of_rows_is_prefill(monkeypatch):
    model = build(CONFIGS["prefix"])
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 53, (6, 8, 4))

    def run():
        cache = model.create_cache(6, 10)
        return prefill.prefill(model, params, tokens, np.ones_like(tokens, bool), cache)

    whole = run()
    monkeypatch.setattr(prefill, "_POSITIONS_AT_ONCE", 16)  # two rows
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(), whole)
    assert np.asarray(whole[0].k_SxD).any(axis=(0, 2)).tolist() == [True] * 8 + [False] * 2


@pytest.mark.parametrize("name", ["prefix", "vanilla"])
def test_program_holds_one_copy_of_the_cache(name):
    config = dataclasses.replace(CONFIGS[name], vocab_size=16, context_length=2048)
    if name == "prefix":  # what a step needs beside the cache is little beside several layers
        config = dataclasses.replace(config, block_decoder=StackConfig(4, width=48, heads=2))
    model = build(config)
    params = random_params(model)
    shape = (1024, 64)  # prompt and answer
    cache_bytes = cost.cache_bytes(config, sampling.slots(config, *shape))
    needed = {}
    for rows in (256, 512):
        memory = sampling.lower(model, params, rows, *shape).compile().memory_analysis()
        assert memory.alias_size_in_bytes == rows * cache_bytes
        output = memory.output_size_in_bytes - rows * cache_bytes
        needed[rows] = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    tokens = 4 * sum(shape)  # no small part in so small a model
    counted = cache_bytes + cost.logits_bytes(config, 1) + tokens
    assert (needed[512] - needed[256]) / 256 == pytest.approx(counted, rel=0.05)
