"""Numbers of the authors' own code, from their weights: forward pass, loss, greedy generation."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blocktx.convert import load_neox, load_official
from blocktx.decode.generate import generate
from blocktx.model.loss import loss_by_position
from blocktx.model.params import for_decoding
from tests.helpers import golden

ROWS = 3  # of every batch, so that a case compiles each function once


def apply(net, method, params, tokens, mask):
    rows = ((0, ROWS - len(tokens)), *((0, 0),) * (tokens.ndim - 1))
    padded = _apply(net, method, params, np.pad(tokens, rows), np.pad(mask, rows))
    return jax.tree.map(lambda array: array[: len(tokens)], padded)


def stages(net, tokens, mask):
    """Block embeddings, context embeddings and logits, by one program."""
    return net.embed_blocks(tokens, mask), net.contexts(tokens, mask), net(tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(net, method, params, tokens, mask):
    return net.apply({"params": params}, tokens, mask, method=method)


def sums_of(net, logits, tokens, mask):
    """`loss_by_position` of logits that are there already, to be spared another compilation."""
    known = types.SimpleNamespace(config=net.config, apply=lambda *args: jnp.asarray(logits))
    return loss_by_position(known, {}, jnp.asarray(tokens), jnp.asarray(mask))


def greedy(net, params, prompt, mask, length, **kwargs):
    """What follows greedily, up to `length`."""
    again = [0] * (ROWS - len(prompt))
    prompt, mask = np.concatenate([prompt, prompt[again]]), np.concatenate([mask, mask[again]])
    new = length - prompt.shape[1]
    generated = generate(net, params, prompt, mask, max_new_tokens=new, temperature=0, **kwargs)
    return np.asarray(generated)[: ROWS - len(again)]


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=golden.TOLERANCE, rtol=0)


@pytest.fixture(params=golden.BLOCK, scope="module")
def block_case(request):
    return *load_official(golden.path(request.param)), golden.expected(request.param)


@pytest.fixture(params=golden.VANILLA, scope="module")
def vanilla_case(request):
    return *load_neox(golden.path(request.param)), golden.expected(request.param)


def test_block_forward(block_case):
    net, params, expected = block_case
    for prefix in ("", "pad_", "lpad_"):
        tokens, mask = expected[f"{prefix}input_ids"], expected[f"{prefix}attention_mask"]
        real = expected[f"{prefix}block_attention_mask"].astype(bool)
        valid = expected[f"{prefix}logits_valid"]
        embeddings, contexts, logits = apply(net, stages, params, tokens, mask)
        assert_close(embeddings[real, 0], expected[f"{prefix}embedder_output"][real])
        assert_close(contexts[real], expected[f"{prefix}context"][real])
        assert_close(logits[valid], expected[f"{prefix}logits"][valid])
        nats_K, count_K = sums_of(net, logits, tokens, mask)
        name = "lpad_loss_valid_only" if prefix == "lpad_" else f"{prefix}loss"
        assert_close(nats_K.sum() / count_K.sum(), expected[name])
        if prefix != "lpad_":  # there the authors' means include targets that they call invalid
            assert_close(nats_K / count_K, expected[f"{prefix}loss_by_position"])


def test_block_greedy(block_case):
    net, params, expected = block_case
    net, params = for_decoding(net, params)
    for case in ("genA", "genB", "genC", "genD"):
        prompt, mask = expected[f"{case}_input_ids"], expected[f"{case}_attention_mask"]
        full = expected[f"{case}_generated_consistent_full"]
        assert (full[:, : prompt.shape[1]] == prompt).all()
        generated = greedy(net, params, prompt, mask, full.shape[1])
        np.testing.assert_array_equal(generated, full[:, prompt.shape[1] :], err_msg=case)


def test_block_greedy_to_the_end_of_sequence(block_case):
    net, params, expected = block_case
    net, params = for_decoding(net, params)
    prompt, end = expected["genA_input_ids"], int(expected["genEOS_eos_token_id"])
    theirs = expected["genEOS_generated_consistent"]
    assert (theirs[:, : prompt.shape[1]] == prompt).all()
    mask = np.ones_like(prompt)
    generated = greedy(net, params, prompt, mask, theirs.shape[1], stop=[end])
    for ours_T, theirs_T in zip(generated, theirs[:, prompt.shape[1] :], strict=True):
        if end in theirs_T.tolist():
            length = theirs_T.tolist().index(end) + 1
            assert (ours_T[length:] == net.config.pad_id).all()
        else:
            length = theirs_T.size
        np.testing.assert_array_equal(ours_T[:length], theirs_T[:length])


@pytest.mark.parametrize("case", golden.UPTRAINED)
def test_uptrained(case):
    net, params = load_official(golden.path(case))
    expected = golden.expected(case)
    for prefix in ("", "pad_"):
        tokens, mask = expected[f"{prefix}input_ids"], expected[f"{prefix}attention_mask"]
        logits = apply(net, "__call__", params, tokens, mask)
        valid = expected.get(f"{prefix}logits_valid", np.ones(logits.shape[:-1], bool))
        assert_close(logits[valid], expected[f"{prefix}logits"][valid])
        nats_K, count_K = sums_of(net, logits, tokens, mask)
        assert_close(nats_K.sum() / count_K.sum(), expected[f"{prefix}loss"])
        if not prefix:
            assert_close(nats_K / count_K, expected["loss_by_position"])
    # Greedy text is what the forward pass finds likeliest; that spares compiling `generate`.
    prompt, full = expected["genA_input_ids"], expected["genA_generated_consistent"]
    tokens = np.pad(full, ((0, 0), (0, tokens[0].size - full.shape[1])))
    mask = np.broadcast_to(np.arange(tokens.shape[1]) < full.shape[1], tokens.shape)
    blocks = (len(tokens), -1, net.config.block_length)
    logits = apply(net, "__call__", params, tokens.reshape(blocks), mask.reshape(blocks))
    likeliest = logits.argmax(-1).reshape(len(tokens), -1)  # from the second block on
    first = prompt.shape[1] - net.config.block_length
    found = likeliest[:, first : full.shape[1] - net.config.block_length]
    np.testing.assert_array_equal(found, full[:, prompt.shape[1] :])


def test_vanilla_forward(vanilla_case):
    net, params, expected = vanilla_case
    for prefix in ("", "pad_"):
        tokens = expected[f"{prefix}input_ids"]
        mask = expected.get(f"{prefix}attention_mask", np.ones_like(tokens)).astype(bool)
        logits = apply(net, "__call__", params, tokens, mask)
        assert_close(logits[mask], expected[f"{prefix}logits"][mask])
        # Not the authors' pad_loss: it scores the first token from a context of padding alone.
        scored = mask[:, 1:] & mask[:, :-1]
        nats, count = sums_of(net, logits, tokens[..., None], mask[..., None])
        expected_nats = optax.softmax_cross_entropy_with_integer_labels(
            expected[f"{prefix}logits"][:, :-1], tokens[:, 1:]
        )
        assert count == scored.sum()
        assert_close(nats / count, expected_nats[scored].mean())
        if not prefix:
            assert_close(nats / count, expected["loss"])


def test_vanilla_greedy(vanilla_case):
    net, params, expected = vanilla_case
    for case in ("genA", "genD"):
        prompt = expected[f"{case}_input_ids"]
        mask = expected.get(f"{case}_attention_mask", np.ones_like(prompt))
        full = expected[f"{case}_generated"]
        generated = greedy(net, params, prompt, mask, full.shape[1])
        np.testing.assert_array_equal(generated, full[:, prompt.shape[1] :], err_msg=case)
