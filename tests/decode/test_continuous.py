"""Continuous decoding: every request is decoded as it would be alone."""

import collections
import functools

import jax
import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.generate import generate
from blocktx.decode.sampling import SamplingConfig, seed_words
from blocktx.model.build import build
from tests.helpers import eight_devices
from tests.helpers.compile_events import compilations
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=32, heads=2)
SHARED = dict(vocab_size=53, context_length=128, scan_layers=False)
VANILLA = VanillaConfig(**SHARED, decoder=STACK)


def block(length):
    return BlockConfig(**SHARED, block_length=length, block_decoder=STACK, token_decoder=STACK)


CASES = {
    "block 1": (block(1), "pad"),
    "block 4, pad": (block(4), "pad"),
    "block 4, force": (block(4), "force"),
    "block 8, force": (block(8), "force"),
    "vanilla": (VANILLA, "pad"),
}
REQUESTS = 24


def options(number):
    """A request that is random in everything."""
    rng = np.random.default_rng(number)
    # Of both buckets of prompts, but not of more: each is a program of the reference.
    return dict(
        tokens=rng.integers(0, 53, rng.integers(1, 60)).tolist(),
        max_new_tokens=int(rng.integers(1, 40)),
        sampling=SamplingConfig(
            temperature=[0, 0.7, 1.5][number % 3],
            top_k=[0, 5][number % 2],
            top_p=[1.0, 0.9, 1.0, 0.5][number % 4],
            min_p=[0, 0.05][number % 5 == 0],
        ),
        stop=rng.integers(0, 53, 6).tolist() if number % 4 == 0 else [],
    )


class Case:
    def __init__(self, config, placement):
        self.net, self.placement = build(config), placement
        self.params = random_params(self.net)
        self.decoder = self.new_decoder(rows=4)
        self.decoder.compile()

    def new_decoder(self, **settings):
        settings = dict(placement=self.placement, blocks_per_call=3, top_logprobs=3) | settings
        return ContinuousDecoder(self.net, self.params, **settings)

    def run(self, numbers, score=1):
        """Tokens, log-probabilities, likeliest tokens and end of each request."""
        requests = {
            self.decoder.request(
                **options(number), seed_2=seed_words([number], 1)[0], score=score
            ): number
            for number in numbers
        }
        found = {number: ([], [], []) for number in numbers}
        ends = {}
        for updates in self.decoder.run(requests):
            assert len({update.request for update in updates}) == len(updates)
            for request, tokens, logprobs, top, reason in updates:
                number = requests[request]
                assert number not in ends
                for known, new in zip(found[number], (tokens, logprobs, top), strict=True):
                    known += new
                if reason:
                    ends[number] = reason
        assert self.decoder.running == self.decoder.slots_used == 0
        return {number: (*found[number], ends[number]) for number in numbers}

    @functools.cached_property
    def together(self):
        with compilations() as compiled:
            found = self.run(range(REQUESTS))
        assert not compiled
        return found


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    return Case(*request.param)


def test_requests_are_those_of_generate(case):
    reasons = collections.Counter()
    for number, (tokens, logprobs, _, reason) in case.together.items():
        given = options(number)
        prompt = np.array([given.pop("tokens")])
        expected, expected_logprobs = generate(
            case.net,
            case.params,
            prompt,
            np.ones_like(prompt),
            seed=[number],
            placement=case.placement,
            return_logprobs=True,
            **given,
        )
        count = len(tokens)
        assert tokens == expected[0, :count].tolist()
        assert not expected[0, count:].any()
        np.testing.assert_allclose(logprobs, expected_logprobs[0, :count], atol=1e-5)
        stopped = tokens[-1] in given["stop"]
        assert reason == ("stop" if stopped else "length")
        assert stopped or count == given["max_new_tokens"]
        reasons[reason] += 1
    assert len(reasons) == 2


def test_nothing_but_the_request_changes_its_bits(case):
    """Neither rows, nor neighbours, nor the time of arrival, nor what others ask for."""
    order = np.random.default_rng(0).permutation(REQUESTS).tolist()
    assert case.run(order) == {number: case.together[number] for number in order}
    for number in (3, 14):
        assert case.run([number]) == {number: case.together[number]}
    for number, (tokens, logprobs, top, reason) in case.run(order[:9], score=2).items():
        assert (tokens, logprobs, [], reason) == case.together[number]
        for token, logprob, likely in zip(tokens, logprobs, top, strict=True):
            values = [value for _, value in likely]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert logprob <= values[0]
            if logprob in values:  # the same number, not nearly
                assert token in [id_ for id_, value in likely if value == logprob]
    for tokens, logprobs, *_ in case.run(order[:3], score=0).values():
        assert tokens
        assert logprobs == []


