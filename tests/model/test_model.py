"""What the models promise beyond the authors' numbers: causality, padding, execution options."""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.cost import count_params
from blocktx.model.build import build
from blocktx.model.loss import loss_by_position
from blocktx.model.params import for_decoding, stack_layers, unstack_layers
from blocktx.ops.gelu import gelu
from blocktx.ops.rotary import rotary
from tests.helpers.random_weights import random_params

ROWS, BLOCKS, LENGTH, VOCABULARY = 2, 5, 4, 53
STACK = StackConfig(layers=2, width=32, heads=2)
SHARED = dict(vocab_size=VOCABULARY, context_length=BLOCKS * LENGTH)
BLOCK = BlockConfig(
    **SHARED, block_decoder=STACK, token_decoder=StackConfig(layers=2, width=16, heads=2)
)
VANILLA = VanillaConfig(**SHARED, decoder=STACK)
# No token occurs twice, so the gradient of an embedding table's row is that of one position.
TOKENS = np.random.default_rng(0).permutation(VOCABULARY)[: ROWS * BLOCKS * LENGTH]
TOKENS = TOKENS.reshape(ROWS, BLOCKS, LENGTH).astype(np.int32)
REAL = np.ones_like(TOKENS)
PADDED = np.array(
    [
        [[0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]],
        [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
    ]
)


@functools.cache
def params_of(config):
    return random_params(build(config))


@functools.partial(jax.jit, static_argnums=0)
def forward(net, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask)


@functools.partial(jax.jit, static_argnums=0)
def contexts(net, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask, method="contexts")


@functools.partial(jax.jit, static_argnums=0)
def _table_gradients(net, params, tokens, mask):
    """For each logit vector, the gradient's magnitude in each row of the embedding tables."""
    weight_V = jax.random.normal(jax.random.key(1), (VOCABULARY,))
    flat = flax.traverse_util.flatten_dict(params)
    tables = {path: leaf for path, leaf in flat.items() if path[-1] == "embedding"}

    def scores(tables):
        changed = flax.traverse_util.unflatten_dict(flat | tables)
        return net.apply({"params": changed}, tokens, mask) @ weight_V

    return sum(jnp.abs(jacobian).sum(-1) for jacobian in jax.jacrev(scores)(tables).values())


def sees(net, params, tokens, mask):
    """Bool `[*logits.shape[:-1], *tokens.shape]`: whether a logit vector depends on a token."""
    return np.asarray(_table_gradients(net, params, tokens, mask))[..., tokens] > 0


def expected_sight(mask_BxNxK):
    """Which tokens each logit vector `[b, j, k]` of the block model sees, from its docstrings."""
    mask = mask_BxNxK.astype(bool)
    seen = np.zeros((ROWS, BLOCKS - 1, LENGTH, ROWS, BLOCKS, LENGTH), bool)
    for b, j, k in np.ndindex(ROWS, BLOCKS - 1, LENGTH):
        seen[b, j, k, b, : j + 1] = mask[b, : j + 1].any(-1, keepdims=True)
        seen[b, j, k, b, j] = True  # padding or not, the context stands on its own block
        seen[b, j, k, b, j + 1, :k] = mask[b, j + 1, :k]
        seen[b, j, k, b, j + 1, max(k - 1, 0) : k] = True  # likewise on the token before
    return seen


@pytest.mark.parametrize("mask", [REAL, PADDED], ids=["real", "padded"])
def test_logits_depend_on_what_came_before_and_nothing_else(mask):
    got = sees(build(BLOCK), params_of(BLOCK), TOKENS, mask)
    np.testing.assert_array_equal(got, expected_sight(mask))


def test_vanilla_logits_depend_on_what_came_before_and_nothing_else():
    tokens, mask = TOKENS.reshape(ROWS, -1), np.ones((ROWS, BLOCKS * LENGTH), int)
    mask[1, [0, 1, 7, -1]] = 0
    expected = np.zeros((*tokens.shape, *tokens.shape), bool)
    for b, t in np.ndindex(*tokens.shape):
        expected[b, t, b, : t + 1] = mask[b, : t + 1]
        expected[b, t, b, t] = True
    np.testing.assert_array_equal(sees(build(VANILLA), params_of(VANILLA), tokens, mask), expected)


@pytest.mark.parametrize("config", [BLOCK, VANILLA], ids=["block", "vanilla"])
def test_row_does_not_change_with_another_rows_padding_or_tokens(config):
    shape = TOKENS.shape if config is BLOCK else (ROWS, -1)
    run = functools.partial(forward, build(config), params_of(config))
    before = run(TOKENS.reshape(shape), REAL.reshape(shape))
    mask, tokens = REAL.copy(), TOKENS.copy()
    mask[1], tokens[1] = PADDED[0], 7
    after = run(tokens.reshape(shape), mask.reshape(shape))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


@pytest.mark.parametrize("config", [BLOCK, VANILLA], ids=["block", "vanilla"])
def test_a_token_outside_the_vocabulary_makes_the_logits_of_its_row_nan(config):
    shape = TOKENS.shape if config is BLOCK else (ROWS, -1)
    tokens = TOKENS.copy()
    tokens[1, 1, 0] = VOCABULARY
    logits = forward(build(config), params_of(config), tokens.reshape(shape), REAL.reshape(shape))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).any()


