"""Schedules against hand computation, decay on matrices only, and a state of one structure."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import OptimizerConfig, RunConfig, TrainingConfig
from blocktx.model.build import build, init_params
from blocktx.train.optimizer import decayed, optimizer, schedule

STACK = StackConfig(layers=2, width=32, heads=4)
MODEL = BlockConfig(vocab_size=64, context_length=16, block_decoder=STACK, token_decoder=STACK)


def run(steps=10, **settings) -> RunConfig:
    return RunConfig(
        model=MODEL, optimizer=OptimizerConfig(**settings), training=TrainingConfig(steps=steps)
    )


def rates(config: RunConfig, steps: int) -> np.ndarray:
    return np.broadcast_to(schedule(config)(jnp.arange(steps)), steps)


def test_linear_warmup_then_linear_decay():
    config = run(10, learning_rate=1.0, warmup_steps=4, schedule="linear", final_fraction=0.1)
    rise = [0.2, 0.4, 0.6, 0.8]
    fall = [1 - 0.9 * k / 6 for k in range(7)]
    np.testing.assert_allclose(rates(config, 13), [*rise, *fall, 0.1, 0.1], rtol=1e-6)


def test_cosine_decay():
    config = run(8, learning_rate=2.0, schedule="cosine", final_fraction=0.5)
    expected = [1 + 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    np.testing.assert_allclose(rates(config, 9), expected, rtol=1e-6)


def test_constant_after_warmup():
    config = run(6, learning_rate=3.0, schedule="constant", warmup_steps=2)
    np.testing.assert_allclose(rates(config, 6), [1, 2, 3, 3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_no_step_is_taken_at_rate_zero(kind, warmup):
    config = run(5, schedule=kind, warmup_steps=warmup, final_fraction=0.0)
    assert (rates(config, 5) > 0).all()


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_weight_decay_moves_matrices_only(name):
    shapes = jax.eval_shape(lambda: init_params(build(MODEL), jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    chain = optimizer(run(name=name, learning_rate=0.5, weight_decay=0.2, schedule="constant"))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(chain.update)(zero, chain.init(params), params)
    kinds = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        kind = path[-1].key
        kinds.add(kind)
        expected = -0.1 if kind in ("kernel", "embedding") else 0.0
        np.testing.assert_allclose(update, np.full(update.shape, expected), rtol=1e-6)
    assert kinds == {"kernel", "embedding", "bias", "scale"}


def test_parameter_of_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"head/gate.*kernel, embedding, bias, scale"):
        decayed({"head": {"gate": jnp.ones(3)}})


def test_clipping_scales_the_whole_gradient():
    params = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"bias": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.full((2, 2), 4.0)}, "b": {"bias": jnp.full(1, 6.0)}}  # norm 10
    # beta1 = 0 and a huge eps make Adam's update -rate * gradient / eps.
    settings = dict(learning_rate=1e6, schedule="constant", beta1=0.0, eps=1e6, weight_decay=0.0)

    def update(clip_norm):
        chain = optimizer(run(clip_norm=clip_norm, **settings))
        return chain.update(grads, chain.init(params), params)[0]

    np.testing.assert_allclose(optax.tree.norm(update(0.0)), 10, rtol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(update(2.0)), 2, rtol=1e-4)
    np.testing.assert_allclose(update(2.0)["b"]["bias"], -1.2, rtol=1e-4)


def test_muon_makes_each_matrix_orthogonal():
    """Query, key, value and every layer are matrices of their own; the rest is AdamW's."""
    params = init_params(build(MODEL), jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    settings = dict(learning_rate=1.0, schedule="constant", weight_decay=0.0)

    def update(chain):
        return jax.jit(chain.update)(grads, chain.init(params), params)[0]

    updates = update(optimizer(run(name="muon", clip_norm=0.0, **settings)))
    adam = update(optax.adamw(1.0, 0.9, 0.95, weight_decay=0.0, nesterov=True))
    attention = updates["token_decoder"]["stack"]["layers"]["attention"]
    matrices = [
        *attention["qkv"]["kernel"].reshape(2, 32, 3, 32).swapaxes(1, 2).reshape(6, 32, 32),
        *attention["out"]["kernel"].reshape(2, 32, 32),
        updates["token_decoder"]["expansion"]["kernel"].reshape(32, 64),
    ]
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False)
        high, low = np.quantile(values, [0.9, 0.1])
        assert high / low < 2  # of the gradient: 3 to 10
        assert 0.1 < np.sqrt(np.square(matrix).mean()) < 0.4  # as large as AdamW's
    for part in ("embed", "classifier"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
            updates["token_decoder"][part],
            adam["token_decoder"][part],
        )


def test_adafactor_keeps_almost_nothing_and_moments_can_be_short():
    params = {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}

    def size(**settings):
        state = optimizer(run(**settings)).init(params)
        return sum(x.nbytes for x in jax.tree.leaves(state))

    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert size(name="adafactor") < 0.02 * whole
    assert size() == pytest.approx(2 * whole, rel=1e-3)
    assert size(moment_dtype="bfloat16") == pytest.approx(1.5 * whole, rel=1e-3)
    assert size(name="lion", moment_dtype="bfloat16") == pytest.approx(0.5 * whole, rel=1e-3)


def test_every_setting_gives_a_state_of_the_same_structure():
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    first = run()
    others = [
        dict(clip_norm=0.0),
        dict(weight_decay=0.0),
        dict(schedule="cosine", warmup_steps=3),
        dict(schedule="constant"),
    ]
    structure = jax.tree.structure(optimizer(first).init(params))
    for settings in others:
        changed = dataclasses.replace(
            first, optimizer=dataclasses.replace(first.optimizer, **settings)
        )
        assert jax.tree.structure(optimizer(changed).init(params)) == structure
