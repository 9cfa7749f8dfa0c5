"""The step against an undivided one, and what a run does and leaves."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blocktx.checkpoint.params import load_params
from blocktx.config.model import StackConfig, VanillaConfig
from blocktx.model.build import build
from blocktx.model.loss import loss_by_position
from blocktx.train.loop import train
from blocktx.train.metrics import read
from blocktx.train.optimizer import optimizer, schedule
from blocktx.train.step import TrainState, create_state, step_config, train_step
from tests.helpers.tiny_run import MODEL, STACK, run_config

MODULE = build(MODEL)


def batch(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    shape = (rows, MODEL.blocks, MODEL.block_length)
    mask = rng.random(shape) < 0.7
    mask[0, 1:] = False  # parts of very different numbers of scored tokens
    return {"tokens": rng.integers(0, MODEL.vocab_size, shape, dtype=np.int32), "mask": mask}


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Huge eps makes AdamW like SGD: updates compare as gradients do, not as their signs.
LIKE_SGD = dict(eps=1e3, learning_rate=1e3, clip_norm=0.0)


def assert_close(got, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, wanted)


def test_step_is_optax_on_the_gradient_of_the_mean(data):
    config = run_config(data, optimizer=LIKE_SGD)
    state = create_state(config, MODULE)
    tokens, mask = batch().values()

    @jax.jit
    def gradient_step(params):
        def loss(params):
            nats_K, count_K = loss_by_position(MODULE, params, tokens, mask)
            return nats_K.sum() / count_K.sum()

        value, grads = jax.value_and_grad(loss)(params)
        chain = optimizer(config)
        updates, _ = chain.update(grads, chain.init(params), params)
        return optax.apply_updates(params, updates), value, optax.tree.norm(grads)

    wanted, value, norm = gradient_step(state.params)
    after, got = train_step(state, batch(), config, MODULE)
    assert_close(after.params, wanted)
    assert_close([got["loss"], got["grad_norm"]], [value, norm])
    np.testing.assert_allclose(got["learning_rate"], schedule(config)(0), rtol=1e-6)
    assert got["tokens"] == mask.sum()
    assert after.step == 1


def test_microbatches_equal_the_undivided_batch(data):
    def after(microbatches):
        config = run_config(data, microbatches=microbatches, optimizer=LIKE_SGD)
        state, got = train_step(create_state(config, MODULE), batch(), config, MODULE)
        return state.params, got

    assert_close(after(4), after(1))


def test_step_takes_over_the_memory_of_its_state(finished):
    config, _, _ = finished
    state = create_state(config, MODULE)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    train_step(state, batch(), config, MODULE)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_step_compiles_once(finished):
    config, _, state = finished
    state, _ = train_step(jax.tree.map(jnp.copy, state), batch(), config, MODULE)
    before = train_step._cache_size()
    train_step(state, batch(1), dataclasses.replace(config), build(config.model))
    assert train_step._cache_size() == before


def test_runs_that_differ_in_seed_data_or_logging_share_their_program(finished):
    config, _, state = finished
    train_step(jax.tree.map(jnp.copy, state), batch(), step_config(config), MODULE)
    before = train_step._cache_size()
    other = dataclasses.replace(
        config,
        seed=5,
        data=dataclasses.replace(config.data, cache_dir="elsewhere"),
        training=dataclasses.replace(config.training, log_every=7, keep_checkpoints=9),
    )
    train_step(jax.tree.map(jnp.copy, state), batch(), step_config(other), MODULE)
    assert train_step._cache_size() == before
    rate = dataclasses.replace(config.optimizer, learning_rate=0.5)
    changed = dataclasses.replace(config, optimizer=rate)
    assert step_config(changed) != step_config(config)


def test_batch_without_scored_tokens(finished):
    config, _, _ = finished
    nothing = {**batch(), "mask": np.zeros_like(batch()["mask"])}
    state, got = train_step(create_state(config, MODULE), nothing, config, MODULE)
    assert got["loss"] == got["grad_norm"] == got["tokens"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_run_leaves_all_that_a_run_is(finished, data):
    config, workdir, state = finished
    assert isinstance(state, TrainState)
    assert set(os.listdir(workdir)) == {
        *("checkpoints", "config.json", "loss.png", "metrics.jsonl"),
        *("tensorboard", "tokenizer.json"),
    }
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]
    assert json.loads((workdir / "config.json").read_text())["data"]["source"] == data.source
    checkpoint = load_params(workdir)
    assert (checkpoint.step, checkpoint.config) == (4, config)
    assert_same(checkpoint.params, state.params)
    lines = read(workdir)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "heldout/loss" in line] == [4]


def test_loss_falls_and_is_evaluated(data, tmp_path, capsys):
    settings = dict(steps=30, log_every=29, evaluate_every=20)
    train(run_config(data, optimizer=dict(learning_rate=1e-2), **settings), tmp_path / "run")
    first, *_, last = [r["train/loss"] for r in read(tmp_path / "run") if "train/loss" in r]
    assert first > 5.5  # ln 300 is 5.7
    assert last < first - 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out")]
    assert [line.split()[1] for line in lines] == ["step=20", "step=30"]
    assert all("perplexity=" in line and "bits/byte=" in line for line in lines)
    assert len(lines[-1].split("by position ")[1].split()) == MODEL.block_length


def test_vanilla_model_trains(data, tmp_path, capsys):
    model = VanillaConfig(vocab_size=300, context_length=32, decoder=STACK)
    config = dataclasses.replace(run_config(data, steps=2), model=model)
    assert train(config, tmp_path / "run").step == 2
    assert "held-out step=2 loss=" in capsys.readouterr().out


def test_longer_run_after_a_finished_one_is_exact(data, tmp_path, capsys):
    """Of Llama type, and with nothing held out, about which there is one warning."""
    stack = StackConfig.llama(1, 32, 4, key_value_heads=2)
    model = dataclasses.replace(
        MODEL, tied_classifier=True, block_decoder=stack, token_decoder=stack
    )

    def run(workdir, steps, **resume):
        nothing = dataclasses.replace(data, holdout_every=0)
        constant = dict(schedule="constant")
        config = run_config(nothing, steps=steps, evaluate_every=1, optimizer=constant)
        config = dataclasses.replace(config, model=model)
        return train(config, tmp_path / workdir, **resume)

    whole = run("whole", 6)
    out = capsys.readouterr().out
    assert out.count("warning: no held-out text to evaluate on") == 1
    assert "held-out step" not in out
    run("parts", 3)
    parts = run("parts", 6, resume=True)
    assert "resumed  after step 3 of 6" in capsys.readouterr().out
    assert_same((parts.params, parts.opt_state), (whole.params, whole.opt_state))
    assert parts.step == whole.step == 6

    def losses(name):
        return [(line["step"], line["train/loss"]) for line in read(tmp_path / name)]

    assert losses("parts") == losses("whole")
