"""Programs for a GPU that is not there: attention by cuDNN, and no array of scores."""

import importlib.util

import jax
import pytest

from blocktx.compile.aot import _OPTIONS
from blocktx.compile.topology import find_topology
from blocktx.config.model import VanillaConfig
from blocktx.config.run import RunConfig, TrainingConfig
from blocktx.config.stack import StackConfig
from blocktx.model.build import build
from blocktx.parallel.sharding import create_mesh
from blocktx.train.step import abstract_batch, abstract_state, train_step


@pytest.mark.slow
@pytest.mark.parametrize(
    "stack", [StackConfig(1, 128, 2), StackConfig.llama(1, 128, 4, key_value_heads=2)]
)
def test_training_step_on_h100_attends_by_cudnn(stack):
    if importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("the compiler for GPUs comes with JAX's CUDA plugin")
    topology, length = find_topology("h100:1"), 500
    model = VanillaConfig(
        vocab_size=64,
        context_length=length,
        decoder=stack,
        compute_dtype="bfloat16",
        platform="gpu",
    )
    config = RunConfig(model=model, training=TrainingConfig(batch_size=2))
    mesh = create_mesh(config.mesh, topology.devices)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        lowered = train_step.lower(state, batch, config, build(model))
    text = lowered.compile(compiler_options=_OPTIONS["gpu"]).as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
    assert f"{length},{length}]" not in text
