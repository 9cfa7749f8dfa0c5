"""Uptraining against the authors' initialisation, and longer blocks."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from blocktx.config.model import StackConfig, VanillaConfig
from blocktx.convert import load_hf, load_neox, load_official
from blocktx.convert.uptrain import lengthen, uptrain
from blocktx.model.build import build
from blocktx.model.params import unstack_layers
from tests.helpers import golden, hf_models, numpy_llama
from tests.helpers.random_weights import random_params
from tests.helpers.tiny_run import MODEL

VANILLA = VanillaConfig(
    vocab_size=50, context_length=16, decoder=StackConfig(layers=4, width=16, heads=2)
)


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@functools.cache
def vanilla_params(config=VANILLA):
    return random_params(build(config))


# The authors' initialisation.


@functools.partial(jax.jit, static_argnums=0)
def outputs(net, params, tokens, mask):
    def apply(method):
        return net.apply({"params": params}, tokens, mask, method=method)

    return apply("embed_blocks"), apply("contexts"), apply("__call__")


@pytest.mark.parametrize("name", golden.UPTRAINED)
def test_equals_the_authors(name):
    expected = golden.expected(name)
    vanilla = VanillaConfig(
        vocab_size=97, context_length=256, decoder=StackConfig(layers=4, width=32, heads=2)
    )
    _, given = load_neox(golden.FOLDER / "uptrain" / "vanilla.safetensors", vanilla)
    how = dict(method="partition", block_layers=3) if name == "partition31" else dict(method=name)
    config, params = uptrain(vanilla, given, block_length=4, **how)
    _, theirs = load_official(golden.path(name), config)
    assert_same(params, theirs)

    separate = dataclasses.replace(vanilla, scan_layers=False)
    separate, separate_params = uptrain(separate, unstack_layers(given), block_length=4, **how)
    assert separate == dataclasses.replace(config, scan_layers=False)
    assert_same(separate_params, unstack_layers(theirs))

    def both(array):  # without padding and with it
        return np.concatenate([expected[array], expected[f"pad_{array}"]])

    embeddings, contexts, logits = outputs(
        build(config), params, both("input_ids"), both("attention_mask")
    )
    close = functools.partial(np.testing.assert_allclose, atol=golden.TOLERANCE, rtol=0)
    close(embeddings[:2, :, 0], expected["embedder_output"])
    close(contexts[:2], expected["context"])
    valid = np.concatenate([np.ones((2, 5, 4), bool), expected["pad_logits_valid"]])
    close(logits[valid], both("logits")[valid])


def test_what_is_not_of_a_block_model_is_taken_over():
    given = dataclasses.replace(VANILLA, compute_dtype="bfloat16", remat="full")
    config, params = uptrain(
        given, vanilla_params(), method="skip", block_length=2, prefix_length=3
    )
    assert (config.compute_dtype, config.remat, config.context_length) == ("bfloat16", "full", 16)
    assert (config.block_length, config.prefix_length) == (2, 3)
    assert config.block_decoder == config.token_decoder == StackConfig(layers=2, width=16, heads=2)
    assert_same(
        jax.tree.map(np.shape, params),
        jax.tree.map(np.shape, random_params(build(config))),
    )


@pytest.mark.parametrize(
    ("layers", "arguments", "message"),
    [
        (
            4,
            dict(method="halve"),
            "method: got .halve.; use one of partition, skip, duplic",
        ),
        (3, dict(method="partition"), "3 layers into halves; .* block_layers 1 or 2"),
        (1, dict(method="partition"), "cannot divide 1 layer in two; use duplicate"),
        (4, dict(method="partition", block_layers=0), "block_layers: got 0 of 4 .* use 1 to 3"),
        (4, dict(method="partition", block_layers=4), "block_layers: got 4 of 4 .* use 1 to 3"),
        (4, dict(method="skip", block_layers=2), "block_layers: is for partition only, got 2"),
        (4, dict(method="skip", block_length=0), "block_length: got 0, must be greater than 0"),
        (3, dict(method="skip"), "method: skip cannot .* 3 layers .* block_layers 1 to 2$"),
        (1, dict(method="skip"), "method: skip cannot .* 1 layers .* or duplicate$"),
        (
            4,
            dict(method="skip", block_length=3),
            "^block_length: 3 does not divide context_length 16 .* use one of 1, 2, 4, 8$",
        ),
        (4, dict(method="skip", block_length=16), "^block_length: 16 does not .* 1, 2, 4, 8$"),
        (4, dict(method="skip", prefix_length=0), "prefix_length: got 0, must be greater than 0"),
    ],
)
def test_uptraining_that_cannot_be(layers, arguments, message):
    vanilla = dataclasses.replace(VANILLA, decoder=StackConfig(layers=layers, width=16, heads=2))
    with pytest.raises(ValueError, match=message):
        uptrain(vanilla, {}, **(dict(block_length=4) | arguments))


def test_all_that_hinders_uptraining_is_listed():
    vanilla = dataclasses.replace(VANILLA, decoder=StackConfig(layers=3, width=16, heads=2))
    with pytest.raises(ValueError, match="into halves") as error:
        uptrain(vanilla, {}, method="partition", block_length=0, prefix_length=0)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["method", "block_length", "prefix_length"]


# Models of Hugging Face, and other starts than the authors'.


def apply(config, params, tokens):
    return np.asarray(_apply(build(config), params, tokens, np.ones_like(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask)


def source(case):
    model, params = load_hf(hf_models.path(case))
    return model.config, params


def tokens_of(config, *shape):
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("case", ["llama_gqa", "qwen25", "qwen3"])
@pytest.mark.parametrize("embedder", ["projection", "mean", "mean_mlp"])
def test_partition_equals_a_computation_in_numpy(case, embedder):
    vanilla, given = source(case)
    config, params = uptrain(vanilla, given, method="partition", block_length=4, embedder=embedder)
    assert config.tied_classifier
    assert "classifier" not in params["token_decoder"]
    tokens = tokens_of(config, 2, 6, 4)
    reference = numpy_llama.Llama(hf_models.config(case), hf_models.weights(case))
    expected = [reference.partition_logits(row, config.prefix_length) for row in tokens]
    np.testing.assert_allclose(apply(config, params, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama", "llama_gqa", "qwen3", "neox_sequential"])
@pytest.mark.parametrize("embedder", ["projection", "mean"])
def test_all_layers_without_new_ones_are_the_source(case, embedder):
    vanilla, given = source(case)
    config, params = uptrain(
        vanilla, given, method="all", token_layers=0, block_length=1, embedder=embedder
    )
    assert config.token_decoder.layers == 0
    tokens = tokens_of(config, 2, 16)
    expected = apply(vanilla, given, tokens)[:, :-1]
    np.testing.assert_array_equal(apply(config, params, tokens[..., None])[:, :, 0], expected)


@pytest.mark.parametrize("scan", [True, False])
def test_new_layers_start_as_the_identity(scan):
    vanilla, given = source("llama_gqa")
    if not scan:
        vanilla = dataclasses.replace(vanilla, scan_layers=False)
        given = unstack_layers(given)
    how = dict(method="all", block_length=1, embedder="mean", token_layers=2)
    config, params = uptrain(vanilla, given, **how)
    assert_same(
        jax.tree.map(np.shape, params), jax.tree.map(np.shape, random_params(build(config)))
    )
    tokens = tokens_of(config, 2, 16)
    expected = apply(vanilla, given, tokens)[:, :-1]
    logits = apply(config, params, tokens[..., None])[:, :, 0]
    np.testing.assert_allclose(logits, expected, atol=0.02, rtol=0)  # of the second norm's epsilon
    other = uptrain(vanilla, given, **how, seed=1)[1]
    first, second = (jax.tree.leaves(p["token_decoder"]["stack"]) for p in (params, other))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))


def test_blocks_of_a_longer_model_without_token_layers_see_only_blocks_before():
    vanilla, given = source("llama_gqa")
    config, params = uptrain(
        vanilla, given, method="all", token_layers=0, block_length=4, embedder="mean_mlp"
    )
    tokens = tokens_of(config, 1, 4, 4)
    logits = apply(config, params, tokens)
    changed = tokens.copy()
    changed[0, 3] += 1
    assert logits.shape == (1, 3, 4, config.vocab_size)
    np.testing.assert_array_equal(
        apply(config, params, changed % config.vocab_size)[:, :, 0], logits[:, :, 0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(method="skip", token_layers=1), "token_layers: is for the method all only, got 1"),
        (dict(method="all", token_layers=-1), "token_layers: got -1, must be 0 or greater"),
        (dict(method="all", block_layers=1), "block_layers: is for partition only, got 1"),
        (dict(method="all", embedder="lookup"), "embedder: got 'lookup'; use one of projection, m"),
    ],
)
def test_other_starts_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        uptrain(VANILLA, {}, block_length=4, **arguments)


# Longer blocks.


@pytest.mark.parametrize("embedder", ["projection", "mean", "mean_mlp"])
def test_longer_block_is_the_mean_of_its_parts(embedder):
    how = dict(method="partition", block_length=2, embedder=embedder)
    short, _ = uptrain(VANILLA, vanilla_params(), **how)
    params = random_params(build(short))
    long, longer_params = lengthen(short, params, 4)
    assert long == dataclasses.replace(short, block_length=8)
    tokens = np.random.default_rng(0).integers(0, short.vocab_size, 16)

    def embeddings(config, params):
        shape = (1, -1, config.block_length)
        return build(config).apply(
            {"params": params},
            tokens.reshape(shape),
            np.ones_like(tokens).reshape(shape),
            method="embed_blocks",
        )

    parts = np.asarray(embeddings(short, params)).reshape(2, 4, -1)
    np.testing.assert_allclose(
        embeddings(long, longer_params).reshape(2, -1), parts.mean(1), atol=1e-6, rtol=0
    )
    for part in ("block_decoder", "token_decoder"):
        assert longer_params[part] is params[part]


@pytest.mark.parametrize("factors", [(4,), (2, 2), (4, 1)])
def test_lengthening_what_is_uptrained_is_uptraining_with_longer_blocks(factors):
    model = uptrain(VANILLA, vanilla_params(), method="partition", block_length=1)
    for factor in factors:
        model = lengthen(*model, factor)
    config, params = uptrain(VANILLA, vanilla_params(), method="partition", block_length=4)
    assert model[0] == config
    assert_same(model[1], params)


@pytest.mark.parametrize(
    ("changes", "factor", "message"),
    [
        ({}, 0, "factor: got 0"),
        ({}, 3, "^factor: 3 makes blocks of 12, .* context_length 16 .* use one of 1, 2$"),
        ({}, 8, "^factor: 8 makes blocks of 32, .* context_length 16 .* use one of 1, 2$"),
        (dict(conditioning="summation"), 2, "conditioning: summation .* takes models with a pref"),
        (dict(embedder=MODEL.embedder), 2, "embedder.kind: lookup .* a projection embedder"),
    ],
)
def test_lengthening_that_cannot_be(changes, factor, message):
    config, params = uptrain(VANILLA, vanilla_params(), method="skip", block_length=4)
    with pytest.raises(ValueError, match=message):
        lengthen(dataclasses.replace(config, **changes), params, factor)