def test_padding_is_content_of_a_block_with_real_tokens_and_unseen_in_others():
    run = functools.partial(contexts, build(BLOCK), params_of(BLOCK))
    before = run(TOKENS, PADDED)
    changed = TOKENS.copy()
    changed[0, 3, 1] = 7  # in a block of nothing but padding
    changed[1, 2, 2] = 7  # in a block with real tokens
    after = run(changed, PADDED)
    np.testing.assert_array_equal(
        (before != after).any(-1),
        [[False, False, False, True, False], [False, False, True, True, True]],
    )


def test_whole_blocks_of_padding_in_front_change_nothing():
    run = functools.partial(forward, build(BLOCK), params_of(BLOCK))
    moved, mask = np.roll(TOKENS, 2, axis=1), np.roll(REAL, 2, axis=1)
    mask[:, :2] = 0
    np.testing.assert_allclose(run(moved, mask)[:, 2:], run(TOKENS, REAL)[:, :2], atol=1e-5, rtol=0)


def loss_of(config):
    """The loss of a batch, and parameters that `config` takes."""
    net, tokens, mask = build(config), jnp.tile(TOKENS, (4, 1, 1)), jnp.tile(PADDED, (4, 1, 1))

    def loss(params):
        nats, count = loss_by_position(net, params, tokens, mask)
        return nats.sum() / count.sum()

    return loss, params_of(BLOCK) if config.scan_layers else unstack_layers(params_of(BLOCK))


@functools.cache
def gradient(**execution):
    """Loss and gradients of BLOCK with other execution options, and the program's memory."""
    loss, params = loss_of(dataclasses.replace(BLOCK, **execution))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return *compiled(params), compiled.memory_analysis().temp_size_in_bytes


def residual_bytes(**execution):
    """What the forward pass leaves for the backward pass."""
    loss, params = loss_of(dataclasses.replace(BLOCK, **execution))
    residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize("execution", [{"remat": "full"}, {"scan_layers": False}], ids=str)
def test_execution_options_do_not_change_loss_and_gradients(execution):
    loss, grads, _ = gradient(**execution)
    expected_loss, expected_grads, _ = gradient()
    if "scan_layers" in execution:
        grads = stack_layers(grads)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    jax.tree.map(close, grads, expected_grads)


def test_remat_recomputes():
    # Of a layer only the input stays, and it makes over ten arrays as large.
    for scan in (True, False):
        all_kept = residual_bytes(scan_layers=scan)
        assert residual_bytes(scan_layers=scan, remat="full") < all_kept / 3
    # Scanned only: the CPU compiler merges what unrolled layers recompute with the first copy.
    assert gradient(remat="full")[2] < gradient()[2] / 2


