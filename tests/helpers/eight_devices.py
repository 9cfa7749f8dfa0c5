"""Functions of tests on eight devices, in a process of their own: `run("losses", "block")`."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

from tests.helpers.fake_devices import fake_devices
from tests.helpers.processes import started

MESHES = {
    "data": dict(data=8, fsdp=1),
    "fsdp": dict(fsdp=8),
    "tensor": dict(data=2, fsdp=1, tensor=4),
    "mixed": dict(data=2, fsdp=2, tensor=2),
}


def run(*arguments: str):
    """Return what a function below returns on eight fake devices, in a process of its own."""
    command = [sys.executable, "-m", "tests.helpers.eight_devices", *arguments]
    options = dict(cwd=pathlib.Path(__file__).parents[2], env=os.environ | fake_devices(8))
    with started([command], **options, stdout=subprocess.PIPE, text=True) as (process,):
        out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def _model(kind: str):
    from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig

    stack = StackConfig(layers=2, width=32, heads=4)
    if kind == "llama":
        stack = StackConfig.llama(2, 32, 8, key_value_heads=4, mlp_width=64)
    if kind != "vanilla":
        decoders = dict(block_decoder=stack, token_decoder=stack, tied_classifier=kind == "llama")
        return BlockConfig(vocab_size=64, context_length=32, **decoders)
    return VanillaConfig(vocab_size=64, context_length=32, decoder=stack)


def losses(kind: str) -> dict[str, list[float]]:
    """Of 20 steps, on each mesh and on one device, with two microbatches; of "bag" 10 on bags."""
    import jax
    import numpy as np

    from blocktx.config.run import (
        LossConfig,
        MeshConfig,
        OptimizerConfig,
        RunConfig,
        TrainingConfig,
    )
    from blocktx.model.build import build
    from blocktx.parallel.sharding import batch_sharding, create_mesh
    from blocktx.train.step import abstract_state, create_state, train_step

    model = _model(kind)
    net = build(model)

    def follow(mesh_config: MeshConfig, devices: list[jax.Device]) -> list[float]:
        config = RunConfig(
            model=model,
            optimizer=OptimizerConfig(learning_rate=3e-3),
            loss=LossConfig(bag_steps=10 if kind == "bag" else 0),
            training=TrainingConfig(batch_size=16, steps=20, microbatches=2),
            mesh=mesh_config,
        )
        mesh = create_mesh(mesh_config, devices)
        wanted = abstract_state(config, mesh)

        def check_place(x, like):
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim), (x.sharding, like)

        rng, found = np.random.default_rng(0), []
        with jax.set_mesh(mesh):
            state = create_state(config, net)
            jax.tree.map(check_place, state, wanted)
            for step in range(20):
                tokens = rng.integers(0, 64, (16, model.blocks, model.block_length), np.int32)
                batch = {"tokens": tokens, "mask": np.ones_like(tokens, bool)}
                batch = jax.device_put(batch, batch_sharding(mesh))
                bag = step < config.loss.bag_steps
                state, metrics = train_step(state, batch, config, net, bag=bag)
                found.append(float(metrics["loss"]))
            jax.tree.map(check_place, state, wanted)
        return found

    found = {name: follow(MeshConfig(**sizes), jax.devices()) for name, sizes in MESHES.items()}
    return found | {"one device": follow(MeshConfig(), jax.devices()[:1])}


def kernels(family: str) -> dict[str, list]:
    """Loss and norms of gradients by the formulations for TPU, on meshes, and by the plain ones."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from blocktx.config.model import BlockConfig, StackConfig
    from blocktx.config.run import LossConfig, MeshConfig
    from blocktx.model.build import abstract_params, build, init_params
    from blocktx.parallel.sharding import batch_sharding, create_mesh
    from blocktx.train.loss import training_sums

    grouped = dict(key_value_heads=4, head_width=32) if family == "llama" else {}
    stack = getattr(StackConfig, family)(layers=2, width=256, heads=8, **grouped)
    config = BlockConfig(
        vocab_size=64,
        context_length=16,
        block_decoder=stack,
        token_decoder=stack,
        initializer_range=0.1,
    )
    params = jax.jit(init_params, static_argnums=0)(build(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 4, 4), np.int32)
    mask = rng.random(tokens.shape) > 0.2

    def run(platform: str, mesh) -> list:
        model = build(dataclasses.replace(config, platform=platform))

        @jax.jit
        def value_and_gradient(params, tokens, mask):
            def loss(params):
                return training_sums(model, params, tokens, mask, LossConfig())["loss"]

            value, grads = jax.value_and_grad(loss)(params)
            norms = [jnp.sqrt((x**2).sum()) for x in jax.tree.leaves(grads)]
            return jnp.stack([value, *norms])

        with jax.set_mesh(mesh):
            places = abstract_params(config, mesh)
            placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, places)
            batch = jax.device_put((tokens, mask), batch_sharding(mesh))
            return value_and_gradient(placed, *batch).tolist()

    one = create_mesh(MeshConfig(), jax.devices()[:1])
    found = {
        name: run("tpu", create_mesh(MeshConfig(**MESHES[name]))) for name in ("fsdp", "mixed")
    }
    return found | {"one device": run("tpu", one), "plain": run("cpu", one)}


