"""Decoding in the formulations for a TPU, on a CPU; and what the compilers make of the loop."""

import dataclasses

import jax
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.decode import loop
from blocktx.decode.generate import generate
from blocktx.model.build import build
from tests.helpers import eight_devices
from tests.helpers.random_weights import random_params

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
        tokens[platform] = generate(
            model, random_params(model), prompts, mask, max_new_tokens=24, temperature=0
        )
    np.testing.assert_array_equal(tokens["tpu"], tokens["cpu"])
    assert len(np.unique(tokens["cpu"])) > 5


def test_prefill_by_groups_of_rows_is_prefill(monkeypatch):
    model = build(CONFIGS["prefix"])
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 53, (6, 8, 4))

    def run():
        return loop.fill_cache(model, params, tokens, np.ones_like(tokens, bool), 10)

    whole = run()
    model = model.clone(formulations=dataclasses.replace(model.formulations, prefill_positions=16))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(), whole)
    assert np.asarray(whole[0].k_SxE).any(axis=(0, 2)).tolist() == [True] * 8 + [False] * 2


@pytest.mark.parametrize(
    "kind",
    ["block", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "vanilla"))],
)
def test_meshes_generate_what_one_device_does(kind):
    tokens = eight_devices.run("decode", kind)
    expected = tokens.pop("one device")
    assert len(np.unique(expected[1])) > 5
    assert tokens == dict.fromkeys(["data", "fsdp", "tensor"], expected)
