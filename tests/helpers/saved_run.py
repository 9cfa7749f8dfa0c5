"""A run folder with checkpoints of a tiny model, made without training."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.checkpoint.manager import Checkpoints
from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import RunConfig, TrainingConfig
from blocktx.model.build import abstract_params
from blocktx.train.optimizer import optimizer

STACK = StackConfig(layers=1, width=32, heads=4)
MODEL = BlockConfig(vocab_size=64, context_length=16, block_decoder=STACK, token_decoder=STACK)
CONFIG = RunConfig(model=MODEL, training=TrainingConfig(steps=10, keep_checkpoints=2))
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
DATA = {"next_index": 7, "nested": {"names": ["a", "b"]}}


def new_params():
    """Made by NumPy: one compiled initialisation would cost more than all of a test."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_params(MODEL, SHARDING)
    )


def save(workdir, steps=(3,)):
    params = new_params()
    opt_state = optimizer(CONFIG).init(params)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for step in steps:
            checkpoints.save(step, params, opt_state, DATA)
    return params, opt_state


def restore(workdir, config=CONFIG, step=None):
    params = abstract_params(config.model, SHARDING)
    opt_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING),
        jax.eval_shape(optimizer(config).init, params),
    )
    with Checkpoints(workdir, config) as checkpoints:
        return checkpoints.restore(params, opt_state, step)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def edit_metadata(workdir, **changes):
    (file,) = (pathlib.Path(workdir) / "checkpoints" / "3" / "metadata").glob("metadata")
    metadata = json.loads(file.read_text())
    metadata.update(changes)
    file.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
