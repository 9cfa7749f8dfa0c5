"""Generation where JAX's default integers have 64 bits."""

import jax
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.decode.generate import generate
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=16, heads=2)
SIZES = dict(vocab_size=50, context_length=16)
MODELS = [
    BlockConfig(**SIZES, block_decoder=STACK, token_decoder=STACK),
    VanillaConfig(**SIZES, decoder=STACK),
]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.kind)
def test_tokens_are_the_same(config):
    model = build(config)
    params = random_params(model)
    tokens_BxT = np.array([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]], np.int32)
    mask_BxT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def run():
        return generate(model, params, tokens_BxT, mask_BxT, max_new_tokens=6)

    wanted = run()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(run(), wanted)
