"""The losses against NumPy, block by block, from the model's own embeddings and contexts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blocktx.config.errors import UserError
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import LossConfig, OptimizerConfig, RunConfig, TrainingConfig
from blocktx.evaluate.heldout import evaluate
from blocktx.model.build import build
from blocktx.train.loss import training_counts, training_sums
from blocktx.train.optimizer import optimizer
from blocktx.train.step import TrainState, train_step
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=16, heads=2)
MODEL = BlockConfig(
    vocab_size=29,
    context_length=20,
    embeddings_per_block=2,
    block_decoder=STACK,
    token_decoder=dataclasses.replace(STACK, width=32),
    scan_layers=False,
)
NET = build(MODEL)
PARAMS = random_params(NET)
TOKENS = np.random.default_rng(0).integers(0, 29, (3, 5, 4)).astype(np.int32)
MASK = np.ones(TOKENS.shape, bool)
MASK[0, 0, :2] = MASK[0, 3:] = False  # padding in front, and blocks of it at the end
MASK[1, :2] = MASK[1, 4, 1:] = False  # blocks of it in front: block 2 is the first, not predicted
BLOCKS = [(0, 1), (0, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4)]  # that are predicted


def losses(block_decoding="none", auto_encoding=False, **weights):
    return LossConfig(block_decoding=block_decoding, auto_encoding=auto_encoding, **weights)


@functools.cache
def forward():
    """The model's embeddings `[B, N, n, D]`, contexts `[B, N, nD]`, and logits from both."""

    @jax.jit
    def run(params):
        def apply(method, *args):
            return NET.apply({"params": params}, *args, method=method)

        embeddings = apply("embed_blocks", TOKENS, MASK)
        contexts = apply("contexts", TOKENS, MASK)
        encoded = embeddings[:, 1:].reshape(contexts[:, 1:].shape)
        decoded = [
            apply("decode_blocks", x, TOKENS[:, 1:], MASK[:, 1:])
            for x in (contexts[:, :-1], encoded)
        ]
        return embeddings, contexts, *map(jax.nn.log_softmax, decoded)

    return [np.asarray(x, np.float64) for x in run(PARAMS)]


@jax.jit
def sums_and_gradients(tokens, mask):
    """Sums by name, and for each the gradient with respect to the parameters."""

    def sums(params):
        mse, contrastive = (
            training_sums(NET, params, tokens, mask, config)
            for config in (losses("mse", True), losses("contrastive"))
        )
        out = mse | {"contrastive": contrastive["block_decoding_loss"]}
        return out, out

    return jax.jacrev(sums, has_aux=True)(PARAMS)[::-1]


@functools.cache
def ours():
    return sums_and_gradients(TOKENS, MASK)


def cross_entropy(log_probabilities):
    return -sum(
        log_probabilities[b, i - 1, k, TOKENS[b, i, k]]
        for b, i in BLOCKS
        for k in range(4)
        if MASK[b, i, k]
    )


def mean_square():
    embeddings, contexts, *_ = forward()
    return sum(np.mean((contexts[b, i - 1] - embeddings[b, i].ravel()) ** 2) for b, i in BLOCKS)


def contrast():
    embeddings, contexts, *_ = forward()
    wanted = [embeddings[b, i, j] for b, i in BLOCKS for j in range(2)]
    got = [contexts[b, i - 1].reshape(2, -1)[j] for b, i in BLOCKS for j in range(2)]
    nats = 0
    for t, x in enumerate(got):
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in wanted]
        logits = np.array(cosines) / 0.07
        nats += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[t]
    return nats / 2  # the mean over the embeddings of a block


def test_sums_are_those_of_numpy():
    sums, _ = ours()
    _, _, predicted, encoded = forward()
    wanted = {
        "loss": cross_entropy(predicted),
        "block_decoding_loss": mean_square(),
        "contrastive": contrast(),
        "auto_encoding_loss": cross_entropy(encoded),
    }
    assert sums.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert abs(wanted["auto_encoding_loss"] - wanted["loss"]) > 1


def test_counts_are_of_tokens_and_blocks():
    counts = training_counts(MASK, losses("mse", True))
    tokens = sum(MASK[b, i].sum() for b, i in BLOCKS)
    wanted = dict(loss=tokens, block_decoding_loss=len(BLOCKS), auto_encoding_loss=tokens)
    assert {name: int(count) for name, count in counts.items()} == wanted
    assert training_counts(np.zeros_like(MASK), losses("mse")) == dict.fromkeys(
        ("loss", "block_decoding_loss"), 1
    )


