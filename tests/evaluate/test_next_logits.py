"""Chunks of a context give what its whole logits give, in a bounded part of their memory."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.command_line import read_config
from blocktx.config.run import MeshConfig
from blocktx.evaluate import heldout, next_logits, scoring
from blocktx.evaluate.next_logits import cross_entropy, map_logits
from blocktx.model.build import abstract_params, build
from blocktx.model.loss import token_losses
from blocktx.parallel.sharding import create_mesh
from tests.helpers.scored_models import BLOCK, VANILLA, random_model

PAPER = pathlib.Path(__file__).parents[2] / "configs" / "paper.py"
MODELS = {
    kind: dataclasses.replace(config, context_length=32)
    for kind, config in {
        "block": BLOCK,
        "summation": dataclasses.replace(BLOCK, conditioning="summation"),
        "vanilla": VANILLA,
        "tied block": dataclasses.replace(BLOCK, tied_classifier=True),
        "tied vanilla": dataclasses.replace(VANILLA, tied_classifier=True),
    }.items()
}


def batch(config, rows=3):
    rng = np.random.default_rng(0)
    shape = (rows, config.blocks, config.block_length)
    mask = rng.random(shape) < 0.9
    mask[0, :2] = False  # padding before the first real token
    return rng.integers(2, 300, shape), mask


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 2**28])
def test_chunks_against_whole_logits(kind, chunk_bytes, monkeypatch):
    monkeypatch.setattr(next_logits, "_CHUNK_BYTES", chunk_bytes)
    model, params = random_model(MODELS[kind])
    tokens, mask = batch(model.config)
    wanted, scored = token_losses(model, params, tokens, mask)
    compute = jax.jit(lambda *inputs: map_logits(model, *inputs, cross_entropy))
    with jax.set_mesh(create_mesh(MeshConfig(), jax.devices()[:1])):
        found = compute(params, tokens, mask)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(jnp.where(scored, found, 0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("places", "place_bytes", "wanted"),
    [(511, 2**20, (256, 2)), (7, 1, (7, 1)), (7, 2**40, (1, 7)), (10, 2**28 // 4, (4, 3))],
)
def test_chunks_are_equal_cover_all_places_and_fit(places, place_bytes, wanted):
    size, count = next_logits.split(places, place_bytes)
    assert (size, count) == wanted
    assert size * count >= places
    assert size == 1 or size * place_bytes <= next_logits._CHUNK_BYTES


@pytest.mark.parametrize("program", [heldout._sums, scoring._scores])
def test_memory_at_the_sizes_of_the_paper(program):
    """Compile for 16 contexts of 2,048 tokens, whose float32 logits alone are 6.6 GB."""
    config = dataclasses.replace(read_config(f"{PAPER}:block_170m").model, compute_dtype="float32")
    shape = (16, config.blocks, config.block_length)
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, bool))
    params = abstract_params(config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    more = (None,) if program is heldout._sums else ()
    memory = program.lower(build(config), params, tokens, mask, *more).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2e9
