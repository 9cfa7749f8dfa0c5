"""The loss with its gradient formed beside the logits against differentiating the plain loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import LossConfig
from blocktx.model.build import build
from blocktx.ops.cross_entropy import cross_entropy_sum
from blocktx.train.loss import training_sums
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=128, heads=2)
SHARED = dict(vocab_size=37, context_length=20, platform="cpu")
MODELS = {
    "block": BlockConfig(block_decoder=STACK, token_decoder=STACK, **SHARED),
    "vanilla": VanillaConfig(decoder=STACK, **SHARED),
}


@pytest.mark.parametrize("scatter", [False, True])
def test_equals_the_plain_loss(scatter):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 7, 2, 16)).astype(np.float32)
    kernel = 3 * rng.normal(size=(16, 29)).astype(np.float32)
    labels = rng.integers(0, 29, hidden.shape[:3])
    scored = rng.random(labels.shape) > 0.3

    def plain(hidden, kernel):
        nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
        return jnp.where(scored, nats, 0).sum()

    @jax.jit
    def both(hidden, kernel):
        def fused(*args):
            # Chunks are of 3 blocks; the last of 7 is alone.
            return cross_entropy_sum(*args, labels, scored, 12, scatter)

        return [
            jax.value_and_grad(lambda *args, f=f: 0.5 * f(*args), (0, 1))(hidden, kernel)
            for f in (plain, fused)
        ]

    wanted, got = map(jax.tree.leaves, both(hidden, kernel))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_large_logits_neither_overflow_nor_lose_their_gradient():
    hidden = np.full((1, 1, 1, 1), 200, np.float32)
    kernel = np.array([[1.0, -1.0]], np.float32)
    labels, scored = np.ones((1, 1, 1), int), np.ones((1, 1, 1), bool)
    nats, gradient = jax.value_and_grad(cross_entropy_sum, 1)(hidden, kernel, labels, scored, 1)
    assert nats == 400
    np.testing.assert_array_equal(gradient, [[200, -200]])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_training_sums_of_platforms_are_those_on_cpu(kind, platform):
    config = MODELS[kind]
    params = random_params(build(config))
    rng = np.random.default_rng(1)
    shape = (2, config.blocks, config.block_length)
    tokens = rng.integers(0, config.vocab_size, shape)
    mask = np.ones(shape, bool)
    mask[0, 0, :2] = mask[1, -2:] = False

    @jax.jit
    def gradients(params):
        def of(name):
            model = build(dataclasses.replace(config, platform=name))
            return jax.value_and_grad(
                lambda p: training_sums(model, p, tokens, mask, LossConfig())["loss"]
            )(params)

        return of("cpu"), of(platform)

    wanted, got = map(jax.tree.leaves, gradients(params))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3 * np.abs(y).max() + 1e-5)
