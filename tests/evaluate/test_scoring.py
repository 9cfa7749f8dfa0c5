"""Scores of pairs in batches against each row alone in a full forward."""

import numpy as np
import pytest

from blocktx.evaluate.scoring import _scores, longest_row, score
from tests.helpers.scored_models import BLOCK, VANILLA, log_probabilities, random_model

CASES = {"pad": (BLOCK, "pad"), "force": (BLOCK, "force"), "vanilla": (VANILLA, "pad")}
PAD = 1


def random_pairs(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(2, 300, n).tolist() for n in pair) for pair in sizes]


SIZES = [(1, 1), (1, 9), (2, 3), (3, 1), (4, 4), (5, 2), (50, 7), (70, 30), (1, 124), (150, 20)]
PAIRS = random_pairs(SIZES)


def run(case, pairs, batch_size=3):
    config, placement = CASES[case]
    options = dict(placement=placement, pad_id=PAD, batch_size=batch_size)
    return score(*random_model(config), pairs, **options)


def padding(case, context):
    """Tokens of it in front, by the paper."""
    return {"pad": 3, "force": max(0, 4 - len(context)), "vanilla": 0}[case]


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_row_alone(case):
    config, placement = CASES[case]
    most = {"pad": 125, "force": 128, "vanilla": 129}[case]
    assert longest_row(config, placement) == most
    scores = run(case, PAIRS)
    assert len(scores) == len(PAIRS)
    for (context, continuation), found in zip(PAIRS, scores, strict=True):
        row = [*context, *continuation][-most:]
        known = log_probabilities(*random_model(config), row, padding(case, context))
        known = known[-len(continuation) :]
        wanted = np.take_along_axis(known, np.array(continuation)[:, None], axis=1)[:, 0]
        assert np.isfinite(wanted).all()  # every token of it is predicted
        np.testing.assert_allclose(found.logprobs_J, wanted, atol=1e-4)
        np.testing.assert_array_equal(found.likeliest_J, known.argmax(1) == continuation)


@pytest.mark.parametrize("case", ["pad", "vanilla"])
def test_neither_batch_size_nor_order_nor_company_changes_a_score(case):
    scores = run(case, PAIRS)
    for found, again in zip(scores, run(case, PAIRS[::-1], batch_size=8)[::-1], strict=True):
        np.testing.assert_allclose(found.logprobs_J, again.logprobs_J, atol=1e-5)
    (alone,) = run(case, PAIRS[6:7])
    np.testing.assert_allclose(scores[6].logprobs_J, alone.logprobs_J, atol=1e-5)


def test_a_program_for_each_length_whatever_the_pairs():
    run("pad", PAIRS)
    before = _scores._cache_size()
    run("pad", random_pairs([(n, 3) for n in range(1, 140, 9)], seed=1))
    assert _scores._cache_size() == before


def test_greedy_continuation_is_the_likeliest():
    model, params = random_model(BLOCK)
    row = PAIRS[4][0]
    for _ in range(5):
        padded = [*row, 0]
        row = [*row, int(log_probabilities(model, params, padded, 3)[-1].argmax())]
    (found,) = run("pad", [(row[:4], row[4:])])
    assert found.likeliest_J.all()


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([5], [6]), ([5], [])], {}, "pair 1: the continuation has no token"),
        ([([], [6])], {}, "pair 0: the context has no token"),
        ([([5], [6] * 125)], {}, "pair 0: the continuation of 125 tokens .* 124 can be predicted"),
        ([([5] * 9, [6] * 125)], {"placement": "force"}, "of which 124 can be predicted"),
        ([([5], [6])], {"placement": "left"}, "placement: got 'left'"),
        ([([5], [6])], {"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_bad_input(pairs, options, message):
    settings = dict(placement="pad", pad_id=PAD, batch_size=2) | options
    with pytest.raises(ValueError, match=message):
        score(*random_model(BLOCK), pairs, **settings)
