"""The bag-of-next-block loss against NumPy, and runs that begin with it."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest

from blocktx.config.errors import UserError
from blocktx.config.formulations import Formulations
from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import LossConfig
from blocktx.model.build import build
from blocktx.model.params import classifier_kernel
from blocktx.train.loop import train
from blocktx.train.loss import bag_sums
from blocktx.train.metrics import read
from blocktx.train.step import create_state, train_step
from tests.helpers.random_weights import random_params
from tests.helpers.tiny_run import MODEL, run_config

TOKENS = np.random.default_rng(0).integers(0, 29, (2, 5, 4)).astype(np.int32)
MASK = np.ones(TOKENS.shape, bool)
MASK[0, :1] = MASK[0, 1, :2] = False  # block 1 is the first with a real token
MASK[1, 3, 1:] = MASK[1, 4:] = False


def net(loss="logits", **fields):
    stack = StackConfig(layers=1, width=16, heads=2)
    formulations = dataclasses.replace(Formulations.plain(), loss=loss, loss_tokens=8)
    config = BlockConfig(
        vocab_size=29,
        context_length=20,
        block_decoder=stack,
        token_decoder=dataclasses.replace(stack, width=32),
        formulations=formulations,
        **fields,
    )
    return build(config)


@pytest.mark.parametrize(
    "fields",
    [{}, {"conditioning": "summation", "embeddings_per_block": 2}, {"tied_classifier": False}],
    ids=["prefix", "summation", "untied"],
)
def test_sum_is_that_of_numpy(fields):
    model = net(**fields)
    params = random_params(model)
    contexts = np.asarray(model.apply({"params": params}, TOKENS, MASK, method="contexts"))
    expansion = params["token_decoder"]["expansion"]
    kernel = np.asarray(expansion["kernel"], np.float64)
    bias = np.asarray(expansion["bias"], np.float64) if "bias" in expansion else 0
    classifier = np.asarray(classifier_kernel(model.config, params), np.float64)
    wanted = 0
    for b, i in [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3)]:
        vectors = np.tensordot(contexts[b, i - 1], kernel, 1) + bias
        logits = vectors.mean(0) @ classifier
        nats = np.log(np.exp(logits).sum()) - logits
        wanted += nats[TOKENS[b, i][MASK[b, i]]].sum()
    got = bag_sums(model, params, TOKENS, MASK)
    assert got.keys() == {"loss"}
    np.testing.assert_allclose(got["loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize("loss", ["fused", "scattered"])
def test_formulations_of_the_loss_are_equal(loss):
    params = random_params(net())

    def value_and_gradient(loss):
        return jax.value_and_grad(lambda p: bag_sums(net(loss), p, TOKENS, MASK)["loss"])(params)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        value_and_gradient(loss),
        value_and_gradient("logits"),
    )


def test_gradient_reaches_all_but_the_layers_of_the_token_decoder():
    model = net()
    params = random_params(model)
    gradient = jax.grad(lambda p: bag_sums(model, p, TOKENS, MASK)["loss"])(params)
    token_decoder = gradient["token_decoder"]
    assert optax.tree.norm(token_decoder.pop("stack")) == 0
    parts = ["expansion", "classifier"]
    reached = [gradient["embedder"], gradient["block_decoder"], *map(token_decoder.get, parts)]
    assert all(optax.tree.norm(x) > 1e-3 for x in reached)


def with_bag(data, **training):
    loss = LossConfig(bag_steps=2, auto_encoding=True)
    return dataclasses.replace(run_config(data, **training), loss=loss)


def test_first_steps_train_on_the_bag_loss_alone(data, tmp_path):
    """Also with microbatches and an auxiliary loss, and resumed at the end of the phase."""
    config = with_bag(data, microbatches=2, checkpoint_every=2)
    state = train(config, tmp_path / "run")
    lines = [line for line in read(tmp_path / "run") if "train/loss" in line]
    assert ["train/auto_encoding_loss" in line for line in lines] == [False, False, True, True]

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped, ignore=shutil.ignore_patterns("4"))
    resumed = train(config, stopped, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)


def test_step_reports_the_mean_of_the_bag_loss(data):
    config = with_bag(data)
    model = build(MODEL)
    state = create_state(config, model)
    rng = np.random.default_rng(0)
    shape = (4, MODEL.blocks, MODEL.block_length)
    tokens, mask = rng.integers(0, MODEL.vocab_size, shape, np.int32), rng.random(shape) < 0.7
    wanted = bag_sums(model, state.params, tokens, mask)["loss"] / mask[:, 1:].sum()
    _, got = train_step(state, {"tokens": tokens, "mask": mask}, config, model, bag=True)
    np.testing.assert_allclose(got["loss"], wanted, rtol=1e-5)


def test_phase_must_end_before_the_run(data):
    with pytest.raises(UserError, match=r"loss.bag_steps: got 4, must be below training.steps 4"):
        dataclasses.replace(run_config(data), loss=LossConfig(bag_steps=4))
    with pytest.raises(UserError, match=r"bag_steps: got -1, must be 0 or greater"):
        LossConfig(bag_steps=-1)