def test_gradients_reach_what_each_loss_is_about():
    _, gradients = ours()
    reached = {
        name: {part for part, tree in of_loss.items() if optax.tree.norm(tree) > 1e-3}
        for name, of_loss in gradients.items()
    }
    assert reached == {
        "loss": {"embedder", "block_decoder", "token_decoder"},
        "block_decoding_loss": {"embedder", "block_decoder"},
        "contrastive": {"embedder", "block_decoder"},
        "auto_encoding_loss": {"embedder", "token_decoder"},
    }
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_wanted_embedding_has_no_gradient():
    """The last block's embedding is wanted, and goes into no context that a loss is over."""
    tokens = np.zeros_like(TOKENS)
    tokens[:, :2] = np.arange(24).reshape(3, 2, 4)  # no token in two blocks
    mask = np.zeros_like(MASK)
    mask[:, :2] = True
    _, gradients = sums_and_gradients(tokens, mask)
    for name in ("block_decoding_loss", "contrastive"):
        rows = np.abs(gradients[name]["embedder"]["tokens"]["embedding"]).sum(-1)
        assert (rows[tokens[:, 0]] > 0).all()
        assert (rows[tokens[:, 1]] == 0).all()


def test_batch_without_a_scored_token_has_no_loss_and_no_gradient():
    sums, gradients = sums_and_gradients(TOKENS, np.zeros_like(MASK))
    assert all((x == 0).all() for x in jax.tree.leaves((sums, gradients)))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def run(config, microbatches=1):
    return RunConfig(
        model=MODEL,
        # Huge eps makes AdamW like SGD: updates compare as gradients do, not as their signs.
        optimizer=OptimizerConfig(eps=1e3, learning_rate=1e3, clip_norm=0.0, weight_decay=0.0),
        loss=config,
        training=TrainingConfig(batch_size=3, microbatches=microbatches),
    )


def arguments(config):
    params = jax.tree.map(jnp.copy, PARAMS)  # the step takes over the memory
    state = TrainState(jnp.int32(0), params, optimizer(config).init(params))
    return state, {"tokens": TOKENS, "mask": MASK}, config, NET


def test_step_adds_weighted_means_and_reports_them_plain():
    config = losses("mse", True, block_decoding_weight=0.5, auto_encoding_weight=2.0)
    after, metrics = train_step(*arguments(run(config, microbatches=3)))
    counts = training_counts(MASK, config)
    sums, gradients = ours()
    gradient = 0
    for name, weight in [("loss", 1), ("block_decoding_loss", 0.5), ("auto_encoding_loss", 2)]:
        np.testing.assert_allclose(metrics[name], sums[name] / counts[name], rtol=1e-5)
        gradient += weight / counts[name] * flat(gradients[name])
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-4)
    np.testing.assert_allclose(flat(PARAMS) - flat(after.params), gradient, rtol=2e-3, atol=1e-4)


def test_step_with_losses_of_weight_0_is_the_plain_program():
    off = losses("contrastive", True, block_decoding_weight=0.0, auto_encoding_weight=0.0)
    plain, other = (train_step.lower(*arguments(run(config))) for config in (losses(), off))
    assert plain.as_text() == other.as_text()
    assert plain.out_info[1].keys() == {"loss", "grad_norm", "learning_rate", "tokens"}


def test_evaluation_is_of_the_tokens_alone():
    got = evaluate(NET, PARAMS, [{"tokens": TOKENS, "mask": MASK}], bytes_per_token=1.0)
    np.testing.assert_allclose(got.loss * got.tokens, ours()[0]["loss"], rtol=1e-6)


def test_a_vanilla_model_has_no_auxiliary_losses():
    stack = StackConfig(layers=1, width=16, heads=2)
    model = build(VanillaConfig(vocab_size=50, context_length=16, decoder=stack))
    tokens = np.zeros((1, 16, 1), np.int32)
    with pytest.raises(UserError, match="auto_encoding_loss is for block models only"):
        training_sums(model, {}, tokens, tokens == 0, LossConfig(auto_encoding=True))
