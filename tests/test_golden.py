"""Numbers of the authors' own code: forward pass, loss and greedy generation."""

import dataclasses
import functools

import golden
import jax
import numpy as np
import optax
import pytest

from blocktx import loss, model, sampling
from blocktx.stack import stack_layers

TOLERANCE = golden.TOLERANCE
BLOCK_CASES = ["lookup_prefix1", "lookup_prefix1_b1", "lookup_prefix2", "lookup_prefix2_b8"]
VANILLA_CASES = ["vanilla", "vanilla_wide_ffn"]

position_sums = jax.jit(loss.position_sums, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def everything(net, params, tokens, mask):
    """Embedder output, contexts, logits, and sums of the loss, in one program."""

    def apply(method, *args):
        return net.apply({"params": params}, *args, method=method)

    return (
        apply("embed_blocks", tokens),
        apply("contexts", tokens, mask),
        apply("__call__", tokens, mask),
        loss.position_sums(net, params, tokens, mask),
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(net, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask)


@pytest.fixture(params=BLOCK_CASES)
def block_case(request):
    weights, config, expected = golden.read(request.param)
    config, params = golden.block_model(weights, config)
    return model.build(config), params, expected


@pytest.fixture(params=VANILLA_CASES)
def vanilla_case(request):
    weights, config, expected = golden.read(request.param)
    config, params = golden.vanilla_model(weights, config)
    return model.build(config), params, expected


@pytest.mark.parametrize("prefix", ["", "pad_", "lpad_"])
def test_block_forward(block_case, prefix):
    net, params, expected = block_case
    tokens, mask = expected[f"{prefix}input_ids"], expected[f"{prefix}attention_mask"]
    real = expected[f"{prefix}block_attention_mask"].astype(bool)

    embeddings, contexts, logits, (nats_K, count_K) = everything(net, params, tokens, mask)
    valid = expected[f"{prefix}logits_valid"]
    for ours, theirs in [
        (embeddings[real], expected[f"{prefix}embedder_output"][real]),
        (contexts[real], expected[f"{prefix}context"][real]),
        (logits[valid], expected[f"{prefix}logits"][valid]),
    ]:
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    name = "lpad_loss_valid_only" if prefix == "lpad_" else f"{prefix}loss"
    np.testing.assert_allclose(nats_K.sum() / count_K.sum(), expected[name], atol=TOLERANCE)
    if prefix != "lpad_":  # there the authors' means include targets that they call invalid
        np.testing.assert_allclose(
            nats_K / count_K, expected[f"{prefix}loss_by_position"], atol=TOLERANCE
        )


@pytest.mark.parametrize("case", ["genA", "genB", "genC", "genD"])
def test_block_greedy(block_case, case):
    net, params, expected = block_case
    prompt, mask = expected[f"{case}_input_ids"], expected[f"{case}_attention_mask"]
    full = expected[f"{case}_generated_consistent_full"]
    assert (full[:, : prompt.shape[1]] == prompt).all()
    generated = sampling.generate(
        net,
        params,
        prompt,
        mask,
        max_new_tokens=full.shape[1] - prompt.shape[1],
        temperature=0,
        pad_id=0,
    )
    np.testing.assert_array_equal(generated, full[:, prompt.shape[1] :])


def test_vanilla_forward(vanilla_case):
    net, params, expected = vanilla_case
    for prefix in ("", "pad_"):
        tokens = expected[f"{prefix}input_ids"]
        mask = expected.get(f"{prefix}attention_mask", np.ones_like(tokens)).astype(bool)
        logits = forward(net, params, tokens, mask)
        np.testing.assert_allclose(
            logits[mask], expected[f"{prefix}logits"][mask], atol=TOLERANCE, rtol=0
        )
        # Not the authors' pad_loss: it scores the first token from a context of padding alone.
        scored = mask[:, 1:] & mask[:, :-1]
        nats, count = position_sums(net, params, tokens[..., None], mask[..., None])
        expected_nats = optax.softmax_cross_entropy_with_integer_labels(
            expected[f"{prefix}logits"][:, :-1], tokens[:, 1:]
        )
        assert count == scored.sum()
        np.testing.assert_allclose(nats / count, expected_nats[scored].mean(), atol=TOLERANCE)
        if not prefix:
            np.testing.assert_allclose(nats / count, expected["loss"], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["genA", "genD"])
def test_vanilla_greedy(vanilla_case, case):
    net, params, expected = vanilla_case
    prompt = expected[f"{case}_input_ids"]
    mask = expected.get(f"{case}_attention_mask", np.ones_like(prompt))
    new = expected[f"{case}_max_length"] - prompt.shape[1]
    generated = sampling.generate(net, params, prompt, mask, max_new_tokens=int(new), temperature=0)
    np.testing.assert_array_equal(generated, expected[f"{case}_generated"][:, prompt.shape[1] :])


def test_stacked_layers_give_the_same_numbers(block_case):
    net, params, expected = block_case
    stacked = model.build(dataclasses.replace(net.config, scan_layers=True))
    params = stack_layers(params)
    logits = forward(stacked, params, expected["input_ids"], expected["attention_mask"])
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE, rtol=0)
