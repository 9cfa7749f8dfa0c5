"""The samplers, and what the generate loop promises besides its tokens (see test_decoding.py)."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params

from blocktx import sampling
from blocktx.model import build
from blocktx.model_config import BlockConfig, StackConfig
from blocktx.sampling import Sampling, generate, sample

STACK = StackConfig(layers=1, width=32, heads=2)
NET = build(
    BlockConfig(
        vocab_size=53,
        context_length=128,
        scan_layers=False,
        block_decoder=STACK,
        token_decoder=STACK,
    )
)
PARAMS = random_params(NET)
PROMPTS = np.random.default_rng(0).integers(0, 53, (2, 9))
REAL = np.ones_like(PROMPTS)


def run(tokens=PROMPTS, mask=REAL, **options):
    options = dict(max_new_tokens=12) | options
    return np.asarray(generate(NET, PARAMS, tokens, mask, **options))


@contextlib.contextmanager
def events(name):
    """A list that has an entry for each time JAX reports `name`."""
    seen = []

    def listen(event, *_, **__):
        if event == f"/jax/core/compile/{name}":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_second_call_in_a_bucket_compiles_nothing():
    jax.clear_caches()
    with events("backend_compile_duration") as compiled:
        run()
        first = len(compiled)
        mask = REAL.copy()
        mask[0, :3] = 0
        run(PROMPTS[::-1, :6], mask[:, :6])
        run(max_new_tokens=30, temperature=0.7)
        run(max_new_tokens=11, top_k=5, top_p=0.9, seed=3, end_id=4, pad_id=1, temperature=0.0)
    assert first > 0
    assert len(compiled) == first


def test_seed_decides():
    tokens = run(seed=1)
    np.testing.assert_array_equal(run(seed=1), tokens)
    assert (run(seed=2) != tokens).mean() > 0.5
    assert (tokens[0] != tokens[1]).mean() > 0.5


def test_draws_do_not_depend_on_the_budget_or_on_other_rows():
    tokens = run(seed=1)
    np.testing.assert_array_equal(run(seed=1, max_new_tokens=5), tokens[:, :5])
    other = PROMPTS.copy()
    other[1] = 7
    np.testing.assert_array_equal(run(other, seed=1)[0], tokens[0])
    np.testing.assert_array_equal(run(PROMPTS[:1], REAL[:1], seed=1)[0], tokens[0])


def test_every_draw_is_a_new_one():
    rows = run(np.tile(PROMPTS[:1], (2, 1)), temperature=1e6)  # all 53 tokens alike
    assert all(len(set(row)) > 7 for row in rows.tolist())
    assert (rows[0] != rows[1]).mean() > 0.5


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_limits_are_greedy(options):
    np.testing.assert_array_equal(run(**options), run(temperature=0))


def reference(logits, temperature, top_k, top_p):
    """The probabilities that `sample` is to draw from, token by token."""
    weight = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weight)[: top_k or None]
    weight /= weight[order].sum()
    keep, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        keep.append(token)
        mass += weight[token]
    probability = np.zeros_like(weight)
    probability[keep] = weight[keep] / mass
    return probability


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.7), (0, 0.3), (100, 1.0)]
)
def test_sampled_frequencies(temperature, top_k, top_p):
    logits, draws = np.array([0.1, 2.0, -1.0, 1.5, 0.9, 1.8, -0.3]), 20_000
    expected = reference(logits, temperature, top_k, top_p)
    chosen = Sampling.create(temperature=temperature, top_k=top_k, top_p=top_p, seed=0, rows=draws)
    tokens = jax.jit(sample)(jnp.tile(jnp.float32(logits), (draws, 1)), chosen, jnp.int32(3))
    observed = np.bincount(tokens, minlength=len(logits)) / draws
    assert (observed[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    np.testing.assert_array_less(np.abs(observed - expected), 5 * deviation + 1e-9)


def addresses(cache):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]


@pytest.fixture
def caches(monkeypatch):
    """Of each call: the empty cache, its addresses in memory, and the cache that comes out."""
    seen, original = [], sampling._generate

    def spy(model, params, tokens, mask, cache, *args, **kwargs):
        before = addresses(cache)
        tokens, written = original(model, params, tokens, mask, cache, *args, **kwargs)
        seen.append((cache, before, written))
        return tokens, written

    monkeypatch.setattr(sampling, "_generate", spy)
    return seen


def test_loop_stops_when_all_rows_have_ended(caches):
    prompt = np.tile(np.random.default_rng(1).integers(0, 53, (1, 64)), (2, 1))  # a full bucket
    options = dict(mask=np.ones_like(prompt), max_new_tokens=64, temperature=0)
    tokens = run(prompt, **options)
    run(prompt, **options, end_id=int(tokens[0, 5]))
    full, ended = (np.flatnonzero(np.any(cache[0].k_SxD, (0, 2))) for *_, cache in caches)
    # The prompt's 16 blocks, the last of them once more, and each new block that another one was
    # decoded after.
    np.testing.assert_array_equal(full, np.arange(16 + 16))
    end_block = tokens[0].tolist().index(tokens[0, 5]) // 4
    np.testing.assert_array_equal(ended, np.arange(16 + 1 + end_block))


def test_cache_is_written_in_place(caches):
    run()
    ((empty, before, written),) = caches
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(empty))
    assert addresses(written) == before


HOLES = np.array([[1] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = np.array([[1] * 9, [1] * 8 + [0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: got 0, must be 1 or greater"),
        (dict(max_new_tokens=-3), "max_new_tokens: got -3"),
        (dict(max_new_tokens=2.5), "max_new_tokens: got 2.5"),
        (dict(top_k=2.5), "top_k: got 2.5"),
        (dict(top_k=3_000_000_000), "top_k: got 3000000000"),
        (dict(temperature="1"), "temperature: got '1'"),
        (dict(seed=10**30), "seed: got 1"),
        (
            dict(max_new_tokens=117),
            r"row 0 \(9 tokens\) and 117 new .* context of 128 .* at most 116 new",
        ),
        (dict(max_new_tokens=128), "ask for at most 116 new tokens"),
        (
            dict(tokens=np.ones((1, 128), int), mask=np.ones((1, 128))),
            "keep prompts to 116 tokens",
        ),
        (dict(tokens=PROMPTS * 1.0), "tokens: got float64, expected integers"),
        (dict(tokens=PROMPTS + 1000 * REAL), "tokens: 10.. is not in 0.."),
        (dict(tokens=-PROMPTS), "tokens: -.* is not in 0.."),
        (dict(mask=REAL * [[1], [0]]), "row 1 of the prompts has no token"),
        (dict(tokens=PROMPTS[:, :0], mask=REAL[:, :0]), "row 0 of the prompts has no token"),
        (dict(mask=HOLES), "row 1 of the mask has padding behind a token; left-pad"),
        (dict(mask=RIGHT_PADDED), "row 1 of the mask has padding behind a token; left-pad"),
        (dict(mask=REAL[:, 1:]), r"tokens \(2, 9\) and mask \(2, 8\) must both be"),
        (dict(tokens=PROMPTS[0], mask=REAL[0]), r"must both be \[batch, length\], with"),
        (dict(tokens=PROMPTS[:0], mask=REAL[:0]), "with a row or more"),
        (dict(temperature=-0.1), "temperature: got -0.1, must be 0"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(temperature=float("inf")), "temperature: got inf"),
        (dict(top_k=-1), "top_k: got -1, must be 0"),
        (dict(top_p=0.0), "top_p: got 0.0, must be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p: got 1.1"),
        (dict(top_p=float("nan")), "top_p: got nan"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_refused_before_anything_is_traced(options, message):
    with events("jaxpr_trace_duration") as traced, pytest.raises(ValueError, match=message):
        run(**options)
    assert not traced


def test_traces_are_counted():
    with events("jaxpr_trace_duration") as traced:
        jax.jit(lambda x: x + 1)(0)
    assert traced
