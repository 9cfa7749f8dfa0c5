"""A cache in int8 is close to an exact one in all ways of decoding, and compiles nothing more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx import cost
from blocktx.config.errors import UserError
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig, with_cache_dtype
from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.generate import generate
from blocktx.decode.sampling import SamplingConfig, seed_words
from blocktx.evaluate.next_logits import cached_contexts, map_logits
from blocktx.model.build import build
from blocktx.model.cache import create_cache
from tests.helpers.compile_events import compilations
from tests.helpers.random_weights import random_params

NEOX = StackConfig(2, width=32, heads=4)
LLAMA = StackConfig.llama(2, 32, 4, key_value_heads=2)
SHARED = dict(vocab_size=53, context_length=64)
MODELS = {
    "block": BlockConfig(**SHARED, block_decoder=NEOX, token_decoder=NEOX),
    "llama": BlockConfig(
        **SHARED, embeddings_per_block=2, block_length=2, block_decoder=LLAMA, token_decoder=LLAMA
    ),
    "vanilla": VanillaConfig(**SHARED, decoder=NEOX),
}
CLOSE = 0.05  # of the standard deviation of logits


def int8(model):
    return build(with_cache_dtype(model.config, "int8"))


def batch(config, rows=3):
    """Tokens and mask; one row begins with padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 53, (rows, config.blocks, config.block_length))
    mask = np.ones(tokens.shape, bool)
    mask[0, :3] = False
    mask[0, 3, : config.block_length - 1] = False
    return tokens, mask


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(MODELS[request.param])


def test_stepwise_is_close_to_teacher_forcing(model):
    params = random_params(model, 0.1)
    tokens, mask = batch(model.config)
    real = mask.any(-1)

    @jax.jit
    def contexts(params):
        method = "hidden" if model.config.kind == "vanilla" else "contexts"
        inputs = (tokens, mask) if method == "contexts" else (tokens[..., 0], mask[..., 0])
        exact = model.apply({"params": params}, *inputs, method=method)
        return exact, *(cached_contexts(m, params, tokens, mask) for m in (model, int8(model)))

    exact, cached, rounded = (np.asarray(x)[real] for x in contexts(params))
    np.testing.assert_allclose(cached, exact, atol=1e-4)
    error = np.abs(rounded - exact).max() / exact.std()
    assert 1e-5 < error < CLOSE


def test_greedy_tokens_have_nearly_the_probabilities_of_teacher_forcing(model):
    """Of ragged prompts, in a batch and continuously; admissions and arrivals compile nothing."""
    params, length = random_params(model, 0.1), model.config.block_length
    sizes, new = [13, 1, 22, 8, 17], 12
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 53, size).tolist() for size in sizes]
    tokens = np.array([[0] * (22 - len(prompt)) + prompt for prompt in prompts])
    mask = np.arange(22)[::-1] < np.array(sizes)[:, None]
    options = dict(max_new_tokens=new, temperature=0)
    drawn, logprobs = generate(int8(model), params, tokens, mask, return_logprobs=True, **options)

    texts = np.zeros((len(sizes), 36), int)
    real = np.zeros(texts.shape, bool)
    begins = -np.array(sizes) % length
    for row, (prompt, begin) in enumerate(zip(prompts, begins, strict=True)):
        text = [*prompt, *drawn[row]]
        texts[row, begin : begin + len(text)] = text
        real[row, begin : begin + len(text)] = True
    blocks = (x.reshape(len(sizes), -1, length) for x in (texts, real))

    def own(logits_BxCxKxV, tokens_BxCxK):
        every = jax.nn.log_softmax(logits_BxCxKxV)
        return jnp.take_along_axis(every, tokens_BxCxK[..., None], axis=-1)[..., 0]

    expected = jax.jit(lambda params, *x: map_logits(model, params, *x, own))(params, *blocks)
    expected = np.asarray(expected).reshape(len(sizes), -1)  # from the second block on
    at = (begins + sizes - length)[:, None] + np.arange(new)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, at, 1), atol=CLOSE)

    decoder = ContinuousDecoder(int8(model), params, rows=2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder._state.cache)} == {
        "int8",
        "float32",
    }
    decoder.compile()
    greedy, seed_2 = SamplingConfig(temperature=0), seed_words(0, 1)[0]
    with compilations() as compiled:
        requests = [
            decoder.request(p, max_new_tokens=new, sampling=greedy, seed_2=seed_2, score=1)
            for p in prompts
        ]
        found = {request: ([], []) for request in requests}
        for updates in decoder.run(requests):
            for update in updates:
                found[update.request][0].extend(update.tokens)
                found[update.request][1].extend(update.logprobs)
    assert not compiled
    for row, request in enumerate(requests):
        # Sums over slots in another order may round a key to the next integer.
        assert found[request][0][:4] == drawn[row, :4].tolist()
        np.testing.assert_allclose(found[request][1][:4], logprobs[row, :4], atol=CLOSE)


@pytest.mark.parametrize("own", [False, True], ids=["one slot", "own slots"])
@pytest.mark.parametrize("slots", [64, 1056, 40])  # selected, scattered, not in whole tiles
def test_all_ways_to_write_are_equal(slots, own):
    rows, rng = 3, np.random.default_rng(0)
    cache = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(1, 100, x.shape), x.dtype),
        create_cache(NEOX, rows, slots, "int8")[0],
    )
    new = [rng.normal(size=(rows, 1, 32)).astype(np.float32) for _ in range(2)]
    slot = np.array([slots - 1, 0, 33]) if own else np.full(rows, 33)

    def written(tile):
        def write(cache, k, v, slot):
            return cache.write(k, v, slot, tile)

        axes = (0, 0, 0, 0 if own else None)
        return jax.jit(jax.vmap(write, axes))(cache, *new, slot if own else slot[0])

    plain, tiled = written(False), written(True)
    jax.tree.map(np.testing.assert_array_equal, plain, tiled)
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(-1)
        np.testing.assert_array_equal(changed, np.arange(slots) == slot[:, None])


def test_bytes_are_counted(model):
    config = dataclasses.replace(model.config, compute_dtype="bfloat16")
    plain, rounded = config, with_cache_dtype(config, "int8")
    held = sum(x.nbytes for x in jax.tree.leaves(build(rounded).create_cache(2, 16)))
    assert held == 2 * cost.cache_bytes(rounded, 16)
    saved = cost.cache_bytes(plain, 16) - cost.cache_bytes(rounded, 16)
    assert saved > 0
    steps = [cost.decode_block(x, 3, 16) for x in (plain, rounded)]
    assert steps[0].bytes - steps[1].bytes == 3 * saved
    assert steps[0].flops == steps[1].flops


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match=r"^cache_dtype: got 'int3'; use one of auto, compute"):
        with_cache_dtype(MODELS["block"], "int3")
    assert with_cache_dtype(MODELS["block"], None) is MODELS["block"]
