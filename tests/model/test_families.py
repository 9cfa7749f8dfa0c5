"""The Llama family: numbers of transformers, and an independent computation of a block model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from blocktx.config.fields import FieldError
from blocktx.config.model import BlockConfig
from blocktx.config.stack import RotaryScaling, StackConfig
from blocktx.decode.generate import generate
from blocktx.model.build import abstract_params, build
from tests.helpers import golden_hf
from tests.helpers.random_weights import random_params

TOLERANCE = 1e-4  # absolute, see the README of golden_hf


@functools.partial(jax.jit, static_argnums=0)
def forward(net, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask)


@pytest.mark.parametrize("case", [*golden_hf.LLAMA, *golden_hf.NEOX])
def test_logits_and_greedy_tokens_are_those_of_transformers(case):
    config, params, expected = golden_hf.load(case)
    wanted = abstract_params(config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, wanted)
    net = build(config)
    logits = forward(net, params, expected["input_ids"], expected["attention_mask"])
    valid = expected["logits_valid"].astype(bool)
    np.testing.assert_allclose(
        np.asarray(logits)[valid], expected["logits"][valid], atol=TOLERANCE, rtol=0
    )
    prompts = expected["gen_input_ids"]
    new = expected["gen_generated"].shape[1] - prompts.shape[1]
    options = dict(max_new_tokens=new, temperature=0)
    generated = generate(net, params, prompts, np.ones_like(prompts), **options)
    np.testing.assert_array_equal(generated, expected["gen_generated"][:, prompts.shape[1] :])


STACK = StackConfig.llama(
    2,
    24,
    4,
    key_value_heads=2,
    head_width=8,
    mlp_width=40,
    qk_norm=True,
    biases="qkv",
    norm_epsilon=1e-3,
    rotary_scaling=RotaryScaling("llama3", factor=8.0, original_context=16),
)
CONFIG = BlockConfig(
    vocab_size=61,
    context_length=32,
    tied_classifier=True,
    scan_layers=False,
    block_decoder=STACK,
    token_decoder=dataclasses.replace(STACK, layers=1, rotary_scaling=RotaryScaling()),
)


def plain_logits(config, params, tokens_NxK):
    """Logits of one row in float64 NumPy, written from the equations."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def rms(x, scale, epsilon):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale

    def frequencies(stack):
        found, scaling = [], stack.rotary_scaling
        for i in range(stack.head_size // 2):
            f = stack.rotary_base ** (-2 * i / stack.head_size)
            if scaling.kind == "llama3":
                wavelength = 2 * np.pi / f
                low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
                t = (scaling.original_context / wavelength - low) / (high - low)
                t = min(max(t, 0), 1)
                f = f * (t + (1 - t) / scaling.factor)
            found.append(f)
        return np.array(found)

    def turn(x, position, stack):  # complex numbers i and i + C/2
        half = stack.head_size // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies(stack))
        return np.concatenate([z.real, z.imag])

    def attention(p, x, stack):
        q = np.einsum("td,dhc->thc", x, p["q"]["kernel"]) + p["q"]["bias"]
        kv = np.einsum("td,dnhc->tnhc", x, p["kv"]["kernel"]) + p["kv"]["bias"]
        out = np.zeros((len(x), stack.width))
        for t, h in np.ndindex(len(x), stack.heads):
            g = h // (stack.heads // stack.kv_heads)
            query = turn(rms(q[t, h], p["q_norm"]["scale"], stack.norm_epsilon), t, stack)
            keys = [
                turn(rms(kv[s, 0, g], p["k_norm"]["scale"], stack.norm_epsilon), s, stack)
                for s in range(t + 1)
            ]
            weights = np.exp(np.array(keys) @ query / np.sqrt(stack.head_size))
            weights /= weights.sum()
            out[t] += (weights @ kv[: t + 1, 1, g]) @ p["out"]["kernel"][h]
        return out

    def stack_of(p, x, stack):
        for i in range(stack.layers):
            layer = p[f"layers_{i}"]
            normed = rms(x, layer["attention_norm"]["scale"], stack.norm_epsilon)
            x = x + attention(layer["attention"], normed, stack)
            normed = rms(x, layer["mlp_norm"]["scale"], stack.norm_epsilon)
            gate = normed @ layer["mlp"]["gate"]["kernel"]
            hidden = gate / (1 + np.exp(-gate)) * (normed @ layer["mlp"]["up"]["kernel"])
            x = x + hidden @ layer["mlp"]["down"]["kernel"]
        return rms(x, p["final_norm"]["scale"], stack.norm_epsilon)

    blocks = params["embedder"]["tokens"]["embedding"][tokens_NxK].reshape(len(tokens_NxK), -1)
    contexts = stack_of(params["block_decoder"]["stack"], blocks, config.block_decoder)
    p = params["token_decoder"]
    table, logits = p["embed"]["embedding"], []
    for context, tokens in zip(contexts[:-1], tokens_NxK[1:], strict=True):
        prefix = np.einsum("d,dpe->pe", context, p["expansion"]["kernel"]) + p["expansion"]["bias"]
        x = stack_of(p["stack"], np.concatenate([prefix, table[tokens[:-1]]]), config.token_decoder)
        logits.append(x[len(prefix) - 1 :] @ table.T)
    return np.array(logits)


def test_block_model_is_what_its_equations_say():
    net = build(CONFIG)
    params = random_params(net)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 8, 4))
    got = forward(net, params, tokens, np.ones_like(tokens))
    for row in range(2):
        expected = plain_logits(CONFIG, params, tokens[row])
        np.testing.assert_allclose(got[row], expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(norm="layer"), "norm"),
        (dict(mlp="gelu"), "mlp"),
        (dict(residual="parallel"), "residual"),
        (dict(rotary_fraction=0.25), "rotary_fraction"),
        (dict(key_value_heads=3), "key_value_heads"),
        (dict(rotary_scaling=RotaryScaling("linear")), None),
    ],
)
def test_impossible_mixtures_are_refused_by_name(fields, named):
    if named is None:
        StackConfig.llama(1, 32, 4, **fields)
        return
    with pytest.raises(FieldError) as info:
        StackConfig.llama(1, 32, 4, **fields)
    assert info.value.field == named


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("none", dict(factor=2.0), "factor"),
        ("linear", dict(original_context=64), "original_context"),
        ("llama3", dict(low_frequency_factor=4.0), "high_frequency_factor"),
        ("yarn", dict(beta_slow=40.0), "beta_fast"),
        ("linear", dict(factor=0.5), "factor"),
    ],
)
def test_impossible_scaling_is_refused_by_name(kind, fields, named):
    with pytest.raises(FieldError) as info:
        RotaryScaling(kind, **fields)
    assert info.value.field == named