def engine(workdir: str) -> dict[str, list[str] | int]:
    """Return what a run's engine writes on a mesh and on one device.

    Beside it, the largest number of pieces into which a parameter is sharded.
    """
    import jax

    import blocktx
    from blocktx.config.run import MeshConfig
    from blocktx.parallel.sharding import create_mesh

    found = {}
    for name, place in [("mesh", create_mesh(MeshConfig(**MESHES["mixed"]))), ("one device", None)]:
        loaded = blocktx.load(workdir, place)
        options = dict(max_new_tokens=12, temperature=0)
        found[name] = loaded.generate(["block token", "cache"], **options)
        found[f"pieces, {name}"] = max(
            x.size // math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(loaded.params)
        )
    return found


def decode(kind: str) -> dict[str, list]:
    """Greedy tokens on some meshes and on one device, of a ragged batch and of a row alone."""
    import dataclasses

    import jax
    import numpy as np

    from blocktx.config.run import MeshConfig
    from blocktx.decode.generate import generate
    from blocktx.model.build import abstract_params, build, init_params
    from blocktx.parallel.sharding import create_mesh

    config = dataclasses.replace(_model(kind), context_length=128, initializer_range=0.3)
    net = build(config)
    params = jax.jit(init_params, static_argnums=0)(net, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (6, 30))
    mask = np.arange(30)[::-1] < np.array([[30], [1], [17], [8], [29], [4]])

    def run(params) -> list:
        options = dict(max_new_tokens=20, temperature=0)
        return [
            generate(net, params, tokens[:rows], mask[:rows], **options).tolist() for rows in (1, 6)
        ]

    found = {"one device": run(params)}
    for name in ("data", "fsdp", "tensor"):
        places = abstract_params(config, create_mesh(MeshConfig(**MESHES[name])))
        found[name] = run(jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, places))
    return found


def continuous() -> dict[str, list]:
    """Tokens of requests decoded one by one on one device, and continuously on some meshes."""
    import dataclasses

    import jax
    import numpy as np

    from blocktx.config.run import MeshConfig
    from blocktx.decode.continuous import ContinuousDecoder
    from blocktx.decode.generate import generate
    from blocktx.decode.sampling import SamplingConfig, seed_words
    from blocktx.model.build import abstract_params, build, init_params
    from blocktx.parallel.sharding import create_mesh
    from tests.helpers.compile_events import compilations

    found = {}
    for kind in ("block", "vanilla"):
        config = dataclasses.replace(
            _model(kind), context_length=64, initializer_range=0.3, scan_layers=False
        )
        net = build(config)
        params = jax.jit(init_params, static_argnums=0)(net, jax.random.key(0))
        rng = np.random.default_rng(0)
        given = [
            dict(
                tokens=rng.integers(0, 64, rng.integers(1, 30)).tolist(),
                max_new_tokens=int(rng.integers(1, 24)),
                sampling=SamplingConfig([0, 1.0][number % 2]),
            )
            for number in range(20)
        ]
        alone = []
        for number, options in enumerate(given):
            options = dict(options)
            tokens = np.array([options.pop("tokens")])
            mask = np.ones_like(tokens)
            alone.append(generate(net, params, tokens, mask, seed=[number], **options)[0].tolist())
        for name in ("data", "tensor") if kind == "block" else ("mixed",):
            mesh = create_mesh(MeshConfig(**MESHES[name]))
            places = abstract_params(config, mesh)
            placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, places)
            decoder = ContinuousDecoder(net, placed, rows=3, blocks_per_call=2, mesh=mesh)
            decoder.compile()
            requests = {
                decoder.request(**options, seed_2=seed_words([number], 1)[0]): number
                for number, options in enumerate(given)
            }
            together = [[] for _ in given]
            with compilations() as compiled:
                for updates in decoder.run(requests):
                    for update in updates:
                        together[requests[update.request]] += update.tokens
            assert not compiled, name
            found[f"{kind}, {name}"] = (alone, together)
    return found