def test_bfloat16_stays_near_float32():
    net = build(dataclasses.replace(BLOCK, compute_dtype="bfloat16"))
    params = params_of(net.config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    logits = forward(net, params, TOKENS, REAL)
    expected = forward(build(BLOCK), params, TOKENS, REAL)
    assert logits.dtype == jnp.float32
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < 0.02  # a bfloat16's steps are up to 0.008 of its size


def test_layers_taken_apart_and_put_together():
    params = params_of(BLOCK)
    apart = unstack_layers(params)
    decoder = apart["token_decoder"]["stack"]
    assert set(decoder) == {"layers_0", "layers_1", "final_norm"}
    np.testing.assert_array_equal(
        decoder["layers_1"]["mlp"]["up"]["kernel"],
        params["token_decoder"]["stack"]["layers"]["mlp"]["up"]["kernel"][1],
    )
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), params)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_norms_are_in_float32_and_all_else_in_the_compute_dtype_when_decoding(param_dtype):
    net = build(dataclasses.replace(BLOCK, param_dtype=param_dtype, compute_dtype="bfloat16"))
    _, params = for_decoding(net, random_params(net))
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        assert leaf.dtype == ("float32" if path[-2].endswith("norm") else "bfloat16"), path


# Non-embedding parameters: the paper's (printed to one unit) and Pythia's own, of the model cards.
SIZES = [
    (3, 256, 8, (5, 1e6), None),
    (3, 512, 8, (19, 1e6), 18_915_328),
    (6, 768, 12, (85, 1e6), 85_056_000),
    (12, 1024, 16, (302, 1e6), 302_311_424),
    (8, 2048, 16, (805, 1e6), 805_736_448),
    (12, 2048, 16, (12, 1e8), 1_208_602_624),
]


@pytest.mark.parametrize(("layers", "width", "heads", "paper", "pythia"), SIZES)
def test_sizes_of_the_papers_models(layers, width, heads, paper, pythia):
    shared = dict(vocab_size=50_304, context_length=2048)
    half = StackConfig(layers=layers, width=width, heads=heads)
    whole = dataclasses.replace(half, layers=2 * layers)
    _, vanilla, _ = count_params(VanillaConfig(**shared, decoder=whole))
    total, block, _ = count_params(BlockConfig(**shared, block_decoder=half, token_decoder=half))
    number, unit = paper
    assert abs(vanilla / unit - number) < 1  # 805.7 is printed as 805
    assert pythia in (None, vanilla)
    # The paper's numbers of block models are vanilla's: the prefix projection is left out.
    prefix, final_norm = (width + 1) * 2 * width, 2 * width
    assert block == vanilla + prefix + final_norm
    assert total == block + 50_304 * (width // 4 + width + width)


def test_gelu_is_exact():
    x = jnp.linspace(-12, 12, 10_001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dims", [0, 4, 16])
def test_rotary_turns_complex_numbers(dims):
    x = np.random.default_rng(0).normal(size=(7, 3, 16)).astype(np.float32)
    position = np.array([0, 1, 2, 3, 50, 511, 2047])
    frequency = 10_000.0 ** (-2 * np.arange(dims // 2) / max(dims, 1))
    turn = np.exp(1j * position[:, None] * frequency)[:, None]
    turned = (x[..., : dims // 2] + 1j * x[..., dims // 2 : dims]) * turn
    expected = np.concatenate([turned.real, turned.imag, x[..., dims:]], axis=-1)
    stack = StackConfig(layers=1, width=48, heads=3, rotary_fraction=dims / 16)
    got = rotary(jnp.asarray(x), jnp.asarray(position), stack)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)  # float32 angles up to 2047
    np.testing.assert_allclose(got[:4], expected[:4], atol=1e-6, rtol=0)
