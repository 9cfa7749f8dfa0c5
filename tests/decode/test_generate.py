"""Stepwise decoding and the generate loop against the full, teacher-forced forward."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.decode.generate import generate, generate_blocks
from blocktx.model.build import build
from blocktx.model.params import stack_layers
from tests.helpers.random_weights import random_params

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

    def __init__(self, config, placement="pad"):
        self.placement = placement
        self.net, self.length = build(config), config.block_length
        self.params = random_params(self.net)
        self.lengths = range(1, 2 * self.length + (1 if self.length > 1 else 3))
        self.rows = len(self.lengths)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(1, 53, length).tolist() for length in self.lengths]
        self.prompt_blocks = np.array([-(-length // self.length) for length in self.lengths])
        self.blocks = max(self.prompt_blocks) + NEW_BLOCKS
        self.first = [  # the place of each row's first token
            -length % self.length if placement == "pad" or length < self.length else 0
            for length in self.lengths
        ]

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
            begin = self.first[b]
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
            logits = logits[:, :-1]
        else:
            logits = apply(self.net, "__call__", self.params, tokens, mask)
        logits = np.asarray(logits).reshape(self.rows, -1, logits.shape[-1])
        # They are of the tokens from the second block on.
        drawn = np.add(self.first, self.lengths)[:, None] + np.arange(NEW_BLOCKS * self.length)
        return np.take_along_axis(logits, (drawn - self.length)[..., None], axis=1)

    @functools.cached_property
    def greedy(self):
        """The greedy continuation, by a full forward for each token."""
        new = NEW_BLOCKS * self.length
        chosen = np.full((self.rows, new), 7)
        for i in range(new):
            chosen[:, i] = self.teacher_forced(chosen)[:, i].argmax(-1)
        return chosen

    def generate(self, **options):
        return generate(self.net, self.params, *self.left_padded(), **self.options(**options))

    def options(self, **options):
        new = NEW_BLOCKS * self.length
        standard = dict(max_new_tokens=new, temperature=0, pad_id=PAD, placement=self.placement)
        return standard | options


CASES = [(name, "pad") for name in CONFIGS] + [(2, "force"), (4, "force")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    name, placement = request.param
    return Case(CONFIGS[name], placement)


@pytest.mark.parametrize("name", CONFIGS)
def test_stepwise_equals_teacher_forcing(name):
    case = Case(CONFIGS[name])
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


def test_budgets_are_of_each_row(case):
    budget = 1 + np.arange(case.rows) % case.greedy.shape[1]
    greedy = case.greedy[:, : budget.max()]
    expected = np.where(np.arange(budget.max()) < budget[:, None], greedy, PAD)
    np.testing.assert_array_equal(case.generate(max_new_tokens=budget), expected)


def test_rows_end_at_a_stop_token(case):
    # Tokens that cut off something in one row or more, but not in all.
    for token in np.unique(case.greedy):
        stop = [int(token), 52]
        hit = np.isin(case.greedy, stop)
        before = np.cumsum(hit, axis=1) - hit
        expected = np.where(before > 0, PAD, case.greedy)
        changed = (expected != case.greedy).any(1)
        if changed.any() and not changed.all():
            break
    else:
        pytest.fail("no such token: choose other weights")
    np.testing.assert_array_equal(case.generate(stop=stop), expected)


def test_blocks_come_one_by_one_as_they_come_together(case):
    budget = case.greedy.shape[1] - 1
    stop = [int(case.greedy[0, budget // 2])]
    options = case.options(max_new_tokens=budget, stop=stop, return_logprobs=True)
    tokens, logprobs = generate(case.net, case.params, *case.left_padded(), **options)
    results = list(generate_blocks(case.net, case.params, *case.left_padded(), **options, every=1))
    known = np.zeros(case.rows, int)
    for result in results:
        drawn = np.arange(budget) < result.count_B[:, None]
        np.testing.assert_array_equal(result.tokens_BxM, np.where(drawn, tokens, PAD))
        np.testing.assert_array_equal(result.logprobs_BxM, np.where(drawn, logprobs, 0))
        whole = (np.add(case.first, case.lengths) + result.count_B) % case.length == 0
        assert (whole | result.finished_B).all()
        assert ((result.count_B > known) | result.finished_B).all()
        known = result.count_B
        last = tokens[np.arange(case.rows), result.count_B - 1]
        np.testing.assert_array_equal(result.ended_B, last == stop[0])
    assert results[-1].finished_B.all()
    assert not any(result.finished_B.all() for result in results[:-1])
    np.testing.assert_array_equal(known == budget, ~np.isin(tokens[:, :-1], stop).any(1))


def test_logprobs_are_the_models(case):
    tokens, logprobs = case.generate(return_logprobs=True)
    np.testing.assert_array_equal(tokens, case.greedy)
    expected = jax.nn.log_softmax(case.teacher_forced(tokens))
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4, rtol=0)
    # Temperature and truncation change what is drawn, not what the model thinks of it.
    tokens, logprobs = case.generate(return_logprobs=True, temperature=3.0, top_k=20)
    expected = jax.nn.log_softmax(case.teacher_forced(tokens))
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4, rtol=0)


def test_stacked_layers_generate_the_same(case):
    net = build(dataclasses.replace(case.net.config, scan_layers=True))
    got = generate(net, stack_layers(case.params), *case.left_padded(), **case.options())
    np.testing.assert_array_equal(got, case.greedy)
