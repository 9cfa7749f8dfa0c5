"""int8 kernels: equal to the arrays that they stand for, in every family, stacked or separate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.errors import UserError
from blocktx.config.model import (
    BlockConfig,
    EmbedderConfig,
    VanillaConfig,
    with_cache_dtype,
)
from blocktx.config.stack import StackConfig
from blocktx.decode.generate import generate
from blocktx.evaluate.heldout import evaluate
from blocktx.model.build import build
from blocktx.model.params import for_decoding
from blocktx.model.quantize import Int8Kernel, quantize
from tests.helpers.random_weights import random_params

NEOX = StackConfig(2, width=32, heads=4)
LLAMA = StackConfig.llama(2, 32, 4, key_value_heads=2)
SHARED = dict(vocab_size=61, context_length=32)
MODELS = {
    "neox": BlockConfig(**SHARED, block_decoder=NEOX, token_decoder=NEOX),
    "llama, tied": BlockConfig(
        **SHARED, block_decoder=LLAMA, token_decoder=LLAMA, tied_classifier=True
    ),
    "mean_mlp": BlockConfig(
        **SHARED, block_decoder=LLAMA, token_decoder=NEOX, embedder=EmbedderConfig("mean_mlp")
    ),
    "vanilla": VanillaConfig(**SHARED, decoder=NEOX),
    "vanilla, tied": VanillaConfig(**SHARED, decoder=LLAMA, tied_classifier=True),
}


def is_quantized(x):
    return isinstance(x, Int8Kernel)


def as_arrays(params):
    return jax.tree.map(jnp.asarray, params, is_leaf=is_quantized)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_parameters_equal_the_arrays_that_they_stand_for(name):
    model = build(MODELS[name])
    shape = (2, model.config.blocks, model.config.block_length)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
    tokens = tokens if model.config.kind == "block" else tokens[..., 0]

    @jax.jit
    def both(quantized):
        trees = (quantized, as_arrays(quantized))
        return [model.apply({"params": tree}, tokens, np.ones_like(tokens)) for tree in trees]

    got, wanted = both(quantize(model.config, random_params(model, 0.1), "int8"))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_decoding_with_quantized_parameters():
    model = build(MODELS["llama, tied"])
    quantized = quantize(model.config, random_params(model, 0.1), "int8")
    prompts = np.arange(16).reshape(2, 8)
    options = dict(max_new_tokens=8, temperature=0)
    stacked, separate = (
        generate(net, tree, prompts, np.ones_like(prompts), **options)
        for net, tree in ((model, as_arrays(quantized)), for_decoding(model, quantized))
    )
    np.testing.assert_array_equal(stacked, separate)


@pytest.mark.parametrize("name", MODELS)
def test_all_kernels_and_nothing_else_are_quantized(name):
    model = build(MODELS[name])
    params = random_params(model, 0.1)
    quantized = quantize(model.config, params, "int8")
    found = jax.tree.leaves_with_path(quantized, is_leaf=is_quantized)
    table = ["token_decoder", "embed"] if model.config.kind == "block" else ["embed"]
    for path, new in found:
        names = [key.key for key in path]
        tied = model.config.tied_classifier and names == [*table, "embedding"]
        assert is_quantized(new) == (names[-1] == "kernel" or tied), names
        if is_quantized(new):
            old = params
            for key in names:
                old = old[key]
            assert new.values.dtype == jnp.int8
            assert new.values.shape == old.shape
            error = np.abs(jnp.asarray(new) - old)
            assert (error <= 0.501 * np.asarray(new.scale)).all()
            if "layers" in names:
                assert new.scale.shape[0] == len(old)  # a scale for each layer
            outputs = old.shape[0] if tied else old.shape[-1]
            assert outputs in new.scale.shape
            assert new.scale.size <= old.size // 30


def test_a_channel_of_zeros_stays_zero():
    kernel = {"up": {"kernel": jnp.zeros((3, 2)).at[:, 1].set(2.0)}}
    quantized = quantize(MODELS["neox"], kernel, "int8")["up"]["kernel"]
    np.testing.assert_allclose(jnp.asarray(quantized), kernel["up"]["kernel"], rtol=1e-6, atol=0)


def test_other_kinds_are_refused():
    with pytest.raises(UserError, match=r"^quantize: got 'int3', must be None or one of"):
        quantize(MODELS["neox"], {}, "int3")
    assert quantize(MODELS["neox"], {}, None) == {}


def test_loss_of_a_trained_model_hardly_changes(trained):
    """Held-out bits per byte change by less than 0.5%."""
    model, params, batches = trained
    plain, int8 = (
        evaluate(model, p, batches, 4.0).bits_per_byte
        for p in (params, quantize(model.config, params, "int8"))
    )
    assert plain < 0.8 * np.log2(model.config.vocab_size) / 4  # it has learned something
    assert int8 == pytest.approx(plain, rel=0.005)
    assert int8 != plain


def test_loss_of_a_trained_model_hardly_changes_with_a_cache_in_int8(trained):
    model, params, batches = trained
    rounded = build(with_cache_dtype(model.config, "int8"))
    plain, int8 = (evaluate(m, params, batches, 4.0).bits_per_byte for m in (model, rounded))
    assert int8 == pytest.approx(plain, rel=0.005)
    assert int8 != plain
    both = evaluate(rounded, quantize(model.config, params, "int8"), batches, 4.0).bits_per_byte
    assert both == pytest.approx(plain, rel=0.005)


@pytest.fixture(scope="module")
def trained():
    """A model that predicts sequences of a noisy rule, after 100 steps of Adam."""
    import optax

    from blocktx.config.run import LossConfig
    from blocktx.train.loss import training_sums

    config = dataclasses.replace(MODELS["neox"], initializer_range=0.1)
    model = build(config)
    params, optimizer = random_params(model, 0.1), optax.adam(3e-3)
    rng = np.random.default_rng(1)

    def batch(rows):
        tokens = np.cumsum(
            rng.choice([1, 2, 7], (rows, config.context_length), p=[0.7, 0.2, 0.1]), 1
        )
        tokens = (tokens % config.vocab_size).reshape(rows, config.blocks, config.block_length)
        return {"tokens": tokens.astype(np.int32), "mask": np.ones(tokens.shape, bool)}

    @jax.jit
    def step(params, state, tokens, mask):
        def loss(params):
            return training_sums(model, params, tokens, mask, LossConfig())["loss"] / tokens.size

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state, *batch(16).values())
    return model, params, [batch(32)]
