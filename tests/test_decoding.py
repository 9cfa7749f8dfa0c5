"""Stepwise decoding and the generate loop against the full, teacher-forced forward."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from random_weights import random_params

from blocktx.model import build
from blocktx.model_config import BlockConfig, StackConfig, VanillaConfig
from blocktx.sampling import generate
from blocktx.stack import stack_layers

PAD = 0
# Contexts that hold a prompt of the smallest bucket and as many new tokens.
SHARED = dict(vocab_size=53, context_length=128, scan_layers=False)
CONFIGS = {
    length: BlockConfig(
        **SHARED,
        block_length=length,
        block_decoder=StackConfig(block_layers, width=32, heads=2),
        token_decoder=StackConfig(token_layers, width=16, heads=2),
    )
    for length, block_layers, token_layers in [(1, 1, 1), (2, 1, 2), (4, 2, 1)]
}
CONFIGS["vanilla"] = VanillaConfig(**SHARED, decoder=StackConfig(layers=2, width=32, heads=2))
NEW_BLOCKS = 3


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(net, method, params, *args):
    return net.apply({"params": params}, *args, method=method)


class Case:
    """A model, and prompts of every length up to two blocks in one ragged batch."""

    def __init__(self, config):
        self.net, self.length = build(config), config.block_length
        self.params = random_params(self.net)
        self.lengths = range(1, 2 * self.length + (1 if self.length > 1 else 3))
        self.rows = len(self.lengths)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(1, 53, length).tolist() for length in self.lengths]
        self.prompt_blocks = np.array([-(-length // self.length) for length in self.lengths])
        self.blocks = max(self.prompt_blocks) + NEW_BLOCKS

    def left_padded(self):
        """The prompts as `generate` takes them."""
        width = max(self.lengths)
        tokens = np.array([[PAD] * (width - len(row)) + row for row in self.prompts])
        return tokens, np.arange(width)[::-1] < np.array(self.lengths)[:, None]

    def begun_at_zero(self, continuation):
        """Prompts and what follows as blocks `[rows, blocks, K]`, each row's first in slot 0."""
        tokens = np.full((self.rows, self.blocks * self.length), PAD)
        mask = np.zeros_like(tokens)
        for b, (prompt, after) in enumerate(zip(self.prompts, continuation, strict=True)):
            begin = -len(prompt) % self.length
            text = [*prompt, *after]
            tokens[b, begin : begin + len(text)] = text
            mask[b, begin : begin + len(text)] = 1
        shape = (self.rows, self.blocks, self.length)
        return tokens.reshape(shape), mask.reshape(shape)

    def teacher_forced(self, continuation):
        """Logits `[rows, new, V]` of the new tokens by the full forward."""
        tokens, mask = self.begun_at_zero(continuation)
        if self.net.config.kind == "vanilla":
            logits = apply(self.net, "__call__", self.params, tokens[..., 0], mask[..., 0])
            logits = logits[:, :-1, None]
        else:
            logits = apply(self.net, "__call__", self.params, tokens, mask)
        first = self.prompt_blocks[:, None] - 1 + np.arange(NEW_BLOCKS)
        logits = np.take_along_axis(np.asarray(logits), first[..., None, None], axis=1)
        return logits.reshape(self.rows, -1, logits.shape[-1])

    @functools.cached_property
    def greedy(self):
        """The greedy continuation, by a full forward for each token."""
        new = NEW_BLOCKS * self.length
        chosen = np.full((self.rows, new), 7)
        for i in range(new):
            chosen[:, i] = self.teacher_forced(chosen)[:, i].argmax(-1)
        return chosen

    def generate(self, **options):
        options = dict(max_new_tokens=NEW_BLOCKS * self.length, temperature=0, pad_id=PAD) | options
        return np.asarray(generate(self.net, self.params, *self.left_padded(), **options))


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def case(request):
    return Case(CONFIGS[request.param])


def test_stepwise_equals_teacher_forcing(case):
    run = functools.partial(apply, case.net)
    rng, rows, params = np.random.default_rng(1), case.rows, case.params
    new = rng.integers(0, 53, (rows, NEW_BLOCKS, case.length))
    prompts, mask = case.begun_at_zero([[]] * rows)
    real = np.ones((rows, 1, case.length), bool)
    cache = case.net.create_cache(rows, case.blocks)
    count = max(case.prompt_blocks)
    start = np.zeros(rows, int)
    first = (params, prompts[:, :count], mask[:, :count], start, cache, 0, None)
    contexts, cache = run("extend", *first)
    context = np.take_along_axis(
        np.asarray(contexts), case.prompt_blocks[:, None, None] - 1, axis=1
    )[:, 0]
    stepwise = []
    for n in range(NEW_BLOCKS):
        logits, token_cache = run("start_block", params, context, case.net.create_token_cache(rows))
        stepwise.append(logits)
        for k in range(case.length - 1):
            logits, token_cache = run("step_token", params, new[:, n, k], k, token_cache)
            stepwise.append(logits)
        at = case.prompt_blocks + n
        # All rows write to one slot; what a shorter prompt leaves free before it stays hidden.
        slot = np.arange(case.blocks)
        seen = (slot < case.prompt_blocks[:, None]) | ((slot >= count) & (slot < count + n))
        next_ = (params, new[:, n : n + 1], real, at, cache, np.int32(count + n), seen)
        contexts, cache = run("extend", *next_)
        context = contexts[:, 0]
    expected = case.teacher_forced(new.reshape(rows, -1))
    assert expected.std() > 1
    np.testing.assert_allclose(np.stack(stepwise, axis=1), expected, atol=1e-5, rtol=0)


def test_greedy_equals_a_full_forward_for_every_token(case):
    np.testing.assert_array_equal(case.generate(), case.greedy)
    part = case.greedy.shape[1] - 1
    np.testing.assert_array_equal(case.generate(max_new_tokens=part), case.greedy[:, :part])


def test_rows_end_at_the_end_token(case):
    # A token that cuts off something in one row or more, but not in all.
    for end_id in np.unique(case.greedy):
        before = np.cumsum(case.greedy == end_id, axis=1) - (case.greedy == end_id)
        expected = np.where(before > 0, PAD, case.greedy)
        changed = (expected != case.greedy).any(1)
        if changed.any() and not changed.all():
            break
    else:
        pytest.fail("no such token: choose other weights")
    np.testing.assert_array_equal(case.generate(end_id=int(end_id)), expected)


def test_stacked_layers_generate_the_same(case):
    net = build(dataclasses.replace(case.net.config, scan_layers=True))
    got = generate(
        net,
        stack_layers(case.params),
        *case.left_padded(),
        max_new_tokens=case.greedy.shape[1],
        temperature=0,
    )
    np.testing.assert_array_equal(got, case.greedy)
