"""Each formulation against the plain one on CPU: loss, gradient, and greedy tokens."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from blocktx.config.formulations import Formulations
from blocktx.config.model import BlockConfig, VanillaConfig
from blocktx.config.run import LossConfig
from blocktx.config.stack import StackConfig
from blocktx.decode.generate import generate
from blocktx.model.build import _log_fallback, build
from blocktx.train.loss import training_sums
from tests.helpers.random_weights import random_params

NEOX = StackConfig(1, width=128, heads=4)
LLAMA = StackConfig.llama(1, 128, 4, key_value_heads=2, mlp_width=96, biases="qkv")
SHARED = dict(vocab_size=37, context_length=132)
MODELS = {
    "neox": BlockConfig(**SHARED, block_length=1, block_decoder=NEOX, token_decoder=NEOX),
    "llama": BlockConfig(
        **SHARED, block_length=1, block_decoder=LLAMA, token_decoder=LLAMA, tied_classifier=True
    ),
    "vanilla": VanillaConfig(**SHARED, decoder=LLAMA, compute_dtype="bfloat16"),
}
PLAIN = dataclasses.replace(Formulations.plain(), pallas="interpreted", prefill_positions=100_000)
PLATFORMS = ("cpu", "gpu", "tpu")


def choices() -> list[tuple[str, str]]:
    """Every formulation that is not the plain one, by field."""
    found = []
    for field, hint in typing.get_type_hints(Formulations).items():
        if field in ("pallas", "cache_dtype", "cache_write", "prefill_positions", "loss_tokens"):
            continue
        plain = getattr(PLAIN, field)
        found += [(field, x) for x in typing.get_args(hint) if x not in ("auto", plain)]
    return [*found, ("prefill_positions", 64)]


TRAINING = {"scores", "norm", "loss"}  # fields that decoding does not read
DECODING = {
    "cached_attention",
    "token_cached_attention",
    "cached_rotary",
    "sampler",
    "prefill_positions",
}


def results(config, formulations, field=""):
    """Loss and gradient, greedy tokens and log-probabilities; None where `field` is not read."""
    model = build(dataclasses.replace(config, formulations=formulations))
    params = random_params(model, 0.1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, config.blocks, 1))
    mask = np.ones(tokens.shape, bool)
    mask[0, :3] = mask[1, -4:] = False

    def loss(params):
        return training_sums(model, params, tokens, mask, LossConfig())["loss"]

    prompts = tokens[:, :20, 0]
    options = dict(max_new_tokens=6, temperature=0, return_logprobs=True)
    trained = None if field in DECODING else jax.jit(jax.value_and_grad(loss))(params)
    if field in TRAINING:
        return trained, None
    return trained, generate(model, params, prompts, np.ones_like(prompts), **options)


@pytest.fixture(
    scope="module", params=[pytest.param("neox", marks=pytest.mark.slow), "llama", "vanilla"]
)
def case(request):
    config = MODELS[request.param]
    return config, results(config, PLAIN)


@pytest.mark.parametrize(("field", "value"), choices())
def test_formulation_equals_the_plain_one(case, field, value):
    config, (trained, generated) = case
    if config.compute_dtype == "bfloat16" and field == "loss":
        pytest.skip("XLA for CPU has no product of bfloat16 with a float32 result")
    got_trained, got_generated = results(
        config, dataclasses.replace(PLAIN, **{field: value}), field
    )
    close = 1e-4 if config.compute_dtype == "float32" else 3e-2
    if got_trained:
        (got_loss, got_gradient), (loss, gradient) = got_trained, trained
        np.testing.assert_allclose(got_loss, loss, rtol=close)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(got_gradient), jax.tree.leaves(gradient), strict=True
        ):
            scale = np.abs(np.asarray(y)).max() + 1e-6
            np.testing.assert_allclose(x, y, atol=3 * close * scale, rtol=0, err_msg=str(path))
    if got_generated:
        (got_tokens, got_logprobs), (tokens, logprobs) = got_generated, generated
        np.testing.assert_allclose(got_logprobs[:, 0], logprobs[:, 0], atol=30 * close)
        if config.compute_dtype == "float32":
            np.testing.assert_array_equal(got_tokens, tokens)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_is_resolved(platform):
    chosen = Formulations().resolved(platform)
    assert "auto" not in dataclasses.asdict(chosen).values()
    assert chosen.resolved("tpu") == chosen
    by_hand = Formulations(norm="plain", prefill_positions=3).resolved("tpu")
    assert (by_hand.norm, by_hand.prefill_positions, by_hand.loss) == ("plain", 3, "fused")


def test_building_does_not_change_the_config():
    config = MODELS["neox"]
    model = build(config)
    assert model.config == config
    assert model.config.platform == "auto"
    assert model.formulations == Formulations().resolved(jax.default_backend())
    other = build(dataclasses.replace(config, platform="tpu"))
    assert other.formulations.self_attention == "splash"


def attention_records(config, caplog):
    """Of building a model for a GPU twice."""
    caplog.clear()
    for _ in range(2):
        build(dataclasses.replace(config, platform="gpu"))
    return [record.getMessage() for record in caplog.records if record.name == "blocktx.model"]


def test_attention_without_cudnn_is_logged_once(caplog):
    _log_fallback.cache_clear()
    fits = dataclasses.replace(MODELS["neox"], compute_dtype="bfloat16")
    odd = StackConfig.llama(1, 96, 8)  # of 12 channels
    assert attention_records(fits, caplog) == []
    for config, problem in [
        (MODELS["neox"], "cuDNN takes bfloat16, and compute_dtype is float32"),
        (dataclasses.replace(fits, block_decoder=odd), "channels, and these have 12"),
        (
            dataclasses.replace(fits, embeddings_per_block=2),
            "causal, and embeddings_per_block is 2",
        ),
    ]:
        (message,) = attention_records(config, caplog)
        assert message.endswith(problem)
        assert message.startswith("attention over whole sequences stores all scores: ")
    assert attention_records(dataclasses.replace(fits, token_decoder=odd), caplog) == []


@pytest.mark.parametrize("leading", [0, 5])
def test_cudnn_attends_to_real_positions_alone(leading):
    """Its algebra, computed by XLA: lengths in place of masks, leading padding moved last."""
    config = dataclasses.replace(MODELS["vanilla"], scan_layers=False)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    mask = np.ones(tokens.shape, bool)
    mask[0, :leading] = mask[1, 33:] = False
    logits = []
    for attention in ("plain", "cudnn"):
        formulations = dataclasses.replace(PLAIN, self_attention=attention)
        model = build(dataclasses.replace(config, formulations=formulations))
        params = random_params(model, 0.1)
        forward = jax.jit(lambda params, model=model: model.apply({"params": params}, tokens, mask))
        logits.append(np.asarray(forward(params))[mask])
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05 * logits[0].std())
    assert logits[0].std() > 0.1
