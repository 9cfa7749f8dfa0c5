"""Attention maps are those that the model computes with; nearest tokens are the nearest."""

import dataclasses
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, EmbedderConfig, StackConfig, VanillaConfig
from blocktx.inspect_model import (
    block_attention,
    first_block_share,
    in_blocks,
    nearest_tokens,
    plot_attention,
    token_attention,
)
from blocktx.model.attention import Attention
from blocktx.model.build import build
from blocktx.model.params import unstack_layers
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=2, width=24, heads=3, rotary_fraction=0.5)
SMALL = StackConfig(layers=1, width=16, heads=2, rotary_fraction=0.5)
VANILLA = build(VanillaConfig(vocab_size=50, context_length=32, decoder=STACK))
VARIANTS = {
    "prefix": dict(prefix_length=3),
    "summation": dict(
        conditioning="summation",
        embeddings_per_block=2,
        embedder=EmbedderConfig(kind="projection"),
        scan_layers=False,
    ),
}


def block_model(variant="prefix"):
    return build(
        BlockConfig(
            vocab_size=50,
            context_length=32,
            block_decoder=STACK,
            token_decoder=SMALL,
            **VARIANTS[variant],
        )
    )


def text(model, length=18):
    return in_blocks(np.random.default_rng(0).integers(0, 50, length).tolist(), model)


def logits_with(maps, model, params, tokens_NxK, mask_NxK):
    """The model's logits, each `Attention` mixing its values by the maps instead of its own."""
    model = model.clone(config=dataclasses.replace(model.config, scan_layers=False))

    def mix(next_function, args, kwargs, context):
        module = context.module
        if not isinstance(module, Attention) or context.method_name != "over_itself":
            return next_function(*args, **kwargs)
        decoder, _, layer, _ = module.path
        weights = at_hand[decoder][int(layer[-1])]
        qkv, out = (module.variables["params"][name] for name in ("qkv", "out"))
        values = jnp.einsum("td,dhc->thc", args[0], qkv["kernel"][:, 2]) + qkv["bias"][2]
        mixed = jnp.einsum("hts,shc,hcd->td", weights, values, out["kernel"])
        return mixed + out["bias"]

    def forward(net):
        real_N = mask_NxK.any(-1)
        if net.config.kind == "vanilla":
            return net.classifier(net.decoder(net.embed(tokens_NxK), real_N))[:, None]
        contexts = net.block_decoder(net.embed_blocks(tokens_NxK[None], mask_NxK[None])[0], real_N)
        logits = []
        for i in range(len(tokens_NxK) - 1):
            at_hand["token_decoder"] = maps["token_decoder"][i]
            logits.append(net.token_decoder(contexts[i], tokens_NxK[i + 1], mask_NxK[i + 1]))
        return jnp.stack(logits)

    at_hand = dict(maps)
    with nn.intercept_methods(mix):
        return jax.jit(lambda: model.apply({"params": params}, method=forward))()


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_what_a_block_model_computes_with(variant):
    model = block_model(variant)
    params, (tokens, mask) = random_params(model), text(model)
    maps = {
        "block_decoder": block_attention(model, params, tokens, mask),
        "token_decoder": token_attention(model, params, tokens, mask),
    }
    group, positions = model.config.embeddings_per_block, 6 if variant == "prefix" else 4
    assert maps["block_decoder"].shape == (2, 3, 5 * group, 5 * group)
    assert maps["token_decoder"].shape == (4, 1, 2, positions, positions)
    separate = unstack_layers(params) if model.config.scan_layers else params
    (ours,) = jax.jit(model.apply)({"params": params}, tokens[None], mask[None])
    theirs = logits_with(maps, model, separate, tokens, mask)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_maps_of_a_vanilla_model():
    params, (tokens, mask) = random_params(VANILLA), text(VANILLA)
    maps = block_attention(VANILLA, params, tokens, mask)
    assert maps.shape == (2, 3, 18, 18)
    (ours,) = jax.jit(VANILLA.apply)({"params": params}, tokens[None, :, 0], mask[None, :, 0])
    theirs = logits_with({"decoder": maps}, VANILLA, unstack_layers(params), tokens, mask)[:, 0]
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    for ask in (token_attention, nearest_tokens):
        with pytest.raises(ValueError, match="model: got a vanilla one"):
            ask(VANILLA, params, tokens, mask)


def test_nearest_tokens_by_brute_force():
    model = block_model()
    params, (tokens, mask) = random_params(model), text(model)
    # A prefix that is, whatever the context, the embedding of token 7, but for its length.
    table = params["token_decoder"]["embed"]["embedding"]
    expansion = params["token_decoder"]["expansion"]
    expansion["kernel"] = expansion["kernel"].at[:, 1].set(0)
    expansion["bias"] = expansion["bias"].at[1].set(3 * table[7])
    found, cosine = nearest_tokens(model, params, tokens, mask, count=50)
    assert found.shape == cosine.shape == (5, 3, 50)
    assert (found[:, 1, 0] == 7).all()
    np.testing.assert_allclose(cosine[:, 1, 0], 1, atol=1e-6)
    assert (np.diff(cosine) <= 0).all()
    contexts = jax.jit(lambda *text: model.apply({"params": params}, *text, method="contexts"))
    context = contexts(tokens[None], mask[None])[0, 4]
    told = np.einsum("d,de->e", context, expansion["kernel"][:, 2]) + expansion["bias"][2]
    table = np.asarray(table)
    cosines = table @ told / np.linalg.norm(table, axis=1) / np.linalg.norm(told)
    np.testing.assert_array_equal(found[4, 2], np.argsort(-cosines))
    for count in (0, 51):
        with pytest.raises(ValueError, match=f"count: got {count}, must be 1 to 50"):
            nearest_tokens(model, params, tokens, mask, count)


def test_text_in_blocks():
    tokens, mask = in_blocks([5, 6, 7, 8, 9], block_model(), pad_id=3)
    assert tokens.tolist() == [[3, 3, 3, 5], [6, 7, 8, 9]]
    assert mask.tolist() == [[False] * 3 + [True], [True] * 4]
    for length in (0, 33):
        with pytest.raises(ValueError, match=f"text: got {length} tokens, must be 1 to 32"):
            in_blocks([1] * length, block_model())
    with pytest.raises(ValueError, match="tokens: got 1 block, must be 2 or more"):
        token_attention(block_model(), {}, *in_blocks([1], block_model()))


def test_share_of_the_first_block():
    uniform = np.tril(np.ones((2, 3, 4, 4)))
    uniform /= uniform.sum(-1, keepdims=True)
    share, even = first_block_share(uniform)
    np.testing.assert_allclose(share, even)
    assert even == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    blocks = np.kron(uniform, np.full((2, 2), 0.5))  # two embeddings in each
    np.testing.assert_allclose(first_block_share(blocks, group=2)[0], even)


def test_plot_has_a_map_for_each_head():
    figure = plot_attention(np.full((2, 3, 20, 20), 0.05), [f"${i}" for i in range(20)], "title")
    *maps, _ = figure.axes
    assert len(maps) == 6
    assert [label.get_text() for label in maps[0].get_yticklabels()][:2] == [r"\$0", r"\$2"]
    figure.savefig(io.BytesIO(), format="png")
