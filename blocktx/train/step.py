"""Train state and the compiled training step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from blocktx.config import DataConfig, MeshConfig, RunConfig, TrainingConfig, UserError
from blocktx.model import Model, abstract_params, init_params
from blocktx.parallel import batch_parts, batch_sharding, check_model_fits, replicated
from blocktx.train.distill import (
    Teacher,
    distillation_counts,
    distillation_sums,
    distillation_weights,
)
from blocktx.train.loss import bag_sums, training_counts, training_sums
from blocktx.train.optimizer import multipliers, optimizer, schedule
from blocktx.train.teacher import check_distillation


@flax.struct.dataclass
class TrainState:
    """Parameters, optimizer state and the number of steps taken."""

    step: jax.Array  # int32, the number of steps taken
    params: dict[str, Any]
    opt_state: optax.OptState


def abstract_state(config: RunConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings.

    Optimizer arrays shaped like a parameter take its sharding; the rest are replicated.
    """
    params = abstract_params(config.model, mesh)
    by_path = dict(jax.tree.leaves_with_path(params))

    def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        for start in range(len(path)):
            param = by_path.get(path[start:])
            if param is not None and param.shape == x.shape:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    opt_state = jax.eval_shape(optimizer(config).init, params)
    opt_state = jax.tree.map_with_path(place, opt_state)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step, params, opt_state)


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the batch of a step as ShapeDtypeStructs."""
    model = config.model
    shape = (config.training.batch_size, model.blocks, model.block_length)
    struct = functools.partial(jax.ShapeDtypeStruct, shape, sharding=batch_sharding(mesh))
    return {"tokens": struct(jnp.int32), "mask": struct(jnp.bool)}


def step_config(config: RunConfig) -> RunConfig:
    """Return `config` with all fields at their defaults that no compiled program depends on.

    It is the static argument of the compiled functions: runs that differ in seed, data or logging
    share their programs.
    """
    training = config.training
    return dataclasses.replace(
        config,
        data=DataConfig(),
        mesh=MeshConfig(),
        seed=0,
        training=TrainingConfig(
            steps=training.steps,
            batch_size=training.batch_size,
            microbatches=training.microbatches,
        ),
    )


def _constrain_state(state: TrainState, config: RunConfig) -> TrainState:
    """Shard `state` over the current mesh, so that no array is gathered on one device."""
    return _constrain_like(state, lambda mesh: abstract_state(config, mesh))


def _constrain_like(tree: Any, like: Callable[[AbstractMesh], Any]) -> Any:
    """Shard `tree` as `like(mesh)` on the current mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(
        lambda x, like: jax.lax.with_sharding_constraint(x, like.sharding.spec), tree, like(mesh)
    )


def create_state(config: RunConfig, model: Model) -> TrainState:
    """Return the initial state, with new parameters from `config.seed`."""
    return _create_state(_key(config.seed), step_config(config), model)


