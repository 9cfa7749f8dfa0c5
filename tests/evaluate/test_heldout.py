"""The evaluation against sums by hand; one program for all batches of a shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.evaluate.heldout import Evaluation, _sums, evaluate
from blocktx.model.build import build, init_params
from blocktx.model.loss import loss_by_position
from tests.helpers.tiny_run import MODEL

MODULE = build(MODEL)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(MODULE, key))(jax.random.key(0))


def batches(count=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, MODEL.blocks, MODEL.block_length)
    for _ in range(count):
        yield {
            "tokens": rng.integers(0, MODEL.vocab_size, shape, dtype=np.int32),
            "mask": rng.random(shape) < 0.8,
        }


def test_values_against_sums_over_batches(params):
    compiled = jax.jit(loss_by_position, static_argnums=0)
    sums = [compiled(MODULE, params, b["tokens"], b["mask"]) for b in batches()]
    nats_K = sum(np.float64(nats) for nats, _ in sums)
    count_K = sum(np.float64(count) for _, count in sums)
    got = evaluate(MODULE, params, batches(), bytes_per_token=2.5)
    assert got.tokens == count_K.sum()
    np.testing.assert_allclose(got.loss, nats_K.sum() / count_K.sum(), rtol=1e-6)
    np.testing.assert_allclose(got.perplexity, math.exp(got.loss), rtol=1e-12)
    bits = nats_K.sum() / math.log(2) / (got.tokens * 2.5)
    np.testing.assert_allclose(got.bits_per_byte, bits, rtol=1e-6)
    np.testing.assert_allclose(got.loss_by_position, nats_K / count_K, rtol=1e-6)


def test_new_model_knows_nothing(params):
    got = evaluate(MODULE, params, batches(), bytes_per_token=1.0)
    assert abs(got.loss - math.log(MODEL.vocab_size)) < 0.1


def test_all_batches_and_parameters_share_one_program(params):
    evaluate(MODULE, params, batches(), 1.0)
    before = _sums._cache_size()
    evaluate(build(MODEL), jax.tree.map(jnp.zeros_like, params), batches(seed=1), 1.0)
    assert _sums._cache_size() == before


def test_no_scored_token(params):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(MODULE, params, [], 1.0)
    empty = [{**b, "mask": np.zeros_like(b["mask"])} for b in batches(1)]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(MODULE, params, empty, 1.0)


@pytest.mark.filterwarnings("error")
def test_position_that_is_never_scored_is_nan(params):
    (batch,) = batches(1)
    batch["mask"][:, :, 0] = False
    first, *others = evaluate(MODULE, params, [batch], 1.0).loss_by_position
    assert math.isnan(first)
    assert all(math.isfinite(loss) for loss in others)


def test_line():
    evaluation = Evaluation(4.32149, 75.3001, 1.78, (4.9, 4.25, 4.1, 4.0), 10)
    assert str(evaluation) == (
        "loss=4.3215 perplexity=75.30 bits/byte=1.7800 by position 4.900 4.250 4.100 4.000"
    )
    assert list(evaluation.scalars()) == [
        *("loss", "perplexity", "bits_per_byte"),
        *("loss_at_1", "loss_at_2", "loss_at_3", "loss_at_4"),
    ]