def train(workdir: str, *settings: str) -> None:
    """Trains the run that is described in `workdir`.json, up to each of some steps in turn.

    A setting is a step and a mesh, as `4:mixed`.
    """
    import dataclasses

    from blocktx.config.conversion import from_config_dict
    from blocktx.config.run import MeshConfig
    from blocktx.train.loop import train as run_training

    config = from_config_dict(json.loads(pathlib.Path(f"{workdir}.json").read_text()))
    for setting in settings:
        steps, mesh = setting.split(":")
        training = dataclasses.replace(config.training, steps=int(steps))
        now = dataclasses.replace(config, training=training, mesh=MeshConfig(**MESHES[mesh]))
        run_training(now, workdir, resume=True)


def distillation() -> dict[str, list[float]]:
    """Return losses of distillation steps in two stages, on meshes and on one device."""
    import jax
    import numpy as np

    from blocktx.config.distill import DistillConfig, StageConfig
    from blocktx.config.run import MeshConfig, OptimizerConfig, RunConfig, TrainingConfig
    from blocktx.model.build import abstract_params, build
    from blocktx.parallel.sharding import batch_sharding, create_mesh
    from blocktx.train import distill
    from blocktx.train.step import create_state, train_step
    from tests.helpers.random_weights import random_params

    distill._TOKENS = 32  # several slices
    model, source = build(_model("block")), build(_model("vanilla"))
    params = random_params(source, 0.1)
    frozen = StageConfig(steps=2, hidden_weight=1.0, multipliers=((".*/stack/layers/.*", 0.0),))

    def follow(mesh_config: MeshConfig, devices: list[jax.Device]) -> list[float]:
        config = RunConfig(
            model=_model("block"),
            optimizer=OptimizerConfig(learning_rate=3e-3),
            training=TrainingConfig(batch_size=16, steps=4, microbatches=2),
            mesh=mesh_config,
            distill=DistillConfig(teacher="teacher", stages=(frozen, StageConfig())),
        )
        mesh = create_mesh(mesh_config, devices)
        places = abstract_params(_model("vanilla"), mesh)
        placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, places)
        teacher = distill.Teacher(placed, source)
        rng, found = np.random.default_rng(0), []
        with jax.set_mesh(mesh):
            state = create_state(config, model)
            for step in range(4):
                shape = (16, model.config.blocks, model.config.block_length)
                tokens = rng.integers(0, 64, shape, np.int32)
                batch = {"tokens": tokens, "mask": rng.random(shape) > 0.2}
                batch = jax.device_put(batch, batch_sharding(mesh))
                stage = config.distill.stage_at(step)
                state, metrics = train_step(state, batch, config, model, teacher, stage)
                found += [float(x) for name, x in metrics.items() if name.endswith("loss")]
        return found

    found = {name: follow(MeshConfig(**MESHES[name]), jax.devices()) for name in ("fsdp", "mixed")}
    return found | {"one device": follow(MeshConfig(), jax.devices()[:1])}


def text_sums() -> list:
    """`text_sums` of the texts and the block model of `test_position_curve`."""
    import jax

    from blocktx.config.run import MeshConfig
    from blocktx.evaluate.heldout import text_sums
    from blocktx.parallel.sharding import create_mesh
    from tests.evaluate.test_position_curve import DOCUMENTS, MODELS, random_model

    mesh = create_mesh(MeshConfig())
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        options = dict(batch_size=3, stride=None)
        found = text_sums(*random_model(MODELS["block"]), DOCUMENTS, 1, mesh, **options)
    return found.tolist()


if __name__ == "__main__":
    begin = time.time()
    returned = globals()[sys.argv[1]](*sys.argv[2:])
    print(f"{time.time() - begin:.1f} s", file=sys.stderr)
    print(json.dumps(returned))