@pytest.fixture(scope="module")
def one():
    return Case(*CASES["block 4, pad"])


def waiting(decoder, numbers, **changes):
    return collections.deque(
        decoder.request(**options(n) | changes, seed_2=seed_words([n], 1)[0]) for n in numbers
    )


def test_cancelled_requests_free_their_rows(one):
    decoder = one.decoder
    queue = waiting(decoder, range(6), max_new_tokens=39, stop=[])
    requests = list(queue)
    decoder.admit(queue)
    assert (decoder.running, len(queue)) == (4, 2)
    decoder.start(True)
    decoder.cancel(requests[1])
    updates = decoder.finish()
    assert {update.request for update in updates} == {requests[0], requests[2], requests[3]}
    decoder.admit(queue)  # into the free row at once
    assert (decoder.running, len(queue)) == (4, 1)
    for request in requests:
        decoder.cancel(request)
        decoder.cancel(request)
    assert decoder.running == decoder.slots_used == 0
    assert one.run([7]) == {7: one.together[7]}  # and nothing of them is left in the rows


@pytest.mark.parametrize(("length", "at_once"), [(110, 1), (70, 1), (7, 2)])  # 32, 24, 16 blocks
def test_running_rows_wait_for_one_prefill_of_a_burst(one, length, at_once):
    decoder = one.decoder
    queue = waiting(decoder, [0], tokens=[1] * 9, max_new_tokens=8)
    decoder.admit(queue)
    burst = waiting(decoder, range(6), tokens=[1] * length, max_new_tokens=8)
    for running in range(1 + at_once, 4, at_once):
        decoder.admit(burst)
        assert decoder.running == running
    decoder.admit(burst)
    assert (decoder.running, len(burst)) == (4, 3)
    # Rows that were freed are filled together, whatever the length of their prompts.
    for request in decoder.requests[:3]:
        decoder.cancel(request)
    decoder.admit(burst)
    assert (decoder.running, len(burst)) == (4, 0)
    for request in decoder.requests:
        decoder.cancel(request)
    # Nobody waits for these.
    burst = waiting(decoder, range(6), tokens=[1] * length, max_new_tokens=8)
    decoder.admit(burst)
    assert (decoder.running, len(burst)) == (4, 2)
    for request in decoder.requests:
        decoder.cancel(request)


def test_calls_end_when_a_row_is_free_for_who_waits(one):
    decoder = one.decoder
    queue = waiting(decoder, range(2), tokens=[1] * 8, max_new_tokens=28, stop=[])
    queue += waiting(decoder, [2, 3], tokens=[1] * 8, max_new_tokens=8, stop=[])
    decoder.admit(queue)
    assert decoder.running == 4
    decoder.start(waiting=True)
    assert [len(update.tokens) for update in decoder.finish()] == [8, 8, 8, 8]
    decoder.start(waiting=True)  # two rows are free
    assert [len(update.tokens) for update in decoder.finish()] == [4, 4]
    decoder.start(waiting=False)
    assert [len(update.tokens) for update in decoder.finish()] == [12, 12]  # all blocks of a call
    for request in decoder.requests:
        decoder.cancel(request)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rows=0), "rows: got 0, must be between 1"),
        (dict(context=129), "context: got 129, must be between 1 and 128"),
        (dict(blocks_per_call=-1), "blocks_per_call: got -1"),
    ],
)
def test_bad_settings(one, settings, message):
    with pytest.raises(ValueError, match=message):
        one.new_decoder(**settings)


def test_bad_requests(one):
    seed_2 = seed_words(0, 1)[0]
    make = functools.partial(one.decoder.request, sampling=SamplingConfig(), seed_2=seed_2)
    with pytest.raises(ValueError, match=r"row 7 \(60 tokens\) and 80 new .* context of 128"):
        make([1] * 60, max_new_tokens=80, row=7)
    with pytest.raises(ValueError, match="has no token"):
        make([], max_new_tokens=8)
    with pytest.raises(ValueError, match=r"99 is not in 0\.\.52"):
        make([99], max_new_tokens=8)
    with pytest.raises(ValueError, match="stop: got -1"):
        make([1], max_new_tokens=8, stop=[-1])
    short = one.new_decoder(rows=1, context=64)
    with pytest.raises(ValueError, match="context of 64"):
        short.request([1] * 60, max_new_tokens=8, sampling=SamplingConfig(), seed_2=seed_2)


def test_the_cache_is_written_in_place(one):
    decoder = one.decoder
    state = decoder._state

    def addresses(state):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache)]

    before = addresses(state)
    one.run(range(5))
    assert addresses(decoder._state) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_rows_over_eight_devices_decode_what_one_device_does():
    found = eight_devices.run("continuous")
    for name, (alone, together) in found.items():
        assert together == alone, name
