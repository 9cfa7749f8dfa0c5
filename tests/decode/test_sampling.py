"""The samplers: what is drawn, how often, and from which seed."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from blocktx.decode.sampler import log_probability, sample
from blocktx.decode.sampling import Sampling, SamplingConfig

CHOOSE = jax.jit(sample, static_argnums=3)
LOGITS = np.array([0.1, 2.0, -1.0, 1.5, 0.9, 1.8, -0.3])
# The seven tokens in three chunks of a vocabulary of 260; the others are never drawn.
PLACES = np.array([3, 100, 127, 128, 255, 256, 259])
DRAWS = 4_000


def reference(logits, temperature, top_k, top_p, min_p):
    """The probabilities that `sample` is to draw from, token by token."""
    weight = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weight)[: top_k or None]
    weight /= weight[order].sum()
    keep, mass = [], 0.0
    for token in order:
        if mass >= top_p or weight[token] < min_p * weight.max():
            break
        keep.append(token)
        mass += weight[token]
    probability = np.zeros_like(weight)
    probability[keep] = weight[keep] / mass
    return probability


@pytest.fixture(scope="module", params=["chunked", "plain"])
def platform(request):
    return request.param


def draw(rows, platform, **options):
    """A token for each of `rows` rows of the same logits."""
    logits = np.full((rows, 260), -1e9, np.float32)
    logits[:, PLACES] = LOGITS
    position = options.pop("position", np.full(rows, 3))
    seed = options.pop("seed", 0)
    sampling = Sampling.create(SamplingConfig(**options), rows=rows, seed=seed)
    return np.asarray(CHOOSE(logits, sampling, position, platform))


@pytest.fixture(scope="module")
def drawn(platform):
    """4,000 draws at position 3 of as many rows."""
    logits = np.full((DRAWS, 260), -1e9, np.float32)
    logits[:, PLACES] = LOGITS

    def run(**options):
        sampling = Sampling.create(SamplingConfig(**options), rows=DRAWS)
        return np.asarray(CHOOSE(logits, sampling, np.full(DRAWS, 3), platform))

    return run


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (3, 1.0, 0.0),
        (0, 0.8, 0.0),
        (4, 0.7, 0.0),
        (0, 0.3, 0.0),
        (100, 1.0, 0.0),
        (0, 1.0, 0.3),
        (5, 0.9, 0.5),
        (0, 1.0, 1.0),
    ],
)
def test_sampled_frequencies(drawn, temperature, top_k, top_p, min_p):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = np.zeros(260)
    expected[PLACES] = reference(LOGITS, **options)
    observed = np.bincount(drawn(**options), minlength=260) / DRAWS
    assert (observed[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    np.testing.assert_array_less(np.abs(observed - expected), 5 * deviation + 1e-9)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}]
)
def test_limits_are_greedy(platform, options):
    assert (draw(50, platform, **options) == PLACES[LOGITS.argmax()]).all()
    assert (draw(50, platform, temperature=1e-6) == PLACES[LOGITS.argmax()]).all()


def predicates(branch):
    """Branches of the conditions that a host would read, without those inside of branches."""
    found = []
    for equation in branch.eqns:
        if equation.primitive.name == "cond":
            found.append(equation.params["branches"])
        else:
            for inner in jaxprs_in_params(equation.params):
                found += predicates(inner)
    return found


def test_conditions_that_a_host_reads(platform):
    """One for greedy rows, two for rows that are drawn from all tokens."""
    sampling = Sampling.create(rows=2)
    traced = jax.make_jaxpr(functools.partial(sample, formulation=platform))
    (branches,) = predicates(traced(np.zeros((2, 260)), sampling, np.zeros(2, int)).jaxpr)
    greedy, draw = (predicates(branch.jaxpr) for branch in branches)
    assert greedy == []
    ((unfiltered, filtered),) = draw
    assert predicates(unfiltered.jaxpr) == []
    assert len(predicates(filtered.jaxpr)) == 3


def test_greedy_is_the_first_of_equals(platform):
    logits = np.random.default_rng(0).integers(0, 9, (40, 260)).astype(np.float32)
    sampling = Sampling.create(SamplingConfig(temperature=0), rows=40)
    tokens = CHOOSE(logits, sampling, np.zeros(40, int), platform)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_draws_follow_from_seed_and_position_alone(platform):
    rows = draw(50, platform, seed=1)
    np.testing.assert_array_equal(draw(50, platform, seed=1), rows)
    assert (draw(50, platform, seed=2) != rows).any()
    assert (draw(50, platform, seed=1, position=np.full(50, 4)) != rows).any()
    # A row of a list of seeds draws as it would alone, and so does the first of a single seed.
    assert draw(1, platform, seed=1)[0] == rows[0]
    seeds = [*range(49), 10**30]
    alone = [draw(1, platform, seed=seed)[0] for seed in seeds]
    np.testing.assert_array_equal(draw(50, platform, seed=seeds), alone)
    assert (draw(50, platform, seed=[7] * 50) == draw(1, platform, seed=7)[0]).all()


def test_rows_with_different_parameters_draw_what_they_would_draw_alone(platform):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(36, 260)).astype(np.float32)
    configs = [
        SamplingConfig(temperature, top_k, top_p, min_p)
        for temperature in (0, 0.7, 2.0)
        for top_k in (0, 3)
        for top_p in (1.0, 0.8)
        for min_p in (0.0, 0.1, 0.3)
    ]
    seeds, position = list(range(36)), rng.integers(0, 9, 36)
    together = CHOOSE(logits, Sampling.create(configs, rows=36, seed=seeds), position, platform)
    for row in range(36):
        alone = Sampling.create(configs[row], rows=1, seed=[row])
        row_1 = slice(row, row + 1)
        assert CHOOSE(logits[row_1], alone, position[row_1], platform)[0] == together[row]


def test_numpy_and_jax_numbers_are_numbers():
    plain = SamplingConfig(0.5, 3, 0.25, 0.125)
    arrays = [np.float32(0.5), np.array(3), jax.numpy.float32(0.25), jax.numpy.array(0.125)]
    assert SamplingConfig(*arrays) == plain
    seeds = Sampling.create(rows=2, seed=[4, 5]).seed_Bx2
    for given in (np.array([4, 5]), jax.numpy.array([4, 5]), [np.int64(4), jax.numpy.array(5)]):
        np.testing.assert_array_equal(Sampling.create(rows=2, seed=given).seed_Bx2, seeds)
    with pytest.raises(ValueError, match="temperature: got True"):
        SamplingConfig(temperature=True)
    with pytest.raises(ValueError, match=r"sampling: got .* must be one .* or one per row \(3\)"):
        Sampling.create([plain] * 2, rows=3)


def test_log_probability():
    logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    tokens = np.array([0, 8, 3, 3, 1])
    expected = jax.nn.log_softmax(logits)[np.arange(5), tokens]
    np.testing.assert_allclose(log_probability(logits, tokens), expected, atol=1e-6)
