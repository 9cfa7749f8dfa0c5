"""Variants that have no numbers of the authors': what they see, step by step, and greedily.

Each case combines several choices, so that together they cover several embeddings a block with
every embedder, every conditioning, prefixes of 1, 4 and 8, blocks of 1 to 16 tokens, and token
decoders narrower and wider than the block decoder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, EmbedderConfig, EncoderConfig, StackConfig
from blocktx.decode.generate import generate
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

PAD, VOCABULARY = 1, 89
NARROW, WIDE = StackConfig(layers=1, width=16, heads=2), StackConfig(layers=1, width=32, heads=2)
DEEP = StackConfig(layers=2, width=24, heads=3)
GROUPED = StackConfig.llama(1, 24, 4, key_value_heads=2, head_width=8, mlp_width=40, qk_norm=True)
ONE_HEAD = StackConfig.llama(1, 16, 2, key_value_heads=1, biases="qkv")
ENCODER = EncoderConfig(layers=1, width=16, heads=2)
ROWS, NEW_BLOCKS = 6, 3


def variant(kind, embeddings, length, block, token, conditioning, prefix=2, **embedder):
    return BlockConfig(
        vocab_size=VOCABULARY,
        context_length=16 * length,
        block_length=length,
        embeddings_per_block=embeddings,
        embedder=EmbedderConfig(kind=kind, encoder=ENCODER, **embedder),
        block_decoder=block,
        token_decoder=token,
        conditioning=conditioning,
        prefix_length=prefix,
        bos_id=2,
        scan_layers=False,
    )


VARIANTS = {
    "lookup2-cross": variant("lookup", 2, 4, WIDE, NARROW, "cross_attention"),
    "lookup3-prefix8": variant("lookup", 3, 8, DEEP, NARROW, "prefix", 8),
    "projection3-prefix4": variant("projection", 3, 3, NARROW, WIDE, "prefix", 4, width=8),
    "encoder2-summation": variant("encoder", 2, 5, WIDE, NARROW, "summation"),
    "cls3-cross": variant("cls", 3, 2, NARROW, WIDE, "cross_attention"),
    "lookup1-summation-of-16": variant("lookup", 1, 16, NARROW, NARROW, "summation"),
    "llama-lookup1-prefix2": variant("lookup", 1, 4, GROUPED, ONE_HEAD, "prefix"),
    "llama-projection2-cross": variant("projection", 2, 3, ONE_HEAD, GROUPED, "cross_attention"),
    "lookup2-prefix2-of-1": variant("lookup", 2, 1, NARROW, NARROW, "prefix"),
}
MORE = {  # one at a time they add little, and take as long
    "lookup1-cross": variant("lookup", 1, 16, WIDE, DEEP, "cross_attention"),
    "projection2-cross": variant("projection", 2, 1, NARROW, WIDE, "cross_attention"),
    "encoder3-prefix1": variant("encoder", 3, 2, NARROW, WIDE, "prefix", 1),
    "cls2-summation": variant("cls", 2, 6, WIDE, DEEP, "summation", cls_tokens=4, concatenate=True),
}


@functools.cache
def params_of(net):
    return random_params(net)


@pytest.fixture(params=[*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def net(request):
    return build((VARIANTS | MORE)[request.param])


@functools.partial(jax.jit, static_argnums=0)
def forward(net, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(net, params, tokens_NxK, mask_NxK):
    """Derivatives `[N, K, N-1, K, V]` of the logits along a change of each token's embeddings.

    No token may occur twice, so that a row of a table is one position's.
    """

    def change(path, leaf, token):
        is_table = path[-1].key == "embedding" and leaf.shape[0] == VOCABULARY
        direction = jnp.sin(1 + jnp.arange(leaf.shape[-1])).astype(leaf.dtype)
        return jnp.zeros_like(leaf).at[token].set(direction) if is_table else jnp.zeros_like(leaf)

    def logits(params):
        return net.apply({"params": params}, tokens_NxK[None], mask_NxK[None])[0]

    _, along = jax.linearize(logits, params)
    return jax.vmap(
        jax.vmap(lambda t: along(jax.tree.map_with_path(lambda p, x: change(p, x, t), params)))
    )(tokens_NxK)


def expected_sight(config, mask_NxK):
    """Bool `[N-1, K, N, K]`: which tokens the logits of each token see."""
    blocks, length = mask_NxK.shape
    content = np.ones_like(mask_NxK) if config.embedder.kind != "cls" else mask_NxK
    seen = np.zeros((blocks - 1, length, blocks, length), bool)
    for j, k in np.ndindex(blocks - 1, length):
        seen[j, k, : j + 1] = content[: j + 1]
        seen[j, k, j + 1, :k] = mask_NxK[j + 1, :k]
        seen[j, k, j + 1, max(k - 1, 0) : k] = True  # real or not, logits stand on the token before
    return seen


def test_logits_see_the_blocks_before_and_the_tokens_before(net):
    length = net.config.block_length
    tokens = 3 + np.random.default_rng(0).permutation(VOCABULARY - 3)[: 4 * length]
    tokens = tokens.reshape(4, length).astype(np.int32)
    padded = np.ones(tokens.shape, bool)
    padded[0, : length // 2] = padded[2, (length + 2) // 2 :] = False
    for mask in (np.ones_like(padded), padded):
        seen = (np.asarray(derivatives(net, params_of(net), tokens, mask)) != 0).any(-1)
        np.testing.assert_array_equal(seen.transpose(2, 3, 0, 1), expected_sight(net.config, mask))


def test_embeddings_of_a_block_see_each_other_and_those_of_blocks_before():
    net = build(VARIANTS["projection3-prefix4"])
    embeddings = np.random.default_rng(0).normal(size=(1, 4, 3, 16)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def jacobian(embeddings):
        contexts = net.apply(
            {"params": params_of(net)}, embeddings, np.ones((1, 4, 3)), method="decode_embeddings"
        )
        return contexts.reshape(4, 3, 16) @ jnp.sin(1 + jnp.arange(16.0))

    seen = np.abs(jacobian(embeddings)[:, :, 0]).sum(-1) > 0
    expected = np.broadcast_to(np.tri(4, dtype=bool)[:, None, :, None], seen.shape)
    np.testing.assert_array_equal(seen, expected)


@functools.partial(jax.jit, static_argnums=0)
def stepwise(net, params, tokens_BxNxK):
    """Logits `[B, N-1, K, V]` by the methods for decoding, one block and one token at a time."""
    rows, blocks, length = tokens_BxNxK.shape

    def apply(method, *args):
        return net.apply({"params": params}, *args, method=method)

    def decode_block(cache, index):
        block_Bx1xK = jax.lax.dynamic_slice_in_dim(tokens_BxNxK, index, 1, axis=1)
        mask = jnp.ones_like(block_Bx1xK)
        seen = jnp.broadcast_to(jnp.arange(blocks) < index, (rows, blocks))
        contexts, cache = apply(
            "extend", block_Bx1xK, mask, jnp.full(rows, index), cache, index, seen
        )
        first, token_cache = apply("start_block", contexts[:, 0], net.create_token_cache(rows))

        def step(token_cache, k):
            logits, token_cache = apply("step_token", tokens_BxNxK[:, index + 1, k], k, token_cache)
            return token_cache, logits

        _, rest = jax.lax.scan(step, token_cache, jnp.arange(length - 1))
        return cache, jnp.concatenate([first[None], rest])

    cache = net.create_cache(rows, blocks)
    _, logits_MxKxBxV = jax.lax.scan(decode_block, cache, jnp.arange(blocks - 1))
    return logits_MxKxBxV.transpose(2, 0, 1, 3)


def test_stepwise_equals_forward(net):
    shape = (ROWS, 2 + NEW_BLOCKS, net.config.block_length)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, shape)
    expected = forward(net, params_of(net), tokens, np.ones_like(tokens))
    assert expected.std() > 0.5
    got = stepwise(net, params_of(net), tokens)
    # One forward, compiled with and without optimisation, differs from itself by 2e-5.
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def brute_force(net, prompts, placement):
    """The greedy continuation, by a forward of the whole text for every token."""
    length = net.config.block_length
    begins = [
        -len(prompt) % length if placement == "pad" or len(prompt) < length else 0
        for prompt in prompts
    ]
    texts = [list(prompt) for prompt in prompts]
    for _ in range(NEW_BLOCKS * length):
        tokens = np.full((ROWS, (2 + NEW_BLOCKS) * length), PAD)
        mask = np.zeros_like(tokens)
        ends = []
        for b, text in enumerate(texts):
            ends.append(begins[b] + len(text))
            tokens[b, begins[b] : ends[b]] = text
            mask[b, begins[b] : ends[b]] = 1
        shape = (ROWS, -1, length)
        logits = forward(net, params_of(net), tokens.reshape(shape), mask.reshape(shape))
        logits = np.asarray(logits).reshape(ROWS, -1, VOCABULARY)  # from the second block on
        for b, text in enumerate(texts):
            text.append(int(logits[b, ends[b] - length].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def test_greedy_equals_a_forward_for_every_token(net):
    length = net.config.block_length
    rng = np.random.default_rng(2)
    sizes = np.maximum(2 * length - np.array([0, 1, 2, 3, 4, 2 * length]), 1)
    prompts = [rng.integers(3, VOCABULARY, size).tolist() for size in sizes]
    tokens = np.array([[PAD] * (2 * length - len(prompt)) + prompt for prompt in prompts])
    mask = np.arange(2 * length)[::-1] < sizes[:, None]
    options = dict(max_new_tokens=NEW_BLOCKS * length, temperature=0, pad_id=PAD)
    for placement in ("pad", "force"):
        got = generate(net, params_of(net), tokens, mask, placement=placement, **options)
        np.testing.assert_array_equal(got, brute_force(net, prompts, placement))