def _key(seed: int) -> jax.Array:
    """Return a key that depends on all bits of the seed: `jax.random.key` takes 32 of them."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


@functools.partial(jax.jit, static_argnames=("config", "model"))
def _create_state(key: jax.Array, config: RunConfig, model: Model) -> TrainState:
    return _constrain_state(_with_params(init_params(model, key), config), config)


def state_of(params: dict[str, Any], config: RunConfig) -> TrainState:
    """Return the initial state with the given parameters, which are donated."""
    return _state_of(params, step_config(config))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="params")
def _state_of(params: dict[str, Any], config: RunConfig) -> TrainState:
    return _constrain_state(_with_params(params, config), config)


def _with_params(params: dict[str, Any], config: RunConfig) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer(config).init(params))


@functools.partial(
    jax.jit, static_argnames=("config", "model", "stage", "bag"), donate_argnames="state"
)
def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    config: RunConfig,
    model: Model,
    teacher: Teacher | None = None,
    stage: int = 0,
    bag: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step on one batch. `state` is donated.

    The gradient is accumulated over `config.training.microbatches` parts of the batch. Every loss
    is normalised by the counts of the whole batch, so the number of parts does not change it
    (except for the contrastive loss of `config.loss`, whose negatives are those of a part).

    Args:
      state: the state before the step.
      batch: `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`, and with several processes
        `"stop": bool [B]`, True in the rows of a process that was asked to stop. Token ids are not
        checked here; one of `vocab_size` or more makes the loss NaN.
      config: of the run; static. Pass `step_config(config)` to share programs between runs.
      model: the module of `config.model`; static.
      teacher: of distillation, unless the batch holds its cached probabilities.
      stage: the index of the stage of distillation, which chooses losses and frozen parameters;
        static.
      bag: whether the step is one of `config.loss.bag_steps`; static.

    Returns:
      The state after the step, and scalars: `loss` (nats per token, before the update; with `bag`
      the bag-of-next-block loss), the
      auxiliary losses of `config.loss` (unweighted), `grad_norm` (before clipping),
      `learning_rate`, `tokens` (not padding) and, if it was given, whether any `stop` is True.
    """
    if config.distill.teacher:
        weights = distillation_weights(config.distill, stage)
        counts = distillation_counts(batch["mask"], weights)
    else:
        weights = {"loss": 1.0} if bag else {"loss": 1.0, **config.loss.weights}
        counts = training_counts(batch["mask"], config.loss)
        counts = {name: counts[name] for name in weights}
    factors = multipliers(state.params, config, stage)

    def objective(params: dict[str, Any], part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        # No gradient is computed for frozen parameters, nor does it count in the gradient's norm.
        params = jax.tree.map(lambda x, by: x if by else jax.lax.stop_gradient(x), params, factors)
        if config.distill.teacher:
            sums = distillation_sums(model, params, teacher, part, config.distill, stage)
        elif bag:
            sums = bag_sums(model, params, part["tokens"], part["mask"])
        else:
            sums = training_sums(model, params, part["tokens"], part["mask"], config.loss)
        return sum(weights[name] * sums[name] / counts[name] for name in weights), sums

    def gradient(part: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(state.params, part)
        # Reduce-scatter, not all-reduce.
        return sums, _constrain_like(grads, lambda mesh: abstract_params(config.model, mesh))

    def accumulate(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    def split(x: jax.Array) -> jax.Array:
        # Each part takes every M-th row, so that it is sharded like the batch.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    parts = config.training.microbatches
    rows = {name: x for name, x in batch.items() if name != "stop"}
    if parts == 1:
        sums, grads = gradient(rows)
    else:
        zeros = jax.tree.map(jnp.zeros_like, (counts, state.params))
        (sums, grads), _ = jax.lax.scan(accumulate, zeros, jax.tree.map(split, rows))

    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    updates = jax.tree.map(_scaled, updates, factors)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        **{name: sums[name] / counts[name] for name in sums},
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(schedule(config)(state.step), jnp.float32),
        "tokens": batch["mask"].sum(dtype=jnp.int32),
    }
    if "stop" in batch:
        metrics["stop"] = batch["stop"].any()
    return _constrain_state(TrainState(state.step + 1, params, opt_state), config), metrics


def _scaled(update: jax.Array, by: float) -> jax.Array:
    if by == 1:
        return update
    return update * by if by else jnp.zeros_like(update)


def check_run(config: RunConfig, mesh: Mesh) -> None:
    """Raise a UserError if this run cannot be trained on the devices of `mesh`."""
    if config.model.param_dtype != "float32":
        raise UserError(
            "config.model.param_dtype: bfloat16 weights are for decoding; training keeps float32 "
            "weights; use config.model.compute_dtype=bfloat16"
        )
    platform = mesh.devices.flat[0].platform
    if config.model.remat == "offload" and platform == "cpu":
        raise UserError("config.model.remat: offload needs a GPU or TPU; use full or dots")
    check_model_fits(config.model, mesh)
    size, parts, micro = config.training.batch_size, batch_parts(mesh), config.training.microbatches
    if size % (parts * micro):
        raise UserError(
            f"config.training.batch_size: {size} rows do not divide into {parts} parts (mesh data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}) of {micro} microbatches; use a "
            f"multiple of {parts * micro}, such as {-(-size // (parts * micro)) * parts * micro}"
        )
    check_distillation(config, mesh)
